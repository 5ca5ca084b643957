"""PyTorch's files from before version 1.6, read without running what is in them.

Many models of 2018 to 2020 are still published so (`pytorch_model.bin`). Format
(`torch.serialization`, "legacy"): five pickles one after another (a magic number, a version, facts
about the machine, the saved object with its storages left out and named by persistent ids, and the
list of the storages' keys), then for each key the count of its numbers as 8 bytes, and the numbers.
"""

import os
import pickle
import struct
from pathlib import Path
from typing import Any, BinaryIO

from medalign_jax.weights.lazy import FileTensor, WeightError
from medalign_jax.weights.torch_pickle import (
    MAX_PICKLE_BYTES,
    Stretch,
    TensorUnpickler,
    claims,
    load_pickle,
    located,
)

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001


class _Pickles:
    """The front of a file, up to the most that is read of it for pickles.

    Without `peek`, so that an unpickler takes no byte more than its own.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self._left():
            raise pickle.UnpicklingError(f"larger than {MAX_PICKLE_BYTES} bytes; refused")
        return self._file.read(size)

    def readline(self) -> bytes:
        return self._file.readline(max(self._left(), 0))

    def _left(self) -> int:
        return MAX_PICKLE_BYTES - self._file.tell()


def open_torch_legacy(path: Path) -> dict[str, FileTensor]:
    """Tensors of a file written by `torch.save` before version 1.6.

    Which dict holds them: see `torch_pickle.claims`.

    Raises:
      WeightError: not such a file, damaged, or a tensor reaches beyond its storage.
    """
    with path.open("rb") as file:
        pickles = _Pickles(file)
        _check_front(path, pickles)
        unpickler = TensorUnpickler(pickles)
        tensors = claims(path, load_pickle(path, unpickler), unpickler.unknown)
        keys = load_pickle(path, TensorUnpickler(pickles))
        stretches = _storages(path, file, keys, unpickler)
    missing = "{key} is missing from the file's list of storages"
    return {
        name: located(path, name, each, stretches.get, missing) for name, each in tensors.items()
    }


def _check_front(path: Path, pickles: _Pickles) -> None:
    """Reads the three pickles before the saved object."""
    for expected in (_MAGIC, _VERSION):
        if load_pickle(path, TensorUnpickler(pickles)) != expected:
            raise WeightError(f"{path}: a pickle, but not one that torch.save wrote")
    machine = load_pickle(path, TensorUnpickler(pickles))
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise WeightError(f"{path}: saved on a big-endian machine, which is not read")


def _storages(
    path: Path, file: BinaryIO, keys: Any, unpickler: TensorUnpickler
) -> dict[str, Stretch]:
    """Where the storages lie, which follow the pickles in the order of `keys` to the file's end."""
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise WeightError(f"{path}: damaged list of storages")
    size = os.fstat(file.fileno()).st_size
    stretches: dict[str, Stretch] = {}
    for key in keys:
        storage = unpickler.storages.get(key)
        if storage is None or storage.dtype is None or key in stretches:
            raise WeightError(f"{path}: storage {key!r} is of no known dtype, or listed twice")
        prefix = file.read(8)
        start = file.tell()
        count = struct.unpack("<q", prefix)[0] if len(prefix) == 8 else -1
        stretch = Stretch(start, count * storage.dtype.itemsize)
        if count < 0 or start + stretch.size > size:
            raise WeightError(f"{path}: cut short or damaged at storage {key!r} (byte {start})")
        stretches[key] = stretch
        file.seek(start + stretch.size)
    if file.tell() != size:
        raise WeightError(f"{path}: followed by bytes of no tensor, from byte {file.tell()} on")
    return stretches
