"""How a language model reads its weights: whole, or gathered from the shards of a mesh.

With fully sharded parameters (ZeRO-3, Rajbhandari et al. 2019, arXiv 1910.02054; FSDP) a device
holds a slice of every matrix along the mesh axis `fsdp`, and the rows of a batch that are its own.
A matrix is gathered right before its use, in the type of the computation, and forgotten after it.
Left to itself the compiler may move activations instead, or hold more than one layer; so it is
constrained explicitly at the places where a model touches its weights:

    layer    inside the scan over layers (and inside what is computed anew backwards)
    head     inside a chunk of response tokens
    lookup   every device looks all tokens up in its slice of the width; one all-to-all then gives
             each its own rows (a gathered table of 150,000 tokens would be a gigabyte)
    rows     hidden states stay with their rows

Gradients go the way back: what a device adds to a matrix is summed straight into the shards, and no
device holds the whole gradient of more than one matrix. None of this changes a value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from medalign_jax.core.mesh import BATCH, Rules, batch_ways, shardings

_AXIS = "fsdp"  # of the mesh, along which weights are gathered


@dataclasses.dataclass(frozen=True)
class WholeWeights:
    """Weights as they are: one device, or the compiler's own choice."""

    def layer(self, weights: Any) -> Any:
        """One layer's weights as the layer uses them."""
        return weights

    def head(self, name: str, kernel: jax.Array) -> jax.Array:
        """The matrix that logits go through; `name` is its path in the model's parameters."""
        del name
        return kernel

    def lookup(self, table: jax.Array, ids: jax.Array) -> jax.Array:
        """Rows (B, T, W) of a table (V, W) at ids (B, T), in the table's type."""
        return jnp.take(table, ids, axis=0)

    def rows(self, x: jax.Array) -> jax.Array:
        """Hidden states (B, ...), laid out by their rows."""
        return x


@dataclasses.dataclass(frozen=True)
class ShardedWeights(WholeWeights):
    """Weights laid out over a mesh by a sharding table; see the module's docstring.

    Attributes:
      mesh: axes (data, fsdp, tensor).
      rules: the table by which the model's parameters are laid out (`core.mesh`).
      dtype: of the computation, in which matrices travel.
    """

    mesh: Mesh
    rules: tuple
    dtype: Any = jnp.float32

    def layer(self, weights: Any) -> Any:
        """Gathers the matrices; what is not divided over `fsdp` stays as it is."""
        places = shardings({"layers": weights}, self.rules, self.mesh)["layers"]
        return jax.tree.map(self._whole, weights, places)

    def head(self, name: str, kernel: jax.Array) -> jax.Array:
        """The matrix gathered."""
        return self._whole(kernel, self._place(name, kernel))

    def lookup(self, table: jax.Array, ids: jax.Array) -> jax.Array:
        """All tokens in every slice of the width, then each device's own rows."""
        spec = self._place("embed/embedding", table).spec
        if not _divided(spec[-1:]):
            return super().lookup(table, ids)
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        found = super().lookup(table, jax.lax.with_sharding_constraint(ids, everywhere))
        slices = NamedSharding(self.mesh, PartitionSpec(None, None, spec[-1]))
        return self.rows(jax.lax.with_sharding_constraint(found, slices))

    def rows(self, x: jax.Array) -> jax.Array:
        """Rows over (data, fsdp) where they divide."""
        if x.shape[0] % batch_ways(self.mesh):
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, BATCH))

    def _place(self, name: str, leaf: jax.Array) -> NamedSharding:
        *outer, last = name.split("/")
        tree = {last: leaf}
        for key in reversed(outer):
            tree = {key: tree}
        return jax.tree.leaves(shardings(tree, self.rules, self.mesh))[0]

    def _whole(self, leaf: jax.Array, place: NamedSharding) -> jax.Array:
        if not _divided(place.spec):
            return leaf
        target = NamedSharding(self.mesh, PartitionSpec(*map(_without_axis, place.spec)))
        return _gathered(leaf, place, target, jnp.dtype(self.dtype))


def weights_over(mesh: Mesh | None, rules: Rules, dtype: Any = jnp.float32) -> WholeWeights:
    """What a model of these sharding rules needs on a mesh: `WholeWeights` where nothing is cut.

    Args:
      mesh: of the run; None for one device.
      rules: sharding table of the model's own parameters.
      dtype: of the model's computation.
    """
    if mesh is None or mesh.shape[_AXIS] == 1:
        return WholeWeights()
    return ShardedWeights(mesh, tuple(rules), dtype)


def over_mesh(module: nn.Module, mesh: Mesh | None, rules: Rules) -> nn.Module:
    """A `Decoder` or `AudioLM` that reads weights which are laid out over a mesh by `rules`."""
    return module.clone(access=weights_over(mesh, rules, module.dtype))


def _names(axes: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _divided(spec: Sequence[Any]) -> bool:
    return any(_AXIS in _names(axes) for axes in spec)


def _without_axis(axes: str | Sequence[str] | None) -> tuple[str, ...] | None:
    return tuple(name for name in _names(axes) if name != _AXIS) or None


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gathered(leaf, place, target, dtype):
    """`leaf`, laid out as `place`, in `dtype` and laid out as `target`; gradients as `place`."""
    # Held in place, so that the narrower type is what travels.
    narrow = jax.lax.with_sharding_constraint(leaf.astype(dtype), place)
    return jax.lax.with_sharding_constraint(narrow, target)


def _gathered_forward(leaf, place, target, dtype):
    return _gathered(leaf, place, target, dtype), jnp.zeros((0,), leaf.dtype)


def _gathered_backward(place, target, dtype, kept, gradient):
    del target, dtype
    # The compiler adds up where the product is made, in its type: that of the computation.
    return (jax.lax.with_sharding_constraint(gradient, place).astype(kept.dtype),)


_gathered.defvjp(_gathered_forward, _gathered_backward)
