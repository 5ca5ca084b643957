"""The grammar of a mapping table: which upstream tensor fills which parameter.

A table is read like a specification, one line per kind of tensor:

    Table(
        name="toy",
        prefixes=("", "encoder."),
        rules=(
            Rule("{prefix}embed.weight", "embed/embedding"),
            Rule("{prefix}proj.weight", "proj/kernel", LINEAR),
            Rule("{prefix}layers.{i}.fc.weight", "layers/fc/kernel", LINEAR),
            Rule("{prefix}blocks.{i}.norm.weight", "blocks_{i}/norm/scale"),
            Rule(("{prefix}norm.gamma", "{prefix}norm.weight"), "norm/scale"),
        ),
        ignores=(Ignore("{prefix}*.position_ids", "a counter 0..n, made anew"),),
    )

*One tensor, one place.* A tensor fills one parameter, or one layer of a stacked parameter; nothing
is added, split off or averaged, so that every table can be read backwards (`load.export`).

`Rule(upstream, path, transform)`
    `upstream` is the published name; `path` joins the keys of the parameter tree with `/`, below
    the collection name (`blocks_0/attn/qkv/kernel`, without `params/`).
`{i}` is a layer number, written in plain decimals.
    In `upstream` and `path`: one module per layer (`blocks_{i}`).
    In `upstream` only: the layers are stacked on axis 0 of the parameter (scanned modules); the
    length of that axis says how many layers there are. `layers=(...)` names the upstream layers
    of a rule, in stacking order, where they are not 0, 1, ..., n-1.
    In `path` only: an error in the table.
`{prefix}` is one of the table's `prefixes`.
    The same one throughout a checkpoint. It is the one under which any rule finds a tensor; if two
    do, loading fails as ambiguous. Names without `{prefix}` are taken as they stand.
Alternatives
    A tuple of upstream names: exactly one of them may be there. Export writes the first one, or
    the one among the names it is given to write.
Transforms
    Read from upstream to parameter: `LINEAR` (out, in) -> (in, out), `CONV1D`, `CONV2D`, and, to be
    joined in reading order by `chain(...)`: `Permute`, `SplitAxis`, `MergeAxes`, `Squeeze`,
    `PadAxis`. All only move numbers (`PadAxis` adds zeros), check the shape they are given and can
    be undone. One dimension per head, as modules of other packages may have it:
    `chain(LINEAR, SplitAxis(1, (heads, width)))`.
`Ignore(pattern, reason)`
    Names tensors that are not wanted. `*` stands for anything, dots too; `{i}` and `{prefix}` as
    above. `equal_to` names the tensor that an ignored one must equal bit for bit: a stored copy of
    a tied weight is checked, not trusted.

A tensor that no line names, a parameter that no line fills, or anything claimed twice is an error.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

Shape = tuple[int, ...]
Index = tuple[slice, ...]


class ShapeMismatch(ValueError):
    """A transform was given a shape that it is not made for; the loader adds the names."""


class NotUpstream(ValueError):
    """A parameter holds numbers that upstream has no place for; the exporter adds the names."""


class Transform(Protocol):
    """A way to lay out the numbers of a tensor anew, that can be undone and read in slices."""

    def target_shape(self, shape: Shape) -> Shape:
        """Shape of the parameter made from a tensor of `shape`; raises ShapeMismatch."""

    def apply(self, array: np.ndarray) -> np.ndarray:
        """From upstream to parameter."""

    def invert(self, array: np.ndarray) -> np.ndarray:
        """From parameter to upstream; raises NotUpstream where numbers would be lost."""

    def pull_back(self, index: Index, shape: Shape) -> tuple[Index, Index]:
        """What to read of a tensor of `shape` in order to get `index` of the parameter.

        Returns `(source, rest)` so that `apply(tensor[source])[rest]` is the parameter's `index`.
        Indices hold one slice per axis, with plain start and stop and step 1.
        """


def full_index(shape: Shape) -> Index:
    """The index of everything in an array of `shape`."""
    return tuple(slice(0, size) for size in shape)


def index_shape(index: Index) -> Shape:
    """The shape of what an index takes out of an array."""
    return tuple(axis.stop - axis.start for axis in index)


@dataclasses.dataclass(frozen=True)
class Identity:
    """Leaves a tensor as it is."""

    def target_shape(self, shape: Shape) -> Shape:
        return shape

    def apply(self, array: np.ndarray) -> np.ndarray:
        return array

    def invert(self, array: np.ndarray) -> np.ndarray:
        return array

    def pull_back(self, index: Index, shape: Shape) -> tuple[Index, Index]:
        return index, full_index(index_shape(index))


@dataclasses.dataclass(frozen=True)
class Permute:
    """Reorders the axes: axis `t` of the parameter is axis `axes[t]` of the tensor."""

    axes: tuple[int, ...]

    def target_shape(self, shape: Shape) -> Shape:
        if len(shape) != len(self.axes):
            raise ShapeMismatch(f"{len(self.axes)} axes expected, found {len(shape)}")
        return tuple(shape[axis] for axis in self.axes)

    def apply(self, array: np.ndarray) -> np.ndarray:
        return array.transpose(self.axes)

    def invert(self, array: np.ndarray) -> np.ndarray:
        return array.transpose(tuple(int(axis) for axis in np.argsort(self.axes)))

    def pull_back(self, index: Index, shape: Shape) -> tuple[Index, Index]:
        source = [slice(0, 0)] * len(index)
        for target_axis, source_axis in enumerate(self.axes):
            source[source_axis] = index[target_axis]
        return tuple(source), full_index(index_shape(index))


@dataclasses.dataclass(frozen=True)
class SplitAxis:
    """Splits `axis` of the tensor, row-major, into axes of `sizes` (heads and head width)."""

    axis: int
    sizes: tuple[int, ...]

    def target_shape(self, shape: Shape) -> Shape:
        if self.axis >= len(shape) or shape[self.axis] != int(np.prod(self.sizes)):
            raise ShapeMismatch(f"axis {self.axis} must split into {self.sizes}")
        return shape[: self.axis] + self.sizes + shape[self.axis + 1 :]

    def apply(self, array: np.ndarray) -> np.ndarray:
        return _split(array, self.axis, self.sizes)

    def invert(self, array: np.ndarray) -> np.ndarray:
        return _merge(array, self.axis, len(self.sizes))

    def pull_back(self, index: Index, shape: Shape) -> tuple[Index, Index]:
        end = self.axis + len(self.sizes)
        head, parts, tail = index[: self.axis], index[self.axis : end], index[end:]
        inner = int(np.prod(self.sizes[1:]))
        merged = slice(parts[0].start * inner, parts[0].stop * inner)
        rest = (slice(0, parts[0].stop - parts[0].start), *parts[1:])
        source = (*head, merged, *tail)
        return source, (*full_index(index_shape(head)), *rest, *full_index(index_shape(tail)))


@dataclasses.dataclass(frozen=True)
class MergeAxes:
    """Joins the axes of `sizes` that begin at `axis` of the tensor, row-major, into one."""

    axis: int
    sizes: tuple[int, ...]

    def target_shape(self, shape: Shape) -> Shape:
        end = self.axis + len(self.sizes)
        if shape[self.axis : end] != self.sizes:
            raise ShapeMismatch(f"axes {self.axis}..{end - 1} must be {self.sizes}")
        return (*shape[: self.axis], int(np.prod(self.sizes)), *shape[end:])

    def apply(self, array: np.ndarray) -> np.ndarray:
        return _merge(array, self.axis, len(self.sizes))

    def invert(self, array: np.ndarray) -> np.ndarray:
        return _split(array, self.axis, self.sizes)

    def pull_back(self, index: Index, shape: Shape) -> tuple[Index, Index]:
        head, part, tail = index[: self.axis], index[self.axis], index[self.axis + 1 :]
        inner = int(np.prod(self.sizes[1:]))
        first, last = part.start // inner, -(-part.stop // inner)
        source = (*head, slice(first, last), *full_index(self.sizes[1:]), *tail)
        rest = slice(part.start - first * inner, part.stop - first * inner)
        return source, (*full_index(index_shape(head)), rest, *full_index(index_shape(tail)))


@dataclasses.dataclass(frozen=True)
class Squeeze:
    """Drops `axis` of the tensor, which must have size 1."""

    axis: int

    def target_shape(self, shape: Shape) -> Shape:
        if self.axis >= len(shape) or shape[self.axis] != 1:
            raise ShapeMismatch(f"axis {self.axis} must have size 1")
        return shape[: self.axis] + shape[self.axis + 1 :]

    def apply(self, array: np.ndarray) -> np.ndarray:
        return array.squeeze(self.axis)

    def invert(self, array: np.ndarray) -> np.ndarray:
        return np.expand_dims(array, self.axis)

    def pull_back(self, index: Index, shape: Shape) -> tuple[Index, Index]:
        source = (*index[: self.axis], slice(0, 1), *index[self.axis :])
        return source, full_index(index_shape(index))


@dataclasses.dataclass(frozen=True)
class PadAxis:
    """Lengthens `axis` of the tensor from `size` to `padded` with zeros at its end.

    For an axis that has to divide by a mesh axis or a tile. The way back drops the zeros.
    """

    axis: int
    size: int
    padded: int

    def __post_init__(self) -> None:
        if not 0 <= self.size <= self.padded:
            raise ValueError(f"an axis of {self.size} cannot be padded to {self.padded}")

    def target_shape(self, shape: Shape) -> Shape:
        if self.axis >= len(shape) or shape[self.axis] != self.size:
            raise ShapeMismatch(f"axis {self.axis} must have size {self.size}")
        return (*shape[: self.axis], self.padded, *shape[self.axis + 1 :])

    def apply(self, array: np.ndarray) -> np.ndarray:
        # By as much for a slice as for the whole: `pull_back` drops what is too much.
        widths = [(0, 0)] * array.ndim
        widths[self.axis] = (0, self.padded - self.size)
        return np.pad(array, widths)

    def invert(self, array: np.ndarray) -> np.ndarray:
        before = (slice(None),) * self.axis
        if np.any(array[(*before, slice(self.size, None))] != 0):
            raise NotUpstream(f"axis {self.axis} is not zero everywhere from {self.size} on")
        return array[(*before, slice(0, self.size))]

    def pull_back(self, index: Index, shape: Shape) -> tuple[Index, Index]:
        part = index[self.axis]
        kept = slice(min(part.start, self.size), min(part.stop, self.size))
        source = (*index[: self.axis], kept, *index[self.axis + 1 :])
        return source, full_index(index_shape(index))


@dataclasses.dataclass(frozen=True)
class Chain:
    """Several transforms, the first one nearest to the upstream tensor; built by `chain`.

    Read in slices by `read_part`, step by step.
    """

    steps: tuple[Transform, ...]

    def target_shape(self, shape: Shape) -> Shape:
        for step in self.steps:
            shape = step.target_shape(shape)
        return shape

    def apply(self, array: np.ndarray) -> np.ndarray:
        for step in self.steps:
            array = step.apply(array)
        return array

    def invert(self, array: np.ndarray) -> np.ndarray:
        for step in reversed(self.steps):
            array = step.invert(array)
        return array


def chain(*steps: Transform | Chain) -> Chain:
    """Joins transforms in reading order, upstream first."""
    nested = [step.steps if isinstance(step, Chain) else (step,) for step in steps]
    return Chain(tuple(step for inner in nested for step in inner))


def source_index(transform: Transform | Chain, index: Index, shape: Shape) -> Index:
    """The smallest box of a tensor of `shape` that holds the part `index` of the parameter."""
    return _pull_back(_steps(transform), index, shape)[0]


def read_part(
    transform: Transform | Chain,
    read: Callable[[Index], np.ndarray],
    index: Index,
    shape: Shape,
) -> np.ndarray:
    """The part `index` of the parameter that `transform` makes from a tensor of `shape`.

    Args:
      read: gives a part of the tensor; asked once, for `source_index`.
      index: one slice per axis of the parameter, with plain start and stop.
    """
    steps = _steps(transform)
    wanted, rests = _pull_back(steps, index, shape)
    array = read(wanted)
    for step, rest in zip(steps, rests, strict=True):
        array = step.apply(array)[rest]
    return array


def _steps(transform: Transform | Chain) -> tuple[Transform, ...]:
    return transform.steps if isinstance(transform, Chain) else (transform,)


def _pull_back(
    steps: tuple[Transform, ...], index: Index, shape: Shape
) -> tuple[Index, list[Index]]:
    """What to read for `index`, and what to keep after each step."""
    shapes = [shape]
    for step in steps[:-1]:
        shapes.append(step.target_shape(shapes[-1]))
    rests = []
    for step, before in zip(reversed(steps), reversed(shapes), strict=True):
        index, rest = step.pull_back(index, before)
        rests.append(rest)
    return index, rests[::-1]


def _split(array: np.ndarray, axis: int, sizes: Shape) -> np.ndarray:
    # The first part is worked out, because a slice of the parameter holds fewer of it.
    inner = int(np.prod(sizes[1:]))
    first = array.shape[axis] // inner
    return array.reshape(*array.shape[:axis], first, *sizes[1:], *array.shape[axis + 1 :])


def _merge(array: np.ndarray, axis: int, count: int) -> np.ndarray:
    joined = int(np.prod(array.shape[axis : axis + count]))
    return array.reshape(*array.shape[:axis], joined, *array.shape[axis + count :])


IDENTITY = Identity()
LINEAR = Permute((1, 0))  # torch.nn.Linear.weight (out, in) -> flax Dense kernel (in, out)
CONV1D = Permute((2, 1, 0))  # (out, in, width) -> (width, in, out)
CONV2D = Permute((2, 3, 1, 0))  # (out, in, height, width) -> (height, width, in, out)

_FIELD = re.compile(r"\{(\w*)\}")


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a table: see the grammar at the top of this module.

    Attributes:
      upstream: published name, or a tuple of alternatives.
      path: place in the parameter tree, keys joined by `/`.
      transform: layout of the parameter against that of the tensor (of one layer, if stacked).
      layers: upstream layer numbers, in order; None means 0, 1, ..., as many as there are.
    """

    upstream: str | tuple[str, ...]
    path: str
    transform: Transform = IDENTITY
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in self.names:
            _check_fields(name, {"i", "prefix"})
            if name.count("{i}") > 1:
                raise ValueError(f"rule {name!r}: {{i}} may stand once in an upstream name")
            if ("{i}" in name) != ("{i}" in self.names[0]):
                raise ValueError(f"rule for {self.path!r}: {{i}} in some alternatives only")
        _check_fields(self.path, {"i"})
        if "{i}" in self.path and not self.layered:
            raise ValueError(f"rule for {self.path!r}: {{i}} in the path but not upstream")
        if self.layers is not None and not self.layered:
            raise ValueError(f"rule for {self.path!r}: layers given, but no {{i}}")

    @property
    def names(self) -> tuple[str, ...]:
        """The alternatives."""
        return (self.upstream,) if isinstance(self.upstream, str) else self.upstream

    @property
    def layered(self) -> bool:
        """Whether the rule is of numbered layers."""
        return "{i}" in self.names[0]

    @property
    def stacked(self) -> bool:
        """Whether the layers are stacked on axis 0 of one parameter."""
        return self.layered and "{i}" not in self.path


