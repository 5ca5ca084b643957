"""Supervised fine-tuning of a text model: cross-entropy of the response tokens, and of no other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medalign_jax.core.mesh import make_mesh, named_leaves, shardings
from medalign_jax.data.questions.prompts import SequenceBuilder
from medalign_jax.data.questions.source import open_questions
from medalign_jax.methods.accumulate import loss_and_grad
from medalign_jax.methods.text_finetune import TextFinetune
from tests import distill_models as tiny
from tests.tiny_models import quick_jit

BATCH = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The teacher reads the questions as a student would."""
    made = tiny.world(tmp_path_factory.mktemp("finetune"))
    builder = SequenceBuilder(made.teacher.tokenizer, None, None, 64, format=tiny.FORMAT)
    data = open_questions(made.data.questions, builder)
    return tiny.World(made.student, made.teacher, builder, data)


@pytest.fixture(scope="module")
def method(world):
    model = world.teacher
    return TextFinetune(model.module, model.params, model.sharding, chunk=3)


def plain(world, params, batch):
    """Mean over the response tokens of minus the logarithm of their probability."""
    model = world.teacher
    hidden, _ = model.module.apply(
        {"params": params["text"]}, batch["student_ids"], batch["student_mask"]
    )
    scores = hidden @ params["text"]["embed"]["embedding"].T
    scores = scores[jnp.arange(BATCH)[:, None], batch["student_at"]]
    probabilities = jnp.exp(scores) / jnp.exp(scores).sum(-1, keepdims=True)
    own = jnp.take_along_axis(probabilities, batch["response_ids"][..., None], -1)[..., 0]
    mask = batch["response_mask"]
    right = (scores.argmax(-1) == batch["response_ids"]) & mask
    return jnp.where(mask, -jnp.log(own), 0).sum() / mask.sum(), right.sum() / mask.sum()


@pytest.fixture(scope="module")
def expected(world, method):
    """(loss, accuracy) and gradient of the first batch, and of the second, which is half empty."""
    params = method.initial_params(jax.random.key(0))
    formula = quick_jit(
        jax.value_and_grad(lambda params, batch: plain(world, params, batch), has_aux=True)
    )
    return [jax.device_get(formula(params, batch)) for batch in world.batches(BATCH)]


@pytest.mark.parametrize("chunks", [1, 2])
def test_loss_and_gradient_are_those_of_the_plain_formula(world, method, expected, chunks):
    batch, params = world.batch(BATCH), method.initial_params(jax.random.key(0))
    assert "waveform" not in batch and len(set(batch["response_mask"].sum(1))) > 1
    keys = jax.random.split(jax.random.key(0), BATCH)
    step = quick_jit(lambda params, batch: loss_and_grad(method, params, None, batch, keys, chunks))
    loss, metrics, grads = jax.device_get(step(params, batch))
    (value, accuracy), plain_grads = expected[0]
    np.testing.assert_allclose(loss, value, rtol=1e-6)
    np.testing.assert_allclose(metrics["cross_entropy"], value, rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], accuracy, rtol=1e-6)
    assert set(named_leaves(grads)) == set(named_leaves(plain_grads))
    for name, grad in named_leaves(plain_grads).items():
        bound = 1e-5 * np.abs(grad).max()
        np.testing.assert_allclose(named_leaves(grads)[name], grad, rtol=0, atol=bound)


def test_held_out_loss_is_the_mean_over_all_tokens(world, method, expected):
    params, batches = method.initial_params(jax.random.key(0)), list(world.batches(BATCH))
    keys = jax.random.split(jax.random.key(0), BATCH)
    encode = quick_jit(lambda batch: method.encode(params, None, batch, keys, False).coupled)
    parts = [jax.device_get(encode(batch)) for batch in batches]
    loss, metrics = method.couple(jax.tree.map(lambda *x: np.concatenate(x), *parts))
    counts = [batch["response_mask"].sum() for batch in batches]
    assert (batches[1]["index"] < 0).sum() == 2
    for place, name in enumerate(("cross_entropy", "accuracy")):
        mean = np.average([each[0][place] for each in expected], weights=counts)
        np.testing.assert_allclose(metrics[name], mean, rtol=1e-6)
    assert loss == metrics["cross_entropy"]


def test_parameters_are_copied_and_every_leaf_has_a_place(world, method):
    params = method.initial_params(jax.random.key(0))
    for mine, theirs in zip(
        jax.tree.leaves(params["text"]), jax.tree.leaves(world.teacher.params), strict=True
    ):
        assert mine is not theirs
        np.testing.assert_array_equal(mine, theirs)
    shapes = jax.eval_shape(method.init, jax.random.key(0))
    assert jax.tree.map(np.shape, shapes) == jax.tree.map(np.shape, params)
    shardings(shapes, method.sharding_rules, make_mesh(devices=jax.devices()[:1]))


def test_language_models_say_what_they_are(world):
    """In a sentence, not with all their parameters."""
    listening, reading = repr(world.student), repr(world.teacher)
    assert listening.startswith("LanguageModel 'qwen2_5_omni_thinker' of ")
    assert "takes recordings of up to 300 s" in listening
    assert reading.startswith("LanguageModel 'qwen3' of ") and "recordings" not in reading
    assert all("\n" not in said and len(said) < 400 for said in (listening, reading))
