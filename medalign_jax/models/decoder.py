"""Decoder-only language model (Gemma-3; the family is spanned by ``DecoderConfig``).

Gemma 3 technical report (arXiv 2503.19786) as in transformers' ``Gemma3TextModel``: grouped-query
attention with normed queries and keys, rotary positions, sliding and global layers, gated
feed-forward. The layers are one scan over stacked weights.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from medalign_jax.models.attention import attention
from medalign_jax.models.decoder_config import DecoderConfig, Rope
from medalign_jax.models.layer_stack import normalise_layers, scan_layers, stacked_init

ACTIVATIONS = {"gelu_tanh": lambda x: nn.gelu(x, approximate=True), "silu": nn.silu}


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


def rope_angles(rope: Rope, head_dim: int, length: int) -> np.ndarray:
    """Rotation angles of positions 0..length-1: (length, head_dim / 2), float32, radians.

    Su et al. 2021, arXiv 2104.09864; ``factor`` is linear position interpolation.
    """
    power = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequency = np.float32(1.0) / np.float32(rope.theta) ** power / np.float32(rope.factor)
    return np.arange(length, dtype=np.float32)[:, None] * frequency


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turns each pair (i, i + D/2) of x (B, T, heads, D) by angles (T, D/2)."""
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query self-attention of one layer."""

    config: DecoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, slides: jax.Array) -> jax.Array:
        c = self.config
        q = self._heads("query", c.heads, x)
        k = self._heads("key", c.kv_heads, x)
        v = self._heads("value", c.kv_heads, x)
        if c.qk_norm:
            q = RMSNorm(c.eps, c.norm_offset, self.param_dtype, name="query_norm")(q)
            k = RMSNorm(c.eps, c.norm_offset, self.param_dtype, name="key_norm")(k)
        length = x.shape[1]
        angles = jnp.where(
            slides,
            rope_angles(c.local_rope, c.head_dim, length),
            rope_angles(c.rope, c.head_dim, length),
        )
        mixed = self._attend(rotate(q, angles), rotate(k, angles), v, mask, slides)
        dense = nn.Dense(c.width, use_bias=False, name="out", **self._dtypes())
        return dense(mixed.reshape(*x.shape[:-1], c.heads * c.head_dim))

    def _attend(self, q, k, v, mask, slides):
        c = self.config

        def look(window):
            key_mask = mask[:, None, None, :]
            return attention(
                q, k, v, mask=key_mask, scale=c.attention_scale, causal=True, window=window
            )

        if not any(c.sliding) or q.shape[1] <= c.window:
            return look(None)  # no window is shorter than the text
        if all(c.sliding):
            return look(c.window)
        return jax.lax.cond(slides, lambda: look(c.window), lambda: look(None))

    def _heads(self, name: str, heads: int, x: jax.Array) -> jax.Array:
        c = self.config
        dense = nn.Dense(heads * c.head_dim, use_bias=c.qkv_bias, name=name, **self._dtypes())
        return dense(x).reshape(*x.shape[:-1], heads, c.head_dim)

    def _dtypes(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}


class GatedMLP(nn.Module):
    """``down(activation(gate(x)) * up(x))``."""

    config: DecoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        settings = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        gate = ACTIVATIONS[c.activation](nn.Dense(c.mlp_width, name="gate", **settings)(x))
        up = nn.Dense(c.mlp_width, name="up", **settings)(x)
        return nn.Dense(c.width, name="down", **settings)(gate * up)


class DecoderLayer(nn.Module):
    """One layer: (B, T, W), key mask (B, T), scalar bool "slides" -> (B, T, W)."""

    config: DecoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, slides: jax.Array) -> jax.Array:
        c = self.config
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def norm(name: str, x: jax.Array) -> jax.Array:
            return RMSNorm(c.eps, c.norm_offset, self.param_dtype, name=name)(x)

        mixed = Attention(c, name="attention", **settings)(norm("attention_norm", x), mask, slides)
        x = x + (norm("post_attention_norm", mixed) if c.post_norms else mixed)
        hidden = GatedMLP(c, name="mlp", **settings)(norm("mlp_norm", x))
        return x + (norm("post_mlp_norm", hidden) if c.post_norms else hidden)


class Decoder(nn.Module):
    """The language model.

    Parameters: ``embed/embedding``, ``layers/...`` stacked over depth, ``final_norm/scale``, and
    ``lm_head/kernel`` where the head is not tied to the embedding.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self):
        c = self.config
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.embed = nn.Embed(c.vocab_size, c.width, **settings)
        block = DecoderLayer(c, **settings, parent=None)
        inputs = (jnp.zeros((1, 2, c.width), self.dtype), jnp.ones((1, 2), bool), jnp.array(False))
        self.layers = self.param("layers", stacked_init(block, c.depth), *inputs)
        self.block = block
        if c.final_norm:
            self.final_norm = RMSNorm(c.eps, c.norm_offset, self.param_dtype)
        if not c.tied:
            self.lm_head = nn.Dense(c.vocab_size, use_bias=False, **settings)

    def __call__(
        self, ids: jax.Array, mask: jax.Array, layers: tuple[int, ...] = (-1,)
    ) -> tuple[jax.Array, dict[str, dict[int, jax.Array]]]:
        """Hidden states of right-padded token ids, counted as transformers counts them.

        Args:
          ids: (B, T) int32, T at most ``max_positions``.
          mask: (B, T) bool, True for a real token; padding on the right.
          layers: Hidden states to keep: 0 = scaled embeddings, i = after layer i, -1 = last, which
            is after the final norm. Only the layers up to the deepest of them run.

        Returns:
          The deepest hidden state asked for, (B, T, width), and
          ``{"hidden_states": {index from 0: (B, T, width)}}`` with all that were asked for.
        """
        c = self.config
        if ids.shape[1] > c.max_positions:
            raise ValueError(f"{ids.shape[1]} tokens; this model has {c.max_positions} positions")
        wanted = normalise_layers(layers, c.depth)
        x = self.embed(ids)
        x = x * jnp.asarray(c.embed_scale, x.dtype)

        def step(x: jax.Array, layer: Any) -> jax.Array:
            weights, slides = layer
            return self.block.apply({"params": weights}, x, mask, slides)

        states = scan_layers(step, (self.layers, jnp.asarray(c.sliding)), x, wanted)
        if c.depth in states and c.final_norm:
            states[c.depth] = self.final_norm(states[c.depth])
        if self.is_initializing():
            self._initialise_head(x)
        return states[wanted[-1]], {"hidden_states": states}

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Next-token scores (B, T, vocabulary), float32, of last hidden states (B, T, width)."""
        c = self.config
        scores = self.embed.attend(hidden) if c.tied else self.lm_head(hidden)
        scores = scores.astype(jnp.float32)
        if c.final_softcap is not None:
            scores = c.final_softcap * jnp.tanh(scores / c.final_softcap)
        return scores

    def _initialise_head(self, x: jax.Array) -> None:
        """Makes the parameters that a forward pass to the hidden states does not touch."""
        if not self.config.tied:
            self.lm_head(x[:, :1])
