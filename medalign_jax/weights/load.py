"""The one loader: upstream tensors into a model's parameters, and back under their names.

Nothing is coerced and nothing is passed over: see the grammar in `medalign_jax.weights.table`.
"""

import dataclasses
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from medalign_jax.core.files import writing_whole
from medalign_jax.core.mesh import on_host
from medalign_jax.weights.lazy import SAFETENSORS_DTYPES, LazyTensor, WeightError
from medalign_jax.weights.match import Problems, Slot, flatten, match
from medalign_jax.weights.source import WeightSource, resolve
from medalign_jax.weights.table import (
    Chain,
    Index,
    NotUpstream,
    Shape,
    ShapeMismatch,
    Table,
    Transform,
    full_index,
    index_shape,
    read_part,
    source_index,
)

_FLOATS = tuple(np.dtype(kind) for kind in (np.float32, ml_dtypes.bfloat16, np.float16))
_BITS = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}
_COMPARE_BYTES = 2**26
_STRETCH_BYTES = 2**21
_CACHE_LINE_BYTES = 64
_MAX_THREADS = 8


def load(source: Any, table: Table, abstract: Any, *, dtype: Any = None) -> Any:
    """Fills a parameter tree from upstream tensors.

    A leaf with a sharding becomes a global array of which each process reads its own parts only;
    parameters are read in stretches of a few megabytes, by several threads. Beside the model, the
    host holds at most one parameter at a time (none on a CPU, where JAX takes its memory over).

    Args:
      source: anything that `resolve` takes.
      table: the architecture's mapping table.
      abstract: tree of `jax.ShapeDtypeStruct`, with shardings or without.
      dtype: float32, bfloat16 or float16: all parameters of these three become it, whichever of
        the three the tensors are, rounded to the nearest (beyond float16 is an error). None: dtypes
        must agree exactly, as those of other parameters (counters) always must. A GGUF file's
        quantised tensors count as float32; float64, 8-bit floats and integers are never taken for
        weights.

    Returns:
      A tree like `abstract`, of arrays.

    Raises:
      WeightError: lists every tensor that is missing, unused, ambiguous, or of a wrong shape or
        dtype, with both names, file and nearest name.
    """
    fitted = _fitted(source, table, abstract, dtype)
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _MAX_THREADS)) as pool:
        filled = [
            _parameter(pool, fitted.slots[path], fitted.source, leaf, fitted.dtypes[path])
            for path, leaf in fitted.leaves.items()
        ]
    return jax.tree_util.tree_unflatten(fitted.structure, filled)


def check_weights(source: Any, table: Table, abstract: Any, *, dtype: Any = None) -> None:
    """Refuses what `load` would refuse, from names, shapes and dtypes; no parameter is read.

    Args:
      source, table, abstract, dtype: as for `load`.

    Raises:
      WeightError: as `load`.
    """
    _fitted(source, table, abstract, dtype)


@dataclasses.dataclass(frozen=True)
class _Fitted:
    """A source whose tensors fit the parameters: path -> leaf, slot and dtype of each."""

    source: WeightSource
    leaves: Mapping[str, Any]
    structure: Any
    slots: Mapping[str, Slot]
    dtypes: Mapping[str, np.dtype]


def _fitted(source: Any, table: Table, abstract: Any, dtype: Any) -> _Fitted:
    opened = resolve(source)
    target = None if dtype is None else np.dtype(dtype)
    if target is not None and target not in _FLOATS:
        raise ValueError(f"dtype {target} is not one of {', '.join(kind.name for kind in _FLOATS)}")
    leaves, structure = flatten(abstract)
    problems = Problems()
    found = match(table, opened, {path: tuple(x.shape) for path, x in leaves.items()}, problems)
    dtypes = {path: _wanted(np.dtype(leaf.dtype), target) for path, leaf in leaves.items()}
    for path, slot in found.slots.items():
        shape = tuple(leaves[path].shape)
        _check_tensors(slot, opened, shape, dtypes[path], target is not None, problems)
    for name, other in found.copies:
        _check_copy(opened, name, other, problems)
    problems.raise_if_any(f"{opened.label}: does not fit the table {table.name!r}")
    return _Fitted(opened, leaves, structure, found.slots, dtypes)


def identity(source: Any, table: Table, abstract: Any) -> str:
    """Hex SHA-256 of the tensors that `load` takes, see `WeightSource.identity_of`.

    What a source holds beside them (a decoder, a vision tower, a vocoder) is not looked at, and not
    fetched.

    Args:
      source, table, abstract: as for `load`, which has accepted them.
    """
    opened = resolve(source)
    leaves, _ = flatten(abstract)
    found = match(table, opened, {path: tuple(x.shape) for path, x in leaves.items()}, Problems())
    return opened.identity_of(name for slot in found.slots.values() for name in slot.names)


def _wanted(own: np.dtype, target: np.dtype | None) -> np.dtype:
    return target if target is not None and own in _FLOATS else own


