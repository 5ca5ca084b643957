"""Schedule, clipping and the rule tables of the optimizer, by numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medalign_jax.core.errors import UserError
from medalign_jax.core.mesh import named_leaves
from medalign_jax.train.optimizer import OptimizerConfig, make_optimizer, make_schedule

PARAMS = {
    "encoder": {"pos_embed": jnp.ones((2, 2)), "kernel": jnp.full((2, 2), 3.0)},
    "heads": {"kernel": jnp.full((2,), 5.0), "bias": jnp.full((2,), 7.0)},
}


def config(**changes) -> OptimizerConfig:
    plain = {
        "learning_rate": 0.1, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0,
        "clip": 0.0,
    }  # fmt: skip
    return OptimizerConfig(**plain | changes)


def first_update(settings: OptimizerConfig, grads):
    optimizer, _ = make_optimizer(settings, PARAMS, 100)
    return optimizer.update(grads, optimizer.init(PARAMS), PARAMS)


def filled(value: float):
    return jax.tree.map(lambda x: jnp.full_like(x, value), PARAMS)


def rates(settings: OptimizerConfig, total: int, at) -> list[float]:
    schedule = make_schedule(settings, total)
    return [float(schedule(step)) for step in at]


def test_linear_schedule():
    settings = OptimizerConfig(learning_rate=1.0, warmup_steps=4)
    # 4 steps up to the peak, then down over the other 36, to 0 after the last
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 35 / 36, 0.5, 1 / 36, 0.0]
    np.testing.assert_allclose(
        rates(settings, 40, (0, 1, 2, 3, 4, 5, 22, 39, 40)), expected, rtol=1e-6, atol=1e-7
    )


def test_warm_up_is_at_most_a_tenth_of_the_run():
    settings = OptimizerConfig(learning_rate=1.0, warmup_steps=400, schedule="constant")
    np.testing.assert_allclose(rates(settings, 50, (0, 1, 4, 5, 49)), [0.2, 0.4, 1.0, 1.0, 1.0])
    np.testing.assert_allclose(rates(settings, 5, (0, 1)), [1.0, 1.0])


def test_no_warm_up_starts_at_the_peak():
    settings = OptimizerConfig(learning_rate=1.0, warmup_steps=0)
    np.testing.assert_allclose(rates(settings, 10, (0, 5, 9)), [1.0, 0.5, 0.1], rtol=1e-6)


def test_cosine_schedule():
    settings = OptimizerConfig(learning_rate=2.0, warmup_steps=0, schedule="cosine")
    np.testing.assert_allclose(rates(settings, 10, (0, 5, 10)), [2.0, 1.0, 0.0], atol=1e-7)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(UserError, match=r"'step' is not one of linear, cosine, constant"):
        make_schedule(OptimizerConfig(schedule="step"), 10)


def test_the_update_follows_the_schedule():
    optimizer, schedule = make_optimizer(config(schedule="linear"), PARAMS, 10)
    state = optimizer.init(PARAMS)
    for step in range(3):
        updates, state = optimizer.update(filled(1.0), state, PARAMS)
        rate = float(schedule(step))
        # Adam's bias corrections, 1 - b2^n in float32, have an error of 1e-5 by themselves.
        np.testing.assert_allclose(updates["heads"]["bias"], -rate, rtol=1e-4)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_gradients_are_clipped_by_their_global_norm(clip):
    grads = filled(10.0)
    _, state = first_update(config(clip=clip), grads)
    del grads["encoder"]["pos_embed"]  # fixed
    norm = float(optax.tree.norm(optax.tree.get(state, "mu")))
    # Adam's first moment is a tenth of the gradient that reaches it.
    assert norm == pytest.approx(0.1 * (clip or float(optax.tree.norm(grads))), rel=1e-5)


def test_frozen_parameters_do_not_move_and_have_no_moments():
    settings = config(frozen=(r"^encoder/kernel",), weight_decay=0.5)
    updates, state = first_update(settings, filled(1.0))
    assert not np.any(updates["encoder"]["kernel"]) and not np.any(updates["encoder"]["pos_embed"])
    assert np.all(updates["heads"]["kernel"] != 0)
    shaped = {name: leaf for name, leaf in named_leaves(state).items() if leaf.ndim}
    assert len(shaped) == 4  # two moments of two parameters
    assert all("heads/" in name for name in shaped)


def test_frozen_gradients_do_not_count_in_the_norm():
    grads = filled(0.1)
    grads["encoder"]["pos_embed"] = jnp.full((2, 2), 1e6)
    _, state = first_update(config(clip=10.0), grads)
    np.testing.assert_allclose(optax.tree.get(state, "mu")["heads"]["bias"], 0.01, rtol=1e-5)


def test_weight_decay_leaves_out_no_decay():
    settings = config(weight_decay=0.5, no_decay=(r"bias$",))
    updates, _ = first_update(settings, filled(0.0))
    np.testing.assert_allclose(updates["encoder"]["kernel"], -0.1 * 0.5 * 3.0, rtol=1e-6)
    np.testing.assert_allclose(updates["heads"]["kernel"], -0.1 * 0.5 * 5.0, rtol=1e-6)
    np.testing.assert_array_equal(updates["heads"]["bias"], 0.0)


def test_multipliers_scale_the_update_and_the_first_match_wins():
    settings = config(multipliers=((r"heads/bias", 10.0), (r"heads/", 0.5)))
    updates, _ = first_update(settings, filled(1.0))
    np.testing.assert_allclose(updates["heads"]["bias"], -1.0, rtol=1e-5)
    np.testing.assert_allclose(updates["heads"]["kernel"], -0.05, rtol=1e-5)
    np.testing.assert_allclose(updates["encoder"]["kernel"], -0.1, rtol=1e-5)


@pytest.mark.parametrize(
    "rule",
    [{"frozen": ("kernal",)}, {"no_decay": ("kernal",)}, {"multipliers": (("kernal", 2.0),)}],
)
def test_a_rule_that_matches_nothing_is_named(rule):
    with pytest.raises(UserError, match=r"'kernal' matches no parameter.*encoder/kernel"):
        make_optimizer(config(**rule), PARAMS, 10)


def test_the_default_freeze_needs_no_match():
    make_optimizer(config(), {"heads": PARAMS["heads"]}, 10)
