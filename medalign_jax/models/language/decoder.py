"""Decoder-only language model: Gemma-3, Llama, Qwen2.5, Qwen3 (see ``DecoderConfig``).

Gemma 3 technical report (arXiv 2503.19786), Llama 3 (arXiv 2407.21783), Qwen2.5 (arXiv 2412.15115)
and Qwen3 (arXiv 2505.09388), as in transformers' ``Gemma3TextModel``, ``LlamaModel``,
``Qwen2Model`` and ``Qwen3Model``: grouped-query attention, rotary positions, global and sliding
layers, gated feed-forward. The layers are one scan over stacked weights.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from medalign_jax.models.language.decoder_config import DecoderConfig
from medalign_jax.models.language.decoder_head import DecoderHead, RMSNorm
from medalign_jax.models.language.decoder_rope import rope_table, rotate, token_positions
from medalign_jax.models.layers.attention import attention
from medalign_jax.models.layers.flat_dot import flat_dot
from medalign_jax.models.layers.layer_stack import (
    normalise_layers,
    scan_layers,
    stacked_init,
    use_weights,
)

ACTIVATIONS = {"gelu_tanh": lambda x: nn.gelu(x, approximate=True), "silu": nn.silu}

# Cosine and sine of the rotary embedding, (kinds, B, T, head_dim / 2): what sees everything comes
# first, sliding layers second; one kind where the two are the same.
Turns = tuple[jax.Array, jax.Array]


class Cache(NamedTuple):
    """Keys (rotated) and values of the tokens so far, each (layers, B, S, kv heads, head_dim)."""

    key: jax.Array
    value: jax.Array


# Path regex -> mesh axes of the last dimensions of a cache (see core/mesh.py).
CACHE_SHARDING = ((r"(key|value)$", (("data", "fsdp"), None, "tensor", None)),)


def empty_cache(config: DecoderConfig, batch: int, length: int, dtype: Any) -> Cache:
    """Room for ``length`` tokens of ``batch`` texts."""
    shape = (config.depth, batch, length, config.kv_heads, config.head_dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def _dense(dtype: Any, param_dtype: Any) -> Callable[..., nn.Dense]:
    return partial(nn.Dense, dtype=dtype, param_dtype=param_dtype, dot_general=flat_dot)


class Attention(nn.Module):
    """The projections into and out of one layer's grouped-query self-attention."""

    config: DecoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self):
        c = self.config
        dense = _dense(self.dtype, self.param_dtype)
        self.query = dense(c.heads * c.head_dim, use_bias=c.qkv_bias)
        self.key = dense(c.kv_heads * c.head_dim, use_bias=c.qkv_bias)
        self.value = dense(c.kv_heads * c.head_dim, use_bias=c.qkv_bias)
        self.out = dense(c.width, use_bias=c.out_bias)
        if c.qk_norm:
            self.query_norm = RMSNorm(c.eps, c.norm_offset, self.param_dtype)
            self.key_norm = RMSNorm(c.eps, c.norm_offset, self.param_dtype)

    def project(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, ...]:
        """(B, T, W) to query (B, T, heads, D), key and value (B, T, kv heads, D)."""
        heads = (*x.shape[:-1], -1, self.config.head_dim)
        q, k, v = (dense(x).reshape(heads) for dense in (self.query, self.key, self.value))
        if self.config.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def merge(self, mixed: jax.Array) -> jax.Array:
        """(B, T, heads, D) to (B, T, W)."""
        return self.out(mixed.reshape(*mixed.shape[:2], -1))


class GatedMLP(nn.Module):
    """``down(activation(gate(x)) * up(x))``."""

    config: DecoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        dense = partial(_dense(self.dtype, self.param_dtype), use_bias=c.mlp_bias)
        gate = ACTIVATIONS[c.activation](dense(c.mlp_width, name="gate")(x))
        return dense(c.width, name="down")(gate * dense(c.mlp_width, name="up")(x))


