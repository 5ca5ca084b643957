"""Divergences between the student's and the teacher's distributions, from log-probabilities.

With q the student, p the teacher and m = β p + (1 - β) q their mixture:

    generalised_jsd = β KL(p || m) + (1 - β) KL(q || m)
    forward_kl      = KL(p || q)         the teacher's words that the student lacks weigh most
    reverse_kl      = KL(q || p)         the student's words that the teacher lacks weigh most

β is the *teacher's* share of the mixture (Agarwal et al. 2024, "On-Policy Distillation of Language
Models", eq. 1; the same side as `generalized_jsd_loss` of Hugging Face TRL's GKD trainer). β = 0.5
is the Jensen-Shannon divergence, symmetric and at most ln 2, which arXiv 2509.18579 trains with.
β -> 0 and β -> 1 go to 0, with slopes of the forward and the reverse KL, so those have own names.

All is float32. No logarithm of a probability is ever taken: with d = log q - log p,
log(m / p) = log1p((1 - β) expm1(d)), which is exact where the two sides agree. Derivatives are
written by hand, because each term is x log x of a probability that may be 0.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from medalign_jax.core.errors import UserError

KINDS = ("jsd", "forward_kl", "reverse_kl")

# Stands in for log 0: its exp is 0, and differences and products with 0 stay finite.
LOG_ZERO = -1e30


def generalised_jsd(student: jax.Array, teacher: jax.Array, beta: float = 0.5) -> jax.Array:
    """Jensen-Shannon divergence in which the teacher has the share `beta` of the mixture.

    Args:
      student, teacher: (..., V) log-probabilities, any float type; -inf is a probability of 0.
      beta: in (0, 1).

    Returns:
      (...) float32, from 0 to the entropy of (β, 1 - β), which is at most ln 2. A place where one
      or both probabilities are 0 has a finite value and a zero gradient of that side.

    Raises:
      UserError: shapes that differ, or `beta` outside (0, 1).
    """
    _check_beta(beta)
    return _jsd(*_prepare(student, teacher), beta)


def forward_kl(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """KL(teacher || student) of (..., V) log-probabilities, (...) float32.

    Infinite where the student rules out (-inf) what the teacher does not; the student's gradient,
    minus the teacher's probabilities, is finite even there.

    Raises:
      UserError: shapes that differ.
    """
    student, teacher = _prepare(student, teacher)
    return _kl(teacher, student)


def reverse_kl(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """KL(student || teacher) of (..., V) log-probabilities, (...) float32; see `forward_kl`."""
    return _kl(*_prepare(student, teacher))


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Which divergence, as the configuration names it (`loss.divergence`, `.beta`, `.temperature`).

    Attributes:
      kind: one of `KINDS`.
      beta: the teacher's share of the mixture, of "jsd" only.
      temperature: divides the logits of both sides. The value is *not* multiplied by its square:
        it stays the divergence of two distributions (JSD at most ln 2, and equal to TRL's), and
        how much it weighs is the business of the loss weights alone.
    """

    kind: str = "jsd"
    beta: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"loss.divergence {self.kind!r} is not one of {', '.join(KINDS)}")
        _check_beta(self.beta)
        if not 0.0 < self.temperature < math.inf:
            raise UserError(
                f"loss.temperature divides logits: it must be positive, not {self.temperature!r}"
            )

    def of_log_probs(self, student: jax.Array, teacher: jax.Array) -> jax.Array:
        """(..., V) log-probabilities, already at the temperature -> (...) float32."""
        if self.kind == "jsd":
            return generalised_jsd(student, teacher, self.beta)
        kl = forward_kl if self.kind == "forward_kl" else reverse_kl
        return kl(student, teacher)

    def of_logits(self, student: jax.Array, teacher: jax.Array) -> jax.Array:
        """(..., V) next-token scores of both sides -> (...) float32."""
        return self.of_log_probs(self.log_probs(student), self.log_probs(teacher))

    def log_probs(self, logits: jax.Array) -> jax.Array:
        """Log-probabilities (..., V), float32, of scores at the temperature."""
        return jax.nn.log_softmax(logits.astype(jnp.float32) / self.temperature, axis=-1)


def _check_beta(beta: float) -> None:
    if not 0.0 < beta < 1.0:
        raise UserError(
            f"loss.beta {beta!r} is not inside (0, 1): at the ends the divergence vanishes; use "
            "loss.divergence=forward_kl (in the place of 0) or reverse_kl (of 1)"
        )


def _prepare(student, teacher) -> tuple[jax.Array, jax.Array]:
    if student.shape != teacher.shape:
        raise UserError(
            "a divergence needs the same categories on both sides, got student "
            f"{student.shape} and teacher {teacher.shape}"
        )
    return jnp.asarray(student, jnp.float32), jnp.asarray(teacher, jnp.float32)


def _jsd_slopes(student, teacher, beta):
    """Derivatives by log q and by log p, (..., V); their sum is the divergence itself."""
    student, teacher = jnp.maximum(student, LOG_ZERO), jnp.maximum(teacher, LOG_ZERO)
    gap = student - teacher
    # The mixture seen from the larger of the two: exact near 0, and nothing can overflow. The sign
    # picks that side's share in place of a select, which would halve the speed of the sum on CPUs.
    share = 0.5 + (beta - 0.5) * jnp.sign(gap)
    near = jnp.log1p(share * jnp.expm1(-jnp.abs(gap)))
    over_student = near + jnp.maximum(-gap, 0.0)  # log(m / q)
    over_teacher = near + jnp.maximum(gap, 0.0)  # log(m / p)
    by_student = (beta - 1.0) * jnp.exp(student) * over_student
    return by_student, -beta * jnp.exp(teacher) * over_teacher


def _kl_slopes(first, second):
    """Derivatives of KL(a || b) by log a and by log b, (..., V), finite everywhere."""
    gap = jnp.maximum(first, LOG_ZERO) - jnp.maximum(second, LOG_ZERO)
    share = jnp.exp(first)
    return share * (gap + 1.0), -share


def _jsd_value(student, teacher, beta):
    return sum(_jsd_slopes(student, teacher, beta)).sum(-1)


def _kl_value(first, second):
    share = jnp.exp(first)
    return jnp.where(share == 0, 0.0, share * (first - second)).sum(-1)


_jsd = jax.custom_jvp(_jsd_value, nondiff_argnums=(2,))
_kl = jax.custom_jvp(_kl_value)


def _along(slopes, tangents) -> jax.Array:
    """Sum of slope times tangent over sides and categories; a side at rest costs nothing."""
    moving = [
        (slope * tangent).sum(-1)
        for slope, tangent in zip(slopes, tangents, strict=True)
        if not isinstance(tangent, jax.custom_derivatives.SymbolicZero)
    ]
    return sum(moving, jnp.zeros(slopes[0].shape[:-1], jnp.float32))


def _jsd_rule(beta, primals, tangents):
    return _jsd(*primals, beta), _along(_jsd_slopes(*primals, beta), tangents)


def _kl_rule(primals, tangents):
    return _kl(*primals), _along(_kl_slopes(*primals), tangents)


_jsd.defjvp(_jsd_rule, symbolic_zeros=True)
_kl.defjvp(_kl_rule, symbolic_zeros=True)

JSD = Divergence()
