"""The masked auto-encoder against the published network, at full size, and its own rules."""

import dataclasses
import json
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medalign_jax.models.encoders.vit_mae import OPERA_GT, SMALL, ViTMAE, ViTMAEConfig
from medalign_jax.models.layers.vit_layers import gelu, sincos_table
from medalign_jax.weights.load import export, load
from medalign_jax.weights.tables.opera_gt import TABLE

TINY = ViTMAEConfig(
    frames=32, mels=16, patch=(8, 4), width=24, depth=2, heads=3,
    decoder_width=16, decoder_depth=1, decoder_heads=2,
)  # fmt: skip


def value(entry: dict) -> np.ndarray:
    """The tensor that the fixtures' weight rule gives (../shared/fixtures/README.md)."""
    name, shape, rule = entry["name"], tuple(entry["shape"]), entry["rule"]
    if rule == "computed":
        return sincos_table(shape[-1], (16, 64))
    z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    return {
        "small": lambda: np.float32(0.05) * z,
        "norm_weight": lambda: np.float32(1) + np.float32(0.05) * z,
        "fan_in": lambda: z / np.float32(math.sqrt(math.prod(shape[1:]))),
        "small_1d": lambda: np.float32(0.02) * z,
    }[rule]()


@dataclasses.dataclass
class Published:
    described: dict
    expected: dict
    tensors: dict
    params: dict

    def features(self, frames: int) -> np.ndarray:
        return np.random.default_rng(0).random((2, frames, 64), dtype=np.float32)


@pytest.fixture(scope="module")
def published(shared) -> Published:
    described = json.loads((shared / "fixtures" / "opera_gt.json").read_text())
    with np.load(shared / "fixtures" / "opera_gt.npz") as file:
        expected = dict(file)
    tensors = {entry["name"]: value(entry) for entry in described["state_dict"]}
    params = load(tensors, TABLE, abstract_params(OPERA_GT))
    return Published(described, expected, tensors, params)


def abstract_params(config: ViTMAEConfig) -> dict:
    features = jax.ShapeDtypeStruct((1, config.frames, config.mels), jnp.float32)
    noise = jax.ShapeDtypeStruct((1, config.grid_tokens), jnp.float32)
    return jax.eval_shape(ViTMAE(config).init, jax.random.key(0), features, noise)["params"]


@pytest.fixture(scope="module")
def embed():
    return jax.jit(lambda p, x: ViTMAE(OPERA_GT).apply({"params": p}, x, method="embed"))


@pytest.fixture(scope="module")
def reconstruct():
    return jax.jit(
        lambda p, x, noise: ViTMAE(OPERA_GT).apply({"params": p}, x, noise, method="reconstruct")
    )


def test_position_tables_have_the_published_sums(published):
    for entry in published.described["state_dict"]:
        if entry["rule"] == "computed":
            table = sincos_table(entry["shape"][-1], OPERA_GT.grid).astype(np.float64)
            check = entry["check"]
            assert table.shape == tuple(entry["shape"])
            assert table.ravel()[:4].tolist() == check["first"]
            # NumPy's float32 sine is one unit in the last place off or not, as the processor has
            # it: half such a unit per entry. The table on the true grid differs by thousands.
            units = table.size * 2.0**-25
            np.testing.assert_allclose(table.sum(), check["sum"], atol=units, rtol=0)
            np.testing.assert_allclose(np.abs(table).sum(), check["abs_sum"], atol=units, rtol=0)


def test_export_is_bit_for_bit(published):
    out = export(published.params, TABLE)
    assert out.keys() == published.tensors.keys()
    for name, tensor in published.tensors.items():
        assert out[name].dtype == tensor.dtype
        np.testing.assert_array_equal(out[name], tensor)


@pytest.mark.parametrize("frames", [256, 251, 64])
def test_feature(published, embed, frames):
    feature, _ = embed(published.params, published.features(frames))
    np.testing.assert_allclose(feature, published.expected[f"feature_T{frames}"], atol=5e-6, rtol=0)


def test_feature_of_structured_input(published, embed):
    b, t, f = np.ogrid[:2, :256, :64]
    x = (0.5 + 0.5 * np.sin(0.05 * (b + 1) * t + 0.2 * f)).astype(np.float32)
    expected = published.expected["feature_structured_T256"]
    np.testing.assert_allclose(embed(published.params, x)[0], expected, atol=5e-6, rtol=0)


