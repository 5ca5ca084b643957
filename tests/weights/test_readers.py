"""Safetensors and indexes: what the reference library writes is read; damage is named."""

import json
import struct

import numpy as np
import pytest
import safetensors.torch
import torch

from medalign_jax.weights.lazy import WeightError
from medalign_jax.weights.readers import open_file, open_index


def write(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(**changes):
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


def test_what_the_reference_library_writes(tmp_path):
    tensors = {
        "f32": torch.randn(3, 4),
        "bf16": torch.randn(5, 2).bfloat16(),
        "f16": torch.randn(7).half(),
        "f8": torch.randn(4).to(torch.float8_e5m2),
        "i64": torch.arange(5),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(2.0),
        "empty": torch.zeros(0, 3),
    }
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    read = open_file(path)
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].shape == tuple(tensor.shape)
        expected = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""
        assert read[name].read().tobytes() == bytes(expected), name
    part = read["f32"].read((slice(1, 3), slice(0, 2)))
    np.testing.assert_array_equal(part, tensors["f32"][1:3, :2].numpy())
    assert part.flags.owndata and part.flags.writeable


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"w": entry()}, bytes(4), "cut short"),
        ({"w": entry()}, bytes(12), "bytes of no tensor"),
        ({"w": entry(data_offsets=[4, 12])}, bytes(12), "begins at"),
        ({"w": entry(), "v": entry()}, bytes(8), "begins at"),
        ({"w": entry(shape=[3])}, bytes(8), "8 bytes for shape"),
        ({"w": entry(shape=[-2])}, bytes(8), "damaged header entry"),
        ({"w": entry(shape=[2.0])}, bytes(8), "damaged header entry"),
        ({"w": entry(data_offsets=[0])}, bytes(8), "damaged header entry"),
        ({"w": entry(dtype="Q4")}, bytes(8), "'Q4' is not supported"),
        ({"w": entry(dtype=[])}, bytes(8), "is not supported"),
        ({"w": 3}, bytes(8), "damaged header entry"),
        (b'{"w": {"dtype"', b"", "damaged safetensors header"),
        (b'{"w": 1, "w": 2}', b"", "stands twice"),
        (b"[1]", b"", "not an object"),
        (b"\xff\xfe{}", b"", "damaged safetensors header"),
    ],
)
def test_damaged_safetensors(tmp_path, header, data, words):
    path = write(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(WeightError, match=words) as caught:
        open_file(path)
    assert str(path) in str(caught.value)


def test_every_prefix_of_a_file_gives_a_named_error(tmp_path):
    safetensors.torch.save_file({"w": torch.ones(6)}, tmp_path / "good.safetensors")
    content = (tmp_path / "good.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(WeightError, match=r"cut\.safetensors"):
            open_file(path)


def test_a_file_cut_after_opening_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"w": torch.ones(5000)}, path)
    tensor = open_file(path)["w"]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(WeightError, match="cannot be read any more"):
        tensor.read()


@pytest.mark.parametrize("length", [0x04034B50, 0x46554747, 0x80])
def test_a_header_length_that_looks_like_another_format(tmp_path, length):
    if length > 1000:
        # Too long to write here; that these are taken for safetensors shows in the words.
        path = tmp_path / "x.safetensors"
        path.write_bytes(struct.pack("<Q", length) + b"{}")
        with pytest.raises(WeightError, match="not a safetensors file, or cut short"):
            open_file(path)
    else:
        text = json.dumps({"w": entry()}).encode()
        path = write(tmp_path / "x.safetensors", text + b" " * (length - len(text)), bytes(8))
        assert open_file(path)["w"].shape == (2,)


def test_other_files_are_refused_in_words(tmp_path):
    for name, content, words in [
        ("empty.safetensors", b"", "is empty"),
        ("x.gguf", b"GGUF\x03\x00\x00\x00" + bytes(32), "GGUF"),
        ("text.bin", b"this is text and no weight file", "not a safetensors file"),
        ("lfs.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "not a safetensors"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightError, match=words):
            open_file(tmp_path / name)
    with pytest.raises(WeightError, match="No such file"):
        open_file(tmp_path / "nothing.safetensors")


@pytest.fixture
def shards(tmp_path):
    safetensors.torch.save_file({"a": torch.ones(2), "b": torch.zeros(3)}, tmp_path / "1.st")
    safetensors.torch.save_file({"c": torch.full((4,), 2.0)}, tmp_path / "2.st")

    def index(weight_map):
        path = tmp_path / "model.safetensors.index.json"
        path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return path

    return index


def test_index(shards):
    read = open_index(shards({"a": "1.st", "b": "1.st", "c": "2.st"}))
    np.testing.assert_array_equal(read["c"].read(), np.full(4, 2.0, np.float32))
    assert set(read) == {"a", "b", "c"} and read["c"].origin.endswith("2.st")


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": "1.st", "b": "1.st", "c": "3.st"}, r"shards missing from .*: 3\.st"),
        ({"a": "1.st", "b": "1.st", "d": "2.st"}, r"'d' is not in 2\.st; 'c' of 2\.st is not in"),
        ({"a": "1.st", "b": "2.st", "c": "2.st"}, r"'b' is not in 2\.st"),
        ({"a": "1.st", "c": "2.st"}, r"'b' of 1\.st is not in the index"),
        ({"a": "../1.st"}, "name of a file beside the index"),
        ({"a": 3}, "name of a file beside the index"),
        ({}, "no 'weight_map'"),
        ([], "no 'weight_map'"),
    ],
)
def test_wrong_index(shards, weight_map, words):
    with pytest.raises(WeightError, match=words):
        open_index(shards(weight_map))


def test_damaged_index(shards):
    path = shards({})
    path.write_text('{"weight_map": {"a": ')
    with pytest.raises(WeightError, match="damaged index"):
        open_index(path)
