"""The pickle inside PyTorch's files, read without running what is in it.

A pickle is a program. This reader knows the few constructors that rebuild a tensor; every other
class or function that the pickle asks for becomes an inert stand-in, which takes whatever it is
given, keeps nothing and does nothing. No module is imported on behalf of a file.

A tensor comes out as what the pickle claims about it (`Claim`), and becomes a stretch of the file
once a format (`torch_zip`, `torch_legacy`) has said where its storage lies (`located`).
"""

import collections
import dataclasses
import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from medalign_jax.weights.lazy import FileTensor, WeightError, extent

MAX_PICKLE_BYTES = 512 * 2**20
_MAX_DEPTH = 32
_MAX_ENTRIES = 1_000_000
_WRAPPERS = ("state_dict", "model")  # Lightning and most; AudioMAE and other MAE descendants

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "ComplexFloatStorage": np.complex64,
    "ComplexDoubleStorage": np.complex128,
}
_DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint8": np.uint8,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "bool": np.bool_,
}


@dataclasses.dataclass(frozen=True)
class Storage:
    """A storage that a pickle names."""

    key: str
    dtype: np.dtype | None  # None: bytes, the tensor says what they are


@dataclasses.dataclass(frozen=True)
class Claim:
    """The arguments of a rebuilt tensor, not yet checked."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any
    dtype: np.dtype | None


class _RebuildTensor:
    def __call__(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Claim:
        return Claim(storage, offset, shape, strides, getattr(storage, "dtype", None))


class _RebuildTensorWithDtype:
    def __call__(self, storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Claim:
        dtype = rest[2] if len(rest) > 2 else None  # after requires_grad and hooks
        return Claim(storage, offset, shape, strides, getattr(dtype, "dtype", None))


class _RebuildParameter:
    def __call__(self, data: Any, *_: Any) -> Any:
        return data


@dataclasses.dataclass(frozen=True)
class _StorageType:
    dtype: np.dtype | None


@dataclasses.dataclass(frozen=True)
class _Dtype:
    dtype: np.dtype


def _known_names() -> dict[tuple[str, str], Any]:
    """All that a file may ask for; made anew for each, as its BUILD opcodes may set attributes."""
    parameter = _RebuildParameter()
    names: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch", "Size"): tuple,
        ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
        ("torch._utils", "_rebuild_tensor_v3"): _RebuildTensorWithDtype(),
        ("torch._utils", "_rebuild_parameter"): parameter,
        ("torch._utils", "_rebuild_parameter_with_state"): parameter,
        ("torch.storage", "UntypedStorage"): _StorageType(None),
        ("torch", "UntypedStorage"): _StorageType(None),
    }
    for name, dtype in _STORAGES.items():
        names["torch", name] = names["torch.storage", name] = _StorageType(np.dtype(dtype))
    names.update({("torch", name): _Dtype(np.dtype(dtype)) for name, dtype in _DTYPES.items()})
    return names


def _inert_class(name: str) -> type:
    """A stand-in for the class or function `name`: takes anything, keeps and does nothing."""

    def nothing(self: Any, *args: Any, **keywords: Any) -> None:
        return None

    def make(cls: type, *args: Any, **keywords: Any) -> Any:
        return object.__new__(cls)

    def again(self: Any, *args: Any, **keywords: Any) -> Any:
        return type(self)()

    methods = ("__init__", "__setstate__", "__setitem__", "append", "extend", "add")
    body: dict[str, Any] = {method: nothing for method in methods}
    return type("Inert", (), {**body, "__new__": make, "__call__": again, "stands_for": name})


class TensorUnpickler(pickle.Unpickler):
    """Knows tensors and plain containers only; see the top of this module.

    Attributes:
      storages: those that were named, by key.
      unknown: names of the classes and functions that were asked for and not run.
    """

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self._known = _known_names()
        self.storages: dict[str, Storage] = {}
        self.unknown: dict[str, type] = {}

    def find_class(self, module: str, name: str) -> Any:
        known = self._known.get((module, name))
        if known is not None:
            return known
        full = f"{module}.{name}"
        return self.unknown.setdefault(full, _inert_class(full))

    def persistent_load(self, pid: Any) -> Any:
        kind = pid[0] if isinstance(pid, tuple) and len(pid) >= 3 else None
        if kind == "module":  # the old format puts the source of a pickled module beside its class
            return pid[1]
        if kind != "storage":
            raise pickle.UnpicklingError(f"unknown persistent id {pid!r}")
        if not isinstance(pid[1], _StorageType) or not isinstance(pid[2], str):
            raise pickle.UnpicklingError(f"unknown kind of storage in {pid[2]!r}")
        if any(part is not None for part in pid[5:]):
            raise pickle.UnpicklingError(f"storage {pid[2]!r} is a view of another")
        return self.storages.setdefault(pid[2], Storage(pid[2], pid[1].dtype))


def load_pickle(path: Path, unpickler: TensorUnpickler) -> Any:
    """What a pickle describes. Raises WeightError, whatever is wrong with it."""
    try:
        return unpickler.load()
    except Exception as error:  # a damaged pickle may raise anything at all
        kind = type(error).__name__
        raise WeightError(f"{path}: its pickle cannot be read ({kind}: {error})") from error


def claims(path: Path, saved: Any, unknown: Mapping[str, type]) -> dict[str, Claim]:
    """Tensors of what was saved, by their name in its state dict.

    A dict under `state_dict` or `model` is taken for the state dict if it holds tensors; else the
    whole object is. Nested dicts give names joined by `.`.

    Raises:
      WeightError: there are none.
    """
    found = dict(_flatten(_state_dict(path, saved), path))
    if not found:
        raise WeightError(
            f"{path}: no tensors found at the top level, under 'state_dict' or under 'model'; "
            f"a pickled module is not read, save its state_dict() instead "
            f"(classes met: {', '.join(sorted(unknown)) or 'none'})"
        )
    return found


def _state_dict(path: Path, saved: Any) -> Any:
    if not isinstance(saved, dict):
        return saved
    inner = [key for key in _WRAPPERS if any(True for _ in _flatten(saved.get(key), path))]
    if len(inner) > 1:
        raise WeightError(f"{path}: ambiguous, tensors under both {' and '.join(inner)}")
    return saved[inner[0]] if inner else saved


def _flatten(saved: Any, path: Path) -> Iterator[tuple[str, Claim]]:
    """Tensors of nested dicts, by joined keys; bounded, as dicts may hold each other."""
    waiting = [("", saved, 0)]
    visited = 0
    while waiting:
        prefix, node, depth = waiting.pop()
        visited += 1
        if depth > _MAX_DEPTH or visited > _MAX_ENTRIES:
            raise WeightError(
                f"{path}: dicts nested more than {_MAX_DEPTH} deep, "
                f"or more than {_MAX_ENTRIES} entries, at {prefix!r:.200}"
            )
        if isinstance(node, Claim):
            yield prefix, node
        elif isinstance(node, dict):
            waiting += [
                (f"{prefix}.{key}" if prefix else str(key), value, depth + 1)
                for key, value in node.items()
                if isinstance(key, str | int)
            ]


class Stretch(NamedTuple):
    """Where a storage lies: its first byte in the file, and how many there are."""

    start: int
    size: int


def located(
    path: Path, name: str, tensor: Claim, find: Callable[[str], Stretch | None], place: str
) -> FileTensor:
    """The tensor as a stretch of the file, if everything the pickle says about it can be true.

    Args:
      path, name: of the file, and of the tensor, for messages.
      tensor: what the pickle says.
      find: where the storage of a key lies; None if there is none.
      place: how `find` would call a storage and its file, for messages, with `{key}`.

    Raises:
      WeightError: saying what cannot be.
    """

    def refuse(reason: str) -> WeightError:
        return WeightError(f"{path}: tensor {name!r}: {reason}")

    if not isinstance(tensor.storage, Storage) or tensor.dtype is None:
        raise refuse("not a dense tensor of a known dtype")
    shape, strides = tensor.shape, tensor.strides
    if not (_whole_numbers(shape) and _whole_numbers(strides) and _whole_numbers((tensor.offset,))):
        raise refuse(f"impossible shape {shape!r}, strides {strides!r} or offset {tensor.offset!r}")
    if len(shape) != len(strides):
        raise refuse(f"shape {shape} and strides {strides} differ in length")
    stretch = find(tensor.storage.key)
    if stretch is None:
        raise refuse(f"its storage {place.format(key=tensor.storage.key)}")
    itemsize = tensor.dtype.itemsize
    needed = (tensor.offset + extent(shape, strides)) * itemsize
    if math.prod(shape) and needed > stretch.size:
        raise refuse(f"reaches to byte {needed} of a storage of {stretch.size} bytes")
    start = stretch.start + tensor.offset * itemsize
    return FileTensor(path, start, tuple(shape), tuple(strides), tensor.dtype)


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(value) is int and value >= 0 for value in values)
