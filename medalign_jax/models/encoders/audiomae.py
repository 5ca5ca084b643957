"""AudioMAE (Huang et al. 2022, "Masked Autoencoders that Listen", arXiv 2207.06405).

A ViT-B on 16x16 patches of Kaldi's log-mel filter bank (`medalign_jax.audio.kaldi`), in the two
forms that facebookresearch/AudioMAE published:

* `AUDIOMAE`, fine-tuned on AudioSet: no decoder; the feature is the mean over the patch tokens
  followed by a LayerNorm (`fc_norm`). Backed by the numbers of that network at full size.
* `AUDIOMAE_PRETRAINED`, with the decoder of the pre-training. There are no published numbers to
  check the decoder against. It is written from section 3 of the paper and from what is known of
  the released settings (`decoder_mode=1`, sixteen blocks of cosine attention in 4x4 windows, every
  second one rolled by two rows of time, patch-normalised target, 80 % masked). The attention is
  the one of OPERA-GT's decoder, which was made from the same code and is backed by numbers; here
  its windows are those of the token grid. The feature is the mean and then the encoder's last
  norm, our choice: the authors pool only in the fine-tuned form.

Shapes: B clips, T frames, M mel bins, L patch tokens, K kept tokens, W channels.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from medalign_jax.models.encoders.masked_autoencoder import Intermediates, MaskedAutoencoder
from medalign_jax.models.encoders.windowed_decoder import CosineAttention
from medalign_jax.models.layers.vit_layers import (
    Block,
    Dense,
    Mlp,
    PatchEmbed,
    UniformBlocks,
    layer_norm,
    patchify,
)

_WINDOW = 4  # side of a decoder window, tokens
_SHIFT = 2  # rows that every second decoder block rolls


@dataclasses.dataclass(frozen=True)
class AudioMAEConfig(UniformBlocks):
    """Sizes of an AudioMAE.

    Attributes:
      frames: frames of an input; shorter ones are filled up with zeros.
      mels: mel bins of an input.
      patch: side of a patch, frames and mel bins.
      width, depth, heads, mlp_ratio: of the encoder.
      decoder_depth: blocks of the decoder; 0 for a fine-tuned model, which has none.
      decoder_width, decoder_heads: of the decoder.
      mask_ratio: share of tokens that is removed before reconstruction.
      eps: of every LayerNorm.
      attention: back end, see `medalign_jax.models.layers.attention`.
      remat: recompute each block's activations in the backward pass instead of keeping them.
      dtype: of the computation; parameters, norms' statistics and losses are float32.
    """

    prefix_tokens = 1  # class token

    frames: int = 1024
    mels: int = 128
    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: int = 4
    decoder_depth: int = 0
    decoder_width: int = 512
    decoder_heads: int = 16
    mask_ratio: float = 0.8
    eps: float = 1e-6
    attention: str = "auto"
    remat: bool = False
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if self.frames % self.patch or self.mels % self.patch:
            raise ValueError(
                f"{self.frames}x{self.mels} is not divisible into patches of side {self.patch}"
            )
        for width, heads in ((self.width, self.heads), (self.decoder_width, self.decoder_heads)):
            if width % heads or width % 4:
                raise ValueError(f"width {width} must be a multiple of 4 and of {heads} heads")
        grid = self.grid(self.frames)
        if self.decoder_depth and any(side % _WINDOW for side in grid):
            raise ValueError(
                f"the decoder's {_WINDOW}x{_WINDOW} windows do not divide a grid of {grid} tokens"
            )
        tokens = self.tokens(self.frames)
        if not 1 <= self.kept < tokens:
            raise ValueError(f"mask_ratio {self.mask_ratio} keeps {self.kept} of {tokens} tokens")

    @property
    def footprint(self) -> tuple[int, int]:
        """(frames, mel bins) of a token."""
        return (self.patch, self.patch)

    @property
    def mask_unit(self) -> tuple[int, int]:
        """(rows, columns) of tokens that are hidden together; a token is 0.16 s already."""
        return (1, 1)

    @property
    def patch_values(self) -> int:
        """Numbers in a patch."""
        return self.patch**2

    @property
    def kept(self) -> int:
        """How many tokens the encoder sees when masking."""
        return int(self.tokens(self.frames) * (1 - self.mask_ratio))

    def grid(self, frames: int) -> tuple[int, int]:
        """(time rows, mel columns) of tokens: the same for all, because inputs are filled up.

        Raises:
          ValueError: no frames, or more than the model takes.
        """
        if not 1 <= frames <= self.frames:
            raise ValueError(
                f"input of {frames} frames: this model takes 1 to {self.frames}; "
                "cut it, as the front end does with pad_to"
            )
        return (self.frames // self.patch, self.mels // self.patch)

    def tokens(self, frames: int) -> int:
        """Patch tokens of an input of so many frames; as `grid`."""
        rows, columns = self.grid(frames)
        return rows * columns


AUDIOMAE = AudioMAEConfig()

AUDIOMAE_PRETRAINED = AudioMAEConfig(decoder_depth=16)


class AudioMAE(MaskedAutoencoder):
    """AudioMAE with or without its decoder; see the module's docstring.

    The parameters include the fixed tables `pos_embed` and `decoder_pos_embed` (sine and cosine
    on the token grid, as they are stored in the checkpoints); no gradient reaches them, and an
    optimizer that decays weights has to leave out `.*pos_embed`. The last norm is named as
    upstream: `norm` with a decoder, `fc_norm` without.
    """

    config: AudioMAEConfig

    def setup(self) -> None:
        c = self.config
        token = nn.initializers.normal(0.02)
        self.cls_token = self.param("cls_token", token, (1, 1, c.width), jnp.float32)
        self.pos_embed = self._table("pos_embed", c.width, c.grid(c.frames))
        self.patch_embed = PatchEmbed(c.width, c.footprint, c.dtype)
        block = nn.remat(Block) if c.remat else Block
        self.blocks = [
            block(c.heads, c.mlp_ratio, c.eps, c.attention, c.dtype, name=f"block{i}")
            for i in range(c.depth)
        ]
        self.last_norm = layer_norm(c.eps, c.dtype, "norm" if c.decoder_depth else "fc_norm")
        if c.decoder_depth:
            self._setup_decoder(token)

    def _setup_decoder(self, token: nn.initializers.Initializer) -> None:
        c = self.config
        self.mask_token = self.param("mask_token", token, (1, 1, c.decoder_width), jnp.float32)
        self.decoder_pos_embed = self._table("decoder_pos_embed", c.decoder_width, c.grid(c.frames))
        self.decoder_embed = Dense(c.decoder_width, c.dtype)
        block = nn.remat(GridWindowBlock) if c.remat else GridWindowBlock
        self.decoder_blocks = [
            block(
                c.decoder_heads, c.mlp_ratio, c.eps, c.dtype, c.grid(c.frames), i % 2 == 1,
                name=f"decoder_block{i}",
            )
            for i in range(c.decoder_depth)
        ]  # fmt: skip
        self.decoder_norm = layer_norm(c.eps, c.dtype)
        self.decoder_pred = Dense(c.patch_values, c.dtype)

    def __call__(self, features: jax.Array) -> tuple[jax.Array, Intermediates]:
        """As `embed`; touches every parameter on `init`."""
        if self.is_initializing() and self.config.decoder_depth:
            noise = jnp.arange(self.config.tokens(features.shape[1]), dtype=jnp.float32)
            self.reconstruct(features, jnp.tile(noise, (features.shape[0], 1)))
        return self.embed(features)

    def embed(self, features: jax.Array) -> tuple[jax.Array, Intermediates]:
        """Feature of whole clips.

        Args:
          features: (B, T, M) log-mel, T from 1 to `config.frames`. Zeros are put behind shorter
            ones, and their tokens count, as where the published features were taken; for frames
            that are missing because a clip is short, let the front end fill up.

        Returns:
          (B, W) float32, and a dict with "patch_embed" (B, L, W), "block00" ... (B, 1 + L, W)
          after each block with the class token first, "tokens" (B, L, W) and their mean "pooled"
          (B, W), both before the last norm.

        Raises:
          ValueError: a shape that the model does not take.
        """
        return self._embed_patches(self._patches(features))

    def reconstruct(self, features: jax.Array, noise: jax.Array) -> tuple[jax.Array, Intermediates]:
        """Removes tokens, encodes the rest and predicts what was removed (sections 3.1 to 3.3).

        Args:
          features: (B, T, M) log-mel, as in `embed`.
          noise: (B, L) float, without ties; the tokens with the least noise are kept.

        Returns:
          (B,) float32, each clip's mean squared error over the removed patches. And a dict with
          "block00" ... (B, 1 + K, W), "latent" (B, 1 + K, W) after the norm, "decoder_block00"
          ... (B, L, decoder width), "pred" and "target" (B, L, values of a patch), the target
          with mean 0 and variance 1 in each patch, "mask" (B, L) with 1 where removed, and
          "ids_restore" (B, L).

        Raises:
          ValueError: a shape that the model does not take, or a model without a decoder.
        """
        c = self.config
        if not c.decoder_depth:
            raise ValueError("a fine-tuned AudioMAE has no decoder: use AUDIOMAE_PRETRAINED")
        patches = self._patches(features)
        if noise.shape != patches.shape[:2]:
            raise ValueError(f"noise must be {patches.shape[:2]}, got {noise.shape}")
        return self._reconstruct_patches(patches, normalise_patches(patches), noise, c.kept)

    def _patches(self, features: jax.Array) -> jax.Array:
        c = self.config
        if features.ndim != 3 or features.shape[2] != c.mels:
            raise ValueError(f"features must be (B, T, {c.mels}), got {features.shape}")
        c.grid(features.shape[1])
        missing = c.frames - features.shape[1]
        return patchify(jnp.pad(features, ((0, 0), (0, missing), (0, 0))), c.footprint)


class GridWindowBlock(nn.Module):
    """Post-norm block with cosine attention in 4x4 windows of the token grid (Swin V2).

    (B, rows * columns, W) to the same. A shifted block rolls the rows by two first, so that its
    windows straddle those of the block before; the two halves of the windows in which the last
    rows then meet the first ones do not see each other.
    """

    heads: int
    mlp_ratio: int
    eps: float
    dtype: Any
    grid: tuple[int, int]
    shifted: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        attend = CosineAttention(self.heads, self.dtype, name="attn")
        mlp = Mlp(self.mlp_ratio * x.shape[-1], self.dtype, name="mlp")
        shift = _SHIFT if self.shifted else 0
        bias = jnp.asarray(_shift_bias(self.grid)) if self.shifted else None
        y = _from_windows(attend(_to_windows(x, self.grid, shift), bias), self.grid, shift)
        x = x + layer_norm(self.eps, self.dtype, "norm1")(y)
        return x + layer_norm(self.eps, self.dtype, "norm2")(mlp(x))


def _to_windows(x: jax.Array, grid: tuple[int, int], shift: int) -> jax.Array:
    """(B, rows * columns, W) to windows (B * rows * columns / 16, 16, W), row by row."""
    rows, columns = grid
    x = jnp.roll(x.reshape(-1, *grid, x.shape[-1]), -shift, axis=1)
    x = x.reshape(-1, rows // _WINDOW, _WINDOW, columns // _WINDOW, _WINDOW, x.shape[-1])
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, _WINDOW**2, x.shape[-1])


def _from_windows(x: jax.Array, grid: tuple[int, int], shift: int) -> jax.Array:
    """Undoes `_to_windows`."""
    rows, columns = grid
    x = x.reshape(-1, rows // _WINDOW, columns // _WINDOW, _WINDOW, _WINDOW, x.shape[-1])
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, *grid, x.shape[-1])
    return jnp.roll(x, shift, axis=1).reshape(-1, rows * columns, x.shape[-1])


def _shift_bias(grid: tuple[int, int]) -> np.ndarray:
    """(windows, 16, 16): -100 between first and last rows in the lowest windows, else 0."""
    wrapped = np.arange(_WINDOW**2) >= (_WINDOW - _SHIFT) * _WINDOW
    columns = grid[1] // _WINDOW
    bias = np.zeros((grid[0] // _WINDOW * columns, _WINDOW**2, _WINDOW**2), np.float32)
    bias[-columns:] = np.where(wrapped[:, None] != wrapped, -100.0, 0.0)
    return bias


def normalise_patches(patches: jax.Array) -> jax.Array:
    """Mean 0 and variance 1 in each patch (He et al. 2022, "normalized pixels"), float32.

    Args:
      patches: (B, L, values).

    Returns:
      (B, L, values); a constant patch becomes zeros. The variance is the unbiased one.
    """
    patches = patches.astype(jnp.float32)
    mean = patches.mean(axis=-1, keepdims=True)
    variance = patches.var(axis=-1, keepdims=True, ddof=1)
    return (patches - mean) / jnp.sqrt(variance + 1e-6)
