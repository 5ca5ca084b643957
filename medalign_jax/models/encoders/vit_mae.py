"""Masked auto-encoder on log-mel patches: the ViT family of OPERA-GT, the encoder of AcuLa.

`OPERA_GT` computes what the published network computes (Zhang et al. 2024, "Towards Open
Respiratory Acoustic Foundation Models", `MaskedAutoencoderViTMD` in evelyn0414/OPERA), including
three things that one would not expect:

* the position table is built for a 16x64 grid, while tokens run over 64 time rows of 16 mel
  columns; shorter inputs use the first rows of the table;
* the feature is the mean over the patch tokens, and the last LayerNorm comes after that mean;
* the decoder's windows are not windows of the token grid (see `windowed_decoder`).

`SMALL` is the same family with an ordinary ViT decoder (He et al. 2022), sized for a laptop.
Shapes: B clips, T frames, M mel bins, L patch tokens, K kept tokens, W channels.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from medalign_jax.models.encoders.masked_autoencoder import Intermediates, MaskedAutoencoder
from medalign_jax.models.encoders.windowed_decoder import CHANNELS, WindowedBlock
from medalign_jax.models.layers.vit_layers import (
    Block,
    Dense,
    PatchEmbed,
    UniformBlocks,
    layer_norm,
    patchify,
)


@dataclasses.dataclass(frozen=True)
class ViTMAEConfig(UniformBlocks):
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
      target: what is predicted, "raw" values as in OPERA-GT, or "standardised" ones: mean 0 and
        variance 1 over each clip. Of raw values most of the error is a clip's own level, which a
        short training stops at.
      eps: of every LayerNorm.
      attention: back end, see `medalign_jax.models.layers.attention`.
      remat: recompute each block's activations in the backward pass instead of keeping them.
      dtype: of the computation; parameters, norms' statistics and losses are float32.
    """

    prefix_tokens = 1  # class token

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
    target: str = "raw"
    eps: float = 1e-6
    attention: str = "auto"
    remat: bool = False
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        time, mel = self.patch_size
        if self.frames % time or self.mels % mel:
            raise ValueError(
                f"{self.frames}x{self.mels} is not divisible into {time}x{mel} patches"
            )
        if self.decoder not in ("plain", "windowed"):
            raise ValueError(f"decoder must be 'plain' or 'windowed', got {self.decoder!r}")
        if self.target not in ("raw", "standardised"):
            raise ValueError(f"target must be 'raw' or 'standardised', got {self.target!r}")
        if self.decoder == "windowed" and self.decoder_width != CHANNELS:
            raise ValueError(f"the windowed decoder needs decoder_width={CHANNELS}")
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

    @property
    def most_frames(self) -> int:
        """Most frames of an input, those of a last patch that is not whole included."""
        return self.frames + self.patch_size[0] - 1

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


class ViTMAE(MaskedAutoencoder):
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
        self.pos_embed = self._table("pos_embed", c.width, c.grid)
        self.decoder_pos_embed = self._table("decoder_pos_embed", c.decoder_width, c.grid)
        self.patch_embed = PatchEmbed(c.width, c.patch_size, c.dtype)
        block = nn.remat(Block) if c.remat else Block
        self.blocks = [
            block(c.heads, c.mlp_ratio, c.eps, c.attention, c.dtype, name=f"block{i}")
            for i in range(c.depth)
        ]
        self.last_norm = layer_norm(c.eps, c.dtype, "norm")
        self.decoder_embed = Dense(c.decoder_width, c.dtype)
        self.decoder_blocks = [self._decoder_block(i) for i in range(c.decoder_depth)]
        self.decoder_norm = layer_norm(c.eps, c.dtype)
        self.decoder_pred = Dense(c.patch_values, c.dtype)

    def _decoder_block(self, i: int) -> nn.Module:
        c, name = self.config, f"decoder_block{i}"
        if c.decoder == "windowed":
            block = nn.remat(WindowedBlock) if c.remat else WindowedBlock
            return block(c.decoder_heads, c.mlp_ratio, c.eps, c.dtype, i % 2 == 1, name=name)
        block = nn.remat(Block) if c.remat else Block
        return block(c.decoder_heads, c.mlp_ratio, c.eps, c.attention, c.dtype, name=name)

    def __call__(
        self, features: jax.Array, noise: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Feature and loss without intermediates; touches every parameter (for `init`)."""
        if noise is None:
            tokens = self.config.tokens(features.shape[1])
            noise = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.float32), (len(features), tokens))
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
        return self._embed_patches(self._patches(features))

    def reconstruct(self, features: jax.Array, noise: jax.Array) -> tuple[jax.Array, Intermediates]:
        """Removes tokens, encodes the rest and predicts what was removed.

        Args:
          features: (B, T, M) log-mel, T a multiple of the patch; with the windowed decoder L must
            be a multiple of 256 (OPERA-GT: T a multiple of 64).
          noise: (B, L) float, without ties; the tokens with the least noise are kept.

        Returns:
          (B,) float32, each clip's mean squared error over the removed patches; their mean over
          the batch is the published loss, since every clip loses equally many. And a dict with
          "block00" ... (B, 1 + K, W), "latent" (B, 1 + K, W) after the norm, "decoder_block00"
          ..., "pred" and "target" (B, L, values of a patch), "mask" (B, L) with 1 where removed,
          and "ids_restore" (B, L).

        Raises:
          ValueError: a shape that the model does not take.
        """
        patches = self._patches(features)
        self._check_masked(features, patches, noise)
        kept = self.config.kept(patches.shape[1])
        raw = self.config.target == "raw"
        target = patches if raw else standardise_clips(patches)
        return self._reconstruct_patches(patches, target, noise, kept)

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
        if self.config.decoder == "windowed" and tokens % CHANNELS:
            raise ValueError(
                f"the windowed decoder needs a multiple of {CHANNELS} tokens, "
                f"{frames} frames give {tokens}"
            )


def standardise_clips(patches: jax.Array) -> jax.Array:
    """Mean 0 and variance 1 over each clip, float32; a constant clip becomes zeros.

    Args:
      patches: (B, L, values).
    """
    patches = patches.astype(jnp.float32)
    mean = patches.mean(axis=(1, 2), keepdims=True)
    variance = patches.var(axis=(1, 2), keepdims=True)
    return (patches - mean) / jnp.sqrt(variance + 1e-6)