@dataclasses.dataclass(frozen=True)
class Ignore:
    """Upstream tensors that are left out on purpose.

    Attributes:
      pattern: their names; `*` stands for anything.
      reason: why, in a few words, for the reader of the table.
      equal_to: upstream name of the tensor that they have to equal, bit for bit.
    """

    pattern: str
    reason: str
    equal_to: str | None = None

    def __post_init__(self) -> None:
        _check_fields(self.pattern, {"i", "prefix"})
        _check_fields(self.equal_to or "", {"prefix"})


@dataclasses.dataclass(frozen=True)
class Table:
    """All lines of an architecture.

    Attributes:
      name: how errors call it.
      rules: what fills which parameter.
      ignores: what is left out.
      prefixes: what `{prefix}` may stand for.
    """

    name: str
    rules: Sequence[Rule]
    ignores: Sequence[Ignore] = ()
    prefixes: Sequence[str] = ("",)


def first_layers(table: Table, depth: int, published: int) -> Table:
    """The table of a model that has only the first of the published layers.

    Args:
      table: of the whole model; its stacked layers are parameters below ``layers/``.
      depth: layers of the model.
      published: layers of the checkpoint; the later ones are left out.
    """
    rules, stems = [], {}
    for rule in table.rules:
        if rule.stacked and rule.path.startswith("layers/"):
            stems |= {name.partition("{i}")[0]: None for name in rule.names}
            rule = dataclasses.replace(rule, layers=tuple(range(depth)))
        rules.append(rule)
    reason = f"only the first {depth} layers are taken"
    left_out = [Ignore(f"{s}{n}.*", reason) for s in stems for n in range(depth, published)]
    return dataclasses.replace(table, rules=tuple(rules), ignores=(*table.ignores, *left_out))


