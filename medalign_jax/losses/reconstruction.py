"""Masked reconstruction of spectrogram patches."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def masked_patch_error(predicted: jax.Array, target: jax.Array, removed: jax.Array) -> jax.Array:
    """Squared error of the removed patches, per example (He et al. 2022; OPERA's MAE loss).

    Args:
      predicted: (B, L, P) predicted patches.
      target: (B, L, P) true patches, not normalised.
      removed: (B, L) bool or 0/1, 1 where the patch was hidden from the encoder.

    Returns:
      (B,) float32: mean over an example's removed patches of the mean squared error in a patch; 0
      where nothing was removed. As every example hides equally many patches, the mean over the
      batch is the published loss.
    """
    removed = removed.astype(jnp.float32)
    error = jnp.square(predicted.astype(jnp.float32) - target.astype(jnp.float32)).mean(-1)
    return (error * removed).sum(-1) / jnp.maximum(removed.sum(-1), 1.0)
