"""What a training method is.

A loss may compare samples with each other (CKA, contrastive) or look at each alone
(reconstruction, cross-entropy). A method keeps the two apart:

    encode(params, frozen, batch, keys) -> Encoded(coupled, per_example, metrics)   sample by sample
    couple(coupled, mask)               -> (loss, metrics)                          all samples

    total = couple(coupled of the whole batch) + mean(per_example)

so that accumulated batches are exact (`methods.accumulate`). What an example's loss needs to know
of the whole batch, as the number of its tokens, `weigh` adds before the batch is cut. Each example
has its own random key, so results depend neither on the number of chunks nor on the number of
devices.
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
