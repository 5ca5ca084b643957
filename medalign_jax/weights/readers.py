"""Weight files: what they hold, without reading it yet.

Supported: safetensors and PyTorch files (zip, and from before version 1.6), alone or in shards with
an index, and GGUF. A format is recognised by its first bytes, not by its name. To add one, write
`open_FORMAT(path)`, which returns tensors by name (or a `WeightFile`, if the format has its own
config), and give it a line in `_FORMATS`; nothing else in this room, or after it, knows of file
formats.
"""

import dataclasses
import functools
import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medalign_jax.weights.gguf_upstream import open_gguf
from medalign_jax.weights.lazy import (
    SAFETENSORS_DTYPES,
    FileTensor,
    LazyTensor,
    WeightError,
    WeightFile,
    contiguous_strides,
)
from medalign_jax.weights.table import Index, Shape
from medalign_jax.weights.torch_legacy import open_torch_legacy
from medalign_jax.weights.torch_zip import open_torch_zip

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".gguf")
_MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit


def open_safetensors(path: Path) -> dict[str, FileTensor]:
    """Tensors of a safetensors file.

    The header is checked in full: sizes fit dtypes and shapes, and the tensors cover the rest of
    the file without a gap or an overlap (format: github.com/huggingface/safetensors, README).

    Raises:
      WeightError: the file is damaged or cut short; says how.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(_MAX_HEADER_BYTES, size - 8):
            raise WeightError(
                f"{path}: not a safetensors file, or cut short: "
                f"header of {length} bytes announced in a file of {size}"
            )
        text = file.read(length)
    header = _json_object(text, path, "safetensors header")
    header.pop("__metadata__", None)
    start = 8 + length
    tensors = {name: _entry(path, name, entry, start) for name, entry in header.items()}
    _check_cover(path, tensors, start, size)
    return tensors


def _entry(path: Path, name: str, entry: Any, start: int) -> FileTensor:
    try:
        kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise WeightError(f"{path}: tensor {name!r}: damaged header entry {entry!r}") from error
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise WeightError(f"{path}: tensor {name!r}: damaged header entry {entry!r}")
    dtype = SAFETENSORS_DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise WeightError(f"{path}: tensor {name!r}: dtype {kind!r} is not supported")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise WeightError(
            f"{path}: tensor {name!r}: {end - begin} bytes for shape {list(shape)} of {kind}"
        )
    return FileTensor(path, start + begin, shape, contiguous_strides(shape), dtype)


def _check_cover(path: Path, tensors: Mapping[str, FileTensor], start: int, size: int) -> None:
    place = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].extent)):
        if tensor.start != place:
            raise WeightError(f"{path}: tensor {name!r} begins at {tensor.start}, not at {place}")
        place += math.prod(tensor.shape) * tensor.dtype.itemsize
    if place != size:
        problem = "cut short" if size < place else "followed by bytes of no tensor"
        raise WeightError(f"{path}: {problem}: tensors end at byte {place}, the file at {size}")


# First bytes -> reader; whatever fits none is taken for safetensors, which has no mark.
_FORMATS: tuple[tuple[bytes, Callable[[Path], Mapping[str, LazyTensor]]], ...] = (
    (b"PK\x03\x04", open_torch_zip),
    (b"GGUF", open_gguf),
    (b"\x80", open_torch_legacy),
)


def open_file(path: Path) -> WeightFile:
    """Tensors of one weight file of any supported format.

    Raises:
      WeightError: missing, empty, damaged, or of a format that is not read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(9)
        if not head:
            raise WeightError(f"{path}: the file is empty")
        for mark, reader in _FORMATS:
            # A safetensors file may begin with any of these as its header's length; its ninth byte
            # is then the brace that opens the header.
            if head.startswith(mark) and head[8:] != b"{":
                tensors = reader(path)
                return tensors if isinstance(tensors, WeightFile) else WeightFile(tensors)
        return WeightFile(open_safetensors(path))
    except OSError as error:
        raise WeightError(f"{path}: cannot be read ({error.strerror or error})") from error


def open_index(path: Path, fetch: Callable[[str], Path] | None = None) -> WeightFile:
    """Tensors of all the shards that an index (`*.index.json`) names.

    Args:
      path: of the index.
      fetch: brings a shard by its name and gives its path, when the first of its tensors is looked
        at, and never if none is. None: all shards lie beside the index, and are opened at once.

    Raises:
      WeightError: damaged index, a shard outside the index's folder, missing, or without a tensor
        that the index promises or with one that it does not.
    """
    places = _weight_map(path)
    names = sorted(set(places.values()))
    if fetch is not None:
        shards = {name: _Shard(path, name, places, fetch) for name in names}
        return WeightFile({name: _ShardTensor(shards[places[name]], name) for name in places})
    # As `Path.is_file`, but a name too long for the file system is not a file either.
    missing = [name for name in names if not os.path.isfile(path.parent / name)]
    if missing:
        raise WeightError(f"{path}: shards missing from {path.parent}: {', '.join(missing)}")
    opened = {name: open_file(path.parent / name) for name in names}
    _check_shards(path, places, opened)
    return WeightFile({name: opened[shard][name] for name, shard in places.items()})


def _check_shards(
    path: Path, places: Mapping[str, str], opened: Mapping[str, Mapping[str, LazyTensor]]
) -> None:
    """Raises WeightError unless shards hold what the index says, and nothing else."""
    held = {(name, shard) for shard, tensors in opened.items() for name in tensors}
    promised = {(name, shard) for name, shard in places.items() if shard in opened}
    problems = [f"{name!r} is not in {shard}" for name, shard in sorted(promised - held)]
    problems += [
        f"{name!r} of {shard} is not in the index" for name, shard in sorted(held - promised)
    ]
    if problems:
        raise WeightError(f"{path}: index and shards differ: {'; '.join(problems)}")


@dataclasses.dataclass(frozen=True)
class _Shard:
    """A file of an index, fetched and opened when one of its tensors is first looked at."""

    index: Path
    name: str
    places: Mapping[str, str]
    fetch: Callable[[str], Path]

    @functools.cached_property
    def tensors(self) -> WeightFile:
        opened = open_file(self.fetch(self.name))
        _check_shards(self.index, self.places, {self.name: opened})
        return opened


@dataclasses.dataclass(frozen=True)
class _ShardTensor:
    """A tensor of a shard that may not be here yet; see LazyTensor."""

    shard: _Shard
    name: str

    @property
    def _tensor(self) -> LazyTensor:
        return self.shard.tensors[self.name]

    @property
    def shape(self) -> Shape:
        return self._tensor.shape

    @property
    def dtype(self) -> np.dtype:
        return self._tensor.dtype

    @property
    def origin(self) -> str:
        return self._tensor.origin

    def read(self, index: Index | None = None) -> np.ndarray:
        """See LazyTensor."""
        return self._tensor.read(index)


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor names to shards, as an index says."""
    try:
        index = _json_object(path.read_bytes(), path, "index")
    except OSError as error:
        raise WeightError(f"{path}: cannot be read ({error.strerror or error})") from error
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise WeightError(f"{path}: has no 'weight_map' of tensor names to files")
    if not all(isinstance(shard, str) and Path(shard).name == shard for shard in places.values()):
        raise WeightError(f"{path}: every shard must be the name of a file beside the index")
    return places


def _json_object(text: bytes, path: Path, what: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name stands twice")
        return found

    try:
        value = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise WeightError(f"{path}: damaged {what} ({error})") from error
    if not isinstance(value, dict):
        raise WeightError(f"{path}: damaged {what} (not an object)")
    return value
