"""Named alternatives to CKA that compare sample by sample; both sides have the same width."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from medalign_jax.errors import UserError


def info_nce_loss(
    x: jax.Array, y: jax.Array, *, temperature: float = 0.07, mask: jax.Array | None = None
) -> jax.Array:
    """Symmetric InfoNCE over cosine similarities (Radford et al. 2021, figure 3).

    Args:
      x: (n, d) features; y: (n, d) features of the same samples.
      temperature: divisor of the similarities.
      mask: (n,) bool, True for the samples that count.

    Returns:
      A float32 scalar: mean over counted samples of the two cross-entropies.
    """
    x, y, mask = _prepare(x, y, mask)
    logits = jnp.matmul(_unit(x), _unit(y).T, precision=jax.lax.Precision.HIGHEST) / temperature
    both = mask[:, None] & mask[None, :]
    logits = jnp.where(both, logits, jnp.finfo(jnp.float32).min)
    hit = jnp.diagonal(logits)
    forward = jax.nn.logsumexp(logits, axis=1) - hit
    backward = jax.nn.logsumexp(logits, axis=0) - hit
    return _mean(0.5 * (forward + backward), mask)


def cosine_loss(x: jax.Array, y: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
    """Mean of 1 - cos(x_i, y_i); x, y (n, d), mask (n,) bool."""
    x, y, mask = _prepare(x, y, mask)
    return _mean(1.0 - (_unit(x) * _unit(y)).sum(-1), mask)


def l2_loss(x: jax.Array, y: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
    """Mean over samples and channels of the squared difference; x, y (n, d), mask (n,) bool."""
    x, y, mask = _prepare(x, y, mask)
    return _mean(jnp.square(x - y).mean(-1), mask)


def _prepare(x, y, mask):
    if x.ndim != 2 or x.shape != y.shape:
        raise UserError(f"both sides must be (n, d) with equal d, got {x.shape} and {y.shape}")
    mask = jnp.ones(x.shape[0], bool) if mask is None else mask
    return x.astype(jnp.float32), y.astype(jnp.float32), mask


def _unit(x):
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-12))


def _mean(values, mask):
    return jnp.where(mask, values, 0.0).sum() / jnp.maximum(mask.sum(), 1)
