"""GGUF files (llama.cpp): their header, and their numbers, most of them quantised in blocks.

Format: github.com/ggml-org/ggml, docs/gguf.md. The header is parsed here, because the file is not
trusted: every count, length and place is checked against the file's size first. (The `gguf`
package's own reader checks nothing, and takes 45 s for a vocabulary of 262144.) Numbers are
dequantised by that package, only those asked for.
"""

import dataclasses
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from medalign_jax.core.rounding import round_up
from medalign_jax.weights.lazy import FileTensor, LazyTensor, WeightError, contiguous_strides
from medalign_jax.weights.table import Index, Shape, full_index, index_shape

_MAX_TENSORS = 2**20
_MAX_ENTRIES = 2**16
_MAX_LIST = 2**24  # tokens of a vocabulary, merges
_MAX_KEPT = 2**16  # longer lists belong to the tokenizer
_MAX_NAME_BYTES = 2**12
_MAX_STRING_BYTES = 2**24
_MAX_AXES = 4  # of ggml

_STRING, _LIST = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
            12: "d"}  # fmt: skip
_PLAIN = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F64": np.float64,
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
}


class Skipped(int):
    """The length of a list that was passed over: of strings, or very long."""


@dataclasses.dataclass(frozen=True)
class Header:
    """What a GGUF file says before its numbers.

    Attributes:
      metadata: values by key; lists as tuples, or, where they were not asked for and are of strings
        or very long, as `Skipped`.
      tensors: name to (shape, number of the tensor type, place in the file), the last axis fastest.
    """

    metadata: dict[str, Any]
    tensors: dict[str, tuple[Shape, int, int]]


@dataclasses.dataclass(frozen=True)
class Quantised:
    """A tensor in blocks along its last axis; reads whole blocks of the rows asked for.

    Attributes:
      blocks: (..., blocks of a row, bytes of a block) uint8.
      kind: the `gguf.GGMLQuantizationType`.
      size: numbers in a block.
    """

    blocks: FileTensor
    kind: Any
    size: int

    @property
    def shape(self) -> Shape:
        *rows, blocks, _ = self.blocks.shape
        return (*rows, blocks * self.size)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    @property
    def origin(self) -> str:
        return f"{self.blocks.origin}, {self.kind.name}"

    def read(self, index: Index | None = None) -> np.ndarray:
        """See LazyTensor."""
        *rows, columns = full_index(self.shape) if index is None else index
        if 0 in index_shape((*rows, columns)):
            return np.empty(index_shape((*rows, columns)), self.dtype)
        first, last = columns.start // self.size, -(-columns.stop // self.size)
        wanted = (*rows, slice(first, last), slice(0, self.blocks.shape[-1]))
        numbers = _dequantise(self.blocks.read(wanted), self.kind)
        start = first * self.size
        return np.ascontiguousarray(numbers[..., columns.start - start : columns.stop - start])