def _check_tensors(
    slot: Slot,
    source: WeightSource,
    shape: Shape,
    dtype: np.dtype,
    may_convert: bool,
    problems: Problems,
) -> None:
    """Notes the tensors of a parameter whose shape or dtype does not fit it."""
    expected = shape[1:] if slot.rule.stacked else shape
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        problems.add("dtype", f"parameter {slot.path} is {dtype}, which JAX cuts to 32 bits")
    for name in slot.names:
        tensor = source.get(name)
        if tensor is None:
            continue
        where = f"{name} {list(tensor.shape)} for parameter {slot.path} {list(shape)}"
        try:
            made = slot.rule.transform.target_shape(tensor.shape)
            if made != expected:
                layer = " per layer" if slot.rule.stacked else ""
                text = f"{where}: becomes {list(made)}, expected {list(expected)}{layer}"
                problems.add("shape", f"{text} ({tensor.origin})")
        except ShapeMismatch as error:
            problems.add("shape", f"{where}: {error} ({tensor.origin})")
        convertible = may_convert and tensor.dtype in _FLOATS and dtype in _FLOATS
        if tensor.dtype != dtype and not convertible:
            text = f"{name} is {tensor.dtype}, parameter {slot.path} is {dtype} ({tensor.origin})"
            problems.add("dtype", text + _dtype_advice(tensor.dtype, dtype))


def _dtype_advice(found: np.dtype, wanted: np.dtype) -> str:
    if wanted not in _FLOATS:
        return ""
    if found in _FLOATS:
        return "; give dtype= to convert"
    if found.itemsize == 1 or found.kind in "iu":
        why = "quantised numbers mean nothing without their scales"
        return f"; {why}: use weights that are not, or a GGUF file"
    return "; it is not cut down without being asked: store it anew"


def _check_copy(source: WeightSource, name: str, other: str, problems: Problems) -> None:
    """Notes an ignored tensor that is not what the table says it repeats."""
    if other not in source:
        problems.add("content", f"{name} must equal {other}, which is not there")
        return
    ours, theirs = source[name], source[other]
    if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
        text = f"{list(ours.shape)} {ours.dtype} and {list(theirs.shape)} {theirs.dtype}"
        problems.add("content", f"{name} must equal {other}, but they are {text}")
        return
    rest = full_index(ours.shape)[1:]
    row_bytes = math.prod(ours.shape[1:]) * ours.dtype.itemsize
    step = max(1, _COMPARE_BYTES // max(row_bytes, 1))
    length = ours.shape[0] if ours.shape else 1
    for first in range(0, length, step):
        part = (slice(first, min(first + step, length)), *rest) if ours.shape else None
        if ours.read(part).tobytes() != theirs.read(part).tobytes():
            problems.add("content", f"{name} must equal {other}, but the numbers differ")
            return


def _parameter(
    pool: Executor, slot: Slot, source: WeightSource, leaf: Any, dtype: np.dtype
) -> jax.Array:
    shape = tuple(leaf.shape)
    tensors = [source[name] for name in slot.names]
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return jax.device_put(_read(pool, slot, tensors, full_index(shape), dtype))
    parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def part(index: Index) -> np.ndarray:
        # Devices that hold the same part share one reading of it.
        bounds = tuple(axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True))
        if bounds not in parts:
            plain = tuple(slice(*bound) for bound in bounds)
            parts[bounds] = _read(pool, slot, tensors, plain, dtype)
        return parts[bounds]

    return jax.make_array_from_callback(shape, sharding, part, dtype=dtype)


def _read(
    pool: Executor, slot: Slot, tensors: list[LazyTensor], index: Index, dtype: np.dtype
) -> np.ndarray:
    """The part `index` of a parameter, as a fresh array of `dtype`, read by all threads at once."""
    out = _empty(index_shape(index), dtype)
    layers = [(out, tensors[0], index)]
    if slot.rule.stacked:
        layers = [(*each, index[1:]) for each in zip(out, tensors[index[0]], strict=True)]
    transform = slot.rule.transform

    def fill(place: np.ndarray, tensor: LazyTensor, part: Index) -> None:
        array = read_part(transform, tensor.read, part, tensor.shape)
        with np.errstate(over="ignore"):  # said below, in words
            copy_into(place, array)
        if dtype == np.float16 != array.dtype and np.isinf(place).any() > np.isinf(array).any():
            raise WeightError(f"parameter {slot.path}: {tensor.origin} has numbers beyond float16")

    pieces = [
        pool.submit(fill, room[place], tensor, part)
        for room, tensor, wanted in layers
        for place, part in _stretches(transform, tensor, wanted)
    ]
    for piece in pieces:
        piece.result()
    return out


