"""Masked-spectrogram modelling for encoders that were published without a reconstruction head.

    features -> hide stretches -> encoder -> tokens -> norm, two dense layers -> hidden stretches

SimMIM (Xie et al. 2022, arXiv 2111.09886) on spectrograms: the encoder sees the whole input with
some stretches replaced by a learned value, and each of its last tokens predicts the part of the
picture that it stands for. That needs of an encoder only to say where its tokens lie (`grid`,
`footprint`, `mask_unit` of its config), so it serves transformers and convolutions alike.

Shapes: B clips, T frames, M mel bins, L tokens of width W in a grid of (rows, columns).
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from medalign_jax.losses.reconstruction import masked_patch_error
from medalign_jax.models.layers.vit_layers import Dense, gelu, layer_norm, patchify


@dataclasses.dataclass(frozen=True)
class MaskLayout:
    """Which parts of a picture can be hidden, and which token predicts what.

    Attributes:
      grid: tokens in time and mel.
      footprint: frames and mel bins that a token predicts.
      unit: tokens in time and mel that are hidden together; the last unit may be smaller.
      ratio: share of the units that is hidden.
    """

    grid: tuple[int, int]
    footprint: tuple[int, int]
    unit: tuple[int, int] = (1, 1)
    ratio: float = 0.6

    def __post_init__(self) -> None:
        if not 0.0 < self.ratio < 1.0:
            raise ValueError(f"the masked share must lie between 0 and 1, got {self.ratio}")
        if not 1 <= self.hidden_units < self.units:
            raise ValueError(
                f"hiding {self.ratio} of {self.units} units of {self.unit} tokens leaves nothing "
                "to predict or nothing to see: the clip is too short for this encoder"
            )

    @property
    def unit_grid(self) -> tuple[int, int]:
        """Units in time and mel."""
        return -(-self.grid[0] // self.unit[0]), -(-self.grid[1] // self.unit[1])

    @property
    def units(self) -> int:
        """Length of the noise that decides what is hidden."""
        return self.unit_grid[0] * self.unit_grid[1]

    @property
    def hidden_units(self) -> int:
        """Units that are hidden."""
        return round(self.units * self.ratio)

    def hidden(self, noise: jax.Array) -> jax.Array:
        """(B, units) float noise -> (B, rows, columns) bool; the units with most noise are hidden.

        Every example hides equally many units.
        """
        rank = jnp.argsort(jnp.argsort(noise, axis=1), axis=1)
        chosen = (rank >= self.units - self.hidden_units).reshape(-1, *self.unit_grid)
        tokens = chosen.repeat(self.unit[0], axis=1).repeat(self.unit[1], axis=2)
        return tokens[:, : self.grid[0], : self.grid[1]]


class SpectrogramDecoder(nn.Module):
    """What is hidden with, and the head that predicts it.

    Attributes:
      layout: of the encoder's tokens.
      mels: M.
      hidden: width of the head's inner layer.
      dtype: of the computation.
    """

    layout: MaskLayout
    mels: int
    hidden: int = 512
    dtype: Any = jnp.float32

    def setup(self) -> None:
        frames, mels = self.layout.footprint
        self.mask_value = self.param(
            "mask_value", nn.initializers.zeros_init(), (self.mels,), jnp.float32
        )
        self.norm = layer_norm(1e-6, self.dtype)
        self.fc1 = Dense(self.hidden, self.dtype)
        self.fc2 = Dense(frames * mels, self.dtype)

    def __call__(self, features: jax.Array, tokens: jax.Array) -> jax.Array:
        """Touches every parameter (for `init`)."""
        nothing = jnp.zeros((features.shape[0], *self.layout.grid), bool)
        return self.hide(features, nothing).sum() + self.predict(tokens).sum()

    def hide(self, features: jax.Array, hidden: jax.Array) -> jax.Array:
        """Replaces what the hidden tokens stand for by the clip's mean and a learned value.

        Args:
          features: (B, T, M); frames and bins beyond the grid stay.
          hidden: (B, rows, columns) bool.

        Returns:
          (B, T, M) float32.
        """
        frames, mels = self.layout.footprint
        cover = hidden.repeat(frames, axis=1).repeat(mels, axis=2)
        short = (features.shape[1] - cover.shape[1], features.shape[2] - cover.shape[2])
        cover = jnp.pad(cover, ((0, 0), (0, max(short[0], 0)), (0, max(short[1], 0))))
        cover = cover[:, : features.shape[1], : features.shape[2]]
        fill = features.mean(axis=(1, 2), keepdims=True) + self.mask_value
        return jnp.where(cover, fill, features)

    def predict(self, tokens: jax.Array) -> jax.Array:
        """(B, L, W) -> (B, L, frames * mels of a footprint) float32."""
        return self.fc2(gelu(self.fc1(self.norm(tokens)))).astype(jnp.float32)

    def error(self, features: jax.Array, predicted: jax.Array, hidden: jax.Array) -> jax.Array:
        """Mean squared error over the hidden parts, (B,) float32.

        The target is the clip with mean 0 and variance 1, so that the term weighs the same under
        every front end.
        """
        centred = features - features.mean(axis=(1, 2), keepdims=True)
        scale = jnp.sqrt(jnp.mean(jnp.square(centred), axis=(1, 2), keepdims=True) + 1e-6)
        rows, columns = self.layout.grid
        frames, mels = self.layout.footprint
        picture = centred / scale
        missing = max(rows * frames - picture.shape[1], 0), max(columns * mels - self.mels, 0)
        picture = jnp.pad(picture, ((0, 0), (0, missing[0]), (0, missing[1])))
        picture = picture[:, : rows * frames, : columns * mels]
        target = patchify(picture, self.layout.footprint)
        return masked_patch_error(predicted, target, hidden.reshape(hidden.shape[0], -1))
