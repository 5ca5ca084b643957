"""Masked-reconstruction pre-training and the supervised reference on the tiny encoder."""

from functools import partial

import jax
import numpy as np
import pytest

from medalign_jax.core.mesh import named_leaves
from medalign_jax.methods.pretrain import Pretrain
from medalign_jax.methods.supervised import Supervised
from medalign_jax.train.optimizer import OptimizerConfig, make_optimizer
from medalign_jax.train.step import init_state, train_step
from medalign_jax.weights.tables.opera_gt import SHARDING
from tests import tiny_models as tiny

STEPS, BATCH = 40, 16


def train(method, batch, steps: int = STEPS):
    """(first parameters, last parameters, metrics of each step)."""
    first = jax.device_get(tiny.quick_jit(method.init)(jax.random.key(0)))
    optimizer, schedule = make_optimizer(
        OptimizerConfig(learning_rate=3e-3, warmup_steps=0, weight_decay=0.1), first, steps
    )
    step = tiny.quick_jit(
        partial(train_step, method=method, optimizer=optimizer, schedule=schedule, chunks=1)
    )
    state, lines = init_state(first, optimizer, seed=0), []
    for _ in range(steps):
        state, metrics = step(state, {}, batch)
        lines.append(jax.device_get(metrics))
    return first, jax.device_get(state.params), lines


@pytest.fixture(scope="module")
def pretrained():
    return train(Pretrain(tiny.student(), SHARDING), {"waveform": tiny.waveforms(BATCH)})


def test_reconstruction_falls(pretrained):
    errors = [float(line["reconstruction"]) for line in pretrained[2]]
    assert np.mean(errors[-5:]) < 0.3 * np.mean(errors[:2])


def test_the_loss_is_the_reconstruction(pretrained):
    for line in pretrained[2]:
        assert line["loss"] == line["reconstruction"]


def test_position_tables_never_move_and_all_else_does(pretrained):
    first, last = named_leaves(pretrained[0]), named_leaves(pretrained[1])
    fixed = {name for name in first if np.array_equal(first[name], last[name])}
    assert fixed == {"encoder/pos_embed", "encoder/decoder_pos_embed"}


def test_pretraining_compares_nothing_across_samples(pretrained):
    method = Pretrain(tiny.student(), SHARDING)
    assert method.couple({}) == (0.0, {})
    assert method.select == ("valid/loss", "min")


@pytest.fixture(scope="module")
def supervised():
    """Labels that can be heard: low tones and high ones."""
    labels = np.arange(BATCH, dtype=np.int32) % 2
    time = np.arange(tiny.SAMPLES) / 16_000
    rng = np.random.default_rng(0)
    frequency = np.where(labels, rng.uniform(3000, 6000, BATCH), rng.uniform(100, 400, BATCH))
    waveform = np.sin(2 * np.pi * frequency[:, None] * time).astype(np.float32)
    method = Supervised(tiny.student(augment=tiny.Augment()), 2, SHARDING)
    return train(method, {"waveform": waveform, "label": labels}, 20)


def test_the_reference_starts_at_chance_and_learns(supervised):
    lines = supervised[2]
    assert float(lines[0]["cross_entropy"]) == pytest.approx(np.log(2), rel=1e-5)
    assert float(lines[-1]["cross_entropy"]) < 0.2 and float(lines[-1]["accuracy"]) == 1.0


def test_the_reference_reports_collapse_signs_and_no_other_loss(supervised):
    line = supervised[2][0]
    assert line["loss"] == line["cross_entropy"]
    assert {"embedding_variance", "effective_rank"} <= line.keys()


def test_a_classifier_is_sized_from_the_encoder(supervised):
    assert supervised[0]["classifier"]["kernel"].shape == (tiny.ENCODER.width, 2)
