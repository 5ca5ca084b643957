"""Masked auto-encoder on log-mel patches: the ViT family of OPERA-GT, the encoder of AcuLa.

`OPERA_GT` computes what the published network computes (Zhang et al. 2024, "Towards Open
Respiratory Acoustic Foundation Models", `MaskedAutoencoderViTMD` in evelyn0414/OPERA), including
three things that one would not expect:

* the position table is built for a 16x64 grid, while tokens run over 64 time rows of 16 mel
  columns; shorter inputs use the first rows of the table;
* the feature is the mean over the patch tokens, and the last LayerNorm comes after that mean;
* the decoder's windows are not windows of the token grid (see `_to_windows`).

`SMALL` is the same family with an ordinary ViT decoder (He et al. 2022), sized for a laptop.
Shapes: B clips, T frames, M mel bins, L patch tokens, K kept tokens, W channels.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from medalign_jax.models.attention import attention

Intermediates = dict[str, jax.Array]

_WINDOW = 4  # side of a decoder window
_GROUP = _WINDOW * _WINDOW  # tokens that see each other
_SHIFT = 2  # roll of every second decoder block
_GRID = (32, 8)  # the decoder takes the channels for a grid of this size
_CHANNELS = _GRID[0] * _GRID[1]
_MIN_NORM = 1e-6  # least |q||k| of the cosine attention
_MIN_TAU = 0.01  # least temperature of the cosine attention
_META_WIDTH = 384  # hidden width of the network that makes the relative position bias


@dataclasses.dataclass(frozen=True)
class ViTMAEConfig:
    """Sizes of a masked auto-encoder.

    Attributes:
      frames: most frames of an input (length of the position table times the patch).
      mels: mel bins of an input.
      patch: side of a patch, or (frames, mel bins) of one. Cost grows with the inverse square of
        its area, since attention does.
      position_grid: (rows, columns) for which the position table is made, filled row by row in
        the order of the tokens; None for the true grid (time, mel).
      width, depth, heads, mlp_ratio: of the encoder.
      decoder: "plain" (pre-norm ViT) or "windowed" (as in OPERA-GT).
      decoder_width, decoder_depth, decoder_heads: of the decoder.
      mask_ratio: share of tokens that is removed before reconstruction.
      eps: of every LayerNorm.
      attention: back end, see `medalign_jax.models.attention`.
      remat: recompute each block's activations in the backward pass instead of keeping them.
      dtype: of the computation; parameters, norms' statistics and losses are float32.
    """

    frames: int = 256
    mels: int = 64
    patch: int | tuple[int, int] = 4
    position_grid: tuple[int, int] | None = None
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: int = 4
    decoder: str = "plain"
    decoder_width: int = 256
    decoder_depth: int = 4
    decoder_heads: int = 8
    mask_ratio: float = 0.7
    eps: float = 1e-6
    attention: str = "auto"
    remat: bool = False
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        time, mel = self.patch_size
        if self.frames % time or self.mels % mel:
            raise ValueError(f"{self.frames}x{self.mels} is not divisible into {time}x{mel} patches")
        if self.decoder not in ("plain", "windowed"):
            raise ValueError(f"decoder must be 'plain' or 'windowed', got {self.decoder!r}")
        if self.decoder == "windowed" and self.decoder_width != _CHANNELS:
            raise ValueError(f"the windowed decoder needs decoder_width={_CHANNELS}")
        for width, heads in ((self.width, self.heads), (self.decoder_width, self.decoder_heads)):
            if width % heads or width % 4:
                raise ValueError(f"width {width} must be a multiple of 4 and of {heads} heads")
        if int(np.prod(self.grid)) != self.grid_tokens:
            raise ValueError(f"position_grid {self.grid} must hold {self.grid_tokens} tokens")
        if not 0.0 < self.mask_ratio < 1.0:
            raise ValueError(f"mask_ratio must lie between 0 and 1, got {self.mask_ratio}")

    @property
    def patch_size(self) -> tuple[int, int]:
        """(frames, mel bins) of a patch."""
        return (self.patch, self.patch) if isinstance(self.patch, int) else tuple(self.patch)

    @property
    def patch_values(self) -> int:
        """Numbers in a patch."""
        return self.patch_size[0] * self.patch_size[1]

    @property
    def grid_tokens(self) -> int:
        """Tokens of an input of full length."""
        return self.frames // self.patch_size[0] * (self.mels // self.patch_size[1])

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the position table."""
        true_grid = (self.frames // self.patch_size[0], self.mels // self.patch_size[1])
        return self.position_grid or true_grid

    def tokens(self, frames: int) -> int:
        """Patch tokens of an input of so many frames; frames beyond the last patch are lost.

        Raises:
          ValueError: too few frames for one patch, or more than the position table has.
        """
        rows = frames // self.patch_size[0]
        most = self.frames // self.patch_size[0]
        if not 1 <= rows <= most:
            raise ValueError(
                f"input of {frames} frames gives {rows} rows of patches; "
                f"this model takes 1 to {most} ({self.patch_size[0]} to {self.frames} frames)"
            )
        return rows * (self.mels // self.patch_size[1])

    def kept(self, tokens: int) -> int:
        """How many of so many tokens the encoder sees when masking."""
        kept = int(tokens * (1 - self.mask_ratio))
        if not 1 <= kept < tokens:
            raise ValueError(f"mask_ratio {self.mask_ratio} leaves {kept} of {tokens} tokens")
        return kept


OPERA_GT = ViTMAEConfig(
    position_grid=(16, 64),
    decoder="windowed",
    decoder_width=256,
    decoder_depth=16,
    decoder_heads=16,
)

SMALL = ViTMAEConfig(
    patch=8,
    width=192,
    depth=6,
    heads=3,
    decoder_width=128,
    decoder_depth=2,
    decoder_heads=4,
)


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


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, x * Phi(x); the tanh approximation is off by up to 1e-3."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * np.float32(0.5**0.5).astype(x.dtype)))


class Mlp(nn.Module):
    """Two dense layers with GELU between them; keeps the width of its input."""

    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        x = gelu(_dense(self.hidden, self.dtype, "fc1")(x))
        return _dense(width, self.dtype, "fc2")(x)


class SelfAttention(nn.Module):
    """Multi-head self-attention over all tokens, (B, N, W) to (B, N, W)."""

    heads: int
    backend: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        qkv = _dense(3 * width, self.dtype, "qkv")(x)
        q, k, v = jnp.split(qkv.reshape(*x.shape[:2], 3 * self.heads, -1), 3, axis=2)
        out = attention(q, k, v, backend=self.backend)
        return _dense(width, self.dtype, "proj")(out.reshape(x.shape))


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
        x = x + attend(_norm(self.eps, self.dtype, "norm1")(x))
        return x + mlp(_norm(self.eps, self.dtype, "norm2")(x))


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
        qkv = _dense(3 * width, self.dtype, "qkv")(x).reshape(groups, size, 3, self.heads, -1)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        scores = jnp.einsum("gihc,gjhc->ghij", q, k, preferred_element_type=jnp.float32)
        lengths = _length(q)[..., :, None] * _length(k)[..., None, :]
        scores = scores / jnp.maximum(lengths, _MIN_NORM)
        scores = scores / jnp.maximum(tau, _MIN_TAU)[:, None, None] + self._position_bias()
        if shift_bias is not None:
            period = shift_bias.shape[0]
            scores = scores.reshape(-1, period, self.heads, size, size) + shift_bias[:, None]
            scores = scores.reshape(groups, self.heads, size, size)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        out = jnp.einsum("ghij,gjhc->gihc", weights, v)
        return _dense(width, self.dtype, "proj")(out.reshape(x.shape))

    def _position_bias(self) -> jax.Array:
        """(heads, 16, 16) from the offsets within a window."""
        place = np.stack(np.divmod(np.arange(_GROUP), _WINDOW), axis=-1)
        offset = (place[:, None] - place[None, :]).reshape(-1, 2)
        offset = np.sign(offset) * np.log1p(np.abs(offset))
        bias = MetaMlp(self.heads, name="meta_mlp")(jnp.asarray(offset, jnp.float32))
        return bias.T.reshape(self.heads, _GROUP, _GROUP)


class MetaMlp(nn.Module):
    """Log-spaced offset (..., 2) to one bias a head, (..., heads)."""

    heads: int

    @nn.compact
    def __call__(self, offset: jax.Array) -> jax.Array:
        hidden = nn.relu(_dense(_META_WIDTH, jnp.float32, "fc1")(offset))
        return _dense(self.heads, jnp.float32, "fc2")(hidden)


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
        x = x + _norm(self.eps, self.dtype, "norm1")(y)
        return x + _norm(self.eps, self.dtype, "norm2")(mlp(x))


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
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, _GROUP, _CHANNELS)


def _from_windows(groups: jax.Array, shape: tuple[int, ...], shifted: bool) -> jax.Array:
    """Groups back to (B, L, 256); undoes `_to_windows` for L = 256 only, as published."""
    rows, columns = _GRID
    x = groups.reshape(
        -1, rows // _WINDOW, columns // _WINDOW, _WINDOW, _WINDOW, _CHANNELS
    ).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(-1, rows, columns, _CHANNELS)
    if shifted:
        x = jnp.roll(x, _SHIFT, axis=1)
    return x.reshape(shape)


def _shift_bias() -> np.ndarray:
    """(16, 16, 16): -100 between the halves of the last two groups of every 16."""
    half = np.arange(_GROUP) >= _GROUP // 2
    apart = np.where(half[:, None] != half[None, :], -100.0, 0.0)
    per_image = _CHANNELS // _GROUP
    bias = np.zeros((per_image, _GROUP, _GROUP), np.float32)
    bias[-2:] = apart
    return bias


def _length(x: jax.Array) -> jax.Array:
    """Euclidean length over channels, (G, 16, heads, C) to (G, heads, 16), float32."""
    squares = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1)
    # The floor, far below _MIN_NORM squared, only keeps the gradient at 0 finite.
    return jnp.sqrt(jnp.maximum(squares, 1e-24)).transpose(0, 2, 1)


