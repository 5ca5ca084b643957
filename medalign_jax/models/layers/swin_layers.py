"""Swin transformer (Liu et al. 2021, arXiv 2103.14030): attention in windows that shift.

Shapes: B images, H rows and V columns of tokens, W channels, P windows of N tokens, h heads of D
channels. The layers serve HTS-AT (`models.encoders.htsat`) in the form of OPERA-CT and in that of
LAION-CLAP, which differ in how the projections are stored.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from medalign_jax.models.layers.attention import attention
from medalign_jax.models.layers.vit_layers import Dense, Mlp, layer_norm

# Added to the score of two tokens that only the roll has made neighbours.
_APART = -100.0


def to_windows(x: jax.Array, window: int, heads: int) -> jax.Array:
    """(B, H, V, W) to (B, P, h, N, D): windows row by row, tokens of a window row by row."""
    batch, rows, columns, width = x.shape
    x = x.reshape(batch, rows // window, window, columns // window, window, heads, -1)
    x = x.transpose(0, 1, 3, 5, 2, 4, 6)
    return x.reshape(batch, -1, heads, window * window, width // heads)


def from_windows(x: jax.Array, window: int, rows: int, columns: int) -> jax.Array:
    """(B, P, h, N, D) to (B, H, V, W); undoes `to_windows`."""
    batch, _, heads, _, depth = x.shape
    x = x.reshape(batch, rows // window, columns // window, heads, window, window, depth)
    return x.transpose(0, 1, 4, 2, 5, 3, 6).reshape(batch, rows, columns, heads * depth)


def window_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array,
    *,
    heads: int,
    window: int,
    backend: str = "auto",
) -> jax.Array:
    """Softmax attention of the tokens within each window.

    Args:
      q, k, v: (B, H, V, W).
      bias: (P, h, N, N), or (1, h, N, N) for all windows, added to the scaled scores.
      heads: h.
      window: side of a window; divides H and V.
      backend: "auto", which on a CPU takes one image at a time, so that its scores stay in the
        processor's cache (two to four times faster), or one of `models.layers.attention`.

    Returns:
      (B, H, V, W) of q's type; scores and softmax are float32.
    """

    def together(q, k, v, bias):
        return _all_images(q, k, v, bias, heads, window, "xla" if backend == "auto" else backend)

    def in_turn(q, k, v, bias):
        def one(image):
            return _one_image(*image, bias, heads, window)

        return jax.lax.map(one, (q, k, v))

    if backend != "auto":
        return together(q, k, v, bias)
    return jax.lax.platform_dependent(q, k, v, bias, cpu=in_turn, default=together)


def _one_image(q, k, v, bias, heads, window):
    """Attention in an image (H, V, W); bias (P or 1, h, N, N)."""
    rows, columns, _ = q.shape
    q, k, v = (to_windows(x[None], window, heads)[0] for x in (q, k, v))
    shape = q.shape
    # Windows and heads in one leading axis: many small but compact products.
    q, k, v = (x.reshape(-1, *shape[2:]) for x in (q, k, v))
    scores = jnp.einsum("nic,njc->nij", q, k, preferred_element_type=jnp.float32)
    scores = (scores / math.sqrt(shape[-1])).reshape(*shape[:2], shape[2], shape[2]) + bias
    scores = scores.reshape(-1, shape[2], shape[2])
    highest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - highest)
    out = jnp.einsum("nij,njc->nic", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    # Divided after the product, which has fewer numbers than the scores.
    out = (out / jnp.sum(weights, axis=-1, keepdims=True)).astype(q.dtype)
    return from_windows(out.reshape(1, *shape), window, rows, columns)[0]


def _all_images(q, k, v, bias, heads, window, backend):
    """The same for (B, H, V, W): to `attention` each head of each window is a head of its own."""
    _, rows, columns, _ = q.shape
    q, k, v = (to_windows(x, window, heads) for x in (q, k, v))
    batch, windows, _, tokens, depth = q.shape
    bias = jnp.broadcast_to(bias, (windows, heads, tokens, tokens))
    q, k, v = (x.reshape(batch, -1, tokens, depth).swapaxes(1, 2) for x in (q, k, v))
    out = attention(q, k, v, bias=bias.reshape(1, -1, tokens, tokens), backend=backend)
    out = out.swapaxes(1, 2).reshape(batch, windows, heads, tokens, depth)
    return from_windows(out, window, rows, columns)


def relative_places(window: int) -> np.ndarray:
    """(N, N): row of the bias table for query i and key j of a window.

    The table has a row for each offset (query minus key), rows before columns, from
    -(window - 1) to window - 1.
    """
    row, column = np.divmod(np.arange(window * window), window)
    down, right = (x[:, None] - x[None, :] + window - 1 for x in (row, column))
    return down * (2 * window - 1) + right


def shift_bias(rows: int, columns: int, window: int, shift: int) -> np.ndarray:
    """(P, N, N) float32: keeps tokens apart that are neighbours only because the image was rolled.

    After a roll by -shift the last `shift` rows and columns come from the other side.
    """
    wrapped = (np.arange(rows) >= rows - shift)[:, None] + 2 * (
        np.arange(columns) >= columns - shift
    )
    side = wrapped.reshape(rows // window, window, columns // window, window)
    side = side.swapaxes(1, 2).reshape(-1, window * window)
    return np.where(side[:, :, None] == side[:, None, :], 0.0, _APART).astype(np.float32)


class WindowAttention(nn.Module):
    """Multi-head attention within (shifted) windows, (B, H, V, W) to (B, H, V, W).

    Attributes:
      heads: h.
      window: side of a window.
      shift: roll of the image before it is cut into windows; 0 for none.
      backend: see `window_attention`.
      split_qkv: three matrices `query`, `key`, `value` (CLAP) instead of one `qkv`.
      dtype: of the computation.
    """

    heads: int
    window: int
    shift: int
    backend: str
    split_qkv: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        _, rows, columns, width = x.shape
        bias = self._position_bias()[None]
        if self.shift:
            x = jnp.roll(x, (-self.shift, -self.shift), axis=(1, 2))
            bias = bias + shift_bias(rows, columns, self.window, self.shift)[:, None]
        out = window_attention(
            *self._project(x), bias, heads=self.heads, window=self.window, backend=self.backend
        )
        out = Dense(width, self.dtype, name="proj")(out)
        return jnp.roll(out, (self.shift, self.shift), axis=(1, 2)) if self.shift else out

    def _project(self, x: jax.Array) -> list[jax.Array]:
        width = x.shape[-1]
        if self.split_qkv:
            return [Dense(width, self.dtype, name=name)(x) for name in ("query", "key", "value")]
        return jnp.split(Dense(3 * width, self.dtype, name="qkv")(x), 3, axis=-1)

    def _position_bias(self) -> jax.Array:
        """(h, N, N) from the learned table."""
        size = (2 * self.window - 1) ** 2
        init = nn.initializers.truncated_normal(0.02)
        table = self.param("position_bias", init, (size, self.heads), jnp.float32)
        return table[relative_places(self.window)].transpose(2, 0, 1)


class SwinBlock(nn.Module):
    """Pre-norm Swin block, (B, H, V, W) to (B, H, V, W).

    A map no larger than a window is one window, and then nothing shifts.

    Attributes:
      shifted: whether the windows are shifted by half their side.
      mlp_ratio: hidden width over W.
      eps: of the LayerNorms.
      heads, window, backend, split_qkv, dtype: as in `WindowAttention`.
    """

    heads: int
    window: int
    shifted: bool
    mlp_ratio: int
    eps: float
    backend: str
    split_qkv: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        side = min(x.shape[1], x.shape[2])
        window = min(self.window, side)
        shift = window // 2 if self.shifted and side > window else 0
        attend = WindowAttention(
            self.heads, window, shift, self.backend, self.split_qkv, self.dtype, name="attn"
        )
        mlp = Mlp(self.mlp_ratio * x.shape[-1], self.dtype, name="mlp")
        x = x + attend(layer_norm(self.eps, self.dtype, "norm1")(x))
        return x + mlp(layer_norm(self.eps, self.dtype, "norm2")(x))


class PatchMerging(nn.Module):
    """Joins 2x2 tokens, (B, H, V, W) to (B, H / 2, V / 2, 2 W).

    Their channels follow each other column by column: (0, 0), (1, 0), (0, 1), (1, 1).
    """

    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, rows, columns, width = x.shape
        x = x.reshape(batch, rows // 2, 2, columns // 2, 2, width).transpose(0, 1, 3, 4, 2, 5)
        x = x.reshape(batch, rows // 2, columns // 2, 4 * width)
        x = layer_norm(self.eps, self.dtype, "norm")(x)
        init = nn.initializers.xavier_uniform()
        reduce = nn.Dense(
            2 * width, use_bias=False, dtype=self.dtype, kernel_init=init, name="reduction"
        )
        return reduce(x)


class SwinStage(nn.Module):
    """Blocks of one resolution, shifted in turn, and the merging of patches that follows them.

    Attributes:
      depth: number of blocks.
      merge: whether patches are merged at the end.
      remat: recompute each block's activations in the backward pass.
      block: the other attributes of a `SwinBlock`, as a dict.
    """

    depth: int
    merge: bool
    remat: bool
    block: dict[str, Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """(B, H, V, W) to what the next stage gets, and each block's output (B, H, V, W)."""
        kind = nn.remat(SwinBlock) if self.remat else SwinBlock
        outputs = []
        for i in range(self.depth):
            x = kind(**self.block, shifted=i % 2 == 1, name=f"block{i}")(x)
            outputs.append(x)
        if self.merge:
            x = PatchMerging(self.block["eps"], self.block["dtype"], name="downsample")(x)
        return x, outputs
