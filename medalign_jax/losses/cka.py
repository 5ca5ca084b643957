"""Linear centred kernel alignment (CKA) between two views of the same samples.

With K = X Xᵀ and L = Y Yᵀ the Gram matrices of n samples,

    CKA(X, Y) = <K', L'> / (|K'| |L'|)

and the estimators differ in what the prime does:

* ``unbiased`` (default): U-centring, which leaves the diagonal out, so that <K', L'> is n(n-3)
  times the unbiased HSIC estimator (Song et al. 2012, "Feature Selection via Dependence
  Maximization", eq. 5). Independent samples score 0 on average; values below 0 occur.
* ``biased``: double centring, the textbook form (Kornblith et al. 2019, eq. 4 with HSIC of eq. 3).
  With n of the order of the width it is pushed towards 1: independent Gaussians with n = 24 and
  width 512 score 0.96.
* ``released``: what the published AcuLa code computes, the cosine between the *feature* covariances
  XᵀX and YᵀY. It needs equal widths, changes under a rotation of one side, and does not see which
  report belongs to which recording. For ablation only.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from medalign_jax.core.errors import UserError

ESTIMATORS = ("unbiased", "biased", "released")

# Centred energy below this share of the raw energy is rounding error of constant features.
_CONSTANT = 1e-12


def cka(
    x: jax.Array, y: jax.Array, *, estimator: str = "unbiased", mask: jax.Array | None = None
) -> jax.Array:
    """Alignment of two sets of features of the same n samples.

    Args:
      x: (n, p) features, any float type; computed in float32.
      y: (n, q) features of the same samples.
      estimator: one of `ESTIMATORS`.
      mask: (n,) bool, True for the samples that count; None for all.

    Returns:
      A float32 scalar, at most 1. Where one side is constant (or fewer than 4 samples are left by
      the mask, for `unbiased`) alignment is undefined: the value is 0 and so are the gradients.

    Raises:
      UserError: shapes that do not pair, an unknown estimator, fewer than 4 samples (`unbiased`) or
        2 (others), unequal widths with `released`.
    """
    _check(x, y, estimator)
    if mask is None:
        mask = jnp.ones(x.shape[0], bool)
    count = mask.sum().astype(jnp.float32)
    x, x_varies = _centre(x, mask, count)
    y, y_varies = _centre(y, mask, count)
    if estimator == "released":
        value = _cosine(_dot(x.T, x), _dot(y.T, y))
    elif estimator == "biased":
        value = _biased(x, y)
    else:
        value = _cosine(_u_centre(_dot(x, x.T), mask, count), _u_centre(_dot(y, y.T), mask, count))
        x_varies &= count >= 4
    return jnp.where(x_varies & y_varies, value, 0.0)


def cka_loss(
    x: jax.Array, y: jax.Array, *, estimator: str = "unbiased", mask: jax.Array | None = None
) -> jax.Array:
    """1 - `cka` (AcuLa, section 3: L_align = 1 - A(H_audio, H_language))."""
    return 1.0 - cka(x, y, estimator=estimator, mask=mask)


def _check(x, y, estimator: str) -> None:
    if estimator not in ESTIMATORS:
        raise UserError(f"CKA estimator {estimator!r} is not one of {', '.join(ESTIMATORS)}")
    if x.ndim != 2 or y.ndim != 2 or x.shape[0] != y.shape[0]:
        raise UserError(f"CKA needs (n, p) and (n, q) features, got {x.shape} and {y.shape}")
    least = 4 if estimator == "unbiased" else 2
    if x.shape[0] < least:
        raise UserError(
            f"the {estimator} CKA needs at least {least} samples, got {x.shape[0]}: use a larger "
            "batch (train.batch_size)"
        )
    if estimator == "released" and x.shape[1] != y.shape[1]:
        raise UserError(
            f"the released CKA needs equal widths, got {x.shape[1]} and {y.shape[1]}: project both "
            "sides to the same width, or use the unbiased estimator"
        )


def _dot(a, b):
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _centre(x, mask, count):
    """Centre over the counted samples, scale to unit energy; also whether anything varies.

    CKA does not change with scale; unit energy keeps fourth powers inside float32. Constant
    features are replaced by zeros, before any division, so that no NaN enters the gradient.
    """
    weight = mask.astype(jnp.float32)[:, None]
    x = jnp.where(weight > 0, x.astype(jnp.float32), 0.0)
    centred = (x - x.sum(0) / jnp.maximum(count, 1.0)) * weight
    energy = jnp.square(centred).sum()
    varies = energy > _CONSTANT * jnp.square(x).sum()
    scale = jax.lax.rsqrt(jnp.where(varies, energy, 1.0))
    return jnp.where(varies, centred * scale, 0.0), varies


def _u_centre(gram, mask, count):
    """Remove row and column effects with the diagonal left out (Székely & Rizzo 2014)."""
    n = gram.shape[0]
    counted = mask[:, None] & mask[None, :] & ~jnp.eye(n, dtype=bool)
    gram = jnp.where(counted, gram, 0.0)
    rows = gram.sum(1) / jnp.maximum(count - 2.0, 1.0)
    total = gram.sum() / jnp.maximum((count - 1.0) * (count - 2.0), 1.0)
    return jnp.where(counted, gram - rows[:, None] - rows[None, :] + total, 0.0)


def _biased(x, y):
    """<K, L> / (|K||L|) from whichever side is smaller: n × n Grams or feature products."""
    n, p, q = x.shape[0], x.shape[1], y.shape[1]
    if n * n <= p * q:
        return _cosine(_dot(x, x.T), _dot(y, y.T))
    cross = jnp.square(_dot(x.T, y)).sum()
    return cross * _inverse_norm(_dot(x.T, x)) * _inverse_norm(_dot(y.T, y))


def _cosine(a, b):
    return (a * b).sum() * _inverse_norm(a) * _inverse_norm(b)


def _inverse_norm(a):
    energy = jnp.square(a).sum()
    positive = energy > 0.0
    return jnp.where(positive, jax.lax.rsqrt(jnp.where(positive, energy, 1.0)), 0.0)
