"""What a training method is, and the one training step that serves them all.

A loss may compare samples with each other (CKA, contrastive) or look at each alone
(reconstruction, cross-entropy). A method keeps the two apart:

    encode(params, frozen, batch, keys) -> Encoded(coupled, per_example, metrics)   sample by sample
    couple(coupled, mask)               -> (loss, metrics)                          all samples

    total = couple(coupled of the whole batch) + mean(per_example)

so that accumulated batches are exact: the step first embeds every chunk without gradients, takes
the gradient of `couple` with respect to all embeddings at once, and then back-propagates it chunk
by chunk (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited
Setup"). A method that couples nothing is spared the first of the two. What an example's loss needs
to know of the whole batch, as the number of its tokens, `weigh` adds before the batch is cut. Each
example has its own random key, so results depend neither on the number of chunks nor on the number
of devices.
"""

from __future__ import annotations

import abc
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Tree = Any


class Encoded(NamedTuple):
    """Per-sample results of a method; every leaf leads with the batch dimension.

    coupled: tree of arrays that `Method.couple` compares across samples (may be empty).
    per_example: (B,) float32, added to the loss as its mean.
    metrics: named (B,) arrays, logged as their means.
    """

    coupled: Tree
    per_example: jax.Array
    metrics: dict[str, jax.Array]


class Method(abc.ABC):
    """A training method: parameters, frozen trees and a loss. Opens no file, device or checkpoint.

    Attributes:
      frozen: tree of arrays passed beside the state: never trained, never in a checkpoint.
      sharding_rules: table for the parameters, see `core.mesh`.
      frozen_rules: table for `frozen`.
      select: (metric name, "max" or "min") that picks the best checkpoint on held-out data.
    """

    frozen: Tree = None
    sharding_rules: tuple = ((r".*", ()),)
    frozen_rules: tuple = ((r".*", ()),)
    select: tuple[str, str] = ("valid/loss", "min")

    @abc.abstractmethod
    def init(self, key: jax.Array) -> Tree:
        """Random parameters; traceable, as the loop takes shapes from it."""

    def initial_params(self, key: jax.Array) -> Tree:
        """Parameters that a fresh run starts from; overridden where some are loaded."""
        return jax.jit(self.init)(key)

    def weigh(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The whole batch, with arrays (B, ...) added that depend on all of its examples."""
        return batch

    @abc.abstractmethod
    def encode(
        self, params: Tree, frozen: Tree, batch: dict[str, jax.Array], keys: jax.Array, train: bool
    ) -> Encoded:
        """Sample-by-sample part; `keys` (B,) typed PRNG keys, `train` False for evaluation."""

    def couple(self, coupled: Tree, mask: jax.Array | None = None) -> tuple[jax.Array, dict]:
        """The part of the loss that compares samples; `mask` (B,) marks real samples."""
        del coupled, mask
        return jnp.zeros((), jnp.float32), {}


def loss_and_grad(
    method: Method, params: Tree, frozen: Tree, batch: Tree, keys: jax.Array, chunks: int
) -> tuple[jax.Array, dict[str, jax.Array], Tree]:
    """Loss, metrics and gradient of the whole batch, computed in `chunks` equal parts.

    Chunk i takes the samples i, i + chunks, ...: each device's share of the batch is cut the same
    way, so chunking moves nothing between devices.
    """
    batch = method.weigh(batch)
    if chunks == 1:

        def whole(params):
            encoded = method.encode(params, frozen, batch, keys, True)
            loss, metrics = method.couple(encoded.coupled)
            return loss + encoded.per_example.mean(), metrics | _means(encoded.metrics)

        (loss, metrics), grads = jax.value_and_grad(whole, has_aux=True)(params)
        return loss, metrics, grads

    parts = jax.tree.map(lambda x: _split(x, chunks), (batch, keys))

    def embed(part):
        return method.encode(params, frozen, *part, True).coupled

    coupled = jax.eval_shape(embed, jax.tree.map(lambda x: x[0], parts))
    if jax.tree.leaves(coupled):
        coupled = jax.tree.map(_join, jax.lax.map(embed, parts))
    (coupled_loss, metrics), pull = jax.value_and_grad(method.couple, has_aux=True)(coupled)
    pull = jax.tree.map(lambda x: _split(x, chunks), pull)

    def add_chunk(total, inputs):
        (part, part_keys), part_pull = inputs

        def surrogate(params):
            encoded = method.encode(params, frozen, part, part_keys, True)
            products = jax.tree.map(lambda x, g: (x * g).sum(), encoded.coupled, part_pull)
            own = encoded.per_example.mean() / chunks
            return sum(jax.tree.leaves(products), own), (own, _means(encoded.metrics))

        grads, (own, means) = jax.grad(surrogate, has_aux=True)(params)
        return jax.tree.map(jnp.add, total, grads), (own, means)

    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, (own, means) = jax.lax.scan(add_chunk, zeros, (parts, pull))
    metrics = metrics | jax.tree.map(lambda x: x.mean(0), means)
    return coupled_loss + own.sum(), metrics, grads


def _means(metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: value.mean() for name, value in metrics.items()}


def _split(x: jax.Array, chunks: int) -> jax.Array:
    """(B, ...) -> (chunks, B / chunks, ...), interleaved."""
    return jnp.swapaxes(x.reshape(x.shape[0] // chunks, chunks, *x.shape[1:]), 0, 1)


def _join(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])
