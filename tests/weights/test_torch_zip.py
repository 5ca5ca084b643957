"""PyTorch files: bit for bit what torch reads, nothing executed, damage named."""

import argparse
import collections
import io
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch

from medalign_jax.weights import torch_pickle
from medalign_jax.weights.lazy import WeightError
from medalign_jax.weights.readers import open_file

INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def torch_bytes(tensor):
    """A tensor's numbers in row-major order, as bytes, whatever its dtype."""
    tensor = tensor.detach().contiguous()
    return tensor.reshape(-1).view(INTEGER_OF_SIZE[tensor.element_size()]).numpy().tobytes()


def write_zip(path, pickled, storages=(), byteorder=b"little"):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", byteorder)
        for key, content in storages:
            archive.writestr(f"archive/data/{key}", content)
    return path


def pickled_tensor(storage_key="0", offset=0, shape=(2, 3), strides=(3, 1), wrap=lambda x: x):
    """What torch.save writes for {"w": float32 tensor}, with any claims about the storage."""

    class Storage:
        pass

    class Tensor:
        def __reduce__(self):
            arguments = (Storage(), offset, shape, strides, False, collections.OrderedDict())
            return torch._utils._rebuild_tensor_v2, arguments

    class Pickler(pickle.Pickler):
        def persistent_id(self, item):
            if isinstance(item, Storage):
                return ("storage", torch.FloatStorage, storage_key, "cpu", 6)
            return None

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(wrap({"w": Tensor()}))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.int64,
        torch.int32,
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.uint16,
        torch.float8_e4m3fn,
    ],
)
def test_dtypes_bit_for_bit(tmp_path, dtype):
    torch.manual_seed(0)
    tensor = (torch.randn(5, 7) * 50).abs().to(torch.float32).to(dtype)
    torch.save({"w": tensor}, tmp_path / "x.pt")
    read = open_file(tmp_path / "x.pt")["w"]
    assert read.shape == (5, 7)
    assert read.dtype.name == str(dtype).removeprefix("torch.")
    assert read.read().tobytes() == torch_bytes(tensor)


def test_views_strides_and_shared_storages(tmp_path):
    base = torch.randn(6, 8)
    state = {
        "base": base,
        "transposed": base.t(),
        "steps": base[1::2, 2:7:3],
        "row": base[3],
        "expanded": base[:, :1].expand(6, 4),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(base[2:4]),
    }
    torch.save(state, tmp_path / "x.pt")
    read = open_file(tmp_path / "x.pt")
    assert set(read) == set(state)
    for name, tensor in state.items():
        assert read[name].shape == tuple(tensor.shape)
        assert read[name].read().tobytes() == torch_bytes(tensor), name
    part = read["transposed"].read((slice(2, 5), slice(1, 6)))
    np.testing.assert_array_equal(part, base.t()[2:5, 1:6].numpy())
    assert part.flags.owndata and part.flags.c_contiguous


def test_module_state_dict_with_buffers(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4)).bfloat16()
    torch.save(model.state_dict(), tmp_path / "x.bin")
    read = open_file(tmp_path / "x.bin")
    expected = model.state_dict()
    assert set(read) == set(expected)
    assert read["0.weight"].dtype == ml_dtypes.bfloat16
    for name, tensor in expected.items():
        assert read[name].read().tobytes() == torch_bytes(tensor)


class Callback:
    """Stands for the objects that training frameworks put beside the weights."""

    def __init__(self):
        self.state = {"best": torch.zeros(3)}