def read_header(path: Path, lists: bool = False) -> Header:
    """Parses and checks everything before the numbers.

    Args:
      path: of the file.
      lists: keep all lists, a vocabulary too.

    Raises:
      WeightError: names what is wrong.
    """
    with path.open("rb", buffering=2**20) as file:
        cursor = _Cursor(path, file, lists)
        magic, version, tensor_count, entry_count = cursor.take("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise cursor.damaged(f"GGUF version {version:#x}; 2 and 3 are read, little-endian only")
        if tensor_count > _MAX_TENSORS or entry_count > _MAX_ENTRIES:
            raise cursor.damaged(f"{tensor_count} tensors and {entry_count} entries announced")
        metadata: dict[str, Any] = {}
        for _ in range(entry_count):
            key = cursor.name()
            if key in metadata:
                raise cursor.damaged(f"key {key!r} stands twice")
            metadata[key] = cursor.value(*cursor.take("I"))
        placed: dict[str, tuple[Shape, int, int]] = {}
        for _ in range(tensor_count):
            name = cursor.name()
            if name in placed:
                raise cursor.damaged(f"tensor {name!r} stands twice")
            placed[name] = cursor.tensor(name)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise cursor.damaged(f"alignment {alignment!r} is not a power of two")
        start = round_up(cursor.place, alignment)
    tensors = {
        name: (shape, kind, start + offset) for name, (shape, kind, offset) in placed.items()
    }
    _check_places(path, tensors, alignment)
    return Header(metadata, tensors)


class _Cursor:
    """Reads a header from its begin; goes nowhere beyond the end of the file."""

    def __init__(self, path: Path, file: BinaryIO, lists: bool = False) -> None:
        self.path, self._file, self._lists = path, file, lists
        self._size = path.stat().st_size
        self.place = 0

    def damaged(self, reason: str) -> WeightError:
        return WeightError(f"{self.path}: damaged GGUF header before byte {self.place}: {reason}")

    def bytes(self, count: int) -> bytes:
        if count > self._size - self.place:
            raise self.damaged(f"{count} bytes announced, {self._size - self.place} left")
        data = self._file.read(count)
        if len(data) != count:
            raise self.damaged("the file was cut while it was read")
        self.place += count
        return data

    def take(self, codes: str) -> tuple[Any, ...]:
        form = struct.Struct(f"<{codes}")
        return form.unpack(self.bytes(form.size))

    def string(self, limit: int) -> bytes:
        (length,) = self.take("Q")
        if length > limit:
            raise self.damaged(f"a string of {length} bytes; at most {limit} are read")
        return self.bytes(length)

    def name(self) -> str:
        return self._text(self.string(_MAX_NAME_BYTES))

    def _text(self, data: bytes) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"text that is not UTF-8: {data[:40]!r}") from error

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text(self.string(_MAX_STRING_BYTES))
        if kind == _LIST:
            return self._list(*self.take("IQ"))
        if kind not in _NUMBERS:
            raise self.damaged(f"a value of unknown type {kind}")
        return self.take(_NUMBERS[kind])[0]

    def _list(self, kind: int, length: int) -> Any:
        if length > _MAX_LIST:
            raise self.damaged(f"a list of {length} values; at most {_MAX_LIST} are read")
        if kind == _STRING and self._lists:
            return tuple(self._text(self.string(_MAX_STRING_BYTES)) for _ in range(length))
        if kind == _STRING:
            for _ in range(length):
                self.string(_MAX_STRING_BYTES)
            return Skipped(length)
        if kind not in _NUMBERS:
            raise self.damaged(f"a list of values of unknown type {kind}")
        if length > _MAX_KEPT and not self._lists:
            self.bytes(length * struct.calcsize(_NUMBERS[kind]))
            return Skipped(length)
        return self.take(f"{length}{_NUMBERS[kind]}")

    def tensor(self, name: str) -> tuple[Shape, int, int]:
        (axes,) = self.take("I")
        if not 1 <= axes <= _MAX_AXES:
            raise self.damaged(f"tensor {name!r} has {axes} axes")
        sizes = self.take(f"{axes}Q")
        if 0 in sizes:
            raise self.damaged(f"tensor {name!r} is empty: {sizes}")
        kind, offset = self.take("IQ")
        return tuple(reversed(sizes)), kind, offset


def _check_places(
    path: Path, tensors: Mapping[str, tuple[Shape, int, int]], alignment: int
) -> None:
    size, taken = path.stat().st_size, 0
    for name, (shape, kind, start) in sorted(tensors.items(), key=lambda each: each[1][2]):
        end = start + _stored_bytes(path, name, shape, kind)
        if start % alignment or start < taken:
            raise WeightError(f"{path}: tensor {name!r} begins at {start}, inside another one or "
                              f"not at a multiple of {alignment}")  # fmt: skip
        if end > size:
            raise WeightError(f"{path}: tensor {name!r} reaches to byte {end} of {size}: cut short")
        taken = end


def _gguf() -> Any:
    try:
        import gguf  # late: only GGUF files need it
    except ImportError as error:
        raise WeightError("GGUF files need the gguf package: pip install gguf") from error
    return gguf


def _stored_bytes(path: Path, name: str, shape: Shape, kind: int) -> int:
    gguf = _gguf()
    try:
        size, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    except (ValueError, KeyError) as error:
        raise WeightError(f"{path}: tensor {name!r} has the unknown tensor type {kind}") from error
    if shape[-1] % size:
        raise WeightError(f"{path}: tensor {name!r}: rows of {shape[-1]} in blocks of {size}")
    return math.prod(shape) // size * block_bytes


def stored_tensors(path: Path, header: Header) -> dict[str, LazyTensor]:
    """The tensors of a file under their GGUF names.

    Raises:
      WeightError: a tensor type that the `gguf` package does not dequantise.
    """
    return {name: _tensor(path, name, *place) for name, place in header.tensors.items()}


def _tensor(path: Path, name: str, shape: Shape, number: int, start: int) -> LazyTensor:
    gguf = _gguf()
    kind = gguf.GGMLQuantizationType(number)
    if kind.name in _PLAIN:
        dtype = np.dtype(_PLAIN[kind.name])
        return FileTensor(path, start, shape, contiguous_strides(shape), dtype)
    size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    stored = (*shape[:-1], shape[-1] // size, block_bytes)
    blocks = FileTensor(path, start, stored, contiguous_strides(stored), np.dtype(np.uint8))
    try:
        _dequantise(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError as error:
        text = f"{path}: tensor {name!r} has type {kind.name}, which gguf does not dequantise"
        raise WeightError(text) from error
    return Quantised(blocks, kind, size)


def _dequantise(blocks: np.ndarray, kind: Any) -> np.ndarray:
    """Blocks (..., blocks of a row, bytes) uint8 -> numbers (..., columns) float32."""
    with np.errstate(all="ignore"):  # a scale may be any float16
        return _gguf().dequantize(blocks.reshape(*blocks.shape[:-2], -1), kind)
