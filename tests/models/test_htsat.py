"""HTS-AT against the published network at full size, and against transformers layer by layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import ClapAudioConfig, ClapAudioModel

from medalign_jax.core.mesh import make_mesh, shardings
from medalign_jax.models.encoders.cola import Cola
from medalign_jax.models.encoders.htsat import (
    HTSAT,
    OPERA_CT,
    HTSATConfig,
    crop_starts,
    fold,
    stretch,
    unfold,
)
from medalign_jax.models.layers.swin_layers import from_windows, to_windows, window_attention
from medalign_jax.weights import Ignore, Rule, Table, WeightError
from medalign_jax.weights.load import export, load
from medalign_jax.weights.table import CONV2D
from medalign_jax.weights.tables.opera_ct import SHARDING, TABLE, batch_norm, dense, norm
from tests.models.rule_weights import noise, published, structured

# Sides of 24 (four shifted windows) and 12 tokens (one window); three pieces; odd depths.
TINY = HTSATConfig(
    mels=24, spec_size=72, patch=3, embed_width=16, depths=(3, 2), heads=(2, 4), window=12,
    mlp_ratio=2, split_qkv=True,
)  # fmt: skip


def abstract_params(module, frames=251) -> dict:
    features = jax.ShapeDtypeStruct((1, frames, module.config.mels), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), features)["params"]


@pytest.fixture(scope="module")
def opera_ct(shared):
    return published(shared, "opera_ct")


@pytest.fixture(scope="module")
def opera_ct_params(opera_ct):
    return load(opera_ct.tensors, TABLE, abstract_params(Cola(OPERA_CT)))


@pytest.fixture(scope="module")
def embed(opera_ct_params):
    run = jax.jit(lambda p, x: HTSAT(OPERA_CT).apply({"params": p}, x, method="embed"))
    return lambda x: run(opera_ct_params["encoder"], x)


def test_export_is_bit_for_bit(opera_ct, opera_ct_params):
    out = export(opera_ct_params, TABLE)
    used = {
        entry["name"]
        for entry in opera_ct.described["state_dict"]
        if entry["rule"] not in ("computed", "zero_int")
        and not any(part in entry["name"] for part in ("tscam_conv", "htsat.head"))
    }
    assert out.keys() == used
    for name, tensor in out.items():
        np.testing.assert_array_equal(tensor, opera_ct.tensors[name])


def test_no_tensor_may_be_missing_or_left_over(opera_ct):
    first = "encoder.encoder.htsat.layers.2.blocks.5.attn.qkv.bias"
    tensors = {name: x for name, x in opera_ct.tensors.items() if name != first}
    tensors["encoder.encoder.htsat.layers.0.blocks.0.gamma"] = np.zeros(96, np.float32)
    with pytest.raises(WeightError, match=r"1 missing, 1 unused(.|\n)*blocks.5.attn.qkv.bias"):
        load(tensors, TABLE, abstract_params(Cola(OPERA_CT)))


@pytest.mark.parametrize("frames", [251, 100, 1024, 1600])
def test_feature(opera_ct, embed, frames):
    expected = opera_ct.expected[f"feature_T{frames}"]
    feature, inner = embed(noise(0, len(expected), frames))
    assert feature.dtype == jnp.float32
    np.testing.assert_allclose(feature, expected, atol=5e-6, rtol=0)
    np.testing.assert_allclose(inner["tokens"].mean(axis=1), feature, atol=1e-6, rtol=0)


def test_feature_of_structured_input(opera_ct, embed):
    expected = opera_ct.expected["feature_structured_T251"]
    feature, _ = embed(structured(2, 251, 0.0))
    np.testing.assert_allclose(feature, expected, atol=5e-6, rtol=0)


def test_image_and_stages(opera_ct, embed):
    _, inner = embed(noise(0, 2, 251))
    expected, image = opera_ct.expected, np.asarray(inner["image"])
    np.testing.assert_allclose(image[:, 0], expected["image_row0_T251"], atol=5e-6, rtol=0)
    np.testing.assert_allclose(
        image.mean(axis=2), expected["image_rows_mean_T251"], atol=1e-6, rtol=0
    )
    for name in ("patch_embed", "stage0", "stage1", "stage2", "stage3"):
        pooled = np.asarray(inner[name]).mean(axis=1, dtype=np.float64)
        np.testing.assert_allclose(
            pooled, expected[f"{name}_meanpool_T251"], atol=5e-6, rtol=0, err_msg=name
        )


def test_shapes_at_full_size_follow_the_config():
    init = jax.eval_shape(
        lambda x: HTSAT(OPERA_CT).init_with_output(jax.random.key(0), x, method="embed"),
        jax.ShapeDtypeStruct((2, 251, 64), jnp.float32),
    )
    feature, inner = init[0]
    assert feature.shape == (2, OPERA_CT.width) == (2, 768)
    assert OPERA_CT.frames == 1024 and OPERA_CT.depth == 12
    for i, width in enumerate(OPERA_CT.layer_widths):
        tokens = 64 * (768 // width) ** 2
        assert inner[f"block{i:02d}"].shape == (2, tokens, width)
    assert OPERA_CT.grid(251) == (32, 2) and OPERA_CT.footprint == (32, 32)
    assert inner["tokens"].shape == (2, 64, 768)


def test_every_parameter_has_a_sharding():
    for config in (OPERA_CT, TINY):
        tree = abstract_params(Cola(config))
        assert len(jax.tree.leaves(shardings(tree, SHARDING, make_mesh()))) == len(
            jax.tree.leaves(tree)
        )


# The names of transformers' ClapAudioModel for TINY.
def _clap_block(upstream: str, path: str) -> tuple[Rule, ...]:
    attention = f"{upstream}.attention"
    table = f"{{prefix}}{attention}.self.relative_position_bias_table"
    return (
        *norm(f"{upstream}.layernorm_before", f"{path}/norm1"),
        Rule(table, f"{path}/attn/position_bias"),
        *dense(f"{attention}.self.query", f"{path}/attn/query"),
        *dense(f"{attention}.self.key", f"{path}/attn/key"),
        *dense(f"{attention}.self.value", f"{path}/attn/value"),
        *dense(f"{attention}.output.dense", f"{path}/attn/proj"),
        *norm(f"{upstream}.layernorm_after", f"{path}/norm2"),
        *dense(f"{upstream}.intermediate.dense", f"{path}/mlp/fc1"),
        *dense(f"{upstream}.output.dense", f"{path}/mlp/fc2"),
    )


CLAP = Table(
    name="clap of the tests",
    prefixes=("audio_encoder.",),
    rules=(
        *batch_norm("batch_norm", "batch_norm"),
        Rule("{prefix}patch_embed.proj.weight", "patch_embed/kernel", CONV2D),
        Rule("{prefix}patch_embed.proj.bias", "patch_embed/bias"),
        *norm("patch_embed.norm", "patch_norm"),
        *_clap_block("layers.0.blocks.{i}", "stage0/block{i}"),
        *_clap_block("layers.1.blocks.{i}", "stage1/block{i}"),
        *norm("layers.0.downsample.norm", "stage0/downsample/norm"),
        dense("layers.0.downsample.reduction", "stage0/downsample/reduction")[0],
        *norm("norm", "norm"),
    ),
    ignores=(
        Ignore("*num_batches_tracked", "a counter"),
        Ignore("*relative_position_index", "made anew"),
    ),
)


def reference() -> ClapAudioModel:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ClapAudioModel(
        ClapAudioConfig(
            num_mel_bins=24, spec_size=72, patch_size=3, patch_stride=[3, 3],
            patch_embeds_hidden_size=16, depths=[3, 2], num_attention_heads=[2, 4],
            window_size=12, mlp_ratio=2.0, hidden_size=32, num_hidden_layers=2,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.dtype == torch.float32:
                spread = 0.3 * torch.randn_like(tensor)
                if name.endswith("running_var"):
                    tensor += spread.abs()
                elif tensor.ndim == 2 and "bias_table" not in name:
                    tensor += 0.1 * spread
                else:
                    tensor += spread
    return model


@pytest.fixture(scope="module")
def tiny():
    """Reference, our parameters, and inputs shorter than the 216 frames that they stretch to."""
    model = reference()
    tensors = {name: x.numpy() for name, x in model.state_dict().items()}
    params = load(tensors, CLAP, abstract_params(HTSAT(TINY)))
    features = np.random.default_rng(1).standard_normal((2, 77, 24)).astype(np.float32)
    return model, params, features


def apply(config, params, features, method="embed"):
    return jax.jit(lambda p, x: HTSAT(config).apply({"params": p}, x, method=method))(
        params, features
    )


def test_layers_match_transformers(tiny):
    model, params, features = tiny
    with torch.no_grad():
        out = model(torch.tensor(features)[:, None], output_hidden_states=True)
    feature, inner = apply(TINY, params, features)
    for name, expected in zip(("patch_embed", "stage0", "stage1"), out.hidden_states, strict=True):
        rows = unfold(jnp.asarray(expected.permute(0, 2, 3, 1).numpy()), TINY.pieces)
        np.testing.assert_allclose(inner[name], rows, atol=1e-5, rtol=0, err_msg=name)
    np.testing.assert_allclose(feature, out.pooler_output, atol=1e-5, rtol=0)
    # transformers' last map is (B, W, mel, time).
    last = out.last_hidden_state.permute(0, 3, 2, 1).flatten(1, 2)
    assert last.shape[1] == np.prod(TINY.grid(77))
    np.testing.assert_allclose(inner["tokens"], last, atol=1e-5, rtol=0)


def gradients(config, params, features):
    """Of a weighted sum of the features, to the parameters and to the input."""
    weight = np.random.default_rng(2).standard_normal((2, 32)).astype(np.float32)

    def loss(params, features):
        return jnp.sum(HTSAT(config).apply({"params": params}, features) * weight)

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(params, features), weight


@pytest.fixture(scope="module")
def tiny_gradients(tiny):
    return gradients(TINY, *tiny[1:])


def test_gradient_matches_pytorch(tiny, tiny_gradients):
    model, _, features = tiny
    (to_params, to_features), weight = tiny_gradients
    inputs = torch.tensor(features, requires_grad=True)
    model.zero_grad()
    (model(inputs[:, None]).pooler_output * torch.tensor(weight)).sum().backward()
    np.testing.assert_allclose(to_features, inputs.grad, atol=2e-5, rtol=1e-4)
    theirs = dict(model.named_parameters())
    for name, gradient in export(to_params, CLAP).items():
        if name.endswith(("running_mean", "running_var")):
            assert not gradient.any(), name
        else:
            expected = theirs[name].grad.numpy()
            # Where a gradient is 0 by symmetry (the bias of the keys) both have rounding only.
            tolerance = 1e-4 * np.abs(expected).max() + 1e-6
            np.testing.assert_allclose(gradient, expected, atol=tolerance, rtol=0, err_msg=name)


@pytest.mark.parametrize("change", [{"remat": True, "attention": "xla"}, {"attention": "blocked"}])
def test_remat_and_back_ends_change_nothing(tiny, tiny_gradients, change):
    other, _ = gradients(dataclasses.replace(TINY, **change), *tiny[1:])
    pairs = zip(jax.tree.leaves(tiny_gradients[0]), jax.tree.leaves(other), strict=True)
    for left, right in pairs:
        tolerance = 1e-5 * np.abs(left).max() + 1e-6
        np.testing.assert_allclose(left, right, atol=tolerance, rtol=0)


def test_export_is_read_by_transformers(tiny):
    _, params, features = tiny
    moved = jax.tree.map(lambda x: x * 1.1, params)
    model = reference()
    tensors = {name: torch.tensor(x) for name, x in export(moved, CLAP).items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and all("index" in name or "tracked" in name for name in missing)
    with torch.no_grad():
        expected = model(torch.tensor(features)[:, None]).pooler_output
    np.testing.assert_allclose(apply(TINY, moved, features)[0], expected, atol=1e-5, rtol=0)


def test_bfloat16_compute_stays_close_and_returns_float32(tiny):
    _, params, features = tiny
    low, _ = apply(dataclasses.replace(TINY, dtype=jnp.bfloat16), params, features)
    high, _ = apply(TINY, params, features)
    assert low.dtype == jnp.float32
    # Features of size 1; 8 bits of mantissa through 5 blocks.
    np.testing.assert_allclose(low, high, atol=0.015, rtol=0)


@pytest.mark.parametrize("length", [1, 2, 3, 50, 99, 100])
def test_stretching_is_that_of_pytorch(length):
    x = np.random.default_rng(length).standard_normal((2, length, 5)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.tensor(x)[:, None], (100, 5), mode="bicubic", align_corners=True
    )
    np.testing.assert_allclose(stretch(jnp.asarray(x), 100), expected[:, 0], atol=2e-5, rtol=0)


def test_stretched_input_is_the_same_to_the_network(tiny):
    _, params, features = tiny
    picture = HTSAT(TINY).apply({}, features, method="stretch")
    assert picture.shape == (2, TINY.frames, TINY.mels)
    again = HTSAT(TINY).apply({}, picture, method="stretch")
    np.testing.assert_array_equal(again, picture)
    left, right = (apply(TINY, params, x)[0] for x in (features, picture))
    np.testing.assert_allclose(left, right, atol=2e-6, rtol=0)


def test_folding_keeps_time_order():
    picture = jnp.arange(2 * 12 * 2).reshape(2, 12, 2)
    image = fold(picture, 3)
    assert image.shape == (2, 6, 4)
    assert image[0, 2].tolist() == [picture[0, t, 0] for t in range(4, 8)]
    np.testing.assert_array_equal(unfold(image[..., None], 3).reshape(2, 12, 2), picture)


def test_a_token_stands_for_its_stretch_of_time(tiny):
    """Without attention between windows, a change reaches the tokens of its own place only."""
    _, params, _ = tiny
    config = dataclasses.replace(TINY, window=1, depths=(1, 1))
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x[:1] if "position_bias" in jax.tree_util.keystr(path) else x, params
    )
    params = {
        name: {"block0": x["block0"], **{k: v for k, v in x.items() if k == "downsample"}}
        if name.startswith("stage")
        else x
        for name, x in params.items()
    }
    features = np.random.default_rng(3).random((1, config.frames, config.mels), dtype=np.float32)
    changed = features.copy()
    frames, mels = config.footprint
    changed[:, 5 * frames : 6 * frames, 2 * mels : 3 * mels] += 1.0
    before, after = (apply(config, params, x)[1]["tokens"] for x in (features, changed))
    moved = np.abs(np.asarray(before - after)).max(axis=(0, 2)).reshape(config.grid(config.frames))
    assert np.argwhere(moved > 1e-6).tolist() == [[5, 2]]


def test_crops_of_long_inputs(tiny):
    assert crop_starts(1024, 1024) == crop_starts(3, 1024) == (0,)
    assert crop_starts(1026, 1024) == crop_starts(1537, 1024) == (0,)
    assert crop_starts(1538, 1024) == (0, 512)
    assert crop_starts(3000, 1024) == (0, 512, 1024, 1536)
    _, params, _ = tiny
    features = np.random.default_rng(4).random((2, 330, 24), dtype=np.float32)
    feature, inner = apply(TINY, params, features)
    assert crop_starts(330, 216) == (0, 108)
    parts = [apply(TINY, params, features[:, start : start + 216]) for start in (0, 108)]
    np.testing.assert_allclose(feature, (parts[0][0] + parts[1][0]) / 2, atol=1e-6)
    for name in inner:
        both = (parts[0][1][name] + parts[1][1][name]) / 2
        np.testing.assert_allclose(inner[name], both, atol=5e-6, err_msg=name)


def test_windows_come_back():
    x = jnp.arange(2 * 4 * 6 * 4).reshape(2, 4, 6, 4)
    windows = to_windows(x, 2, 2)
    assert windows.shape == (2, 6, 2, 4, 2)
    np.testing.assert_array_equal(windows[1, 4, 0, 3], x[1, 3, 3, :2])
    np.testing.assert_array_equal(from_windows(windows, 2, 4, 6), x)


def test_window_attention_survives_large_scores():
    x = 100.0 * jax.random.normal(jax.random.key(0), (1, 4, 4, 8))
    bias = jnp.zeros((1, 2, 4, 4))
    auto, plain = (
        window_attention(x, x, x, bias, heads=2, window=2, backend=name) for name in ("auto", "xla")
    )
    assert np.isfinite(auto).all()
    np.testing.assert_allclose(auto, plain, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 64, 32), r"\(B, T, 64\)"),
        ((1, 0, 64), r"\(B, T, 64\)"),
        ((64, 64), r"\(B, T, 64\)"),
        ((1, 1025, 64), "1025 frames.*cut the input to 1024"),
    ],
)
def test_bad_shapes_are_named(shape, words):
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(HTSAT(OPERA_CT).init, jax.random.key(0), jnp.zeros(shape))


def test_stretching_too_long_an_input_is_named():
    with pytest.raises(ValueError, match="1 to 1024 frames, got 1100"):
        HTSAT(OPERA_CT).apply({}, jnp.zeros((1, 1100, 64)), method="stretch")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mels": 20}, "multiple of 6"),
        ({"spec_size": 80}, "divide spec_size"),
        ({"heads": (2, 4, 8)}, "equally long"),
        ({"heads": (3, 4)}, "3 heads"),
        ({"window": 9}, "window 9"),
        ({"attention": "fast"}, "attention"),
    ],
)
def test_bad_configs_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(TINY, **change)
