"""Functions of a few positions at a time, so that only one chunk's intermediates exist at once.

`map_chunks` computes a chunk again in the backward pass, so that any function of the values can be
differentiated. `sum_chunks` is given the weight of each value, and makes a chunk's gradient while
the chunk is there.

Shapes: B rows, R positions, c positions of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from medalign_jax.core.errors import UserError

Tree = Any


def map_chunks(function: Callable[[Any], Any], arrays: Tree, chunk: int) -> Tree:
    """`function` of at most `chunk` positions at a time, recomputed in the backward pass.

    Args:
      function: tree of (B, c, ...) -> tree of (B, c, ...), position by position. It may close over
        parameters; their gradient is added up chunk by chunk.
      arrays: tree of (B, R, ...). Chunks are made equal and the last is filled up with zeros.
      chunk: most positions at a time.

    Returns:
      What `function` gives for all R positions.

    Raises:
      UserError: `chunk` below 1.
    """
    # The scan keeps the two computations of a chunk apart by itself.
    body = jax.checkpoint(function, prevent_cse=False)
    _, out = jax.lax.scan(lambda _, part: (None, body(part)), None, _cut(arrays, chunk))
    return _joined(out, arrays)


def sum_chunks(
    function: Callable[[jax.Array, Any], Mapping[str, jax.Array]],
    moving: jax.Array,
    still: Tree,
    weights: Mapping[str, jax.Array],
    chunk: int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted sum of a function's values, and the values; a chunk is computed once.

    Each chunk's gradient is made together with its values, of what is being differentiated and of
    nothing else.

    Args:
      function: (B, c, ...) of `moving` and of `still` -> named values (B, c), position by position.
        It may close over parameters.
      moving: (B, R, ...) float, to be differentiated.
      still: tree of (B, R, ...), not to be.
      weights: (B, R) by name of a value; values that are not named do not enter the sum. A position
        of weight 0 counts for nothing, even where its value is NaN.
      chunk: most positions at a time; the last chunk is filled up with zeros of weight 0.

    Returns:
      The sum, float32, differentiable by `moving` and by the parameters; and all values (B, R),
      which carry no gradient.

    Raises:
      UserError: `chunk` below 1.
    """
    parts = _cut((moving, still, dict(weights)), chunk)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), parts[:2])
    closed, params = jax.closure_convert(function, *shapes)
    total, values = _summed(closed, params, *parts)
    return total, jax.lax.stop_gradient(_joined(values, moving))


def gradient_only(x: jax.Array) -> jax.Array:
    """Zero that has the gradient of `x`, to be added to a value that has none."""
    return x - jax.lax.stop_gradient(x)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(function, params, moving, still, weights):
    """Sum and values of chunks (N, B, c, ...); `params` are the last arguments of `function`."""

    def turn(total, part):
        moving, still, weights = part
        value, out = _weighed(function(moving, still, *params), weights)
        return total + value, out

    return jax.lax.scan(turn, jnp.zeros((), jnp.float32), (moving, still, weights))


def _summed_forward(function, params, moving, still, weights):
    learns = [leaf.perturbed for leaf in params]
    params, moving, still, weights = jax.tree.map(
        lambda leaf: leaf.value, (params, moving, still, weights), is_leaf=_is_primal
    )
    learning, fixed = _parted(params, learns)

    def turn(carry, part):
        total, grads = carry
        moving, still, weights = part

        def loss(learning, moving):
            return _weighed(function(moving, still, *_whole(learning, fixed, learns)), weights)

        made = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (value, out), (by_params, by_moving) = made(learning, moving)
        return (total + value, jax.tree.map(jnp.add, grads, by_params)), (out, by_moving)

    start = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, learning))
    (total, grads), (out, by_moving) = jax.lax.scan(turn, start, (moving, still, weights))
    return (total, out), (_whole(grads, [None] * len(fixed), learns), by_moving)


def _summed_backward(function, saved, cotangents):
    del function
    scale = cotangents[0]  # those of the values are zero: `sum_chunks` cuts them off
    by_params, by_moving = jax.tree.map(lambda x: x * scale.astype(x.dtype), saved)
    return by_params, by_moving, None, None


_summed.defvjp(_summed_forward, _summed_backward, symbolic_zeros=True)


def _is_primal(leaf: Any) -> bool:
    return isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)


def _weighed(
    values: Mapping[str, jax.Array], weights: Mapping[str, jax.Array]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sum of the values that are named in `weights`, and all values."""
    each = [jnp.where(w == 0, 0.0, w * values[name]).sum() for name, w in weights.items()]
    return sum(each, jnp.zeros((), jnp.float32)), dict(values)


def _parted(leaves: Sequence[Any], chosen: Sequence[bool]) -> tuple[list[Any], list[Any]]:
    """The chosen leaves, and the others."""
    pairs = list(zip(leaves, chosen, strict=True))
    return [x for x, yes in pairs if yes], [x for x, yes in pairs if not yes]


def _whole(first: Sequence[Any], second: Sequence[Any], chosen: Sequence[bool]) -> list[Any]:
    """What `_parted` took apart."""
    first, second = iter(first), iter(second)
    return [next(first) if yes else next(second) for yes in chosen]


def _cut(arrays: Tree, chunk: int) -> Tree:
    """(B, R, ...) -> (N, B, c, ...): equal chunks, the last filled up with zeros.

    Raises:
      UserError: `chunk` below 1.
    """
    if chunk < 1:
        raise UserError(f"loss.chunk {chunk!r} must be at least 1 token")
    length = jax.tree.leaves(arrays)[0].shape[1]
    count = max(1, -(-length // chunk))
    size = -(-length // count)

    def cut(x: jax.Array) -> jax.Array:
        filled = jnp.pad(x, [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(filled.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)

    return jax.tree.map(cut, arrays)


def _joined(parts: Tree, like: Tree) -> Tree:
    """(N, B, c, ...) -> (B, R, ...), with the R of the arrays that were cut."""
    length = jax.tree.leaves(like)[0].shape[1]

    def join(x: jax.Array) -> jax.Array:
        joined = jnp.moveaxis(x, 0, 1)
        return joined.reshape(joined.shape[0], -1, *x.shape[3:])[:, :length]

    return jax.tree.map(join, parts)
