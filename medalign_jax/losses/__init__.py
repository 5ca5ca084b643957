"""Pure losses: jit- and grad-safe functions of arrays, computed in float32."""

from medalign_jax.losses.chunked import gradient_only
from medalign_jax.losses.cka import ESTIMATORS, cka, cka_loss
from medalign_jax.losses.contrastive import cosine_loss, info_nce_loss, l2_loss
from medalign_jax.losses.divergences import Divergence, forward_kl, generalised_jsd, reverse_kl
from medalign_jax.losses.layerwise import (
    HIDDEN_KINDS,
    LOGIT_LENS,
    hidden_divergence,
    init_projections,
    layer_pairs,
    logit_lens_divergence,
    masked_sum,
    pair_name,
    project,
)
from medalign_jax.losses.next_token import TopK, next_token_losses, next_token_sum, top_k
from medalign_jax.losses.reconstruction import masked_patch_error

__all__ = [
    "ESTIMATORS",
    "HIDDEN_KINDS",
    "LOGIT_LENS",
    "Divergence",
    "TopK",
    "cka",
    "cka_loss",
    "cosine_loss",
    "forward_kl",
    "generalised_jsd",
    "gradient_only",
    "hidden_divergence",
    "info_nce_loss",
    "init_projections",
    "l2_loss",
    "layer_pairs",
    "logit_lens_divergence",
    "masked_patch_error",
    "masked_sum",
    "next_token_losses",
    "next_token_sum",
    "pair_name",
    "project",
    "reverse_kl",
    "top_k",
]
