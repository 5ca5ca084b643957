"""What a traced or compiled step costs: floating-point operations, memory, messages."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend import core

GIB = 2**30


def matrix_flops(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> float:
    """Floating-point operations of all matrix products and convolutions, over all devices.

    A multiplication and an addition count as two. What a scan repeats counts as often as it runs
    (a compiler's own analysis counts it once), what is computed anew backwards counts again. Of a
    conditional the dearest branch counts; of a loop without a known length, one turn; of a Pallas
    kernel, all blocks of its grid.
    """
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    return float(sum(_equation_flops(equation) for equation in jaxpr.eqns))


def _equation_flops(equation: core.JaxprEqn) -> float:
    name, params = equation.primitive.name, equation.params
    if name in _PRODUCTS:
        return _PRODUCTS[name](equation)
    inner = [matrix_flops(each) for each in _inner(params)]
    if name == "cond":
        return max(inner, default=0.0)
    return _repeats(name, params) * sum(inner)


def _repeats(name: str, params: dict[str, Any]) -> int:
    if name == "scan":
        return params["length"]
    if name == "shard_map":
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    if name == "pallas_call":
        return math.prod(int(size) for size in params["grid_mapping"].grid)
    return 1


def _inner(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, core.ClosedJaxpr | core.Jaxpr):
                yield each


def _product_flops(equation: core.JaxprEqn) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    out = equation.outvars[0].aval.shape
    return 2.0 * math.prod(out) * math.prod(shape[axis] for axis in contracted)


def _convolution_flops(equation: core.JaxprEqn) -> float:
    numbers = equation.params["dimension_numbers"]
    kernel = equation.invars[1].aval.shape
    taps = math.prod(kernel[axis] for axis in numbers.rhs_spec[1:])
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * taps


_PRODUCTS: dict[str, Callable[[core.JaxprEqn], float]] = {
    "dot_general": _product_flops,
    "conv_general_dilated": _convolution_flops,
}


class Memory(NamedTuple):
    """Bytes of one device in a compiled program.

    arguments: state, frozen parameters and batch.
    outputs: of which `shared` lie where donated arguments lay.
    temporary: everything in between.
    reported: the compiler's own peak; 0 where it reports none.
    """

    arguments: int
    outputs: int
    shared: int
    temporary: int
    reported: int

    @property
    def peak(self) -> int:
        """The larger of the sum of all parts and the compiler's own number."""
        total = self.arguments + self.outputs - self.shared + self.temporary
        return max(total, self.reported)


def memory(compiled: jax.stages.Compiled) -> Memory:
    """What a compiled program needs on each device."""
    found = compiled.memory_analysis()
    return Memory(
        found.argument_size_in_bytes,
        found.output_size_in_bytes,
        found.alias_size_in_bytes,
        found.temp_size_in_bytes,
        getattr(found, "peak_memory_in_bytes", 0),
    )


_KINDS = (
    "all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute",
    "reduce-scatter",
)  # fmt: skip
_MESSAGES = re.compile(rf" = \(*[a-z0-9]+\[.*? (?P<kind>{'|'.join(_KINDS)})(?:-start)?\(")


def messages(text: str) -> dict[str, int]:
    """How many collectives of each kind the text of a compiled program has.

    One inside a loop counts once, however often the loop runs. TPU compilers show a reduce-scatter
    as an all-reduce whose output is sliced, and for some chips a gather as an all-reduce of slices.
    """
    kinds = (match["kind"] for line in text.splitlines() if (match := _MESSAGES.search(line)))
    return dict(sorted(Counter(kinds).items()))
