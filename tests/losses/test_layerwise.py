"""Layer pairs, projections and hidden-state divergences against torch in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from medalign_jax.core.errors import UserError
from medalign_jax.losses import (
    HIDDEN_KINDS,
    Divergence,
    hidden_divergence,
    init_projections,
    layer_pairs,
    logit_lens_divergence,
    masked_sum,
    pair_name,
    project,
)
from tests.losses.test_divergences import assert_relative, torch_divergence
from tests.losses.test_next_token import sizes_of

RNG = np.random.default_rng(0)
STUDENT, TEACHER = RNG.standard_normal((2, 2, 7, 24)).astype(np.float32)
STUDENT, TEACHER = 3.0 * STUDENT + 1.0, 0.2 * TEACHER - 1.0


# Layer pairs.


def test_pairs_of_the_papers_models():
    """Qwen2.5-Omni-7B has 28 layers, Qwen3-8B has 36."""
    assert layer_pairs(28, 36, 7) == ((28, 36), (21, 27), (14, 18), (7, 9))
    assert layer_pairs(28, 36, 14) == ((28, 36), (14, 18))
    assert [s for s, _ in layer_pairs(28, 36, 3)] == [28, 25, 22, 19, 16, 13, 10, 7, 4, 1]
    every = layer_pairs(28, 36)
    assert [s for s, _ in every] == list(range(28, 0, -1))
    assert [t for _, t in every][::-1] == [math.floor(j * 36 / 28 + 0.5) for j in range(1, 29)]


@pytest.mark.parametrize(
    ("student", "teacher", "every", "pairs"),
    [
        (2, 3, 1, ((2, 3), (1, 2))),  # 1.5 rounds up
        (4, 10, 1, ((4, 10), (3, 8), (2, 5), (1, 3))),  # 7.5 and 2.5 too, where Python's go to even
        (3, 3, 1, ((3, 3), (2, 2), (1, 1))),
        (6, 2, 1, ((6, 2), (5, 2), (4, 1), (3, 1), (2, 1), (1, 1))),  # never the embeddings
        (5, 8, 5, ((5, 8),)),
        (5, 8, 99, ((5, 8),)),
        (1, 36, 1, ((1, 36),)),
    ],
)
def test_pairs(student, teacher, every, pairs):
    assert layer_pairs(student, teacher, every) == pairs


def test_pairs_that_cannot_be():
    for every in (0, -1):
        with pytest.raises(UserError, match=rf"loss\.every {every}: .* k at least 1"):
            layer_pairs(4, 4, every)
    with pytest.raises(UserError, match="got 0 and 4"):
        layer_pairs(0, 4)


# Projections.


def test_projections_keep_the_variance_and_do_not_depend_on_the_other_pairs():
    few, many = layer_pairs(28, 36, 14), layer_pairs(28, 36, 7)
    params = init_projections(jax.random.key(0), many, 192, 256)
    assert set(params) == {"pair_07_09", "pair_14_18", "pair_21_27", "pair_28_36"}
    states = {t: RNG.standard_normal((2, 50, 256)).astype(np.float32) for _, t in many}
    for ours, projected in project(params, many, states).items():
        assert projected.shape == (2, 50, 192) and projected.dtype == jnp.float32
        kernel = np.asarray(params[pair_name((ours, dict(many)[ours]))]["kernel"])
        np.testing.assert_allclose(projected, states[dict(many)[ours]] @ kernel, atol=1e-4)
        assert np.asarray(projected).var() == pytest.approx(1.0, rel=0.1)
    again = init_projections(jax.random.key(0), few, 192, 256)
    for name, leaf in again.items():
        np.testing.assert_array_equal(leaf["kernel"], params[name]["kernel"])
    assert not np.allclose(params["pair_07_09"]["kernel"], params["pair_14_18"]["kernel"])


def test_equal_widths_start_from_the_identity():
    pairs = layer_pairs(4, 4, 2)
    states = {layer: TEACHER for layer in (2, 4)}
    projected = project(init_projections(jax.random.key(1), pairs, 24, 24), pairs, states)
    assert set(projected) == {2, 4}
    np.testing.assert_allclose(projected[2], TEACHER, rtol=1e-6)


def test_gradients_reach_the_projection_and_not_the_teacher():
    pairs = layer_pairs(3, 5, 2)
    params = init_projections(jax.random.key(2), pairs, 16, 24)

    def loss(params, states):
        projected = project(params, pairs, states)
        return sum(hidden_divergence(STUDENT[..., :16], projected[s]).sum() for s, _ in pairs)

    by_params, by_states = jax.jit(jax.grad(loss, (0, 1)))(params, {5: TEACHER, 2: STUDENT})
    assert all(np.any(leaf["kernel"]) for leaf in by_params.values())
    assert not any(np.any(leaf) for leaf in by_states.values())


def test_projections_that_cannot_be():
    pairs = layer_pairs(4, 4, 2)
    params = init_projections(jax.random.key(0), pairs, 8, 8)
    with pytest.raises(UserError, match=r"no projection or no teacher states for pair_02_02"):
        project(params, pairs, {4: TEACHER})
    with pytest.raises(UserError, match=r"for pair_03_03, pair_01_01"):
        project(params, layer_pairs(4, 4), dict.fromkeys(range(5), TEACHER[..., :8]))
    with pytest.raises(UserError, match="at least one pair"):
        init_projections(jax.random.key(0), (), 8, 8)


# Divergence of hidden states.


def torch_hidden(student, teacher, kind):
    if kind == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(student, teacher, dim=-1)
    student, teacher = (
        torch.nn.functional.layer_norm(x, x.shape[-1:], eps=0.0) for x in (student, teacher)
    )
    if kind == "mse":
        return (student - teacher).square().mean(-1)
    return torch_divergence(Divergence(), student, teacher)


@pytest.mark.parametrize("kind", HIDDEN_KINDS)
def test_values_and_gradients_equal_the_plain_formula(kind):
    sides = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (STUDENT, TEACHER)]
    expected = torch_hidden(*sides, kind)
    weights = RNG.standard_normal(expected.shape)
    (expected * torch.tensor(weights)).sum().backward()
    value = hidden_divergence(STUDENT, TEACHER, kind)
    error = np.abs(np.asarray(value) - expected.detach().numpy())
    assert np.all(error <= 1e-6 * np.maximum(1.0, expected.detach().numpy()))
    loss = lambda s, t: (hidden_divergence(s, t, kind) * weights.astype(np.float32)).sum()  # noqa: E731
    grads = jax.jit(jax.grad(loss, (0, 1)))(STUDENT, TEACHER)
    for got, side in zip(grads, sides, strict=True):
        assert_relative(got, side.grad, 1e-5)


@pytest.mark.parametrize("kind", HIDDEN_KINDS)
def test_equals_are_at_zero_and_scale_does_not_count(kind):
    np.testing.assert_allclose(hidden_divergence(STUDENT, STUDENT, kind), 0, atol=1e-6)
    value = hidden_divergence(STUDENT, TEACHER, kind)
    np.testing.assert_allclose(hidden_divergence(64 * STUDENT, TEACHER, kind), value, atol=1e-6)
    bound = {"jsd": math.log(2), "cosine": 2.0, "mse": 4.0}[kind]
    assert np.all(value > 0) and np.all(value <= bound + 1e-6)
    half = hidden_divergence(STUDENT.astype(jnp.bfloat16), TEACHER.astype(jnp.bfloat16), kind)
    assert half.dtype == jnp.float32


@pytest.mark.parametrize("kind", HIDDEN_KINDS)
@pytest.mark.parametrize("constant", [0.0, 1.0, -1234.567, 1e-20, 1e20])
def test_constant_vectors_are_finite_and_have_no_gradient_that_explodes(kind, constant):
    vectors = np.full_like(STUDENT, constant)
    loss = lambda s, t: hidden_divergence(s, t, kind).sum()  # noqa: E731
    run = jax.jit(jax.value_and_grad(loss, (0, 1)))
    for sides in ((vectors, TEACHER), (STUDENT, vectors), (vectors, vectors)):
        value, grads = run(*sides)
        assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)
        if kind != "cosine":
            for side, grad in zip(sides, grads, strict=True):
                assert side is not vectors or not np.any(grad)


def test_hidden_states_that_cannot_be_compared():
    with pytest.raises(UserError, match=r"loss\.hidden 'l2' is not one of jsd, cosine, mse"):
        hidden_divergence(STUDENT, TEACHER, "l2")
    with pytest.raises(UserError, match=r"\(2, 7, 24\) and \(2, 7, 23\): project"):
        hidden_divergence(STUDENT, TEACHER[..., 1:])


# Logit lens.

KERNELS = {
    "student": 0.3 * RNG.standard_normal((24, 50)).astype(np.float32),
    "teacher": 0.3 * RNG.standard_normal((24, 60)).astype(np.float32),
}
NORMED = [(x - x.mean()) / x.std() for x in (STUDENT, TEACHER)]


def lens(kernels, student, teacher, chunk=3, **settings):
    heads = {
        f"{side}_head": lambda h, k=kernel: jnp.matmul(h, k, precision="highest")
        for side, kernel in kernels.items()
    }
    return logit_lens_divergence(
        student, teacher, **heads, **{"shared_vocab": 45, **settings}, chunk=chunk
    )


def test_logit_lens_equals_the_plain_formula_and_freezes_the_heads():
    sides = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in NORMED]
    kernels = {k: torch.tensor(x, dtype=torch.float64) for k, x in KERNELS.items()}
    scores = [x @ kernel for x, kernel in zip(sides, kernels.values(), strict=True)]
    d = Divergence("jsd", 0.3, 1.5)
    expected = torch_divergence(d, *(x[..., :45] for x in scores))
    expected.sum().backward()
    loss = lambda *args: (lambda v: (v.sum(), v))(lens(*args, divergence=d))  # noqa: E731
    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    (_, value), (by_kernels, *by_states) = run(KERNELS, *NORMED)
    np.testing.assert_allclose(value, expected.detach(), atol=1e-6, rtol=0)
    for got, side in zip(by_states, sides, strict=True):
        assert_relative(got, side.grad, 1e-5)
    assert not any(np.any(g) for g in by_kernels.values())


def test_logit_lens_makes_no_array_over_all_positions():
    narrow = {side: kernel[:4] for side, kernel in KERNELS.items()}
    loss = lambda *states: lens(narrow, *states, chunk=1).sum()  # noqa: E731
    step = jax.make_jaxpr(jax.grad(loss, (0, 1)))(*(x[..., :4] for x in NORMED))
    # One position of two rows, or a kernel; all positions would be 2 x 7 x 60.
    assert max(sizes_of(step.jaxpr)) <= 4 * 60


def test_logit_lens_that_cannot_be():
    with pytest.raises(UserError, match="student has 50 tokens and the teacher 60"):
        lens(KERNELS, *NORMED, shared_vocab=None)
    with pytest.raises(UserError, match=r"\(2, 7, 24\) and \(2, 6, 24\)"):
        lens(KERNELS, NORMED[0], NORMED[1][:, 1:])


# Masks.


def test_masked_sum_passes_over_what_is_masked_whatever_it_is():
    values = RNG.standard_normal((3, 5)).astype(np.float32)
    mask = np.array([[1, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
    spoilt = np.where(mask, values, [np.nan, np.inf, -np.inf, np.nan, np.nan]).astype(np.float32)
    np.testing.assert_allclose(masked_sum(spoilt, mask), (values * mask).sum(1), rtol=1e-6)
    grad = jax.grad(lambda v: masked_sum(v * v, mask).sum())(values)
    np.testing.assert_allclose(grad, 2 * values * mask, rtol=1e-6)
    assert np.isnan(masked_sum(spoilt, np.ones_like(mask)))[:2].all()
    assert masked_sum(values.astype(jnp.bfloat16), mask).dtype == jnp.float32
    with pytest.raises(UserError, match=r"\(3, 5\) and \(3,\)"):
        masked_sum(values, mask[:, 0])