def test_blocks(published, embed):
    _, inner = embed(published.params, published.features(256))
    np.testing.assert_allclose(
        inner["patch_embed"][:, :8], published.expected["patch_embed_T256_first8"], atol=2e-6
    )
    for i, expected in enumerate(published.expected["encoder_block_meanpool_T256"]):
        pooled = inner[f"block{i:02d}"][:, 1:].mean(axis=1)
        np.testing.assert_allclose(pooled, expected, atol=5e-6, err_msg=f"block {i}")
    np.testing.assert_allclose(inner["pooled"], inner["tokens"].mean(axis=1), atol=1e-6)


@pytest.mark.parametrize("frames", [256, 64])
def test_masked_forward(published, reconstruct, frames):
    expected = {
        name.removesuffix(f"_T{frames}"): array
        for name, array in published.expected.items()
        if name.endswith(f"_T{frames}")
    }
    noise = np.random.default_rng(1).random((2, frames // 4 * 16), dtype=np.float32)
    np.testing.assert_array_equal(noise, expected["noise"])
    loss, inner = reconstruct(published.params, published.features(frames), noise)

    np.testing.assert_array_equal(inner["mask"], expected["mask"])
    np.testing.assert_array_equal(inner["ids_restore"], expected["ids_restore"])
    np.testing.assert_array_equal(inner["target"][:, :8], expected["target_first8"])
    np.testing.assert_allclose(inner["latent"][:, :16], expected["latent_first16"], atol=1e-5)
    np.testing.assert_allclose(
        inner["latent"][:, 1:].mean(axis=1), expected["latent_meanpool"], atol=5e-6
    )
    for i, part in enumerate(expected["decoder_block_slice"]):
        block = inner[f"decoder_block{i:02d}"][:, :8, :32]
        np.testing.assert_allclose(block, part, atol=5e-4, rtol=0, err_msg=f"decoder block {i}")
    np.testing.assert_allclose(inner["pred"], expected["pred"], atol=2e-4, rtol=0)
    per_patch = np.square(np.asarray(inner["pred"]) - np.asarray(inner["target"])).mean(-1)
    np.testing.assert_allclose(per_patch, expected["mse_per_patch"], atol=2e-4, rtol=0)
    assert loss.shape == (2,)
    np.testing.assert_allclose(loss.mean(), expected["loss"], atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def tiny():
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.random((3, TINY.frames, TINY.mels)), jnp.float32)
    noise = jnp.asarray(rng.random((3, TINY.grid_tokens)), jnp.float32)
    params = jax.jit(ViTMAE(TINY).init)(jax.random.key(0), features, noise)["params"]
    return params, features, noise


def loss_of(config):
    def loss(params, features, noise):
        model = ViTMAE(config)
        feature, _ = model.apply({"params": params}, features, method="embed")
        lost, _ = model.apply({"params": params}, features, noise, method="reconstruct")
        return jnp.mean(lost) + jnp.mean(jnp.sin(feature))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


def test_gradient_reaches_all_but_the_position_tables(tiny):
    (to_params, _) = loss_of(TINY)(*tiny)[1]
    for path, leaf in jax.tree_util.tree_leaves_with_path(to_params):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(leaf).all(), name
        assert bool(leaf.any()) != ("pos_embed" in name), name


def test_gradient_matches_a_finite_difference(tiny):
    params, features, noise = tiny
    step = loss_of(TINY)
    (to_params, to_features) = step(params, features, noise)[1]
    for tree, gradient, at in (
        (params, to_params, lambda p: (p, features, noise)),
        (features, to_features, lambda x: (params, x, noise)),
    ):
        # Along the gradient itself, where the difference is largest against float32 noise.
        norm = math.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(gradient)))
        up, down = (
            step(*at(jax.tree.map(lambda x, g, s=s: x + s * g, tree, gradient)))[0]
            for s in (1e-2 / norm, -1e-2 / norm)
        )
        np.testing.assert_allclose((up - down) / 2e-2, norm, rtol=2e-2)


