"""The audio side that every alignment method shares: waveform, augmentation, features, encoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from medalign_jax.audio.augment import Augment

Tree = Any


@dataclass(frozen=True)
class AudioStudent:
    """An audio encoder with what comes before it, all inside the step.

    Attributes:
      module: Linen module with `embed(features)` and `reconstruct(features, noise)`.
      front_end: waveforms (B, S) -> features (B, T, M).
      samples: S, the fixed number of samples of a training clip.
      augment: applied in training only.
      params: loaded parameters, or None to start from random ones.
    """

    module: nn.Module
    front_end: Callable[[jax.Array], jax.Array]
    samples: int
    augment: Augment = field(default_factory=Augment)
    params: Tree | None = None

    def init(self, key: jax.Array) -> Tree:
        """Random parameters of the encoder; loaded ones come in through `initial`."""
        features = jnp.zeros((1, *self.feature_shape), jnp.float32)
        noise = jnp.zeros((1, self.tokens), jnp.float32)
        return self.module.init(key, features, noise)["params"]

    def initial(self, key: jax.Array) -> Tree:
        """Loaded parameters where there are some, else random ones."""
        return jax.jit(self.init)(key) if self.params is None else self.params

    @property
    def feature_shape(self) -> tuple[int, int]:
        """(frames, mel bins) of a training clip."""
        clip = jax.ShapeDtypeStruct((1, self.samples), jnp.float32)
        return jax.eval_shape(self.front_end, clip).shape[1:]

    @property
    def tokens(self) -> int:
        """Patch tokens of a training clip."""
        return self.module.config.tokens(self.feature_shape[0])

    def features(self, waveforms: jax.Array, keys: jax.Array, train: bool) -> jax.Array:
        """(B, S) -> (B, T, M); with `train` augmented, one key an example."""
        if not train:
            return self.front_end(waveforms)
        waveform_keys, feature_keys = split(keys, 2)
        features = self.front_end(self.augment.waveform(waveforms, waveform_keys))
        return self.augment.features(features, feature_keys)

    def embed(self, params: Tree, features: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(B, T, M) -> pooled (B, W) and the encoder's intermediates."""
        return self.module.apply({"params": params}, features, method="embed")

    def reconstruction(self, params: Tree, features: jax.Array, keys: jax.Array) -> jax.Array:
        """Masked-reconstruction error (B,), each example masked by its own key."""
        noise = jax.vmap(lambda key: jax.random.uniform(key, (self.tokens,)))(keys)
        return self.module.apply({"params": params}, features, noise, method="reconstruct")[0]


def split(keys: jax.Array, count: int) -> tuple[jax.Array, ...]:
    """(B,) keys -> `count` independent sets of (B,) keys."""
    return tuple(jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, count))(keys), 1, 0))


def embedding_health(embeddings: jax.Array, mask: jax.Array | None) -> dict[str, jax.Array]:
    """Collapse signs of (B, W) embeddings.

    Returns:
      embedding_variance: mean over channels of the variance over samples.
      effective_rank: participation ratio (Σλ)² / Σλ² of the covariance's eigenvalues; 1 when all
        embeddings lie on one line.
    """
    weight = jnp.ones(embeddings.shape[0]) if mask is None else mask.astype(jnp.float32)
    x = jax.lax.stop_gradient(embeddings.astype(jnp.float32))
    count = jnp.maximum(weight.sum(), 1.0)
    centred = (x - (x * weight[:, None]).sum(0) / count) * weight[:, None]
    gram = centred @ centred.T
    trace = jnp.trace(gram)
    rank = jnp.square(trace) / jnp.maximum(jnp.square(gram).sum(), 1e-30)
    return {"embedding_variance": trace / count / x.shape[1], "effective_rank": rank}