def test_checkpoint_with_foreign_objects(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    saved = {
        "epoch": 3,
        "callbacks": {"x": Callback()},
        "hyper_parameters": argparse.Namespace(lr=np.float64(0.1), seed=np.int64(3), kinds={1, 2}),
        "optimizer_states": [optimizer.state_dict()],
        "dtype": torch.float32,
        "state_dict": model.state_dict(),
    }
    torch.save(saved, tmp_path / "x.ckpt")
    read = open_file(tmp_path / "x.ckpt")
    assert set(read) == {"weight", "bias"}
    np.testing.assert_array_equal(read["weight"].read(), model.weight.detach().numpy())


def test_nested_under_model_and_nested_dicts(tmp_path):
    torch.save({"model": {"a": torch.ones(2)}, "epoch": 1}, tmp_path / "model.pth")
    assert set(open_file(tmp_path / "model.pth")) == {"a"}
    torch.save({"enc": {"a": torch.ones(2), "b": {"c": torch.ones(1)}}}, tmp_path / "nested.pt")
    assert set(open_file(tmp_path / "nested.pt")) == {"enc.a", "enc.b.c"}
    torch.save({"model": {"a": torch.ones(1)}, "state_dict": {"a": torch.ones(1)}}, tmp_path / "2")
    with pytest.raises(WeightError, match="ambiguous"):
        open_file(tmp_path / "2")


class Evil:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def test_nothing_in_a_pickle_runs(tmp_path):
    import os
    import subprocess

    marker = tmp_path / "marker"
    touch = f"touch {marker}"
    evils = [
        Evil(os.system, touch),
        Evil(subprocess.check_call, ["touch", str(marker)]),
        Evil(eval, f"open({str(marker)!r}, 'w')"),
        Evil(exec, f"open({str(marker)!r}, 'w')"),
        Evil(open, str(marker), "w"),
    ]
    state = {"state_dict": {"w": torch.ones(2)}, "evil": evils}
    torch.save(state, tmp_path / "x.ckpt")
    assert set(open_file(tmp_path / "x.ckpt")) == {"w"}
    assert not marker.exists()
    pickle.loads(pickle.dumps(evils[0]))  # the same pickle, executed, does leave its mark
    assert marker.exists()


def test_a_call_of_a_call_and_build_stay_inert(tmp_path):
    marker = tmp_path / "marker"
    # (lambda: getattr(os, 'system'))()(...) and BUILD with state on what came out, in opcodes.
    program = (
        b"\x80\x02cbuiltins\ngetattr\n(cos\n__dict__\nX\x06\x00\x00\x00systemtR"
        + b"(X"
        + struct.pack("<I", len(f"touch {marker}"))
        + f"touch {marker}".encode()
        + b"tR}X\x01\x00\x00\x00aK\x01sb."
    )
    with pytest.raises(WeightError, match=r"no tensors.*builtins\.getattr"):
        open_file(write_zip(tmp_path / "x.pt", program))
    assert not marker.exists()


def test_a_file_cannot_change_how_later_files_are_read(tmp_path):
    # BUILD on the storage type: would make every FloatStorage of this process something else.
    program = b"\x80\x02ctorch\nFloatStorage\n}X\x05\x00\x00\x00dtypeK\x01sb."
    with pytest.raises(WeightError):
        open_file(write_zip(tmp_path / "evil.pt", program))
    torch.save({"w": torch.ones(2)}, tmp_path / "good.pt")
    assert open_file(tmp_path / "good.pt")["w"].dtype == np.float32


@pytest.mark.parametrize(
    ("claims", "words"),
    [
        ({"shape": (3, 3)}, "reaches to byte 36 of a storage of 24"),
        ({"offset": 1}, "reaches to byte 28 of a storage of 24"),
        ({"strides": (100, 1)}, "reaches to byte"),
        ({"offset": -1}, "impossible"),
        ({"strides": (-3, 1)}, "impossible"),
        ({"shape": (2, "3")}, "impossible"),
        ({"strides": (1,)}, "differ in length"),
        ({"storage_key": "7"}, "data/7 is missing"),
    ],
)
def test_a_tensor_beyond_its_storage_is_refused(tmp_path, claims, words):
    path = write_zip(tmp_path / "x.pt", pickled_tensor(**claims), [("0", bytes(24))])
    with pytest.raises(WeightError, match=words) as caught:
        open_file(path)
    assert "'w'" in str(caught.value) and str(path) in str(caught.value)


def test_the_hand_made_file_is_right_when_its_claims_are(tmp_path):
    content = np.arange(6, dtype=np.float32)
    path = write_zip(tmp_path / "x.pt", pickled_tensor(), [("0", content.tobytes())])
    np.testing.assert_array_equal(open_file(path)["w"].read(), content.reshape(2, 3))


def test_damaged_files(tmp_path):
    torch.save({"w": torch.randn(100, 100)}, tmp_path / "good.pt")
    content = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[:-500])
    with pytest.raises(WeightError, match=r"cut\.pt: damaged"):
        open_file(tmp_path / "cut.pt")
    write_zip(tmp_path / "pickle.pt", pickled_tensor()[:-20])
    with pytest.raises(WeightError, match="pickle cannot be read"):
        open_file(tmp_path / "pickle.pt")
    write_zip(tmp_path / "big.pt", pickled_tensor(), [("0", bytes(24))], byteorder=b"big")
    with pytest.raises(WeightError, match="big-endian"):
        open_file(tmp_path / "big.pt")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(WeightError, match=r"not one that torch\.save wrote"):
        open_file(tmp_path / "other.zip")


def test_a_dict_that_holds_itself_ends(tmp_path):
    loop = {}
    loop["again"] = loop
    with pytest.raises(WeightError, match="nested more than"):
        open_file(write_zip(tmp_path / "x.pt", pickle.dumps(loop, 2)))


def test_dicts_that_hold_each_other_twice_end(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_pickle, "_MAX_ENTRIES", 1000)
    node = {}
    for _ in range(30):  # 2**30 names, if they were all followed
        node = {"a": node, "b": node}
    with pytest.raises(WeightError, match="more than 1000 entries"):
        open_file(write_zip(tmp_path / "x.pt", pickle.dumps(node, 2)))


def test_modules_are_refused_in_words(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(WeightError, match="save its state_dict"):
        open_file(tmp_path / "module.pt")


def test_every_prefix_of_a_file_gives_a_named_error(tmp_path):
    torch.save({"w": torch.ones(3)}, tmp_path / "good.pt")
    content = (tmp_path / "good.pt").read_bytes()
    path = tmp_path / "cut.pt"
    for length in range(0, len(content), 37):
        path.write_bytes(content[:length])
        with pytest.raises(WeightError, match=r"cut\.pt"):
            open_file(path)