def _dense(features: int, dtype: Any, name: str) -> nn.Dense:
    return nn.Dense(
        features, dtype=dtype, kernel_init=nn.initializers.xavier_uniform(), name=name
    )


def _norm(eps: float, dtype: Any, name: str) -> nn.LayerNorm:
    # The two-pass variance: the one-pass form loses digits that the parity tests look at.
    return nn.LayerNorm(epsilon=eps, dtype=dtype, use_fast_variance=False, name=name)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=())
def _restore(kept: jax.Array, fill: jax.Array, order: jax.Array, place: jax.Array) -> jax.Array:
    """Puts kept tokens back to their places and `fill` everywhere else.

    Args:
      kept: (B, K, W) in the order of their noise.
      fill: (W,).
      order: (B, L), order[b, r] = place of the token of rank r.
      place: (B, L), the inverse: rank of the token at a place.

    Returns:
      (B, L, W). The gradient is a gather by `order`, where autodiff would write a slow scatter.
    """
    rank = jnp.minimum(place, kept.shape[1] - 1)[..., None]
    return jnp.where(
        (place < kept.shape[1])[..., None], jnp.take_along_axis(kept, rank, axis=1), fill
    )


def _restore_forward(kept, fill, order, place):
    return _restore(kept, fill, order, place), (order, place, kept.shape[1])


