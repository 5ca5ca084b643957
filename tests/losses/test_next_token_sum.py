"""The next-token sum, which makes its gradient on the way, against the losses that recompute."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medalign_jax.losses import masked_sum, next_token_losses, next_token_sum
from medalign_jax.train import cost
from tests.losses.test_divergences import assert_relative
from tests.losses.test_next_token import (
    LABELS,
    LENGTH,
    PARAMS,
    ROWS,
    SHARED,
    TEACHER,
    TEACHER_VOCAB,
    TEACHER_WIDTH,
    VOCAB,
    WEIGHTS,
    WIDTH,
    chunked,
    head_of,
    kept,
    total,
)

NAMES = ("divergence", "cross_entropy")


def summed(params, teacher=TEACHER, labels=LABELS, weights=WEIGHTS, chunk=4, **settings):
    """(sum, values) with the heads of `test_next_token`; `teacher` a tree, a TopK or None."""
    live = isinstance(teacher, dict)
    names = NAMES[1:] if teacher is None else NAMES
    return next_token_sum(
        params["hidden"], teacher["hidden"] if live else teacher, labels,
        dict(zip(names, weights[-len(names):], strict=True)),
        student_head=head_of(params["kernel"]),
        teacher_head=head_of(teacher["kernel"]) if live else None, chunk=chunk,
        shared_vocab=SHARED, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_equals_the_losses_that_are_computed_twice(chunk):
    """In value and gradient; 3 × the sum has three times the gradient."""

    def tripled(params):
        value, out = summed(params, chunk=chunk)
        return 3.0 * value, out

    def plain(params):
        out = chunked(params)
        return 3.0 * total(out), out

    (value, out), grads = jax.jit(jax.value_and_grad(tripled, has_aux=True))(PARAMS)
    (wanted, expected), wanted_grads = jax.jit(jax.value_and_grad(plain, has_aux=True))(PARAMS)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    assert out.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(out[name], array, atol=1e-6, rtol=0)
    for name, grad in wanted_grads.items():
        assert_relative(grads[name], grad, 1e-6)


@pytest.mark.parametrize("teacher", [None, "top_k"])
def test_without_a_live_teacher(teacher):
    teacher = None if teacher is None else kept(6)

    def loss(params):
        return summed(params, teacher)[0]

    def plain(params):
        out = next_token_losses(
            params["hidden"], teacher, LABELS, student_head=head_of(params["kernel"]), chunk=4,
            shared_vocab=SHARED,
        )  # fmt: skip
        return sum((out[n] * w).sum() for n, w in zip(NAMES, WEIGHTS, strict=True) if n in out)

    grads, expected = jax.jit(jax.grad(loss))(PARAMS), jax.jit(jax.grad(plain))(PARAMS)
    for name, grad in expected.items():
        assert_relative(grads[name], grad, 1e-6)


def test_values_carry_no_gradient():
    grads = jax.grad(lambda params: total(summed(params)[1]))(PARAMS)
    assert not any(np.any(grad) for grad in grads.values())


def test_a_token_of_weight_zero_counts_for_nothing():
    """Even where its label is not a token and its cross-entropy NaN."""
    labels, weights = LABELS.copy(), WEIGHTS.copy()
    labels[0, 5:], weights[:, 0, 5:] = -100, 0.0
    run = jax.value_and_grad(lambda p, labels: summed(p, labels=labels, weights=weights)[0])
    (value, grads), (expected, others) = run(PARAMS, labels), run(PARAMS, LABELS)
    assert np.isfinite(value) and value == expected
    jax.tree.map(np.testing.assert_array_equal, grads, others)
    mask = weights[1] != 0
    plain = masked_sum(chunked(PARAMS)["cross_entropy"] * weights[1], mask).sum()
    plain += masked_sum(chunked(PARAMS)["divergence"] * weights[0], mask).sum()
    np.testing.assert_allclose(value, plain, rtol=1e-5)


# Multiply-adds of one product of all states with a kernel of each side.
STUDENT = 2.0 * ROWS * LENGTH * WIDTH * VOCAB
OTHER = 2.0 * ROWS * LENGTH * TEACHER_WIDTH * TEACHER_VOCAB


@pytest.mark.parametrize(
    ("learns", "products"),
    [
        (("hidden", "kernel"), 3 * STUDENT + OTHER),
        (("hidden",), 2 * STUDENT + OTHER),  # a frozen head has no gradient
        ((), STUDENT + OTHER),
    ],
    ids=["all", "states", "none"],
)
def test_only_what_learns_costs_a_product(learns, products):
    """Of all six products that `next_token_losses` makes for value and gradient."""

    def loss(moving, run):
        return run(PARAMS | moving)

    def flops(run):
        moving = {name: jnp.asarray(PARAMS[name]) for name in learns}
        step = functools.partial(loss, run=run)
        step = jax.value_and_grad(step) if learns else step
        return cost.matrix_flops(jax.make_jaxpr(step)(moving))

    chunk = LENGTH  # one, without filling
    assert flops(lambda params: summed(params, chunk=chunk)[0]) == products
    if len(learns) == 2:
        twice = flops(lambda params: total(chunked(params, chunk=chunk)))
        assert twice == 4 * STUDENT + 2 * OTHER
