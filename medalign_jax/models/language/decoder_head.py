"""Both ends of a decoder-only language model: token embeddings, final norm, next-token scores.

`Decoder` is this with layers between. By itself it reads hidden states of a model whose layers are
not at hand (a cached teacher), or of layers that are not the last (logit lens).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from medalign_jax.models.language.decoder_config import DecoderConfig
from medalign_jax.models.layers.layer_stack import low_rank, through
from medalign_jax.models.layers.sharded_weights import WholeWeights


class RMSNorm(nn.Module):
    """``x / rms(x) * (offset + scale)`` over the last axis, in float32."""

    eps: float
    offset: float
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # Either way the factor starts at one.
        init = nn.initializers.constant(1.0 - self.offset)
        scale = self.param("scale", init, x.shape[-1:], self.param_dtype)
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * (self.offset + scale.astype(jnp.float32))).astype(x.dtype)


class DecoderHead(nn.Module):
    """Embeddings and head, without layers.

    Parameters: ``embed/embedding``, ``final_norm/scale``, and ``lm_head/kernel`` where the head is
    not tied to the embedding; those that a call does not read may be missing (`head_params`).

    Attributes:
      config: sizes and switches.
      dtype, param_dtype: of computation and of parameters.
      access: how weights are read, e.g. gathered from shards (`sharded_weights`).
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    access: WholeWeights = WholeWeights()

    def setup(self):
        c = self.config
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        rows = partial(_zero_beyond, size=c.vocab_size)
        embedding = rows(nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0), 0)
        self.embed = nn.Embed(c.vocab_rows, c.width, embedding_init=embedding, **settings)
        if c.final_norm:
            self.final_norm = RMSNorm(c.eps, c.norm_offset, self.param_dtype)
        if c.head and not c.tied:
            kernel = rows(nn.initializers.lecun_normal(), 1)
            self.lm_head = nn.Dense(c.vocab_rows, use_bias=False, kernel_init=kernel, **settings)

    def embedded(self, ids: jax.Array) -> jax.Array:
        """Hidden state 0: the scaled embeddings of token ids, (B, T) to (B, T, width)."""
        # Cast after the look-up: its gradient then adds up in the table's own type.
        x = self.access.lookup(self.embed.embedding, ids).astype(self.dtype)
        return x * jnp.asarray(self.config.embed_scale, x.dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Next-token scores (..., vocabulary), float32, of last hidden states (..., width).

        Rows that fill up the vocabulary have no score.
        """
        c = self.config
        if c.tied:
            table = self.access.head("embed/embedding", self.embed.embedding).astype(self.dtype)
            scores = jnp.einsum("...w,vw->...v", hidden, table, preferred_element_type=jnp.float32)
        else:
            kernel = self.lm_head.variables["params"]["kernel"]
            kernel = self.access.head("lm_head/kernel", kernel).astype(self.dtype)
            scores = jnp.dot(hidden.astype(self.dtype), kernel).astype(jnp.float32)
            if (factors := self._low_rank()["lm_head"]) is not None:
                scores = scores + through(hidden, factors["kernel"]).astype(jnp.float32)
        scores = scores[..., : c.vocab_size]
        if c.final_softcap is not None:
            scores = c.final_softcap * jnp.tanh(scores / c.final_softcap)
        return scores

    def lens(self, hidden: jax.Array, normed: bool) -> jax.Array:
        """Next-token scores (..., vocabulary) that the head reads in any layer's hidden states.

        Args:
          hidden: (..., width).
          normed: whether they are past the final norm, as the last ones are.
        """
        return self.logits(hidden if normed else self._normed(hidden))

    def _low_rank(self) -> dict[str, Any]:
        return low_rank(self, "layers", *(() if self.config.tied else ("lm_head",)))

    def _normed(self, x: jax.Array) -> jax.Array:
        return self.final_norm(x) if self.config.final_norm else x


def head_params(config: DecoderConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a decoder's parameters that `DecoderHead.logits` and `lens` read."""
    names = ("embed" if config.tied else "lm_head", *(("final_norm",) if config.final_norm else ()))
    return {name: params[name] for name in names}


def _zero_beyond(init: Any, axis: int, *, size: int) -> Any:
    """The initialiser, with zeros from ``size`` on along an axis of a matrix."""

    def padded(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        kept = jnp.arange(shape[axis]) < size
        return jnp.where(jnp.expand_dims(kept, 1 - axis), init(key, shape, dtype), 0)

    return padded