class DecoderLayer(nn.Module):
    """One layer. ``heads`` and ``finish`` are what comes before and after the tokens are mixed."""

    config: DecoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    backend: str = "auto"

    def setup(self):
        c = self.config
        norm = partial(RMSNorm, c.eps, c.norm_offset, self.param_dtype)
        self.attention_norm, self.mlp_norm = norm(), norm()
        self.attention = Attention(c, self.dtype, self.param_dtype)
        self.mlp = GatedMLP(c, self.dtype, self.param_dtype)
        if c.post_norms:
            self.post_attention_norm, self.post_mlp_norm = norm(), norm()

    def heads(self, x: jax.Array, turns: Turns, slides: jax.Array) -> tuple[jax.Array, ...]:
        """Query, key and value of (B, T, W)."""
        cos, sin = (_of_kind(table, slides) for table in turns)
        return self.attention.project(self.attention_norm(x), cos, sin)

    def finish(self, x: jax.Array, mixed: jax.Array) -> jax.Array:
        """The layer's output, from its input (B, T, W) and the mixed values (B, T, heads, D)."""
        mixed = self.attention.merge(mixed)
        x = x + (self.post_attention_norm(mixed) if self.config.post_norms else mixed)
        hidden = self.mlp(self.mlp_norm(x))
        return x + (self.post_mlp_norm(hidden) if self.config.post_norms else hidden)

    def __call__(self, x: jax.Array, mask: jax.Array, turns: Turns, slides: jax.Array) -> jax.Array:
        """(B, T, W), key mask (B, T), turns, scalar bool "slides" -> (B, T, W)."""
        q, k, v = self.heads(x, turns, slides)
        return self.finish(x, attend(self.config, self.backend, q, k, v, mask, slides))


def attend(
    c: DecoderConfig,
    backend: str,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    slides: jax.Array,
) -> jax.Array:
    """Causal attention of a text with itself, in a window if ``slides``; key mask (B, T)."""

    def look(window: int | None) -> jax.Array:
        return attention(
            q, k, v, mask=mask[:, None, None, :], scale=c.attention_scale, causal=True,
            window=window, backend=backend,
        )  # fmt: skip

    if not any(c.sliding) or q.shape[1] <= c.window:
        return look(None)  # no window is shorter than the text
    if all(c.sliding):
        return look(c.window)
    return jax.lax.cond(slides, lambda: look(c.window), lambda: look(None))


