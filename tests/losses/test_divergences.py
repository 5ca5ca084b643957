"""Divergences against torch in float64, and at probabilities of 0."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medalign_jax.core.errors import UserError
from medalign_jax.losses import Divergence, forward_kl, generalised_jsd, reverse_kl

RNG = np.random.default_rng(0)
STUDENT, TEACHER = (2.0 * RNG.standard_normal((2, 3, 5, 40))).astype(np.float32)
BETAS = (0.1, 0.5, 0.9)
KINDS = [*(Divergence("jsd", beta) for beta in BETAS), Divergence("forward_kl")]
KINDS.append(Divergence("reverse_kl"))


def torch_divergence(d: Divergence, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The formulas of TRL's `generalized_jsd_loss`, from logits (..., V), summed over V."""
    q = F.log_softmax(student / d.temperature, dim=-1)
    p = F.log_softmax(teacher / d.temperature, dim=-1)
    kl = lambda a, b: (a.exp() * (a - b)).sum(-1)  # noqa: E731
    if d.kind == "forward_kl":
        return kl(p, q)
    if d.kind == "reverse_kl":
        return kl(q, p)
    mixture = torch.logaddexp(q + math.log1p(-d.beta), p + math.log(d.beta))
    return d.beta * kl(p, mixture) + (1 - d.beta) * kl(q, mixture)


