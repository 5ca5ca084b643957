"""AcuLa on the tiny encoder: it learns, its parts are sized and switched by the config."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medalign_jax import losses
from medalign_jax.core.errors import UserError
from medalign_jax.methods.acula import AculaConfig
from medalign_jax.train.optimizer import OptimizerConfig, make_optimizer
from medalign_jax.train.step import init_state, train_step
from tests import tiny_models as tiny

STEPS, BATCH = 30, 24


def keys(count: int = BATCH, seed: int = 1):
    return jax.random.split(jax.random.key(seed), count)


def shared_structure() -> dict[str, np.ndarray]:
    """Four kinds of recording (a tone each) with reports that scatter around four vectors."""
    rng = np.random.default_rng(0)
    kind = np.arange(BATCH) % 4
    frequency = np.array([150.0, 700.0, 2000.0, 5000.0])[kind] * rng.uniform(0.9, 1.1, BATCH)
    time = np.arange(tiny.SAMPLES) / 16_000
    tone = np.sin(2 * np.pi * frequency[:, None] * time)
    waveform = tone + 0.3 * rng.standard_normal((BATCH, tiny.SAMPLES))
    text = rng.standard_normal((4, tiny.TEXT_WIDTH))[kind]
    text = text + 0.2 * rng.standard_normal((BATCH, tiny.TEXT_WIDTH))
    return {"waveform": waveform.astype(np.float32), "text": text.astype(np.float32)}


def train(method, batch, steps: int = STEPS):
    params = tiny.quick_jit(method.init)(jax.random.key(0))
    optimizer, schedule = make_optimizer(
        OptimizerConfig(learning_rate=3e-3, warmup_steps=0), params, steps
    )
    step = tiny.quick_jit(
        partial(train_step, method=method, optimizer=optimizer, schedule=schedule, chunks=1)
    )
    state, lines = init_state(params, optimizer, seed=0), []
    for _ in range(steps):
        state, metrics = step(state, method.frozen, batch)
        lines.append(jax.device_get(metrics))
    return lines


@pytest.fixture(scope="module")
def trained():
    """Metrics of training on pairs that belong together, two layers aligned."""
    side = tiny.student(augment=tiny.Augment())
    return train(tiny.acula(side, layers=(0, -1), dropout=0.1), shared_structure())


def test_the_loss_falls_where_audio_and_text_share_structure(trained):
    first, last = trained[0], trained[-1]
    assert float(last["loss"]) < 0.2 * float(first["loss"])
    assert float(last["cka"]) > 0.8 and float(first["cka"]) < 0.2
    assert float(last["reconstruction"]) < float(first["reconstruction"])


def test_the_loss_is_the_weighted_sum(trained):
    for line in trained:
        expected = float(line["align"]) + float(line["reconstruction"])
        assert float(line["loss"]) == pytest.approx(expected, rel=1e-6)


def params_of(method):
    return jax.eval_shape(method.init, jax.random.key(0))


def test_heads_are_sized_from_the_models_and_the_config():
    heads = params_of(tiny.acula(hidden=48, out=20, layers=(0, -1)))["heads"]
    shapes = jax.tree.map(lambda leaf: leaf.shape, heads)
    assert shapes["text"]["hidden"]["kernel"] == (tiny.TEXT_WIDTH, 48)
    for name in ("audio_00", "audio_last"):
        assert shapes[name]["hidden"]["kernel"] == (tiny.ENCODER.width, 48)
        assert shapes[name]["out"]["kernel"] == (48, 20)
    assert set(shapes) == {"text", "audio_00", "audio_last"}


def test_loaded_weights_meet_the_same_fresh_heads():
    loaded, key = {"loaded": jnp.ones(2)}, jax.random.key(0)
    made = tiny.acula(tiny.student(params=loaded)).initial_params(key)
    assert made["encoder"] is loaded
    fresh = jax.jit(lambda key: tiny.acula().init(key)["heads"])(key)
    for one, other in zip(jax.tree.leaves(made["heads"]), jax.tree.leaves(fresh), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_a_layer_is_the_mean_over_its_tokens_without_the_class_token():
    side = tiny.student(augment=tiny.Augment())
    method = tiny.acula(side, layers=(0,), ssm_weight=0.0)
    params = tiny.quick_jit(method.init)(jax.random.key(0))
    batch = tiny.batch(4)

    @tiny.quick_jit
    def both(params, batch):
        encoded = method.encode(params, {}, batch, keys(4), False)
        _, layers = side.embed(params, tiny.FRONT_END(batch["waveform"]))
        return encoded.coupled["audio"], layers["block00"]

    audio, block = both(params, batch)
    head = params["heads"]["audio_00"]
    x = np.asarray(block)[:, 1:].mean(1)
    hidden = np.maximum(x @ head["hidden"]["kernel"] + head["hidden"]["bias"], 0)
    expected = hidden @ head["out"]["kernel"] + head["out"]["bias"]
    assert list(audio) == ["audio_00"]
    np.testing.assert_allclose(audio["audio_00"], expected, rtol=1e-4, atol=1e-5)


def test_a_side_without_a_head_is_aligned_itself():
    side = tiny.student(augment=tiny.Augment())
    method = tiny.acula(side, ssm_weight=0.0, audio_head="none", text_head="none")
    params = tiny.quick_jit(method.init)(jax.random.key(0))
    batch = tiny.batch(4)
    encode = tiny.quick_jit(lambda params: method.encode(params, {}, batch, keys(4), False))
    found = encode(params).coupled
    assert params["heads"] == {}
    np.testing.assert_array_equal(found["audio"]["audio_last"], found["watched"])
    np.testing.assert_array_equal(found["text"], batch["text"])
    assert set(params_of(tiny.acula(text_head="none"))["heads"]) == {"audio_last"}


def program(method) -> str:
    params = params_of(method)
    batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, tiny.batch(4)))
    encode = partial(method.encode, frozen={}, train=True)
    return str(jax.make_jaxpr(lambda p, b: encode(p, batch=b, keys=keys(4)))(params, batch))


def test_no_reconstruction_is_computed_where_its_weight_is_zero():
    # Masking ranks the tokens; nothing else in the method sorts.
    side = tiny.student(augment=tiny.Augment())
    assert "sort[" in program(tiny.acula(side, ssm_weight=1.0))
    assert "sort[" not in program(tiny.acula(side, ssm_weight=0.0))


def coupled(seed: int = 0, count: int = 8) -> dict:
    rng = np.random.default_rng(seed)
    audio, other, text, watched = rng.standard_normal((4, count, 16)).astype(np.float32)
    audio = {"audio_00": other, "audio_last": audio}
    return {"watched": watched, "audio": audio, "text": text, "report": text}


def test_a_standardised_side_hears_every_feature():
    method = tiny.acula(align="cka", layers=(-1,), audio_head="standardise", text_head="none")
    sides = coupled(count=12)
    sides["audio"] = {"audio_last": sides["audio"]["audio_last"]}
    audio = sides["audio"]["audio_last"]
    expected = losses.cka((audio - audio.mean(0)) / audio.std(0), sides["text"])
    _, metrics = method.couple(sides)
    assert float(metrics["cka"]) == pytest.approx(float(expected), abs=1e-5)
    # Loudness, in one feature, changes nothing; nor does what a padded row holds.
    scale = np.ones(16, np.float32)
    scale[3] = 100.0
    sides["audio"]["audio_last"] = np.concatenate([5 + audio * scale, np.full((2, 16), np.nan)])
    sides["text"] = np.concatenate([sides["text"], np.full((2, 16), np.nan)])
    sides["watched"] = np.zeros((14, 16), np.float32)
    mask = np.arange(14) < 12
    _, metrics = method.couple(sides, mask)
    assert float(metrics["cka"]) == pytest.approx(float(expected), abs=1e-3)
    gradient = jax.grad(lambda x: method.couple(sides | {"audio": {"audio_last": x}}, mask)[0])(
        sides["audio"]["audio_last"]
    )
    assert np.isfinite(gradient).all() and not np.any(gradient[12:]) and np.any(gradient[:12, 3])


@pytest.mark.parametrize(
    ("align", "function"),
    [
        ("cka", losses.cka_loss),
        ("info_nce", partial(losses.info_nce_loss, temperature=0.1)),
        ("cosine", losses.cosine_loss),
        ("l2", losses.l2_loss),
    ],
)
def test_each_alignment_is_the_mean_of_its_loss_over_the_layers(align, function):
    method = tiny.acula(align=align, layers=(0, -1), temperature=0.1, align_weight=0.5)
    sides = coupled()
    loss, metrics = method.couple(sides)
    expected = np.mean([function(x, sides["text"]) for x in sides["audio"].values()])
    assert float(metrics["align"]) == pytest.approx(expected, rel=1e-5)
    assert float(loss) == pytest.approx(0.5 * expected, rel=1e-5)
    similarity = np.mean([losses.cka(x, sides["text"]) for x in sides["audio"].values()])
    assert float(metrics["cka"]) == pytest.approx(similarity, rel=1e-5)


def test_two_wordings_of_one_report_are_no_negatives():
    method = tiny.acula(align="info_nce", layers=(-1,), temperature=0.1)
    params, batch = params_of(method), tiny.batch(4)
    batch["report"] = np.arange(12, dtype=np.float32).reshape(4, 3) // 6  # two, two
    encode = partial(method.encode, frozen={}, train=True, keys=keys(4))
    made = jax.eval_shape(lambda p, b: encode(p, batch=b).coupled, params, batch)
    assert made["report"].shape == (4, 3)
    sides = coupled(count=4)
    sides["audio"] = {"audio_last": sides["audio"]["audio_last"]}
    same = np.kron(np.eye(2), np.ones((2, 2))).astype(bool)
    expected = losses.info_nce_loss(
        sides["audio"]["audio_last"], sides["text"], temperature=0.1, same=same
    )
    _, metrics = method.couple(sides | {"report": batch["report"]})
    assert float(metrics["align"]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("estimator", losses.ESTIMATORS)
def test_the_estimator_of_the_loss_is_the_configs_and_the_metric_stays_unbiased(estimator):
    sides = coupled()
    _, metrics = tiny.acula(estimator=estimator, layers=(0, -1)).couple(sides)
    values = [losses.cka(x, sides["text"], estimator=estimator) for x in sides["audio"].values()]
    assert float(metrics["align"]) == pytest.approx(1 - np.mean(values), rel=1e-5)
    unbiased = np.mean([losses.cka(x, sides["text"]) for x in sides["audio"].values()])
    assert float(metrics["cka"]) == pytest.approx(unbiased, rel=1e-5)


@pytest.mark.parametrize("align", ["cka", "info_nce", "cosine", "l2"])
@pytest.mark.parametrize("collapsed", [False, True])
def test_gradients_are_finite_and_reach_both_sides(align, collapsed):
    method = tiny.acula(align=align, layers=(0, -1))
    sides = coupled()
    if collapsed:
        sides["audio"]["audio_last"] = np.zeros((8, 16), np.float32)
    grads = jax.grad(lambda sides: method.couple(sides)[0])(sides)
    assert all(np.isfinite(grad).all() for grad in jax.tree.leaves(grads))
    assert np.any(grads["text"]) and np.any(grads["audio"]["audio_00"])
    assert not np.any(grads["watched"])  # only watched


def test_padding_rows_do_not_count():
    method, sides = tiny.acula(layers=(0, -1)), coupled(count=8)
    padded = jax.tree.map(lambda x: np.concatenate([x, 50 * np.ones((3, 16), np.float32)]), sides)
    loss, metrics = method.couple(padded, jnp.arange(11) < 8)
    expected, wanted = method.couple(sides)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    for name in metrics:
        assert float(metrics[name]) == pytest.approx(float(wanted[name]), rel=1e-4), name


@pytest.fixture(scope="module")
def online():
    """(loss from cached vectors, loss and gradient with the language model in the step)."""
    teacher = tiny.teacher()
    ids, mask = teacher.tokenize(tiny.texts(BATCH))
    waveform = tiny.waveforms(BATCH)
    side = tiny.student(augment=tiny.Augment())
    changes = {"ssm_weight": 0.0, "dropout": 0.0}
    cached, live = tiny.acula(side, **changes), tiny.acula(side, teacher, **changes)
    params = tiny.quick_jit(cached.init)(jax.random.key(0))

    def loss(method, params, frozen, batch):
        encoded = method.encode(params, frozen, batch, keys(), True)
        return method.couple(encoded.coupled)[0] + encoded.per_example.mean()

    text = teacher.embed(tiny.texts(BATCH))
    from_cache = tiny.quick_jit(partial(loss, cached))(
        params, {}, {"waveform": waveform, "text": text}
    )
    batch = {"waveform": waveform, "text_ids": ids, "text_mask": mask}
    step = tiny.quick_jit(jax.value_and_grad(partial(loss, live), argnums=(0, 1)))
    return from_cache, *step(params, live.frozen, batch)


def test_a_teacher_in_the_step_gives_the_loss_of_its_cached_vectors(online):
    from_cache, live, _ = online
    assert float(live) == pytest.approx(float(from_cache), abs=1e-5)
    assert abs(float(live) - 1.0) > 1e-3


def test_no_gradient_reaches_the_teacher(online):
    params, frozen = online[2]
    assert not any(np.any(grad) for grad in jax.tree.leaves(frozen))
    assert np.any(params["heads"]["text"]["hidden"]["kernel"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"align": "kl"}, r"loss.align 'kl' is not one of cka"),
        ({"estimator": "best"}, r"loss.estimator 'best' is not one of unbiased"),
        ({"layers": ()}, r"loss.layers is empty"),
        ({"audio_head": "linear"}, r"a head is one of mlp, none, standardise, not 'linear'"),
    ],
)
def test_a_wrong_config_is_named(changes, words):
    with pytest.raises(UserError, match=words):
        AculaConfig(**changes)


@pytest.mark.parametrize("layer", [1, 12, -2])
def test_a_layer_that_the_encoder_lacks_is_named(layer):
    with pytest.raises(UserError, match=rf"loss.layers.*{layer}.*1 blocks"):
        tiny.acula(layers=(-1, layer))


def test_a_layer_named_twice_is_refused():
    with pytest.raises(UserError, match="twice"):
        tiny.acula(layers=(0, 0))