def test_remat_and_back_ends_change_nothing(tiny):
    reference = loss_of(TINY)(*tiny)
    for change in ({"remat": True}, {"attention": "blocked"}):
        other = loss_of(dataclasses.replace(TINY, **change))(*tiny)
        for left, right in zip(jax.tree.leaves(reference), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(left, right, atol=2e-6)


def test_bfloat16_compute_stays_close_and_returns_float32(tiny):
    params, features, noise = tiny
    model = ViTMAE(dataclasses.replace(TINY, dtype=jnp.bfloat16))
    low = jax.jit(model.apply)({"params": params}, features, noise)
    high = jax.jit(ViTMAE(TINY).apply)({"params": params}, features, noise)
    for left, right in zip(low, high, strict=True):
        assert left.dtype == jnp.float32
        np.testing.assert_allclose(left, right, atol=0.1)


def test_removed_patches_do_not_reach_the_encoder(tiny):
    params, features, noise = tiny
    run = jax.jit(lambda x: ViTMAE(TINY).apply({"params": params}, x, noise, method="reconstruct"))
    _, before = run(features)
    changed = features.at[0, :8, :4].add(1.0)  # token 0 of clip 0
    _, after = run(changed)
    kept = bool(before["mask"][0, 0] == 0)
    assert kept == bool(np.abs(before["latent"][0] - after["latent"][0]).max() > 1e-6)
    np.testing.assert_array_equal(before["latent"][1:], after["latent"][1:])


def test_loss_is_over_removed_patches_only(tiny):
    params, features, noise = tiny
    loss, inner = ViTMAE(TINY).apply({"params": params}, features, noise, method="reconstruct")
    removed = np.asarray(inner["mask"], bool)
    assert removed.sum(axis=1).tolist() == [16 - int(16 * 0.3)] * 3
    by_hand = [np.square(inner["pred"] - inner["target"])[b][removed[b]].mean() for b in range(3)]
    np.testing.assert_allclose(loss, by_hand, rtol=1e-5)


def test_patches_are_in_time_major_order(tiny):
    params, features, noise = tiny
    _, inner = ViTMAE(TINY).apply({"params": params}, features, noise, method="reconstruct")
    np.testing.assert_array_equal(inner["target"][1, 5], features[1, 8:16, 4:8].ravel())


def test_standardised_targets_do_not_know_a_clips_level(tiny):
    params, features, noise = tiny
    model = ViTMAE(dataclasses.replace(TINY, target="standardised"))
    run = jax.jit(lambda x: model.apply({"params": params}, x, noise, method="reconstruct")[1])
    louder = features.at[0].set(0.5 * features[0] + 0.2).at[2].set(0.3)
    target, changed = run(features)["target"], run(louder)["target"]
    np.testing.assert_allclose(target.mean((1, 2)), 0.0, atol=1e-5)
    np.testing.assert_allclose(target.var((1, 2)), 1.0, rtol=1e-3)
    np.testing.assert_allclose(changed[0], target[0], atol=1e-3)
    np.testing.assert_allclose(changed[2], 0.0, atol=1e-3)
    with pytest.raises(ValueError, match="target must be 'raw' or 'standardised', got 'clip'"):
        dataclasses.replace(TINY, target="clip")


def test_short_input_uses_the_first_rows(tiny):
    params, features, _ = tiny
    model = ViTMAE(TINY)
    short, _ = model.apply({"params": params}, features[:, :17], method="embed")
    cut, _ = model.apply({"params": params}, features[:, :16], method="embed")
    np.testing.assert_array_equal(short, cut)


def test_small_preset_has_a_finite_step():
    config = dataclasses.replace(SMALL, depth=1, decoder_depth=1, frames=128)
    features, noise = jnp.ones((2, 128, 64)), jax.random.uniform(jax.random.key(1), (2, 128))
    params = jax.jit(ViTMAE(config).init)(jax.random.key(0), features, noise)["params"]
    loss, (gradient, _) = loss_of(config)(params, features, noise)
    assert np.isfinite(loss) and all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_gelu_is_exact():
    x = np.linspace(-6, 6, 1001, dtype=np.float32)
    exact = [v * 0.5 * math.erfc(-v / math.sqrt(2)) for v in x.astype(np.float64)]
    # 1 + erf cancels for negative x: an error of up to |x| ulps of 1, about 7e-7 here.
    np.testing.assert_allclose(gelu(x), exact, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "noise", "words"),
    [
        ((1, 64, 32), (1, 256), r"\(B, T, 64\)"),
        ((1, 3, 64), (1, 0), "1 to 64"),
        ((1, 260, 64), (1, 1040), "1 to 64"),
        ((1, 96, 64), (1, 384), "multiple of 256 tokens"),
        ((1, 66, 64), (1, 256), "whole patches"),
        ((1, 64, 64), (1, 255), "noise"),
    ],
)
def test_bad_shapes_are_named(shape, noise, words):
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(ViTMAE(OPERA_GT).init, jax.random.key(0), jnp.zeros(shape), jnp.zeros(noise))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"frames": 30}, "divisible"),
        ({"heads": 5}, "heads"),
        ({"decoder": "odd"}, "decoder"),
        ({"decoder": "windowed", "decoder_width": 128}, "256"),
        ({"position_grid": (3, 3)}, "position_grid"),
        ({"mask_ratio": 1.0}, "mask_ratio"),
    ],
)
def test_bad_configs_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(TINY, **change)
