"""A tensor that lies in a file until it is read, and the error of this room."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from medalign_jax.core.errors import UserError
from medalign_jax.weights.table import Index, Shape, full_index


class WeightError(UserError):
    """Weights cannot be found, read, trusted or fitted; names file, tensor and reason."""


class WeightFile(dict[str, "LazyTensor"]):
    """The tensors of a file, by upstream name.

    Attributes:
      config: works out what the file itself says in place of a `config.json`; None where the format
        has nothing to say.
    """

    def __init__(
        self,
        tensors: Mapping[str, "LazyTensor"],
        config: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(tensors)
        self.config = config


class LazyTensor(Protocol):
    """What a reader hands out for each tensor.

    Attributes:
      shape: as stored upstream.
      dtype: as stored; bfloat16 and the float8 kinds come from `ml_dtypes`.
      origin: file that holds it, or a word for where it comes from.
    """

    shape: Shape
    dtype: np.dtype
    origin: str

    def read(self, index: Index | None = None) -> np.ndarray:
        """A fresh copy of the tensor, or of the part that `index` names.

        One slice per axis, with plain start and stop. Several threads may read at once.
        """


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """A tensor in a stretch of a file, with strides counted in elements.

    Whole rows are read as bytes; other parts through a map of the file that lasts for one `read`
    only, so that pages of tensors read before do not count as memory in use.
    """

    path: Path
    start: int  # byte where element 0 of the tensor lies
    shape: Shape
    strides: tuple[int, ...]
    dtype: np.dtype

    @property
    def origin(self) -> str:
        return str(self.path)

    @property
    def extent(self) -> int:
        """Elements from the first to the last one, both included."""
        return extent(self.shape, self.strides)

    def read(self, index: Index | None = None) -> np.ndarray:
        """See LazyTensor. Raises WeightError if the file was cut or removed meanwhile."""
        index = full_index(self.shape) if index is None else index
        if math.prod(self.shape) == 0:
            return np.empty(self.shape, self.dtype)[index]
        try:
            return self._rows(index) if self._is_rows(index) else self._mapped(index)
        except (OSError, ValueError) as error:
            raise WeightError(f"{self.path}: cannot be read any more ({error})") from error

    def _is_rows(self, index: Index) -> bool:
        whole = self.strides == contiguous_strides(self.shape)
        return whole and index[1:] == full_index(self.shape)[1:]

    def _rows(self, index: Index) -> np.ndarray:
        rows = index[0] if index else slice(0, 1)
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        count, start = (rows.stop - rows.start) * row_bytes, self.start + rows.start * row_bytes
        flat = np.fromfile(self.path, np.uint8, count, offset=start)
        if flat.size != count:
            raise ValueError(f"{flat.size} bytes left of {count} from byte {start} on")
        return flat.view(self.dtype).reshape((-1, *self.shape[1:]) if index else ())

    def _mapped(self, index: Index) -> np.ndarray:
        flat = np.memmap(self.path, self.dtype, "r", offset=self.start, shape=(self.extent,))
        steps = tuple(stride * self.dtype.itemsize for stride in self.strides)
        view = np.ndarray(self.shape, self.dtype, flat, strides=steps)
        return np.array(view[index], order="C", copy=True)


@dataclasses.dataclass(frozen=True)
class ArrayTensor:
    """A tensor that is an array already."""

    array: np.ndarray
    origin: str = "mapping"

    @property
    def shape(self) -> Shape:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.array.dtype)

    def read(self, index: Index | None = None) -> np.ndarray:
        """See LazyTensor."""
        return np.array(self.array if index is None else self.array[index], order="C", copy=True)


def extent(shape: Shape, strides: tuple[int, ...]) -> int:
    """Elements that a strided tensor spans in its storage, from its first to its last one."""
    if math.prod(shape) == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def contiguous_strides(shape: Shape) -> tuple[int, ...]:
    """Row-major strides, in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


SAFETENSORS_DTYPES: Mapping[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
