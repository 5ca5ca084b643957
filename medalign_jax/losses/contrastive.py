"""Losses that tell a sample's counterpart from the others': alternatives to CKA, and COLA's."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from medalign_jax.core.errors import UserError


def info_nce_loss(
    x: jax.Array,
    y: jax.Array,
    *,
    temperature: float = 0.07,
    mask: jax.Array | None = None,
    same: jax.Array | None = None,
) -> jax.Array:
    """Symmetric InfoNCE over cosine similarities (Radford et al. 2021, figure 3).

    Samples that are the `same` are not negatives of each other: the probability of any of them is
    what counts, as in the "in" form of Khosla et al. 2020 ("Supervised Contrastive Learning",
    equation 3, summed inside the logarithm), so that a perfect alignment of few distinct reports
    reaches 0.

    Args:
      x: (n, d) features; y: (n, d) features of the same samples.
      temperature: divisor of the similarities.
      mask: (n,) bool, True for the samples that count.
      same: (n, n) bool, symmetric: pairs with the same report; None: each has its own.

    Returns:
      A float32 scalar: mean over counted samples of the two cross-entropies.
    """
    x, y, mask = _prepare(x, y, mask)
    same = jnp.eye(len(x), dtype=bool) if same is None else same
    logits = jnp.matmul(_unit(x), _unit(y).T, precision=jax.lax.Precision.HIGHEST) / temperature
    both = mask[:, None] & mask[None, :]
    least = jnp.finfo(jnp.float32).min
    logits = jnp.where(both, logits, least)
    hits = jnp.where(same, logits, least)
    forward = jax.nn.logsumexp(logits, axis=1) - jax.nn.logsumexp(hits, axis=1)
    backward = jax.nn.logsumexp(logits, axis=0) - jax.nn.logsumexp(hits, axis=0)
    return _mean(0.5 * (forward + backward), mask)


def cosine_loss(x: jax.Array, y: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
    """Mean of 1 - cos(x_i, y_i); x, y (n, d), mask (n,) bool."""
    x, y, mask = _prepare(x, y, mask)
    return _mean(1.0 - (_unit(x) * _unit(y)).sum(-1), mask)


def l2_loss(x: jax.Array, y: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
    """Mean over samples and channels of the squared difference; x, y (n, d), mask (n,) bool."""
    x, y, mask = _prepare(x, y, mask)
    return _mean(jnp.square(x - y).mean(-1), mask)


def cola_logits(query: jax.Array, key: jax.Array) -> jax.Array:
    """(B, P) of the first stretches and (K, P) of the second -> (B, K) float32."""
    query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    return jnp.matmul(query, key.T, precision=jax.lax.Precision.HIGHEST)


def cola_loss(logits: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Cross-entropy of each row, its own column being the answer.

    Args:
      logits: (B, B).
      mask: (B,) bool, True for the samples that count; the others are nobody's candidate.

    Returns:
      (B,) float32, 0 where masked.
    """
    if logits.ndim != 2 or logits.shape[0] != logits.shape[1]:
        raise ValueError(f"logits must be (B, B), got {logits.shape}")
    mask = jnp.ones(len(logits), bool) if mask is None else mask
    logits = jnp.where(mask, logits.astype(jnp.float32), jnp.finfo(jnp.float32).min)
    entropy = jax.nn.logsumexp(logits, axis=1) - jnp.diagonal(logits)
    return jnp.where(mask, entropy, 0.0)


def _prepare(x, y, mask):
    if x.ndim != 2 or x.shape != y.shape:
        raise UserError(f"both sides must be (n, d) with equal d, got {x.shape} and {y.shape}")
    mask = jnp.ones(x.shape[0], bool) if mask is None else mask
    # Zeros in place of what does not count, before anything is computed of it: NaN times 0 is NaN.
    x, y = (jnp.where(mask[:, None], v.astype(jnp.float32), 0.0) for v in (x, y))
    return x, y, mask


def same_rows(vectors: jax.Array) -> jax.Array:
    """(n, n) bool: which rows of (n, d) are equal, up to rounding (1e-6 of their size)."""
    vectors = vectors.astype(jnp.float32)
    gram = jnp.matmul(vectors, vectors.T, precision=jax.lax.Precision.HIGHEST)
    size = jnp.diagonal(gram)
    # Distances from products cancel; where they are near 0 the products say so all the same.
    apart = size[:, None] + size[None, :] - 2 * gram
    near = apart <= 1e-6 * (size[:, None] + size[None, :])
    return near | jnp.eye(len(vectors), dtype=bool)


def _unit(x):
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-12))


def _mean(values, mask):
    return jnp.where(mask, values, 0.0).sum() / jnp.maximum(mask.sum(), 1)
