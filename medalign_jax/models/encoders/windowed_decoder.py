"""The decoder block of OPERA-GT: attention in windows that are not windows of the token grid.

Shapes: B clips, L patch tokens, 256 channels, G groups of 16 tokens.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from medalign_jax.models.layers.vit_layers import Dense, Mlp, layer_norm

_WINDOW = 4  # side of a decoder window
_GROUP = _WINDOW * _WINDOW  # tokens that see each other
_SHIFT = 2  # roll of every second decoder block
_GRID = (32, 8)  # the decoder takes the channels for a grid of this size
CHANNELS = _GRID[0] * _GRID[1]
_MIN_NORM = 1e-6  # least |q||k| of the cosine attention
_MIN_TAU = 0.01  # least temperature of the cosine attention
_META_WIDTH = 384  # hidden width of the network that makes the relative position bias


class CosineAttention(nn.Module):
    """Scaled cosine attention with a log-spaced relative position bias (Liu et al. 2022, Swin V2).

    Within groups of 16 tokens that stand for a 4x4 window, (G, 16, W) to (G, 16, W).
    """

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, shift_bias: jax.Array | None) -> jax.Array:
        """`shift_bias`: (P, 16, 16), added to the scores of group j as [j mod P], or None."""
        groups, size, width = x.shape
        tau = self.param("tau", nn.initializers.ones_init(), (self.heads,), jnp.float32)
        qkv = Dense(3 * width, self.dtype, name="qkv")(x)
        # Heads before tokens, and both in one leading axis, for many small but compact products.
        qkv = qkv.reshape(groups, size, 3, self.heads, -1).transpose(2, 0, 3, 1, 4)
        q, k, v = qkv.reshape(3, groups * self.heads, size, -1)
        scores = jnp.einsum("nic,njc->nij", q, k, preferred_element_type=jnp.float32)
        scores = scores / jnp.maximum(_length(q)[:, :, None] * _length(k)[:, None, :], _MIN_NORM)
        scores = scores.reshape(groups, self.heads, size, size)
        scores = scores / jnp.maximum(tau, _MIN_TAU)[:, None, None] + self._position_bias()
        if shift_bias is not None:
            period = shift_bias.shape[0]
            scores = scores.reshape(-1, period, self.heads, size, size) + shift_bias[:, None]
        weights = jax.nn.softmax(scores.reshape(-1, size, size), axis=-1).astype(self.dtype)
        out = jnp.einsum("nij,njc->nic", weights, v)
        out = out.reshape(groups, self.heads, size, -1).transpose(0, 2, 1, 3)
        return Dense(width, self.dtype, name="proj")(out.reshape(x.shape))

    def _position_bias(self) -> jax.Array:
        """(heads, 16, 16) from the offsets within a window."""
        place = np.stack(np.divmod(np.arange(_GROUP), _WINDOW), axis=-1)
        offset = (place[:, None] - place[None, :]).reshape(-1, 2)
        offset = np.sign(offset) * np.log1p(np.abs(offset))
        bias = MetaMlp(self.heads, name="meta_mlp")(jnp.asarray(offset, jnp.float32))
        return bias.T.reshape(self.heads, _GROUP, _GROUP)


class MetaMlp(nn.Module):
    """Log-spaced offset (..., 2) to one bias per head, (..., heads)."""

    heads: int

    @nn.compact
    def __call__(self, offset: jax.Array) -> jax.Array:
        hidden = nn.relu(Dense(_META_WIDTH, jnp.float32, name="fc1")(offset))
        return Dense(self.heads, jnp.float32, name="fc2")(hidden)


class WindowedBlock(nn.Module):
    """Post-norm block of the OPERA-GT decoder, (B, L, 256) to (B, L, 256)."""

    heads: int
    mlp_ratio: int
    eps: float
    dtype: Any
    shifted: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        attend = CosineAttention(self.heads, self.dtype, name="attn")
        mlp = Mlp(self.mlp_ratio * x.shape[-1], self.dtype, name="mlp")
        bias = jnp.asarray(_shift_bias()) if self.shifted else None
        y = _from_windows(attend(_to_windows(x, self.shifted), bias), x.shape, self.shifted)
        x = x + layer_norm(self.eps, self.dtype, "norm1")(y)
        return x + layer_norm(self.eps, self.dtype, "norm2")(mlp(x))


def _to_windows(x: jax.Array, shifted: bool) -> jax.Array:
    """(B, L, 256) to groups (B * L / 16, 16, 256), the way that the published code reads memory.

    That code hands (B, L, C) to a block written for (B, C, rows, columns). So the memory of a
    clip is read as a 32x8 grid of vectors of length L, that grid is cut into 4x4 windows, and the
    memory of the windows is read as groups of 16 tokens of 256 channels.
    """
    batch, length, _ = x.shape
    rows, columns = _GRID
    x = x.reshape(batch, rows, columns, length)
    if shifted:
        x = jnp.roll(x, -_SHIFT, axis=1)
    x = x.reshape(batch, rows // _WINDOW, _WINDOW, columns // _WINDOW, _WINDOW, length)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, _GROUP, CHANNELS)


def _from_windows(groups: jax.Array, shape: tuple[int, ...], shifted: bool) -> jax.Array:
    """Groups back to (B, L, 256); undoes `_to_windows` for L = 256 only, as published."""
    rows, columns = _GRID
    x = groups.reshape(
        -1, rows // _WINDOW, columns // _WINDOW, _WINDOW, _WINDOW, CHANNELS
    ).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(-1, rows, columns, CHANNELS)
    if shifted:
        x = jnp.roll(x, _SHIFT, axis=1)
    return x.reshape(shape)


def _shift_bias() -> np.ndarray:
    """(16, 16, 16): -100 between the halves of the last two groups of every 16."""
    half = np.arange(_GROUP) >= _GROUP // 2
    apart = np.where(half[:, None] != half[None, :], -100.0, 0.0)
    per_image = CHANNELS // _GROUP
    bias = np.zeros((per_image, _GROUP, _GROUP), np.float32)
    bias[-2:] = apart
    return bias


def _length(x: jax.Array) -> jax.Array:
    """Euclidean length over the last axis, float32."""
    squares = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1)
    # The floor, far below _MIN_NORM squared, only keeps the gradient at 0 finite.
    return jnp.sqrt(jnp.maximum(squares, 1e-24))
