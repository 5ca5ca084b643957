"""Projection heads that bring audio and text embeddings to one width."""

from __future__ import annotations

import flax.linen as nn
import jax


class ProjectionHead(nn.Module):
    """Linear, ReLU, dropout, linear (AcuLa, section 3; released ``MLP``, dropout 0.2).

    Call: (B, width) -> (B, out), float32. With ``dropout_keys`` (B,) dropout is on and each example
    draws from its own key, so results do not depend on how the batch is split.
    """

    hidden: int = 1024
    out: int = 512
    dropout: float = 0.2

    @nn.compact
    def __call__(self, x: jax.Array, dropout_keys: jax.Array | None = None) -> jax.Array:
        x = nn.relu(nn.Dense(self.hidden, name="hidden")(x))
        if dropout_keys is not None and self.dropout > 0.0:
            keep = 1.0 - self.dropout
            kept = jax.vmap(lambda key: jax.random.bernoulli(key, keep, x.shape[1:]))(dropout_keys)
            x = jax.numpy.where(kept, x / keep, 0.0)
        return nn.Dense(self.out, name="out")(x)
