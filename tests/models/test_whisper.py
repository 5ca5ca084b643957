"""Whisper's encoder against transformers, on small random models and by name at full size."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from medalign_jax.architecture import architecture
from medalign_jax.core.mesh import make_mesh, shardings
from medalign_jax.models.encoders import whisper
from medalign_jax.models.encoders.whisper import Whisper, WhisperConfig, sinusoids, whisper_config
from medalign_jax.models.upstream_config import ModelConfigError
from medalign_jax.weights.lazy import WeightError
from medalign_jax.weights.load import export, load
from medalign_jax.weights.tables.whisper import SHARDING, TABLE
from tests.tiny_models import quick_jit
from tests.torch_models import check_shapes, hollow, shake

ATOL = 1e-5
FRAMES = 44
ODD = transformers.WhisperConfig(
    vocab_size=50, num_mel_bins=7, d_model=24, encoder_layers=3, encoder_attention_heads=3,
    encoder_ffn_dim=40, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16,
    max_source_positions=FRAMES // 2, max_target_positions=8, pad_token_id=0, bos_token_id=1,
    eos_token_id=2, decoder_start_token_id=1, dropout=0.1,
)  # fmt: skip


def abstract_params(config):
    features = jax.ShapeDtypeStruct((1, config.frames, config.mels), jnp.float32)
    return jax.eval_shape(Whisper(config).init, jax.random.key(0), features)["params"]


@pytest.fixture(scope="module")
def upstream():
    return shake(transformers.WhisperForConditionalGeneration(ODD))


@pytest.fixture(scope="module")
def tensors(upstream):
    return {name: tensor.numpy() for name, tensor in upstream.state_dict().items()}


@pytest.fixture(scope="module")
def loaded(tensors):
    config = whisper_config(json.loads(ODD.to_json_string()))
    return Whisper(config), load(tensors, TABLE, abstract_params(config))


@pytest.fixture(scope="module")
def features():
    return np.random.default_rng(0).standard_normal((3, FRAMES, 7)).astype(np.float32)


def apply(model, params, *args, method="embed", **options):
    run = quick_jit(lambda p, *args: model.apply({"params": p}, *args, method=method, **options))
    return run(params, *args)


def test_the_first_blocks_of_a_published_encoder(tensors, loaded, features):
    made = architecture("whisper", {"depth": 2}, published=json.loads(ODD.to_json_string()))
    params = load(tensors, made.table, made.abstract_params())
    assert params["layers"]["query"]["kernel"].shape == (2, 24, 24)
    _, found = apply(made.module, params, features)
    _, whole = apply(*loaded, features)
    np.testing.assert_array_equal(found["block01"], whole["block01"])
    # What the export of it says of itself makes it again.
    settings = made.settings
    again = architecture(settings["name"], settings["overrides"])
    assert again.module.config == made.module.config
    written = export(params, made.table)
    load(written, again.table, again.abstract_params())
    # Not asked for, a block too many stays an error.
    shallow = architecture("whisper", made.settings["overrides"] | {"depth": 3})
    with pytest.raises(WeightError, match="layers"):
        load(written, shallow.table, shallow.abstract_params())


def reference(upstream, features):
    with torch.no_grad():
        x = torch.tensor(features).transpose(1, 2)
        return upstream.model.encoder(x, output_hidden_states=True)


def test_every_layer_equals_transformers(upstream, loaded, features):
    wanted = reference(upstream, features)
    pooled, out = apply(*loaded, features)
    np.testing.assert_allclose(out["stem"], wanted.hidden_states[0], rtol=0, atol=ATOL)
    # transformers replaces the last hidden state by the normed one; test_the_last_block has it.
    for i, state in enumerate(wanted.hidden_states[1:-1]):
        np.testing.assert_allclose(out[f"block{i:02d}"], state, rtol=0, atol=ATOL)
    np.testing.assert_allclose(out["tokens"], wanted.last_hidden_state, rtol=0, atol=ATOL)
    np.testing.assert_allclose(pooled, wanted.last_hidden_state.mean(1), rtol=0, atol=ATOL)
    assert out["mask"].all() and pooled.dtype == jnp.float32
    assert out["tokens"].shape[1] == np.prod(loaded[0].config.grid(FRAMES))


def test_the_last_block(upstream, loaded, features):
    states = []
    hook = upstream.model.encoder.layers[-1].register_forward_hook(
        lambda module, given, made: states.append(made if torch.is_tensor(made) else made[0])
    )
    reference(upstream, features)
    hook.remove()
    _, out = apply(*loaded, features)
    np.testing.assert_allclose(out["block02"], states[0], rtol=0, atol=ATOL)


def test_only_what_is_asked_for_is_kept(loaded, features):
    model, params = loaded
    _, everything = apply(model, params, features)
    _, some = apply(model, params, features, layers=(2, 0))
    assert sorted(set(everything) - set(some)) == ["block01"]
    for name, state in some.items():
        np.testing.assert_allclose(state, everything[name], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"layers \[3\] do not exist: this model has 0 to 2"):
        apply(model, params, features, layers=(3,))


def test_a_padded_batch_gives_what_each_clip_gives_alone(loaded, features):
    model, params = loaded
    lengths = np.array([FRAMES, 21, 1], np.int32)
    rubbish = np.where(np.arange(FRAMES)[None, :, None] < lengths[:, None, None], features, np.nan)
    pooled, out = apply(model, params, rubbish, lengths)
    np.testing.assert_array_equal(np.sum(out["mask"], axis=1), [22, 11, 1])
    for i, length in enumerate(lengths):
        alone, single = apply(model, params, features[i : i + 1, :length])
        np.testing.assert_allclose(pooled[i], alone[0], rtol=0, atol=ATOL)
        rows = single["tokens"].shape[1]
        assert (rows, 1) == model.config.grid(length)
        for name in ("block00", "block01", "block02", "tokens"):
            np.testing.assert_allclose(out[name][i, :rows], single[name][0], rtol=0, atol=ATOL)
    sequence, mask = apply(model, params, rubbish, lengths, method="tokens")
    np.testing.assert_array_equal(mask, out["mask"])
    np.testing.assert_allclose(sequence[mask], out["tokens"][mask], rtol=0, atol=1e-6)


def test_back_ends_change_nothing(loaded, features):
    model, params = loaded
    lengths = np.array([FRAMES, 21, 1], np.int32)
    wanted, _ = apply(model, params, features, lengths)
    blocked = Whisper(dataclasses.replace(model.config, attention="blocked"))
    np.testing.assert_allclose(apply(blocked, params, features, lengths)[0], wanted, atol=ATOL)


def test_a_clip_of_nothing_is_zeros(loaded, features):
    pooled, _ = apply(*loaded, features, np.array([FRAMES, 0, 5], np.int32))
    assert np.isfinite(pooled).all() and not pooled[1].any() and pooled[0].any()


def test_gradient_equals_torch(upstream, loaded, features):
    model, params = loaded
    tilt = np.linspace(-1, 1, 24, dtype=np.float32)

    def loss(params):
        pooled, out = model.apply({"params": params}, features, method="embed")
        return jnp.sum(jnp.sin(pooled) * tilt) + jnp.sum(jnp.cos(out["block01"])) / 100

    gradient = quick_jit(jax.grad(loss))(params)
    assert not np.any(gradient.pop("pos_embed"))
    upstream.zero_grad()
    states = upstream.model.encoder(
        torch.tensor(features).transpose(1, 2), output_hidden_states=True
    )
    pooled = states.last_hidden_state.mean(1)
    wanted = (pooled.sin() * torch.tensor(tilt)).sum() + states.hidden_states[2].cos().sum() / 100
    wanted.backward()
    ours = export(gradient | {"pos_embed": np.zeros((FRAMES // 2, 24), np.float32)}, TABLE)
    theirs = {n: p.grad for n, p in upstream.named_parameters() if "encoder" in n}
    for name, slope in ours.items():
        if "embed_positions" not in name:
            np.testing.assert_allclose(slope, theirs[name], rtol=1e-4, atol=2e-5, err_msg=name)
            assert np.abs(slope).max() > 1e-4, name


def test_gradient_beside_padding_is_finite(loaded, features):
    model, params = loaded
    rubbish = np.array(features)
    rubbish[1, 9:] = np.inf
    lengths = np.array([FRAMES, 9, 0], np.int32)
    loss = lambda p: model.apply({"params": p}, rubbish, lengths, method="embed")[0].sum()  # noqa: E731
    for leaf in jax.tree.leaves(quick_jit(jax.grad(loss))(params)):
        assert np.isfinite(leaf).all()


def test_remat_changes_nothing(loaded, features):
    model, params = loaded
    again = Whisper(dataclasses.replace(model.config, remat=True))

    def slope(model):
        run = jax.grad(lambda p: model.apply({"params": p}, features, method="embed")[0].sum())
        return quick_jit(run)(params)

    for left, right in zip(*(jax.tree.leaves(slope(m)) for m in (model, again)), strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=ATOL)


def test_bfloat16_stays_close_and_pools_in_float32(loaded, features):
    model, params = loaded
    low = Whisper(dataclasses.replace(model.config, dtype=jnp.bfloat16))
    pooled, out = apply(low, params, features)
    wanted, reference = apply(model, params, features)
    assert pooled.dtype == jnp.float32 and out["tokens"].dtype == jnp.bfloat16
    np.testing.assert_allclose(pooled, wanted, rtol=0, atol=0.03)
    off = np.abs(out["tokens"].astype(jnp.float32) - reference["tokens"])
    assert off.max() < 0.15 and off.mean() < 0.015


def test_positions_equal_the_published_table():
    table = transformers.models.whisper.modeling_whisper.sinusoids(1500, 384).numpy()
    # The angles reach 1500, where a float32 step is 1.2e-4: a few rates that differ in their last
    # digit (torch's exp) show there.
    np.testing.assert_allclose(sinusoids(1500, 384), table, rtol=0, atol=1.3e-4)
    np.testing.assert_allclose(sinusoids(100, 384), table[:100], rtol=0, atol=2e-6)
    assert np.mean(sinusoids(1500, 384) != table) < 0.1


def test_export_is_bit_for_bit_and_reloads(tensors, loaded, upstream, features):
    written = export(loaded[1], TABLE, names=tensors)
    assert set(written) == {n for n in tensors if n.startswith("model.encoder.")}
    for name, tensor in written.items():
        assert tensor.dtype == tensors[name].dtype
        np.testing.assert_array_equal(tensor, tensors[name])
    fresh = transformers.WhisperForConditionalGeneration(ODD).eval()
    state = {name: torch.tensor(tensor) for name, tensor in written.items()}
    left = fresh.load_state_dict(state, strict=False)
    assert not left.unexpected_keys
    assert not [name for name in left.missing_keys if "encoder." in name[:14]]
    ours, theirs = (reference(model, features).last_hidden_state for model in (fresh, upstream))
    np.testing.assert_array_equal(ours, theirs)


def test_a_published_folder_loads(upstream, loaded, tmp_path):
    """config.json and safetensors as transformers writes them."""
    upstream.save_pretrained(tmp_path)
    config = whisper_config(json.loads((tmp_path / "config.json").read_text()))
    params = load(tmp_path, TABLE, abstract_params(config))
    for left, right in zip(jax.tree.leaves(params), jax.tree.leaves(loaded[1]), strict=True):
        np.testing.assert_array_equal(left, right)


PRESETS = {
    "tiny": (whisper.TINY, (80, 384, 4, 6, 1536)),
    "base": (whisper.BASE, (80, 512, 6, 8, 2048)),
    "small": (whisper.SMALL, (80, 768, 12, 12, 3072)),
    "medium": (whisper.MEDIUM, (80, 1024, 24, 16, 4096)),
    "large-v3": (whisper.LARGE_V3, (128, 1280, 32, 20, 5120)),
}


def full_config(name):
    mels, width, depth, heads, mlp = PRESETS[name][1]
    return transformers.WhisperConfig(
        num_mel_bins=mels, d_model=width, encoder_layers=depth, encoder_attention_heads=heads,
        encoder_ffn_dim=mlp, decoder_layers=depth, decoder_attention_heads=heads,
        decoder_ffn_dim=mlp,
    )  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_what_the_published_configs_say(name):
    assert whisper_config(json.loads(full_config(name).to_json_string())) == PRESETS[name][0]


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [
        ("WhisperForConditionalGeneration", "model.encoder."),
        ("WhisperModel", "encoder."),
        ("WhisperForAudioClassification", "encoder."),
    ],
)
def test_the_whole_official_key_list_loads(kind, prefix):
    with torch.device("meta"):
        official = hollow(getattr(transformers, kind)(full_config("base")))
    params = load(official, TABLE, abstract_params(whisper.BASE))
    shapes = {name: tensor.shape for name, tensor in export(params, TABLE, names=official).items()}
    assert shapes == {n: t.shape for n, t in official.items() if n.startswith(prefix)}


def test_large_v3_has_the_official_names_and_shapes():
    with torch.device("meta"):
        model = transformers.WhisperModel(full_config("large-v3"))
    official = {f"model.{name}": tensor for name, tensor in hollow(model).items()}
    abstract = abstract_params(whisper.LARGE_V3)
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(abstract))
    assert count == sum(t.size for n, t in official.items() if ".encoder." in n)
    check_shapes(official, TABLE, abstract)


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tensors, loaded):
    abstract = abstract_params(loaded[0].config)
    changed = dict(tensors)
    del changed["model.encoder.layers.1.fc1.bias"]
    changed["model.encoder.layers.0.self_attn.k_proj.bias"] = np.zeros(24, np.float32)
    with pytest.raises(WeightError) as caught:
        load(changed, TABLE, abstract)
    assert "missing: model.encoder.layers.1.fc1.bias" in str(caught.value)
    assert "unused: model.encoder.layers.0.self_attn.k_proj.bias" in str(caught.value)


def test_sharding_covers_every_leaf():
    mesh = make_mesh(devices=jax.devices()[:1])
    assert shardings({"encoder": abstract_params(whisper.TINY)}, SHARDING, mesh)


def test_compile_time_does_not_grow_with_depth():
    def program(depth):
        config = dataclasses.replace(whisper.TINY, depth=depth)
        features = jax.ShapeDtypeStruct((1, 100, 80), jnp.float32)
        run = jax.jit(lambda p, x: Whisper(config).apply({"params": p}, x, method="embed")[0])
        return len(run.lower(abstract_params(config), features).as_text())

    assert program(24) < 1.1 * program(4)


def test_states_that_nobody_reads_take_no_memory():
    config = WhisperConfig(mels=7, frames=400, width=32, depth=12, heads=2, mlp_width=64)
    features = jax.ShapeDtypeStruct((2, 400, 7), jnp.float32)

    def bytes_of(layers):
        model = Whisper(config)
        loss = lambda p, x: model.apply({"params": p}, x, layers=layers, method="embed")[0].sum()  # noqa: E731
        compiled = jax.jit(jax.grad(loss)).lower(abstract_params(config), features).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert bytes_of(None) <= bytes_of(()) + 2 * 200 * 32 * 4


def test_the_encoder_contract():
    config = whisper.LARGE_V3
    assert config.grid(3000) == (1500, 1) and config.grid(3) == (2, 1)
    assert config.layer_widths == (1280,) * 32 and config.prefix_tokens == 0
    assert config.footprint == (2, 128)
    assert 0.2 <= config.mask_unit[0] * 0.02 <= 0.3


@pytest.mark.parametrize(
    ("shape", "lengths", "words"),
    [
        ((1, 44, 8), None, r"\(B, T, 7\)"),
        ((44, 7), None, r"\(B, T, 7\)"),
        ((1, 45, 7), None, "45 frames; this model takes 1 to 44"),
        ((1, 0, 7), None, "0 frames"),
        ((2, 44, 7), np.zeros(3, np.int32), r"\(2,\) integers"),
        ((2, 44, 7), np.zeros(2, np.float32), r"\(2,\) integers"),
    ],
)
def test_bad_shapes_are_named(loaded, shape, lengths, words):
    with pytest.raises(ValueError, match=words):
        apply(*loaded, jnp.zeros(shape), lengths)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": 5}, "multiple of 5 heads"),
        ({"frames": 31}, "even"),
        ({"depth": 0}, "depth"),
        ({"width": 2, "heads": 1}, "width"),
    ],
)
def test_bad_configs_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(WhisperConfig(), **change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"activation_function": "gelu_new"}, "activation_function='gelu_new' is not supported"),
        ({"model_type": "bert"}, "model_type='bert'"),
        ({"rope_theta": 1e4}, "rope_theta"),
        ({"d_model": "24"}, "d_model"),
        ({"num_hidden_layers": 9}, "num_hidden_layers"),
        ({"encoder_layers": None}, "encoder_layers"),
    ],
)
def test_unsupported_settings_are_refused_by_name(change, words):
    with pytest.raises(ModelConfigError, match=words):
        whisper_config(json.loads(ODD.to_json_string()) | change)