def _stretches(
    transform: Transform | Chain, tensor: LazyTensor, index: Index
) -> Iterator[tuple[Index, Index]]:
    """Cuts `index` into pieces that come from a few rows of the tensor each.

    Small pieces stay in the processor's cache on their way, and little lies beside the model.

    Yields:
      The piece's place in the array for `index`, and its index of the parameter.
    """
    sizes = index_shape(index)
    axis = _row_axis(transform, tensor.shape, index)
    if axis is None:
        yield full_index(sizes), index
        return
    each = math.prod(sizes) // sizes[axis] * tensor.dtype.itemsize
    step = max(1, _STRETCH_BYTES // max(each, 1))
    start, stop = index[axis].start, index[axis].stop
    for first in range(start, stop, step):
        last = min(first + step, stop)
        before, after = index[:axis], index[axis + 1 :]
        place = slice(first - start, last - start)
        yield (
            (*full_index(index_shape(before)), place, *full_index(index_shape(after))),
            (*before, slice(first, last), *after),
        )


def _row_axis(transform: Transform | Chain, shape: Shape, index: Index) -> int | None:
    """The axis of the parameter along which the tensor's rows lie; None if there is none to cut."""
    if not shape or not index or 0 in index_shape(index):
        return None
    rows = index_shape(source_index(transform, index, shape))[0]
    for axis, whole in enumerate(index):
        one = (*index[:axis], slice(whole.start, whole.start + 1), *index[axis + 1 :])
        if index_shape(source_index(transform, one, shape))[0] < rows:
            return axis
    return None


def _empty(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """An array that begins at a whole 64 bytes: JAX takes such memory over on a CPU, uncopied."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def copy_into(out: np.ndarray, array: np.ndarray) -> None:
    """`out[...] = array`, several times faster where one is the transpose of the other.

    Rows a power of two apart fall into the same few cache lines, which a transposed copy then
    fetches again for each number. So it goes through rows that are a cache line longer.
    """
    bits = _BITS.get(out.dtype.itemsize)
    if array.dtype == out.dtype and bits is not None:
        # NumPy copies numbers of its own faster than those of other packages (bfloat16).
        out, array = out.view(bits), array.view(bits)
    if _fastest_axis(out) != _fastest_axis(array):
        order = np.argsort([-stride for stride in array.strides], kind="stable")
        *outer, inner = (array.shape[axis] for axis in order)
        spare = _CACHE_LINE_BYTES // out.dtype.itemsize
        padded = np.empty((*outer, inner + spare), out.dtype)[..., :inner]
        padded = padded.transpose(np.argsort(order))
        padded[...] = array
        array = padded
    out[...] = array


def _fastest_axis(array: np.ndarray) -> int:
    """The axis whose neighbours are nearest in memory; -1 without an axis of two or more."""
    axes = [axis for axis, size in enumerate(array.shape) if size > 1]
    return min(axes, key=lambda axis: abs(array.strides[axis]), default=-1)


def export(
    params: Any, table: Table, *, names: Iterable[str] | None = None
) -> dict[str, np.ndarray]:
    """Parameters under their upstream names, in the upstream layout, bit for bit.

    With arrays spread over several processes all of them must call this; each gets everything.

    Args:
      params: tree of arrays that the table describes in full.
      table: the architecture's mapping table.
      names: upstream names to be written (those of the checkpoint loaded, say): they decide
        between alternatives and prefixes. None: the first of each.

    Returns:
      Tensor by name; what the table ignores is not in it.

    Raises:
      WeightError: a parameter without a rule, two that would have the same name, or one that has
        grown into its padding.
    """
    leaves, _ = flatten(params)
    problems = Problems()
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    found = match(table, names or (), shapes, Problems())
    clean = match(table, _written(found.slots), shapes, problems)
    problems.raise_if_any(f"parameters do not fit the table {table.name!r}")
    tensors = {}
    for path, slot in clean.slots.items():
        host = on_host(leaves[path])
        layers = host if slot.rule.stacked else (host,)
        for name, layer in zip(slot.names, layers, strict=True):
            try:
                upstream = slot.rule.transform.invert(layer)
            except NotUpstream as error:
                problems.add("content", f"{name} from parameter {path}: {error}")
                continue
            # A copy: the host may see the very memory that a training step is given to reuse.
            tensors[name] = np.empty(upstream.shape, upstream.dtype)
            copy_into(tensors[name], upstream)
    problems.raise_if_any(f"parameters cannot be written by the table {table.name!r}")
    return tensors


def _written(slots: Mapping[str, Slot]) -> list[str]:
    return [name for slot in slots.values() for name in slot.names]


def save(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file; it appears under its name only when it is whole.

    Args:
      path: file to write or replace; its folder is made if need be.
      tensors: arrays by name, on the host.

    Raises:
      WeightError: a dtype that the format does not have.
    """
    kinds = {dtype: kind for kind, dtype in SAFETENSORS_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    # The format wants every tensor aligned to its own dtype: widest first.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    for name, array in ordered:
        kind = kinds.get(array.dtype)
        if kind is None:
            raise WeightError(f"{path}: tensor {name!r}: safetensors has no dtype {array.dtype}")
        offsets = [place, place + array.nbytes]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": offsets}
        place += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with writing_whole(target) as temporary, temporary.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, array in ordered:
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
