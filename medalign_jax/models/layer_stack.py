"""A language model's layers as one scan over stacked weights: compile time is that of one."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def stacked_init(block: nn.Module, depth: int) -> Callable[..., Any]:
    """An initialiser of ``depth`` copies of ``block``'s parameters, stacked on axis 0.

    Args:
      block: A detached module (``parent=None``).
      depth: Number of layers.

    Returns:
      ``init(key, *inputs) -> params`` for ``Module.param``, each leaf (depth, ...).
    """

    def init(key: jax.Array, *inputs: Any) -> Any:
        return jax.vmap(lambda k: block.init(k, *inputs)["params"])(jax.random.split(key, depth))

    return init


def normalise_layers(layers: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """Hidden-state indices (0 = embeddings, ``depth`` or -1 = last) as sorted numbers from 0.

    Raises:
      ValueError: for an empty request or an index outside [-depth - 1, depth].
    """
    if not layers:
        raise ValueError("at least one hidden state has to be asked for; layers is empty")
    for layer in layers:
        if not -depth - 1 <= layer <= depth:
            raise ValueError(
                f"hidden state {layer} does not exist: this model has {depth} layers, "
                f"so 0 (embeddings) to {depth}, or -{depth + 1} to -1"
            )
    return tuple(sorted({layer % (depth + 1) for layer in layers}))


def scan_layers(
    step: Callable[[jax.Array, Any], jax.Array], stacked: Any, x: jax.Array, wanted: tuple[int, ...]
) -> dict[int, jax.Array]:
    """Runs the first ``max(wanted)`` layers and keeps the hidden states that were asked for.

    Args:
      step: ``(x, layer) -> x``, where ``layer`` is one slice of ``stacked``.
      stacked: Pytree whose leaves all have the layers on axis 0 (weights, per-layer settings).
      x: Hidden state 0, (B, T, W).
      wanted: Sorted indices from ``normalise_layers``.

    Returns:
      ``{index: (B, T, W)}`` with exactly the wanted indices. Stopping before the last layer copies
      the weights of the layers that run; build a shallower model to avoid that.
    """
    deepest = wanted[-1]
    states = {0: x} if wanted[0] == 0 else {}
    if deepest == 0:
        return states
    inner = [index for index in wanted[:-1] if index > 0]
    # Layer i writes its output to slot[i]; a slot outside the buffer is dropped.
    slots = np.full(deepest, len(inner), np.int32)
    slots[[index - 1 for index in inner]] = np.arange(len(inner))

    def body(carry: tuple[jax.Array, jax.Array], layer: Any) -> tuple[Any, None]:
        x, kept = carry
        slot, weights = layer
        x = step(x, weights)
        return (x, kept.at[slot].set(x, mode="drop") if inner else kept), None

    first = jax.tree.map(lambda leaf: leaf[:deepest] if len(leaf) > deepest else leaf, stacked)
    kept = jnp.zeros((len(inner), *x.shape), x.dtype)
    (x, kept), _ = jax.lax.scan(body, (x, kept), (jnp.asarray(slots), first))
    return {**states, **{index: kept[i] for i, index in enumerate(inner)}, deepest: x}
