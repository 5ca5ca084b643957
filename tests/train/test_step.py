"""The training step: exact accumulation, donation, one compilation, no hidden transfers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medalign_jax.core.mesh import make_mesh, named_leaves
from medalign_jax.methods.accumulate import loss_and_grad
from medalign_jax.methods.pretrain import Pretrain
from medalign_jax.train.feed import put_batch
from medalign_jax.train.optimizer import OptimizerConfig, make_optimizer
from medalign_jax.train.step import compile_train_step, init_state, state_shardings
from medalign_jax.weights.tables.opera_gt import SHARDING
from tests import tiny_models as tiny

BATCH = 16


@pytest.fixture(scope="module")
def acula():
    """Dropout, augmentation and masking are on: all noise has to follow the sample."""
    return tiny.acula(dropout=0.5, estimator="unbiased")


@pytest.fixture(scope="module")
def pretrain():
    return Pretrain(tiny.student(), SHARDING)


@pytest.fixture(scope="module")
def params(acula):
    return tiny.quick_jit(acula.init)(jax.random.key(0))


def keys():
    return jax.random.split(jax.random.key(1), BATCH)


def of_chunks(method, params, batch) -> dict[int, tuple]:
    """(loss, metrics, gradient) by number of chunks."""

    def compute(params, batch, keys, chunks):
        return loss_and_grad(method, params, {}, batch, keys, chunks)

    step = tiny.quick_jit(compute, static_argnums=3)
    return {chunks: jax.device_get(step(params, batch, keys(), chunks)) for chunks in (1, 2, 4)}


@pytest.fixture(scope="module")
def acula_results(acula, params):
    return of_chunks(acula, params, tiny.batch(BATCH))


@pytest.fixture(scope="module")
def pretrain_results(pretrain, params):
    return of_chunks(pretrain, {"encoder": params["encoder"]}, {"waveform": tiny.waveforms(BATCH)})


@pytest.mark.parametrize("chunks", [2, 4])
@pytest.mark.parametrize("method", ["acula", "pretrain"])
def test_accumulation_is_exact(request, method, chunks):
    results = request.getfixturevalue(f"{method}_results")
    whole_loss, whole_metrics, whole_grads = results[1]
    loss, metrics, grads = results[chunks]
    np.testing.assert_allclose(loss, whole_loss, rtol=1e-6)
    assert metrics.keys() == whole_metrics.keys()
    for name, value in metrics.items():  # CKA is a difference of numbers near 1
        np.testing.assert_allclose(value, whole_metrics[name], rtol=2e-6, atol=1e-7, err_msg=name)
    whole_grads = named_leaves(whole_grads)
    largest = max(np.abs(grad).max() for grad in whole_grads.values())
    for name, grad in named_leaves(grads).items():
        np.testing.assert_allclose(
            grad, whole_grads[name], rtol=1e-5, atol=1e-6 * largest, err_msg=name
        )


def test_metrics_of_acula(acula_results):
    loss, metrics, _ = acula_results[1]
    assert set(metrics) == {
        "align", "cka", "embedding_variance", "effective_rank", "reconstruction"
    }  # fmt: skip
    assert loss == pytest.approx(metrics["align"] + metrics["reconstruction"], rel=1e-6)
    assert metrics["align"] == pytest.approx(1.0 - metrics["cka"], rel=1e-6)


@pytest.fixture(scope="module")
def encode(acula, params):
    """Sample-by-sample part on (batch, keys)."""
    step = tiny.quick_jit(lambda batch, keys: acula.encode(params, {}, batch, keys, True))
    return lambda batch, keys: jax.device_get(step(batch, keys))


@pytest.mark.parametrize("chunks", [2, 4])
def test_averaging_the_cka_of_chunks_is_something_else(acula, encode, acula_results, chunks):
    """The mistake that exact accumulation avoids is larger than the tolerance above by far."""
    coupled = encode(tiny.batch(BATCH), keys()).coupled
    whole = float(acula.couple(coupled)[0])
    parts = [jax.tree.map(lambda x, i=i: x[i::chunks], coupled) for i in range(chunks)]
    averaged = np.mean([acula.couple(part)[0] for part in parts])
    assert whole == pytest.approx(float(acula_results[1][1]["align"]), rel=1e-6)
    assert abs(averaged - whole) > 1e-3


def test_noise_follows_the_sample(acula, encode, acula_results):
    """Samples in another order, each with its key, give the same loss; other keys do not."""
    batch = jax.tree.map(lambda x: x[::-1].copy(), tiny.batch(BATCH))

    def loss(keys):
        encoded = encode(batch, keys)
        return float(acula.couple(encoded.coupled)[0] + encoded.per_example.mean())

    assert loss(keys()[::-1]) == pytest.approx(float(acula_results[1][0]), rel=1e-6)
    assert abs(loss(keys()) - acula_results[1][0]) > 1e-4


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def compiled(pretrain, params, mesh):
    """(compiled step, function that makes a fresh state, schedule)."""
    encoder = {"encoder": jax.device_get(params["encoder"])}
    optimizer, schedule = make_optimizer(
        OptimizerConfig(learning_rate=1e-3, warmup_steps=4), encoder, 100
    )

    def fresh():
        state = init_state(jax.tree.map(jnp.array, encoder), optimizer, seed=0)
        return jax.device_put(state, state_shardings(state, pretrain.sharding_rules, mesh))

    batch = put_batch({"waveform": tiny.waveforms(BATCH)}, mesh)
    step = compile_train_step(pretrain, optimizer, schedule, mesh, fresh(), {}, batch)
    return step, fresh, schedule


def test_the_state_is_donated(compiled, mesh):
    step, fresh, _ = compiled
    state = fresh()
    kernel = state.params["encoder"]["block0"]["attn"]["qkv"]["kernel"]
    new, _ = step(state, {}, put_batch({"waveform": tiny.waveforms(BATCH)}, mesh))
    assert kernel.is_deleted()
    assert new.params["encoder"]["block0"]["attn"]["qkv"]["kernel"].shape == kernel.shape


def test_another_shape_is_refused_instead_of_recompiled(compiled, mesh):
    step, fresh, _ = compiled
    with pytest.raises(TypeError, match="waveform"):
        step(fresh(), {}, put_batch({"waveform": tiny.waveforms(BATCH // 2)}, mesh))


def test_the_step_makes_no_hidden_transfer(compiled, mesh):
    step, fresh, _ = compiled
    state = fresh()
    batch = put_batch({"waveform": tiny.waveforms(BATCH)}, mesh)
    with jax.transfer_guard("disallow"):
        for _ in range(3):
            state, _ = step(state, {}, batch)
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            step(state, {}, {"waveform": tiny.waveforms(BATCH)})


def test_a_step_counts_follows_the_schedule_and_draws_anew(compiled, mesh):
    step, fresh, schedule = compiled
    batch = put_batch({"waveform": tiny.waveforms(BATCH)}, mesh)
    losses = []
    for number in range(3):
        state = fresh().replace(step=jnp.int32(number))
        state, metrics = step(jax.device_put(state, fresh_layout(fresh)), {}, batch)
        assert int(state.step) == number + 1
        assert float(metrics["learning_rate"]) == pytest.approx(float(schedule(number)))
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 3  # same parameters, same batch, other masks
    again = float(step(fresh(), {}, batch)[1]["loss"])
    assert again == losses[0]


def fresh_layout(fresh):
    return jax.tree.map(lambda leaf: leaf.sharding, fresh())
