"""Pure losses: jit- and grad-safe functions of arrays, computed in float32."""

from medalign_jax.losses.cka import ESTIMATORS, cka, cka_loss
from medalign_jax.losses.contrastive import cosine_loss, info_nce_loss, l2_loss
from medalign_jax.losses.reconstruction import masked_patch_error

__all__ = [
    "ESTIMATORS",
    "cka",
    "cka_loss",
    "cosine_loss",
    "info_nce_loss",
    "l2_loss",
    "masked_patch_error",
]