def _restore_backward(saved, gradient):
    order, place, count = saved
    to_kept = jnp.take_along_axis(gradient, order[:, :count, None], axis=1)
    to_fill = jnp.sum(jnp.where((place >= count)[..., None], gradient, 0), axis=(0, 1))
    return to_kept, to_fill, None, None


_restore.defvjp(_restore_forward, _restore_backward)


class ViTMAE(nn.Module):
    """Masked auto-encoder; see the module's docstring.

    The parameters include the fixed tables `pos_embed` and `decoder_pos_embed`, so that they are
    loaded from and exported to a checkpoint; no gradient reaches them, and an optimizer that
    decays weights has to leave out `.*pos_embed`.
    """

    config: ViTMAEConfig

    def setup(self) -> None:
        c = self.config
        token = nn.initializers.normal(0.02)
        self.cls_token = self.param("cls_token", token, (1, 1, c.width), jnp.float32)
        self.mask_token = self.param("mask_token", token, (1, 1, c.decoder_width), jnp.float32)
        self.pos_embed = self._table("pos_embed", c.width)
        self.decoder_pos_embed = self._table("decoder_pos_embed", c.decoder_width)
        self.patch_embed = PatchEmbed(c.width, c.patch_size, c.dtype)
        block = nn.remat(Block) if c.remat else Block
        windowed = nn.remat(WindowedBlock) if c.remat else WindowedBlock
        self.blocks = [
            block(c.heads, c.mlp_ratio, c.eps, c.attention, c.dtype, name=f"block{i}")
            for i in range(c.depth)
        ]
        self.norm = _norm(c.eps, c.dtype, None)
        self.decoder_embed = _dense(c.decoder_width, c.dtype, None)
        if c.decoder == "windowed":
            self.decoder_blocks = [
                windowed(
                    c.decoder_heads, c.mlp_ratio, c.eps, c.dtype, i % 2 == 1,
                    name=f"decoder_block{i}",
                )
                for i in range(c.decoder_depth)
            ]  # fmt: skip
        else:
            self.decoder_blocks = [
                block(
                    c.decoder_heads, c.mlp_ratio, c.eps, c.attention, c.dtype,
                    name=f"decoder_block{i}",
                )
                for i in range(c.decoder_depth)
            ]  # fmt: skip
        self.decoder_norm = _norm(c.eps, c.dtype, None)
        self.decoder_pred = _dense(c.patch_values, c.dtype, None)

    def _table(self, name: str, width: int) -> jax.Array:
        table = self.param(name, lambda _: jnp.asarray(sincos_table(width, self.config.grid)))
        return jax.lax.stop_gradient(table)

    def __call__(self, features: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Feature and loss without intermediates; touches every parameter (for `init`)."""
        return self.embed(features)[0], self.reconstruct(features, noise)[0]

    def embed(self, features: jax.Array) -> tuple[jax.Array, Intermediates]:
        """Feature of whole clips.

        Args:
          features: (B, T, M) log-mel; any T from one patch to `config.frames` (and what a patch
            leaves over).

        Returns:
          (B, W) float32, and a dict with "patch_embed" (B, L, W), "block00" ... (B, 1 + L, W)
          after each block with the class token first, "tokens" (B, L, W) and their mean "pooled"
          (B, W), both before the last norm.

        Raises:
          ValueError: a shape that the model does not take.
        """
        patches = self._patches(features)
        embedded = self.patch_embed(patches)
        out = {"patch_embed": embedded}
        x = embedded + self.pos_embed[:, 1 : patches.shape[1] + 1].astype(embedded.dtype)
        x = self._encode(x, out)
        out["tokens"] = x[:, 1:]
        out["pooled"] = jnp.mean(out["tokens"].astype(jnp.float32), axis=1)
        return self.norm(out["pooled"]).astype(jnp.float32), out

    def reconstruct(
        self, features: jax.Array, noise: jax.Array
    ) -> tuple[jax.Array, Intermediates]:
        """Removes tokens, encodes the rest and predicts what was removed.

        Args:
          features: (B, T, M) log-mel, T a multiple of the patch; with the windowed decoder L must
            be a multiple of 256 (OPERA-GT: T a multiple of 64).
          noise: (B, L) float, without ties; the tokens with the least noise are kept.

        Returns:
          (B,) float32, each clip's mean squared error over the removed patches; their mean over
          the batch is the published loss, since every clip loses equally many. And a dict with
          "block00" ... (B, 1 + K, W), "latent" (B, 1 + K, W) after the norm, "decoder_block00"
          ..., "pred" and "target" (B, L, values of a patch), "patch_loss" (B, L), "mask" (B, L)
          with 1 where removed, and "ids_restore" (B, L).

        Raises:
          ValueError: a shape that the model does not take.
        """
        patches = self._patches(features)
        self._check_masked(features, patches, noise)
        kept = self.config.kept(patches.shape[1])
        order = jnp.argsort(noise, axis=1)
        place = jnp.argsort(order, axis=1)
        out: Intermediates = {"target": patches.astype(jnp.float32), "ids_restore": place}
        out["mask"] = (place >= kept).astype(jnp.float32)

        # Only kept patches are embedded: nothing here needs a gradient before the gather.
        x = self.patch_embed(jnp.take_along_axis(patches, order[:, :kept, None], axis=1))
        x = x + self.pos_embed[0, 1:][order[:, :kept]].astype(x.dtype)
        out["latent"] = self.norm(self._encode(x, out))
        out["pred"] = self._decode(out["latent"], order, place, out)
        out["patch_loss"] = jnp.mean(jnp.square(out["pred"] - out["target"]), axis=-1)
        removed = patches.shape[1] - kept
        return jnp.sum(out["patch_loss"] * out["mask"], axis=1) / removed, out

    def _patches(self, features: jax.Array) -> jax.Array:
        c = self.config
        if features.ndim != 3 or features.shape[2] != c.mels:
            raise ValueError(f"features must be (B, T, {c.mels}), got {features.shape}")
        c.tokens(features.shape[1])
        return patchify(features, c.patch_size)

    def _check_masked(self, features: jax.Array, patches: jax.Array, noise: jax.Array) -> None:
        frames, tokens = features.shape[1], patches.shape[1]
        if noise.shape != patches.shape[:2]:
            raise ValueError(f"noise must be {patches.shape[:2]}, got {noise.shape}")
        if frames % self.config.patch_size[0]:
            raise ValueError(
                f"reconstruction needs whole patches: {frames} frames are not a multiple of "
                f"{self.config.patch_size[0]}"
            )
        if self.config.decoder == "windowed" and tokens % _CHANNELS:
            raise ValueError(
                f"the windowed decoder needs a multiple of {_CHANNELS} tokens, "
                f"{frames} frames give {tokens}"
            )

    def _encode(self, x: jax.Array, out: Intermediates) -> jax.Array:
        """Adds the class token and runs the blocks; (B, N, W) to (B, 1 + N, W), before the norm."""
        first = (self.cls_token + self.pos_embed[:, :1]).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, x.shape[2])), x], axis=1)
        for i, block in enumerate(self.blocks):
            x = out[f"block{i:02d}"] = block(x)
        return x

    def _decode(
        self, latent: jax.Array, order: jax.Array, place: jax.Array, out: Intermediates
    ) -> jax.Array:
        """(B, 1 + K, W) to predicted patches (B, L, values), float32; the class token is dropped."""
        x = self.decoder_embed(latent[:, 1:])
        x = _restore(x, self.mask_token[0, 0].astype(x.dtype), order, place)
        x = x + self.decoder_pos_embed[:, 1 : x.shape[1] + 1].astype(x.dtype)
        for i, block in enumerate(self.decoder_blocks):
            x = out[f"decoder_block{i:02d}"] = block(x)
        return self.decoder_pred(self.decoder_norm(x)).astype(jnp.float32)
