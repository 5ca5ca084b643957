"""Layers shared by vision-transformer encoders and decoders on log-mel patches.

Shapes: B clips, T frames, M mel bins, L patch tokens, N tokens of any kind, W channels.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from medalign_jax.models.layers.attention import attention


class UniformBlocks:
    """What the configs of encoders share whose blocks all have `width` channels (a mix-in).

    Attributes:
      prefix_tokens: class tokens and the like, before the patch tokens in a block's output.
    """

    prefix_tokens: ClassVar[int] = 0

    @property
    def layer_widths(self) -> tuple[int, ...]:
        """Channels of each block's output."""
        return (self.width,) * self.depth

    @property
    def most_frames(self) -> int | None:
        """Most frames of an input; None for any number."""
        return self.frames


def sincos_table(width: int, grid: tuple[int, int]) -> np.ndarray:
    """Fixed position table (1, 1 + rows * columns, width), float32; the class token's row is 0.

    The first half of the channels encodes the column, the second half the row; each half holds
    sines, then cosines, of position / 10000^(2i / (width / 2)). Worked out in float32, in the order
    of operations that gives the published table bit for bit.
    """
    rows, columns = np.divmod(np.arange(grid[0] * grid[1], dtype=np.float32), np.float32(grid[1]))
    exponents = np.arange(width // 4, dtype=np.float32) / np.float32(width / 4)
    frequencies = np.float32(1.0) / np.float32(10000.0) ** exponents
    halves = []
    for position in (columns, rows):
        angles = np.outer(position, frequencies)
        halves += [np.sin(angles), np.cos(angles)]
    table = np.concatenate(halves, axis=1)
    return np.pad(table, ((1, 0), (0, 0)))[None].astype(np.float32)


@jax.checkpoint
def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, x * Phi(x); the tanh approximation is off by up to 1e-3.

    Only `x` is kept for the gradient; autodiff would keep several arrays of that size.
    """
    return 0.5 * x * (1.0 + jax.lax.erf(x * np.float32(0.5**0.5).astype(x.dtype)))


class Dense(nn.Module):
    """Linear layer over the last axis, (..., V) to (..., features).

    Leading axes are flattened to one: on a CPU the gradients of a product of many short matrices
    take up to a fifth longer than those of one long matrix.
    """

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.xavier_uniform()
        kernel = self.param("kernel", init, (x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
        flat = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        out = flat @ kernel.astype(self.dtype) + bias.astype(self.dtype)
        return out.reshape(*x.shape[:-1], self.features)


def layer_norm(eps: float, dtype: Any, name: str | None = None) -> nn.LayerNorm:
    """LayerNorm over the last axis, with the two-pass variance.

    The one-pass form loses digits that a comparison with published numbers sees.
    """
    return nn.LayerNorm(epsilon=eps, dtype=dtype, use_fast_variance=False, name=name)


class Mlp(nn.Module):
    """Two dense layers with GELU between them; keeps the width of its input."""

    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        x = gelu(Dense(self.hidden, self.dtype, name="fc1")(x))
        return Dense(width, self.dtype, name="fc2")(x)


class SelfAttention(nn.Module):
    """Multi-head self-attention over all tokens, (B, N, W) to (B, N, W)."""

    heads: int
    backend: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        qkv = Dense(3 * width, self.dtype, name="qkv")(x)
        q, k, v = jnp.split(qkv.reshape(*x.shape[:2], 3 * self.heads, -1), 3, axis=2)
        out = attention(q, k, v, backend=self.backend)
        return Dense(width, self.dtype, name="proj")(out.reshape(x.shape))


class Block(nn.Module):
    """Pre-norm transformer block."""

    heads: int
    mlp_ratio: int
    eps: float
    backend: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        attend = SelfAttention(self.heads, self.backend, self.dtype, name="attn")
        mlp = Mlp(self.mlp_ratio * x.shape[-1], self.dtype, name="mlp")
        x = x + attend(layer_norm(self.eps, self.dtype, "norm1")(x))
        return x + mlp(layer_norm(self.eps, self.dtype, "norm2")(x))


class PatchEmbed(nn.Module):
    """Linear map of a patch; the kernel has the layout of a convolution (time, mel, 1, W)."""

    width: int
    patch: tuple[int, int]
    dtype: Any

    @nn.compact
    def __call__(self, patches: jax.Array) -> jax.Array:
        """(B, N, values of a patch, time-major) to (B, N, W)."""
        init = nn.initializers.xavier_uniform(in_axis=(0, 1, 2))
        kernel = self.param("kernel", init, (*self.patch, 1, self.width), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.width,), jnp.float32)
        kernel = kernel.reshape(-1, self.width).astype(self.dtype)
        return patches.astype(self.dtype) @ kernel + bias.astype(self.dtype)


def patchify(features: jax.Array, patch: tuple[int, int]) -> jax.Array:
    """(B, T, M) to (B, L, values): time rows of mel columns, each patch flattened time-major."""
    time, mel = patch
    rows, columns = features.shape[1] // time, features.shape[2] // mel
    x = features[:, : rows * time].reshape(-1, rows, time, columns, mel)
    return x.transpose(0, 1, 3, 2, 4).reshape(-1, rows * columns, time * mel)
