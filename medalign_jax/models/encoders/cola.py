"""COLA (Saeed et al. 2021, arXiv 2010.10915) as OPERA trains its -CT and -CE encoders with it.

Two stretches of the same recording have to find each other among those of the batch:

    key(x)   = tanh(layer_norm(g(encoder(x))))
    query(x) = linear(key(x))
    logits   = query(first) key(second)^T,   loss = cross-entropy of each row

There is no temperature and no normalisation of lengths, and columns are not looked at. Source:
`Cola` in evelyn0414/OPERA. The published checkpoints hold `g`, `layer_norm` and `linear` beside the
encoder.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from medalign_jax.losses.contrastive import cola_logits
from medalign_jax.models.encoders.efficientnet import EfficientNet, EfficientNetConfig
from medalign_jax.models.encoders.htsat import HTSAT, HTSATConfig
from medalign_jax.models.layers.vit_layers import Dense, layer_norm

Intermediates = dict[str, jax.Array]

_ENCODERS = {HTSATConfig: HTSAT, EfficientNetConfig: EfficientNet}


class Cola(nn.Module):
    """An encoder with COLA's projection; parameters `encoder`, `g`, `layer_norm`, `linear`.

    As an encoder it is the encoder: `embed`, `stretch` and `config` are passed on.

    Attributes:
      config: of the encoder, an `HTSATConfig` (OPERA-CT) or an `EfficientNetConfig` (OPERA-CE).
      dropout: rate after the encoder, after `g` and after tanh, in training.
    """

    config: HTSATConfig | EfficientNetConfig
    dropout: float = 0.1

    def setup(self) -> None:
        c = self.config
        if type(c) not in _ENCODERS:
            raise ValueError(
                f"Cola has no encoder for a {type(c).__name__}; it takes one of "
                + ", ".join(known.__name__ for known in _ENCODERS)
            )
        self.encoder = _ENCODERS[type(c)](c)
        self.g = Dense(c.projection, c.dtype)
        self.layer_norm = layer_norm(1e-5, jnp.float32)
        self.linear = nn.Dense(c.projection, use_bias=False, dtype=c.dtype)

    def __call__(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Feature and query without intermediates; touches every parameter (for `init`)."""
        feature, _ = self.embed(features)
        return feature, self._query(self._key(feature))

    def embed(self, features: jax.Array) -> tuple[jax.Array, Intermediates]:
        """The encoder's feature, (B, T, M) -> (B, D) float32, and its intermediates."""
        return self.encoder.embed(features)

    def stretch(self, features: jax.Array) -> jax.Array:
        """The input as an encoder that stretches time works on it, else itself."""
        return self.encoder.stretch(features) if hasattr(self.encoder, "stretch") else features

    def project(self, features: jax.Array, dropout_keys: jax.Array | None = None) -> jax.Array:
        """(B, T, M) -> key(x), (B, P) float32.

        With `dropout_keys` (B,) dropout is on, and each example draws from its own key, so that
        results do not depend on how the batch is split.
        """
        return self._key(self.embed(features)[0], dropout_keys)

    def project_pair(
        self, first: jax.Array, second: jax.Array, dropout_keys: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Two stretches of each recording, (B, T, M) -> query of the first, key of the second."""
        keys = (None, None)
        if dropout_keys is not None:
            keys = tuple(jax.vmap(jax.random.split, out_axes=1)(dropout_keys))
        return self._query(self.project(first, keys[0])), self.project(second, keys[1])

    def cola_logits(
        self, first: jax.Array, second: jax.Array, dropout_keys: jax.Array | None = None
    ) -> jax.Array:
        """Two stretches of each recording, (B, T, M) -> (B, B) float32 for `cola_loss`."""
        return cola_logits(*self.project_pair(first, second, dropout_keys))

    def _key(self, feature: jax.Array, dropout_keys: jax.Array | None = None) -> jax.Array:
        keys = (None,) * 3
        if dropout_keys is not None:
            keys = tuple(jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(dropout_keys))
        x = self.g(self._drop(feature, keys[0]))
        x = jnp.tanh(self.layer_norm(self._drop(x, keys[1])))
        return self._drop(x, keys[2])

    def _query(self, key: jax.Array) -> jax.Array:
        return self.linear(key).astype(jnp.float32)

    def _drop(self, x: jax.Array, keys: Any) -> jax.Array:
        if keys is None or self.dropout == 0.0:
            return x
        keep = 1.0 - self.dropout
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, keep, x.shape[1:]))(keys)
        return jnp.where(kept, x / keep, 0.0)