class Decoder(DecoderHead):
    """The language model.

    Parameters: ``embed/embedding``, ``layers/...`` stacked over depth, ``final_norm/scale``, and
    ``lm_head/kernel`` where the head is not tied to the embedding. Low-rank factors for kernels of
    ``layers`` and ``lm_head`` may be given as collection "lora" (see ``layer_stack.low_rank``).

    Attributes:
      config: sizes and switches.
      dtype, param_dtype: of computation and of parameters.
      backend: of ``models.layers.attention.attention``.
      remat: whether the backward pass computes each layer anew instead of keeping its inner values.
      access: how weights are read, e.g. gathered from shards; a layer's inside the scan, before the
        layer uses them, and anew with ``remat``. See ``sharded_weights``.
    """

    backend: str = "auto"
    remat: bool = False

    def setup(self):
        super().setup()
        c = self.config
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        # Parameters do not depend on the back end, and a named one may refuse short examples.
        plain = DecoderLayer(c, **settings, parent=None)
        self.block = plain if self.is_initializing() else plain.clone(backend=self.backend)
        example = jnp.zeros((1, 2, c.width), self.dtype), jnp.ones((1, 2), bool)
        turns = _turns(c, jnp.zeros((1, 2), jnp.int32))
        self.layers = self.param(
            "layers", stacked_init(plain, c.depth), *example, turns, jnp.array(False)
        )

    def __call__(
        self,
        ids: jax.Array,
        mask: jax.Array,
        layers: tuple[int, ...] = (-1,),
        *,
        embeddings: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, dict[int, jax.Array]]]:
        """Hidden states of token ids, counted as transformers counts them.

        Args:
          ids: (B, T) int32, T at most ``max_positions``.
          mask: (B, T) bool, True for a real token; padding on either side. Positions count real
            tokens only. What comes out at padding means nothing.
          layers: hidden states to keep: 0 = scaled embeddings, i = after layer i, -1 = last, which
            is after the final norm. Only the layers up to the deepest of them run.
          embeddings: (B, T, width) in place of ``embedded(ids)``, e.g. with audio put in.
          positions: (B, T) int32, or (3, B, T) for the three axes of a rope with sections; they
            turn queries and keys only (what is seen follows the order of the tokens). By default
            they count real tokens, on all axes alike.

        Returns:
          The deepest hidden state asked for, (B, T, width), and
          ``{"hidden_states": {index from 0: (B, T, width)}}`` with all that were asked for.

        Raises:
          ValueError: if the text is too long, there is no such hidden state, the rope has no
            sections for three axes, or low-rank factors have no place.
        """
        c = self.config
        if ids.shape[1] > c.max_positions:
            raise ValueError(f"{ids.shape[1]} tokens; this model has {c.max_positions} positions")
        wanted = normalise_layers(layers, c.depth)
        x = self.embedded(ids) if embeddings is None else embeddings
        turns = _turns(c, token_positions(mask) if positions is None else positions)
        factors = self._low_rank()["layers"]

        def step(x: jax.Array, layer: Any) -> jax.Array:
            weights, factors, slides = layer
            weights = use_weights(weights, factors, self.access.layer)
            x = self.access.rows(x)
            return self.block.apply({"params": weights}, x, mask, turns, slides)

        step = jax.checkpoint(step) if self.remat else step
        states = scan_layers(step, (self.layers, factors, jnp.asarray(c.sliding)), x, wanted)
        if c.depth in states:
            states[c.depth] = self._normed(states[c.depth])
        if self.is_initializing() and c.head and not c.tied:
            self.lm_head(x[:, :1])  # which the way to the hidden states does not touch
        return states[wanted[-1]], {"hidden_states": states}

    def extend(
        self,
        ids: jax.Array,
        mask: jax.Array,
        cache: Cache,
        start: int | jax.Array,
        *,
        embeddings: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Last hidden states of tokens that follow those in a cache, and the longer cache.

        Args:
          ids: (B, T) int32: columns ``start`` to ``start + T`` of the texts.
          mask: (B, S) bool: which columns of the whole texts are real tokens. Columns that are
            still to come may say either.
          cache: with room for S columns, filled up to ``start``.
          start: the first new column. The number 0 makes the whole prompt attend to itself
            without looking at the cache.
          embeddings: (B, T, width) in place of ``embedded(ids)``.

        Returns:
          (B, T, width) and the cache, filled up to ``start + T``.
        """
        c = self.config
        length = ids.shape[1]
        fresh = isinstance(start, int) and start == 0
        positions = jax.lax.dynamic_slice_in_dim(token_positions(mask), start, length, axis=1)
        turns = _turns(c, positions)
        visible = _visible_columns(c, mask, start, length)

        def step(carry: tuple[jax.Array, Cache], layer: Any) -> tuple[Any, None]:
            (x, cache), (weights, factors, slides, number) = carry, layer
            weights = use_weights(weights, factors, self.access.layer)
            apply = partial(self.block.apply, {"params": weights})
            q, k, v = apply(x, turns, slides, method="heads")
            place = (number, 0, start, 0, 0)
            cache = Cache(
                *(
                    jax.lax.dynamic_update_slice(old, new[None].astype(old.dtype), place)
                    for old, new in zip(cache, (k, v), strict=True)
                )
            )
            if fresh:
                mixed = attend(c, self.backend, q, k, v, mask[:, :length], slides)
            else:
                mixed = attention(
                    q, cache.key[number], cache.value[number], scale=c.attention_scale,
                    mask=_of_kind(visible, slides), backend="xla",
                )  # fmt: skip
            return (apply(x, mixed, method="finish"), cache), None

        factors = self._low_rank()["layers"]
        layers = (self.layers, factors, jnp.asarray(c.sliding), jnp.arange(c.depth))
        x = self.embedded(ids) if embeddings is None else embeddings
        (x, cache), _ = jax.lax.scan(step, (x, cache), layers)
        return self._normed(x), cache


def _turns(c: DecoderConfig, positions: jax.Array) -> Turns:
    ropes = [c.rope] if c.rope == c.local_rope or not any(c.sliding) else [c.rope, c.local_rope]
    cos, sin = zip(*(rope_table(rope, c.head_dim, positions) for rope in ropes), strict=True)
    return jnp.stack(cos), jnp.stack(sin)


def _of_kind(stacked: jax.Array, slides: jax.Array) -> jax.Array:
    """What holds for a layer, of one that holds for all or of (everything seen, sliding)."""
    return stacked[0] if len(stacked) == 1 else stacked[slides.astype(jnp.int32)]


def _visible_columns(
    c: DecoderConfig, mask: jax.Array, start: int | jax.Array, length: int
) -> jax.Array:
    """Which of S columns the new ones see: (kinds, B, 1, length, S) bool."""
    row = start + jnp.arange(length)[:, None]
    ahead = row - jnp.arange(mask.shape[1])[None, :]
    rules = [ahead >= 0]
    if any(c.sliding):
        rules.append(rules[0] & (ahead < c.window))
    return jnp.stack(rules)[:, None, None] & mask[None, :, None, None, :]
