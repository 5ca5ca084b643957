"""Qwen's audio towers against transformers, on small random models."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from medalign_jax.core.mesh import make_mesh, shardings
from medalign_jax.models.encoders.qwen_omni_audio import (
    QWEN2_5_OMNI_AUDIO,
    QWEN2_AUDIO,
    QwenAudio,
    QwenAudioConfig,
    qwen2_5_omni_audio_config,
    qwen2_audio_config,
)
from medalign_jax.models.upstream_config import ModelConfigError
from medalign_jax.weights.lazy import WeightError
from medalign_jax.weights.load import export, load
from medalign_jax.weights.tables.qwen_omni_audio import (
    QWEN2_5_OMNI_TABLE,
    QWEN2_AUDIO_TABLE,
    SHARDING,
)
from tests.tiny_models import quick_jit
from tests.torch_models import shake

ATOL = 1e-5
MELS, WIDTH, DEPTH, OUT = 7, 24, 3, 20
SIZES = {
    "num_mel_bins": MELS,
    "d_model": WIDTH,
    "encoder_layers": DEPTH,
    "encoder_attention_heads": 3,
    "encoder_ffn_dim": 40,
}
TEXT = {
    "hidden_size": OUT,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 50,
}
ROPE = {"rope_type": "default", "mrope_section": [2, 2, 1]}
FRAMES = 48  # what the small Qwen2-Audio takes, and two and a half windows of the small Omni
LENGTHS = np.array([48, 41, 20, 7], np.int32)


def qwen2_audio(audio=SIZES, text=TEXT):
    return transformers.Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", "max_source_positions": 24} | audio,
        text_config={"model_type": "qwen2"} | text,
        audio_token_index=3,
    )


def omni_thinker(n_window=10, audio=SIZES, text=TEXT):
    return transformers.Qwen2_5OmniThinkerConfig(
        audio_config=audio | {"n_window": n_window, "output_dim": text["hidden_size"]},
        text_config=text | {"rope_parameters": ROPE},
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
            "out_hidden_size": text["hidden_size"],
        },
    )  # fmt: skip


def arrays(model):
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def abstract_params(config):
    frames = min(config.frames, 400)
    features = jax.ShapeDtypeStruct((1, frames, config.mels), jnp.float32)
    return jax.eval_shape(QwenAudio(config).init, jax.random.key(0), features)["params"]


def apply(model, params, *args, method="embed", **options):
    run = quick_jit(lambda p, *args: model.apply({"params": p}, *args, method=method, **options))
    return run(params, *args)


@pytest.fixture(scope="module")
def features():
    return np.random.default_rng(0).standard_normal((4, FRAMES, MELS)).astype(np.float32)


@pytest.fixture(scope="module")
def qwen():
    """(upstream, our model, parameters) of a small Qwen2-Audio."""
    config = qwen2_audio()
    upstream = shake(transformers.Qwen2AudioForConditionalGeneration(config))
    ours = qwen2_audio_config(json.loads(config.to_json_string()))
    return (
        upstream,
        QwenAudio(ours),
        load(arrays(upstream), QWEN2_AUDIO_TABLE, abstract_params(ours)),
    )


def small_omni(n_window):
    config = omni_thinker(n_window)
    upstream = shake(transformers.Qwen2_5OmniThinkerForConditionalGeneration(config))
    ours = qwen2_5_omni_audio_config(json.loads(config.to_json_string()))
    params = load(arrays(upstream), QWEN2_5_OMNI_TABLE, abstract_params(ours))
    return upstream, QwenAudio(ours), params


@pytest.fixture(scope="module")
def omni():
    """The same of a small Qwen2.5-Omni thinker with windows of 20 frames."""
    return small_omni(10)


def tower_states(tower, run):
    """What `run()` returns, and each layer's output."""
    states = []
    hooks = [
        layer.register_forward_hook(
            lambda module, given, made: states.append(made if torch.is_tensor(made) else made[0])
        )
        for layer in tower.layers
    ]
    made = run()
    for hook in hooks:
        hook.remove()
    return made, states


def qwen_reference(upstream, features, lengths):
    """What the language model is given in place of audio tokens, through the whole model."""
    model = upstream.model
    given = []
    hook = model.language_model.register_forward_pre_hook(
        lambda module, args, options: given.append(options["inputs_embeds"]), with_kwargs=True
    )
    counts = (lengths + 1) // 2 // 2
    ids = torch.full((len(lengths), counts.max() + 1), 5)
    for row, count in zip(ids, counts, strict=True):
        row[-count:] = 3
    seen = torch.tensor(np.arange(FRAMES) < lengths[:, None]).long()
    with torch.no_grad():
        _, states = tower_states(
            model.audio_tower,
            lambda: model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                input_features=torch.tensor(features).transpose(1, 2),
                feature_attention_mask=seen,
            ),
        )
    hook.remove()
    wanted = [given[0][i, -count:].numpy() for i, count in enumerate(counts)]
    return wanted, [state.numpy() for state in states]


