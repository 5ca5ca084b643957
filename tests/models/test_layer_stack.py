"""The layers as a loop, as accelerators and deep models run them, and unrolled, as a CPU may."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medalign_jax.models.layers import layer_stack
from medalign_jax.models.layers.layer_stack import scan_layers

DEPTH, WIDTH = 5, 6
WEIGHTS = jnp.asarray(np.random.default_rng(0).normal(0, 0.5, (DEPTH, WIDTH, WIDTH)), jnp.float32)
X = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, WIDTH)), jnp.float32)


def run(weights, x, wanted):
    return scan_layers(lambda x, w: jnp.tanh(x @ w), weights, x, wanted)


def one_by_one(weights, x, wanted):
    states = [x]
    for w in weights:
        states.append(jnp.tanh(states[-1] @ w))
    return {n: states[n] for n in wanted}


@pytest.mark.parametrize("unrolled", [0, DEPTH])
@pytest.mark.parametrize("wanted", [(0,), (5,), (0, 2, 3, 5), (1, 4)])
def test_states_and_gradients_are_those_of_one_layer_after_the_other(wanted, unrolled, monkeypatch):
    monkeypatch.setattr(layer_stack, "_UNROLLED", unrolled)

    def total(function):
        def weighed(weights, x):
            return sum((n + 1) * jnp.sum(s**2) for n, s in function(weights, x, wanted).items())

        return jax.value_and_grad(weighed, argnums=(0, 1))(WEIGHTS, X)

    assert run(WEIGHTS, X, wanted).keys() == set(wanted)
    for ours, theirs in zip(*map(jax.tree.leaves, (total(run), total(one_by_one))), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("most", "unroll"), [(DEPTH - 1, 1), (DEPTH, DEPTH)])
def test_only_a_small_stack_is_unrolled(most, unroll, monkeypatch):
    monkeypatch.setattr(layer_stack, "_UNROLLED", most)
    jaxpr = jax.make_jaxpr(lambda w, x: run(w, x, (2, DEPTH)))(WEIGHTS, X)
    (scan,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    assert scan.params["unroll"] == unroll
