"""The audio side that every alignment method shares: waveform, augmentation, features, encoder."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from medalign_jax.audio.augment import Augment
from medalign_jax.methods.self_supervised import Term, make_term

Tree = Any


@dataclass(frozen=True)
class AudioStudent:
    """An audio encoder, its front end and its self-supervised term, all inside the step.

    Its parameters are {"encoder": ...} and, where the self-supervised term brings some along,
    {"term": ...}; a method adds its own beside them.

    Attributes:
      module: Linen module with `embed(features)`, see `medalign_jax.models`.
      front_end: waveforms (B, S) -> features (B, T, M).
      samples: S, the fixed number of samples of a training clip.
      augment: applied in training only.
      params: loaded parameters of the encoder, or None to start from random ones.
      ssm: kind of the self-supervised term, see `methods.self_supervised`.
    """

    module: nn.Module
    front_end: Callable[[jax.Array], jax.Array]
    samples: int
    augment: Augment = field(default_factory=Augment)
    params: Tree | None = None
    ssm: str = "published"

    def init(self, key: jax.Array) -> Tree:
        """Random parameters."""
        encoder_key, term_key = jax.random.split(key)
        features = jnp.zeros((1, *self.feature_shape), jnp.float32)
        encoder = self.module.init(encoder_key, features)["params"]
        return {"encoder": encoder} | self._term_params(term_key)

    def initial(self, key: jax.Array) -> Tree:
        """Parameters of a fresh run: the encoder's are loaded ones where there are some."""
        if self.params is None:
            return jax.jit(self.init)(key)
        return {"encoder": self.params} | jax.jit(self._term_params)(jax.random.split(key)[1])

    def _term_params(self, key: jax.Array) -> Tree:
        own = self.term.init(key)
        return {"term": own} if own else {}

    @functools.cached_property
    def term(self) -> Term:
        """The self-supervised term.

        Raises:
          UserError: the encoder does not have it, or the clips are too short for it.
        """
        return make_term(self.ssm, self.module, self.feature_shape)

    @property
    def feature_shape(self) -> tuple[int, int]:
        """(frames, mel bins) of a training clip."""
        clip = jax.ShapeDtypeStruct((1, self.samples), jnp.float32)
        return jax.eval_shape(self.front_end, clip).shape[1:]

    def features(self, waveforms: jax.Array, keys: jax.Array, train: bool) -> jax.Array:
        """(B, S) -> (B, T, M); with `train` augmented, one key per example."""
        if not train:
            return self.front_end(waveforms)
        waveform_keys, feature_keys = split(keys, 2)
        features = self.front_end(self.augment.waveform(waveforms, waveform_keys))
        return self.augment.features(features, feature_keys)

    def embed(self, params: Tree, features: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(B, T, M) -> pooled (B, W) and the encoder's intermediates."""
        return self.module.apply({"params": params["encoder"]}, features, method="embed")

    def self_supervised(
        self, params: Tree, features: jax.Array, keys: jax.Array, train: bool
    ) -> tuple[jax.Array, Tree]:
        """Error of each example (B,), and what `term.couple` compares across examples."""
        own = params.get("term", {})
        return self.term.encode(params["encoder"], own, features, keys, train)

    def layer(self, intermediates: dict[str, jax.Array], index: int) -> jax.Array:
        """Mean over the tokens after block `index`, (B, channels of that block)."""
        tokens = intermediates[f"block{index:02d}"][:, self.module.config.prefix_tokens :]
        return tokens.astype(jnp.float32).mean(axis=1)


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