def omni_reference(upstream, features, lengths):
    """Rows of the tower's output for each clip, and of each layer's."""
    seen = torch.tensor(np.arange(features.shape[1]) < lengths[:, None]).long()
    model = upstream.model
    with torch.no_grad():
        made, states = tower_states(
            model.audio_tower,
            lambda: model.get_audio_features(
                torch.tensor(features).transpose(1, 2), feature_attention_mask=seen
            ),
        )
    after = (lengths + 1) // 2

    def rows(packed, counts):
        return np.split(packed.numpy(), np.cumsum(counts)[:-1])

    return rows(made.last_hidden_state, after // 2), [rows(state, after) for state in states]


def test_qwen2_audio_gives_the_language_model_what_it_was_given(qwen, features):
    upstream, model, params = qwen
    wanted, states = qwen_reference(upstream, features, LENGTHS)
    sequence, mask = apply(model, params, features, LENGTHS, method="tokens")
    pooled, out = apply(model, params, features, LENGTHS)
    np.testing.assert_array_equal(np.sum(mask, axis=1), [len(rows) for rows in wanted])
    for i, rows in enumerate(wanted):
        np.testing.assert_allclose(sequence[i][mask[i]], rows, rtol=0, atol=ATOL)
        np.testing.assert_allclose(out["projected"][i][mask[i]], rows, rtol=0, atol=ATOL)
        mean = np.mean(out["tokens"][i][mask[i]], axis=0)
        np.testing.assert_allclose(pooled[i], mean, rtol=0, atol=1e-6)
    for i, state in enumerate(states):
        for clip, after in enumerate((LENGTHS + 1) // 2):
            ours = out[f"block{i:02d}"][clip, :after]
            np.testing.assert_allclose(ours, state[clip, :after], rtol=0, atol=ATOL)


def test_qwen2_audio_without_padding(qwen, features):
    upstream, model, params = qwen
    pooled, out = apply(model, params, features)
    with torch.no_grad():
        wanted = upstream.model.audio_tower(torch.tensor(features).transpose(1, 2))
    np.testing.assert_allclose(out["tokens"], wanted.last_hidden_state, rtol=0, atol=ATOL)
    np.testing.assert_allclose(pooled, wanted.last_hidden_state.mean(1), rtol=0, atol=ATOL)
    assert out["mask"].shape == (4, model.config.grid(FRAMES)[0]) and out["mask"].all()


def check_omni(omni, features, lengths):
    upstream, model, params = omni
    wanted, states = omni_reference(upstream, features, lengths)
    beyond = np.arange(features.shape[1])[None, :, None] >= lengths[:, None, None]
    rubbish = np.where(beyond, np.nan, features)
    sequence, mask = apply(model, params, rubbish, lengths, method="tokens")
    _, out = apply(model, params, rubbish, lengths)
    assert sequence.shape[1] == model.config.grid(features.shape[1])[0]
    for i, rows in enumerate(wanted):
        assert mask[i].sum() == len(rows)
        np.testing.assert_allclose(sequence[i][mask[i]], rows, rtol=0, atol=ATOL)
    for i, state in enumerate(states):
        for clip, rows in enumerate(state):
            ours = out[f"block{i:02d}"][clip, : len(rows)]
            np.testing.assert_allclose(ours, rows, rtol=0, atol=ATOL)


def test_omni_gives_the_language_model_what_it_was_given(omni, features):
    """Lengths of whole windows and of parts, odd and even; padding is never read."""
    check_omni(omni, features, LENGTHS)


def test_omni_of_odd_windows(features):
    """Pairs of tokens then lie in two windows."""
    check_omni(small_omni(7), features, np.array([48, 30, 29, 14], np.int32))


def test_omni_of_the_published_window():
    x = np.random.default_rng(1).standard_normal((2, 431, MELS)).astype(np.float32)
    check_omni(small_omni(100), x, np.array([431, 250], np.int32))


@pytest.mark.parametrize("frames", [40, 47, 9])
def test_omni_without_lengths(omni, features, frames):
    upstream, model, params = omni
    wanted, _ = omni_reference(upstream, features[:, :frames], np.full(4, frames))
    pooled, out = apply(model, params, features[:, :frames])
    np.testing.assert_allclose(out["projected"], wanted, rtol=0, atol=ATOL)
    assert out["mask"].all()
    np.testing.assert_allclose(pooled, np.mean(out["tokens"], axis=1), rtol=0, atol=1e-6)


def test_omni_costs_grow_linearly(omni):
    _, model, params = omni

    def cost(frames):
        x = jax.ShapeDtypeStruct((1, frames, MELS), jnp.float32)
        run = jax.jit(lambda p, x: model.apply({"params": p}, x, method="embed")[0])
        return run.lower(params, x).compile().cost_analysis()["flops"]

    # Sixteen times as long: attention over the whole clip would cost 256 times as much.
    assert cost(1600) < 16.5 * cost(100)


@pytest.mark.parametrize("which", ["qwen", "omni"])
def test_short_and_empty_clips_are_zeros(which, features, request):
    _, model, params = request.getfixturevalue(which)
    pooled, out = apply(model, params, features, np.array([48, 3, 2, 0], np.int32))
    assert np.isfinite(pooled).all() and np.sum(out["mask"], axis=1).tolist() == [12, 1, 0, 0]
    assert pooled[1].any() and not pooled[2:].any()


@pytest.mark.parametrize("which", ["qwen", "omni"])
def test_gradient_equals_torch(which, features, request):
    upstream, model, params = request.getfixturevalue(which)
    table = {"qwen": QWEN2_AUDIO_TABLE, "omni": QWEN2_5_OMNI_TABLE}[which]

    def loss(params):
        sequence, _ = model.apply({"params": params}, features, method="tokens")
        return jnp.sum(jnp.sin(sequence)) / 10

    gradient = quick_jit(jax.grad(loss))(params)
    if which == "qwen":
        assert not np.any(gradient["pos_embed"])
    names = arrays(upstream)
    ours = export(gradient, table, names=names)
    x = torch.tensor(features).transpose(1, 2)
    upstream.zero_grad()
    if which == "qwen":
        tower = upstream.model.audio_tower(x).last_hidden_state
        sequence = upstream.model.multi_modal_projector(tower)
    else:
        seen = torch.ones(features.shape[:2]).long()
        sequence = upstream.model.get_audio_features(x, feature_attention_mask=seen)[0]
    (sequence.sin().sum() / 10).backward()
    theirs = {name: weight.grad for name, weight in upstream.named_parameters()}
    for name, slope in ours.items():
        if "embed_positions" not in name:
            np.testing.assert_allclose(slope, theirs[name], rtol=1e-4, atol=2e-5, err_msg=name)
            assert np.abs(slope).max() > 1e-4, name


@pytest.mark.parametrize("which", ["qwen", "omni"])
def test_bfloat16_stays_close_and_pools_in_float32(which, features, request):
    _, model, params = request.getfixturevalue(which)
    low = QwenAudio(dataclasses.replace(model.config, dtype=jnp.bfloat16))
    pooled, out = apply(low, params, features, LENGTHS)
    wanted, reference = apply(model, params, features, LENGTHS)
    assert pooled.dtype == jnp.float32 and out["projected"].dtype == jnp.bfloat16
    np.testing.assert_allclose(pooled, wanted, rtol=0, atol=0.06)
    mask = reference["mask"]
    off = np.abs(out["tokens"].astype(jnp.float32) - reference["tokens"])[mask]
    assert off.max() < 0.15 and off.mean() < 0.015


@pytest.mark.parametrize("which", ["qwen", "omni"])
def test_export_is_bit_for_bit_and_reloads(which, features, request):
    upstream, _, params = request.getfixturevalue(which)
    table = {"qwen": QWEN2_AUDIO_TABLE, "omni": QWEN2_5_OMNI_TABLE}[which]
    names = arrays(upstream)
    written = export(params, table, names=names)
    audio = re.compile(r".*(audio_tower|multi_modal_projector)\.(?!audio_bos)")
    assert set(written) == {name for name in names if audio.match(name)}
    for name, tensor in written.items():
        np.testing.assert_array_equal(tensor, names[name])
    fresh = type(upstream)(upstream.config).eval()
    state = {name: torch.tensor(tensor) for name, tensor in written.items()}
    left = fresh.load_state_dict(state, strict=False)
    assert not left.unexpected_keys and not any(audio.match(name) for name in left.missing_keys)
    reference = {"qwen": qwen_reference, "omni": omni_reference}[which]
    for ours, theirs in zip(
        *(reference(model, features, LENGTHS)[0] for model in (fresh, upstream)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


READERS = {"qwen": qwen2_audio_config, "omni": qwen2_5_omni_audio_config}
TABLES = {"qwen": QWEN2_AUDIO_TABLE, "omni": QWEN2_5_OMNI_TABLE}


@pytest.mark.parametrize("which", ["qwen", "omni"])
def test_a_published_folder_loads(which, request, tmp_path):
    """config.json and safetensors as transformers writes them, under the published names."""
    upstream, model, params = request.getfixturevalue(which)
    upstream.save_pretrained(tmp_path)
    config = READERS[which](json.loads((tmp_path / "config.json").read_text()))
    assert config == model.config
    again = load(tmp_path, TABLES[which], abstract_params(config))
    for left, right in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("which", ["qwen", "omni"])
def test_a_bare_tower_loads(which, features, request, tmp_path):
    upstream, model, params = request.getfixturevalue(which)
    tower = upstream.model.audio_tower
    config = READERS[which](json.loads(tower.config.to_json_string()))
    bare = load(arrays(tower), TABLES[which], abstract_params(config))
    _, whole = apply(model, params, features)
    _, out = apply(QwenAudio(config), bare, features)
    np.testing.assert_array_equal(out["tokens"], whole["tokens"])
    if which == "qwen":
        with pytest.raises(ValueError, match="no projection"):
            apply(QwenAudio(config), bare, features, method="tokens")


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(omni):
    upstream, model, _ = omni
    changed = arrays(upstream)
    del changed["model.audio_tower.proj.bias"]
    changed["model.audio_tower.extra.weight"] = np.zeros(2, np.float32)
    with pytest.raises(WeightError) as caught:
        load(changed, QWEN2_5_OMNI_TABLE, abstract_params(model.config))
    assert "missing: model.audio_tower.proj.bias" in str(caught.value)
    assert "unused: model.audio_tower.extra.weight" in str(caught.value)


@pytest.mark.parametrize("config", [QWEN2_AUDIO, QWEN2_5_OMNI_AUDIO])
def test_sharding_covers_every_leaf(config):
    mesh = make_mesh(devices=jax.devices()[:1])
    assert shardings({"encoder": abstract_params(config)}, SHARDING, mesh)


def test_the_encoder_contract():
    config = QWEN2_5_OMNI_AUDIO
    assert config.grid(800) == (200, 1) and config.grid(802) == (200, 1)
    assert config.grid(803) == (201, 1) and config.footprint == (4, 128)
    assert config.layer_widths == (1280,) * 32 and config.prefix_tokens == 0
    assert 0.2 <= config.mask_unit[0] * 0.04 <= 0.3
    assert QWEN2_AUDIO.grid(3000) == (750, 1) and QWEN2_AUDIO.output_width == 4096


@pytest.mark.parametrize(
    ("shape", "lengths", "words"),
    [
        ((1, 48, 8), None, r"\(B, T, 7\)"),
        ((1, 49, 7), None, "49 frames; this model takes 3 to 48"),
        ((1, 2, 7), None, "2 frames; this model takes 3"),
        ((2, 48, 7), np.zeros(3, np.int32), r"\(2,\) integers"),
    ],
)
def test_bad_shapes_are_named(qwen, shape, lengths, words):
    with pytest.raises(ValueError, match=words):
        apply(*qwen[1:], jnp.zeros(shape), lengths)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"n_window": 0}, "n_window"), ({"output_width": 0}, "output_width"), ({"heads": 7}, "heads")],
)
def test_bad_configs_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(QwenAudioConfig(), **change)


@pytest.mark.parametrize(
    ("reader", "config", "words"),
    [
        (qwen2_audio_config, {"model_type": "qwen2_audio"}, "config.json has no 'audio_config'"),
        (qwen2_audio_config, {"model_type": "qwen2_5_omni"}, "model_type='qwen2_5_omni'"),
        (qwen2_audio_config, SIZES | {"n_window": 50}, "n_window=50"),
        (qwen2_audio_config, SIZES | {"activation_function": "relu"}, "activation_function"),
        (qwen2_5_omni_audio_config, {"model_type": "qwen2_5_omni"}, "thinker_config"),
        (
            qwen2_5_omni_audio_config,
            {"model_type": "qwen2_5_omni_thinker", "audio_config": SIZES | {"n_window_infer": 8}},
            "audio_config asks for .*n_window_infer=8",
        ),
        (
            qwen2_5_omni_audio_config,
            SIZES | {"n_window": 100, "max_source_positions": 99},
            "max_source_positions is 99",
        ),
    ],
)
def test_unsupported_settings_are_refused_by_name(reader, config, words):
    with pytest.raises(ModelConfigError, match=words):
        reader(config)
