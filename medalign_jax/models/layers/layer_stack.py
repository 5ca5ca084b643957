"""A language model's layers as one scan over stacked weights: compile time is that of one.

Two things may happen to a layer's weights on their way into it, inside the scan and inside what
`jax.checkpoint` computes anew: low-rank factors are added (`adapted`), and a caller's hook sees
them (to gather shards, say). See `use_weights`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# Most layers that are unrolled on a CPU: the time to compile grows with them.
_UNROLLED = 8


def stacked_init(block: nn.Module, depth: int) -> Callable[..., Any]:
    """An initialiser of ``depth`` copies of ``block``'s parameters, stacked on axis 0.

    Args:
      block: a detached module (``parent=None``).
      depth: number of layers.

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


def low_rank(module: nn.Module, *names: str) -> dict[str, Any]:
    """What the variable collection "lora" holds for some of a module's parameters.

    The collection mirrors "params" at the adapted kernels: ``{"a": (..., in, r), "b": (..., r,
    out)}`` stands at the kernel's place, stacked layers first (LoRA, arXiv 2106.09685; the factor
    alpha / r is already in b).

    Args:
      module: a bound module.
      names: its parameters or submodules that can be adapted.

    Returns:
      {name: its part of the collection, or None}.

    Raises:
      ValueError: where the collection names anything else: it would have no effect.
    """
    held = module.variables.get("lora", {})
    if unknown := sorted(set(held) - set(names)):
        raise ValueError(
            f"low-rank factors for {', '.join(unknown)} of {type(module).__name__} have no effect; "
            f"only {', '.join(names)} can be adapted"
        )
    return {name: held.get(name) for name in names}


def adapted(weights: Any, factors: Any) -> Any:
    """A layer's weights with ``kernel + a @ b`` wherever there are factors for a kernel.

    Args:
      weights: nested dict of arrays.
      factors: None, or a part of that nesting with ``{"a": (in, r), "b": (r, out)}`` for kernels.

    Returns:
      Like ``weights``; an adapted kernel is float32, so that small steps are not rounded away.

    Raises:
      ValueError: for factors whose kernel does not exist or has another shape.
    """
    if factors is None:
        return weights
    if not isinstance(weights, Mapping):
        a, b = (factors[name].astype(jnp.float32) for name in ("a", "b"))
        if weights.shape != (*a.shape[:-1], b.shape[-1]):
            raise ValueError(f"factors {a.shape} and {b.shape} do not fit a kernel {weights.shape}")
        return weights.astype(jnp.float32) + jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    if unknown := sorted(set(factors) - set(weights)):
        raise ValueError(f"low-rank factors for {unknown}, but a layer has {sorted(weights)}")
    return {**weights, **{key: adapted(weights[key], each) for key, each in factors.items()}}


def through(x: jax.Array, factors: Mapping[str, jax.Array]) -> jax.Array:
    """What a kernel's factors add to its output: (..., in) to (..., out), in the dtype of x."""
    return (x @ factors["a"].astype(x.dtype)) @ factors["b"].astype(x.dtype)


def use_weights(weights: Any, factors: Any, hook: Callable[[Any], Any] | None) -> Any:
    """A layer's weights as the layer uses them: adapted first, then through the hook.

    In this order the sum is made of shards, and only one array per kernel has to be gathered.
    """
    weights = adapted(weights, factors)
    return weights if hook is None else hook(weights)


def scan_layers(
    step: Callable[[jax.Array, Any], jax.Array], stacked: Any, x: jax.Array, wanted: tuple[int, ...]
) -> dict[int, jax.Array]:
    """Runs the first ``max(wanted)`` layers and keeps the hidden states that were asked for.

    Args:
      step: ``(x, layer) -> x``, where ``layer`` is one slice of ``stacked``.
      stacked: pytree whose leaves all have the layers on axis 0 (weights, per-layer settings).
      x: hidden state 0, (B, T, W).
      wanted: sorted indices from ``normalise_layers``.

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
    # On a CPU a loop stacks what its gradient needs by copying; a small model can do without.
    unroll = deepest if jax.default_backend() == "cpu" and deepest <= _UNROLLED else 1
    (x, kept), _ = jax.lax.scan(body, (x, kept), (jnp.asarray(slots), first), unroll=unroll)
    return {**states, **{index: kept[i] for i, index in enumerate(inner)}, deepest: x}
