"""PyTorch files of before version 1.6: bit for bit what torch reads, nothing executed."""

import argparse
import os
import pickle
import pickletools
import struct

import ml_dtypes
import numpy as np
import pytest
import torch

from medalign_jax.weights import torch_legacy
from medalign_jax.weights.lazy import WeightError
from medalign_jax.weights.readers import open_file
from tests.weights.test_torch_zip import Evil, torch_bytes


def save(saved, path):
    torch.save(saved, path, _use_new_zipfile_serialization=False)
    assert path.read_bytes()[:4] == b"\x80\x02\x8a\n"  # a bare pickle, no zip
    return path


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8],
)
def test_dtypes_bit_for_bit(tmp_path, dtype):
    torch.manual_seed(0)
    tensor = (torch.randn(5, 7) * 50).abs().to(dtype)
    read = open_file(save({"w": tensor}, tmp_path / "x.bin"))["w"]
    assert read.shape == (5, 7) and read.dtype.name == str(dtype).removeprefix("torch.")
    assert read.read().tobytes() == torch_bytes(tensor)


def test_views_and_shared_storages(tmp_path):
    base = torch.randn(6, 8)
    state = {
        "base": base,
        "transposed": base.t(),
        "steps": base[1::2, 2:7:3],
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(base[2:4]),
        "other": torch.arange(5),
    }
    read = open_file(save(state, tmp_path / "x.pt"))
    assert set(read) == set(state)
    for name, tensor in state.items():
        assert read[name].read().tobytes() == torch_bytes(tensor), name


def test_checkpoint_with_foreign_objects(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4)).bfloat16()
    saved = {"state_dict": model.state_dict(), "args": argparse.Namespace(lr=np.float64(0.1))}
    read = open_file(save(saved, tmp_path / "x.ckpt"))
    assert set(read) == set(model.state_dict())
    assert read["0.weight"].dtype == ml_dtypes.bfloat16
    for name, tensor in model.state_dict().items():
        assert read[name].read().tobytes() == torch_bytes(tensor)


@pytest.mark.parametrize("place", range(5))
def test_nothing_in_any_of_the_pickles_runs(tmp_path, place):
    marker = tmp_path / "marker"
    evil = pickle.dumps(Evil(os.system, f"touch {marker}"), 2)
    with save({"w": torch.ones(2)}, tmp_path / "x.bin").open("rb") as file:
        pickles = []
        for _ in range(5):
            start = file.tell()
            for _ in pickletools.genops(file):  # to the end of this pickle
                pass
            end = file.tell()
            file.seek(start)
            pickles.append(file.read(end - start))
        rest = file.read()
    path = tmp_path / "evil.bin"
    path.write_bytes(b"".join(pickles) + rest)
    assert set(open_file(path)) == {"w"}
    pickles[place] = evil
    path.write_bytes(b"".join(pickles) + rest)
    with pytest.raises(WeightError, match=r"evil\.bin"):
        open_file(path)
    assert not marker.exists()
    pickle.loads(evil)  # executed, it does leave its mark
    assert marker.exists()


def test_evil_beside_the_weights_stays_inert(tmp_path):
    marker = tmp_path / "marker"
    saved = {"state_dict": {"w": torch.ones(2)}, "evil": Evil(os.system, f"touch {marker}")}
    assert set(open_file(save(saved, tmp_path / "x.bin"))) == {"w"}
    assert not marker.exists()


def test_modules_and_other_pickles_are_refused_in_words(tmp_path):
    with pytest.raises(WeightError, match=r"save its state_dict\(\) instead.*Linear"):
        open_file(save(torch.nn.Linear(2, 2), tmp_path / "module.pt"))
    (tmp_path / "other.bin").write_bytes(pickle.dumps({"w": [1.0]}, 2))
    with pytest.raises(WeightError, match=r"not one that torch\.save wrote"):
        open_file(tmp_path / "other.bin")


def test_every_prefix_of_a_file_gives_a_named_error(tmp_path):
    content = save({"w": torch.ones(3), "v": torch.ones(2)}, tmp_path / "good.pt").read_bytes()
    path = tmp_path / "cut.pt"
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(WeightError, match=r"cut\.pt"):
            open_file(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(WeightError, match="followed by bytes of no tensor"):
        open_file(path)


def test_a_tensor_beyond_its_storage_is_refused(tmp_path):
    content = save({"w": torch.arange(6.0)}, tmp_path / "good.pt").read_bytes()
    count = content.rindex(struct.pack("<q", 6))
    path = tmp_path / "short.pt"
    path.write_bytes(content[:count] + struct.pack("<q", 5) + content[count + 8 : -4])
    with pytest.raises(WeightError, match="'w': reaches to byte 24 of a storage of 20"):
        open_file(path)
    for wrong in (-1, 7, 2**62):
        path.write_bytes(content[:count] + struct.pack("<q", wrong) + content[count + 8 :])
        with pytest.raises(WeightError, match="cut short or damaged at storage"):
            open_file(path)


def test_a_pickle_that_never_ends_is_refused(tmp_path, monkeypatch):
    path = save({"w" * 3000: torch.ones(3)}, tmp_path / "x.pt")
    monkeypatch.setattr(torch_legacy, "MAX_PICKLE_BYTES", 2000)
    with pytest.raises(WeightError, match="larger than 2000 bytes; refused"):
        open_file(path)