def upstream_pattern(template: str, prefix: str) -> re.Pattern[str]:
    """Regular expression of a name; group `i` is the layer number, `*` stands for anything."""
    parts = re.split(r"(\{prefix\}|\{i\}|\*)", template)
    meaning = {"{prefix}": re.escape(prefix), "{i}": r"(?P<i>0|[1-9]\d*)", "*": ".*"}
    return re.compile("".join(meaning.get(part, re.escape(part)) for part in parts))


def path_pattern(template: str) -> re.Pattern[str]:
    """Regular expression of a parameter path; group `i` is the layer number."""
    first, *others = template.split("{i}")
    # Later places of {i} have to repeat the first number.
    numbers = [r"(?P<i>0|[1-9]\d*)"] + [r"(?P=i)"] * max(len(others) - 1, 0)
    tail = "".join(number + re.escape(text) for number, text in zip(numbers, others, strict=False))
    return re.compile(re.escape(first) + tail)


def fill(template: str, prefix: str = "", layer: int | None = None) -> str:
    """The name that a template stands for."""
    name = template.replace("{prefix}", prefix)
    return name if layer is None else name.replace("{i}", str(layer))


def _check_fields(template: str, known: set[str]) -> None:
    unknown = set(_FIELD.findall(template)) - known
    if unknown:
        raise ValueError(f"{template!r}: unknown field {sorted(unknown)}; known: {sorted(known)}")