def assert_relative(got, expected, bound):
    """Largest difference, as a share of the largest expected number."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= bound * np.abs(expected).max()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS, ids=lambda d: f"{d.kind}-{d.beta}")
def test_values_and_gradients_equal_the_formulas_of_trl(kind, temperature):
    d = Divergence(kind.kind, kind.beta, temperature)
    sides = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (STUDENT, TEACHER)]
    expected = torch_divergence(d, *sides)
    weights = RNG.standard_normal(expected.shape)
    (expected * torch.tensor(weights)).sum().backward()
    # A KL of 4 has no digits of float32 below 1e-6; a JSD is at most 0.7.
    error = np.abs(np.asarray(d.of_logits(STUDENT, TEACHER)) - expected.detach().numpy())
    assert np.all(error <= 1e-6 * np.maximum(1.0, expected.detach().numpy()))
    loss = lambda s, t: (d.of_logits(s, t) * weights.astype(np.float32)).sum()  # noqa: E731
    for got, side in zip(jax.grad(loss, (0, 1))(STUDENT, TEACHER), sides, strict=True):
        assert_relative(got, side.grad, 1e-5)


def test_jsd_is_symmetric_bounded_and_zero_for_equals():
    q, p = jax.nn.log_softmax(20 * STUDENT), jax.nn.log_softmax(20 * TEACHER)
    value = generalised_jsd(q, p)
    np.testing.assert_allclose(value, generalised_jsd(p, q), rtol=1e-6)
    assert value.max() <= math.log(2) + 1e-6 and value.min() > 0.1
    np.testing.assert_allclose(
        generalised_jsd(q, p, 0.1), generalised_jsd(p, q, 0.9), rtol=1e-5, atol=1e-7
    )
    assert not np.any(generalised_jsd(q, q)) and not np.any(forward_kl(q, q))


def test_small_divergences_keep_their_digits():
    """A plain sum of p log(p / m) in float32 is wrong in the second digit here."""
    logits = RNG.standard_normal(2000)
    other = logits + 1e-3 * RNG.standard_normal(2000)
    expected = torch_divergence(Divergence(), torch.tensor(other), torch.tensor(logits))
    q, p = jax.nn.log_softmax(other.astype(np.float32)), jax.nn.log_softmax(np.float32(logits))
    assert float(generalised_jsd(q, p)) == pytest.approx(float(expected), rel=1e-2, abs=0)


def test_beta_is_the_teachers_share_of_the_mixture():
    q, p = np.log([0.5, 0.5]), np.array([0.0, -np.inf])
    for beta in BETAS:
        m = beta * np.array([1.0, 0.0]) + (1 - beta) * np.array([0.5, 0.5])
        expected = beta * -np.log(m[0]) + (1 - beta) * (0.5 * np.log(0.5 / m)).sum()
        assert float(generalised_jsd(q, p, beta)) == pytest.approx(expected, abs=1e-6)
    q, p = jax.nn.log_softmax(STUDENT / 4), jax.nn.log_softmax(TEACHER / 4)
    np.testing.assert_allclose(generalised_jsd(q, p, 1e-3) / 1e-3, forward_kl(q, p), rtol=5e-3)
    np.testing.assert_allclose(generalised_jsd(q, p, 0.999) / 1e-3, reverse_kl(q, p), rtol=5e-3)


@pytest.mark.parametrize("kind", KINDS, ids=lambda d: f"{d.kind}-{d.beta}")
def test_ruled_out_tokens_are_as_if_absent(kind):
    """-inf on both sides: value and gradient of the smaller vocabulary, and zeros."""
    masked = [np.concatenate([x, np.full((3, 5, 7), -np.inf, np.float32)], -1) for x in
              (STUDENT, TEACHER)]  # fmt: skip
    loss = lambda s, t: kind.of_logits(s, t).sum()  # noqa: E731
    value, grads = jax.value_and_grad(loss, (0, 1))(*masked)
    expected, expected_grads = jax.value_and_grad(loss, (0, 1))(STUDENT, TEACHER)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for got, wanted in zip(grads, expected_grads, strict=True):
        assert_relative(got[..., :40], wanted, 1e-6)
        assert not np.any(got[..., 40:])


@pytest.mark.parametrize("beta", BETAS)
def test_jsd_where_one_side_rules_out_what_the_other_is_sure_of(beta):
    sure = np.array([0.0, -np.inf, -np.inf], np.float32)
    bound = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    loss = lambda s, t: generalised_jsd(s, t, beta)  # noqa: E731
    value, grads = jax.value_and_grad(loss, (0, 1))(sure, sure[[1, 0, 2]])
    assert float(value) == pytest.approx(bound, abs=1e-7)
    # d JSD / d log q = (1 - β) q log(q / m), here q = 1 and m = 1 - β; likewise the teacher's.
    np.testing.assert_allclose(grads[0], [-(1 - beta) * math.log(1 - beta), 0, 0], atol=1e-7)
    np.testing.assert_allclose(grads[1], [0, -beta * math.log(beta), 0], atol=1e-7)


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e30])
@pytest.mark.parametrize("kind", KINDS, ids=lambda d: f"{d.kind}-{d.beta}")
def test_probabilities_that_underflow_have_finite_gradients(kind, scale):
    loss = lambda s, t: kind.of_logits(s, t).sum()  # noqa: E731
    value, grads = jax.value_and_grad(loss, (0, 1))(scale * STUDENT, scale * TEACHER)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)
    if kind.kind == "jsd":
        assert all(np.abs(g).max() <= 1 for g in grads)


def test_kl_is_infinite_where_it_is_and_its_gradient_is_not():
    q, p = np.array([0.0, -np.inf], np.float32), np.log(np.array([0.25, 0.75], np.float32))
    value, grad = jax.value_and_grad(forward_kl)(q, p)
    assert np.isposinf(value)
    np.testing.assert_allclose(grad, [-0.25, -0.75], rtol=1e-6)
    assert np.isposinf(reverse_kl(p, q)) and np.isfinite(reverse_kl(q, p))


def test_not_a_number_is_not_hidden():
    spoilt = np.where(np.arange(40) == 3, np.nan, jax.nn.log_softmax(STUDENT[0, 0]))
    for kind in KINDS:
        assert np.isnan(kind.of_log_probs(spoilt, jax.nn.log_softmax(TEACHER[0, 0])))
        assert np.isnan(kind.of_log_probs(jax.nn.log_softmax(TEACHER[0, 0]), spoilt))


def test_forward_mode_second_derivatives_and_vmap():
    q, p = STUDENT[0, 0], TEACHER[0, 0]
    loss = lambda s: generalised_jsd(jax.nn.log_softmax(s), jax.nn.log_softmax(p), 0.3)  # noqa: E731
    direction = RNG.standard_normal(40).astype(np.float32)
    _, along = jax.jvp(loss, (q,), (direction,))
    assert float(along) == pytest.approx(float(jax.grad(loss)(q) @ direction), rel=1e-5)
    s = torch.tensor(q, dtype=torch.float64)
    plain = lambda s: torch_divergence(Divergence("jsd", 0.3), s, torch.tensor(p))  # noqa: E731
    assert_relative(
        jax.jit(jax.hessian(loss))(q), torch.autograd.functional.hessian(plain, s), 1e-4
    )
    each = jax.vmap(jax.vmap(generalised_jsd))(STUDENT, TEACHER)
    np.testing.assert_allclose(each, generalised_jsd(STUDENT, TEACHER), rtol=1e-6)


def test_half_precision_inputs_are_computed_in_float32():
    q, p = (jax.nn.log_softmax(x).astype(jnp.bfloat16) for x in (STUDENT, TEACHER))
    value = generalised_jsd(q, p)
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(value, generalised_jsd(*(x.astype(jnp.float32) for x in (q, p))))


def test_temperature_flattens_and_is_not_squared():
    sharp, flat = (Divergence(temperature=t).of_logits(STUDENT, TEACHER) for t in (0.05, 20.0))
    assert sharp.max() <= math.log(2) + 1e-6 and flat.max() < 0.01


def test_bad_arguments_are_named():
    with pytest.raises(UserError, match=r"loss\.divergence 'kl' is not one of jsd, forward_kl"):
        Divergence("kl")
    for beta in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(UserError, match=r"loss\.beta .* is not inside \(0, 1\)"):
            Divergence(beta=beta)
    with pytest.raises(UserError, match=r"loss\.beta 1\.5"):
        generalised_jsd(STUDENT, TEACHER, 1.5)
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UserError, match=r"loss\.temperature .* must be positive"):
            Divergence(temperature=temperature)
    with pytest.raises(UserError, match=r"student \(3, 5, 40\) and teacher \(3, 5, 39\)"):
        forward_kl(STUDENT, TEACHER[..., 1:])
