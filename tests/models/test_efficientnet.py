"""EfficientNet against the published network at full size, and against transformers by layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import EfficientNetConfig as ReferenceConfig
from transformers import EfficientNetModel

from medalign_jax.core.mesh import make_mesh, shardings
from medalign_jax.models.encoders.cola import Cola
from medalign_jax.models.encoders.efficientnet import (
    OPERA_CE,
    EfficientNet,
    EfficientNetConfig,
    Stage,
    depthwise,
    depthwise_convolution,
    depthwise_sum,
)
from medalign_jax.weights import Ignore, Rule, Table, WeightError
from medalign_jax.weights.load import export, load
from medalign_jax.weights.table import CONV2D, LINEAR, Squeeze, chain
from medalign_jax.weights.tables.opera_ce import SHARDING, TABLE
from medalign_jax.weights.tables.opera_ct import batch_norm
from tests.models.rule_weights import noise, published, structured, with_gain

TINY = EfficientNetConfig(
    frames=40, mels=21, stem=8, width=320,
    stages=(Stage(1, 3, 1, 4, 1), Stage(6, 3, 2, 8, 2), Stage(4, 5, 2, 12, 1)),
)  # fmt: skip


def abstract_params(module) -> dict:
    config = module.config
    features = jax.ShapeDtypeStruct((1, config.frames, config.mels), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), features)["params"]


@pytest.fixture(scope="module")
def opera_ce(shared):
    return published(shared, "opera_ce")


@pytest.fixture(scope="module")
def opera_ce_params(opera_ce):
    """By prefix of the fixture's outputs."""
    tree = abstract_params(Cola(OPERA_CE))
    tensors = {"": opera_ce.tensors, "gain16_": with_gain(opera_ce.tensors)}
    return {prefix: load(tensors[prefix], TABLE, tree) for prefix in tensors}


@pytest.fixture(scope="module")
def embed(opera_ce_params):
    run = jax.jit(lambda p, x: EfficientNet(OPERA_CE).apply({"params": p}, x, method="embed"))
    return lambda prefix, x: run(opera_ce_params[prefix]["encoder"], x)


def test_export_is_bit_for_bit(opera_ce, opera_ce_params):
    out = export(opera_ce_params[""], TABLE)
    counters = {name for name in opera_ce.tensors if name.endswith("num_batches_tracked")}
    assert counters and out.keys() == opera_ce.tensors.keys() - counters
    for name, tensor in out.items():
        np.testing.assert_array_equal(tensor, opera_ce.tensors[name])


def test_no_tensor_may_be_missing_or_left_over(opera_ce):
    first = "encoder.efficientnet._blocks.7._se_reduce.bias"
    tensors = {name: x for name, x in opera_ce.tensors.items() if name != first}
    tensors["encoder.efficientnet._fc.weight"] = np.zeros((1000, 1280), np.float32)
    with pytest.raises(WeightError, match=r"1 missing, 1 unused(.|\n)*_blocks.7._se_reduce.bias"):
        load(tensors, TABLE, abstract_params(Cola(OPERA_CE)))


@pytest.mark.parametrize("prefix", ["", "gain16_"])
@pytest.mark.parametrize("frames", [251, 100, 626, 63])
def test_feature(opera_ce, embed, prefix, frames):
    expected = opera_ce.expected[f"{prefix}feature_T{frames}"]
    feature, inner = embed(prefix, noise(0, len(expected), frames))
    assert feature.dtype == jnp.float32
    np.testing.assert_allclose(feature, expected, atol=5e-6, rtol=0)
    assert inner["tokens"].shape[1] == np.prod(OPERA_CE.grid(frames))


@pytest.mark.parametrize("prefix", ["", "gain16_"])
def test_feature_of_structured_input(opera_ce, embed, prefix):
    expected = opera_ce.expected[f"{prefix}feature_structured_T251"]
    feature, _ = embed(prefix, structured(2, 251, 0.0))
    np.testing.assert_allclose(feature, expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("prefix", ["", "gain16_"])
def test_blocks(opera_ce, embed, prefix):
    _, inner = embed(prefix, noise(0, 2, 251))
    expected = opera_ce.expected
    shapes = {"stem": expected["bn0_shape_T251"]}
    shapes |= {f"block{i:02d}": shape for i, shape in enumerate(expected["block_shapes_T251"])}
    for name, (batch, width, rows, columns) in shapes.items():
        assert inner[name].shape == (batch, rows * columns, width), name
        pooled = np.asarray(inner[name]).mean(axis=1, dtype=np.float64)
        theirs = expected[f"{prefix}{name.replace('stem', 'bn0')}_meanpool_T251"]
        np.testing.assert_allclose(pooled, theirs, atol=2e-6, rtol=0, err_msg=name)
    assert OPERA_CE.layer_widths == tuple(expected["block_shapes_T251"][:, 1])
    assert OPERA_CE.depth == 16 and OPERA_CE.width == 1280


def test_the_grid_and_its_footprint():
    assert OPERA_CE.grid(251) == (7, 1) and OPERA_CE.footprint == (32, 64)
    assert OPERA_CE.grid(34) == (1, 1) and OPERA_CE.least_frames == 34


def test_every_parameter_has_a_sharding():
    tree = abstract_params(Cola(OPERA_CE))
    placed = shardings(tree, SHARDING, make_mesh())
    assert len(jax.tree.leaves(placed)) == len(jax.tree.leaves(tree))


# The names of a convolution and transformers' EfficientNetModel behind it.
_POINTWISE = chain(Squeeze(3), Squeeze(2), LINEAR)
_BLOCK = "1.encoder.blocks.{i}"


def _conv(upstream: str, path: str, transform=_POINTWISE) -> Rule:
    return Rule(f"{upstream}.weight", f"{path}/kernel", transform)


def _norm(upstream: str, path: str) -> tuple[Rule, ...]:
    return batch_norm(upstream, path)


REFERENCE = Table(
    name="efficientnet of the tests",
    rules=(
        _conv("0", "cnn1", CONV2D),
        Rule("0.bias", "cnn1/bias"),
        _conv("1.embeddings.convolution", "conv_stem", CONV2D),
        *_norm("1.embeddings.batchnorm", "bn0"),
        _conv(f"{_BLOCK}.expansion.expand_conv", "block{i}/expand_conv"),
        *_norm(f"{_BLOCK}.expansion.expand_bn", "block{i}/bn0"),
        _conv(f"{_BLOCK}.depthwise_conv.depthwise_conv", "block{i}/depthwise_conv", CONV2D),
        *_norm(f"{_BLOCK}.depthwise_conv.depthwise_norm", "block{i}/bn1"),
        _conv(f"{_BLOCK}.squeeze_excite.reduce", "block{i}/se_reduce"),
        Rule(f"{_BLOCK}.squeeze_excite.reduce.bias", "block{i}/se_reduce/bias"),
        _conv(f"{_BLOCK}.squeeze_excite.expand", "block{i}/se_expand"),
        Rule(f"{_BLOCK}.squeeze_excite.expand.bias", "block{i}/se_expand/bias"),
        _conv(f"{_BLOCK}.projection.project_conv", "block{i}/project_conv"),
        *_norm(f"{_BLOCK}.projection.project_bn", "block{i}/bn2"),
        _conv("1.encoder.top_conv", "conv_head"),
        *_norm("1.encoder.top_bn", "bn1"),
    ),
    ignores=(Ignore("*num_batches_tracked", "a counter"),),
)


def reference() -> torch.nn.Sequential:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    body = EfficientNetModel(
        ReferenceConfig(
            width_coefficient=0.25, depth_coefficient=1.0, depth_divisor=4, hidden_dim=320,
            kernel_sizes=[3, 3, 5], in_channels=[32, 16, 24], out_channels=[16, 24, 40],
            strides=[1, 2, 2], num_block_repeats=[1, 2, 1], expand_ratios=[1, 6, 4],
            depthwise_padding=[], batch_norm_eps=1e-3,
        )
    )  # fmt: skip
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), body).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim == 4:
                fan_in = tensor[0].numel()
                tensor.copy_(1.6 * torch.randn_like(tensor) / fan_in**0.5)
            elif tensor.ndim == 1:
                spread = 0.3 * torch.randn_like(tensor)
                tensor += spread.abs() if name.endswith("running_var") else spread
    return model


@pytest.fixture(scope="module")
def tiny():
    model = reference()
    tensors = {name: x.numpy() for name, x in model.state_dict().items()}
    params = load(tensors, REFERENCE, abstract_params(EfficientNet(TINY)))
    features = np.random.default_rng(1).standard_normal((2, 45, 21)).astype(np.float32)
    return model, params, features


def apply(config, params, features):
    return jax.jit(lambda p, x: EfficientNet(config).apply({"params": p}, x, method="embed"))(
        params, features
    )


def test_layers_match_transformers(tiny):
    model, params, features = tiny
    with torch.no_grad():
        image = model[0](torch.tensor(features)[:, None])
        out = model[1](image, output_hidden_states=True)
    feature, inner = apply(TINY, params, features)
    assert len(out.hidden_states) == 1 + TINY.depth
    for i, expected in enumerate(out.hidden_states[1:]):
        rows = expected.permute(0, 2, 3, 1).flatten(1, 2)
        name = f"block{i:02d}"
        np.testing.assert_allclose(inner[name], rows, atol=1e-5, rtol=1e-5, err_msg=name)
    last = out.last_hidden_state.permute(0, 2, 3, 1).flatten(1, 2)
    np.testing.assert_allclose(inner["tokens"], last, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(feature, out.pooler_output, atol=1e-5, rtol=0)


def gradients(config, params, features):
    """Of a weighted sum of the features, to the parameters and to the input."""
    weight = np.random.default_rng(2).standard_normal((2, TINY.width)).astype(np.float32)

    def loss(params, features):
        return jnp.sum(EfficientNet(config).apply({"params": params}, features) * weight)

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
    scale = inputs.grad.abs().max().item()
    np.testing.assert_allclose(to_features, inputs.grad, atol=1e-5 * scale, rtol=1e-4)
    theirs = dict(model.named_parameters())
    for name, gradient in export(to_params, REFERENCE).items():
        if name.endswith(("running_mean", "running_var")):
            assert not gradient.any(), name
        else:
            expected = theirs[name].grad.numpy()
            scale = np.abs(expected).max()
            np.testing.assert_allclose(gradient, expected, atol=1e-4 * scale, rtol=0, err_msg=name)


def test_remat_changes_nothing(tiny, tiny_gradients):
    other, _ = gradients(dataclasses.replace(TINY, remat=True), *tiny[1:])
    for left, right in zip(jax.tree.leaves(tiny_gradients[0]), jax.tree.leaves(other), strict=True):
        tolerance = 1e-5 * np.abs(left).max() + 1e-6
        np.testing.assert_allclose(left, right, atol=tolerance, rtol=0)


def test_export_is_read_by_transformers(tiny):
    _, params, features = tiny
    moved = jax.tree.map(lambda x: x * 1.05, params)
    model = reference()
    tensors = {name: torch.tensor(x) for name, x in export(moved, REFERENCE).items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and all("tracked" in name for name in missing)
    with torch.no_grad():
        expected = model(torch.tensor(features)[:, None]).pooler_output
    np.testing.assert_allclose(apply(TINY, moved, features)[0], expected, atol=1e-5, rtol=1e-5)


def test_bfloat16_compute_stays_close_and_returns_float32(tiny):
    _, params, features = tiny
    low, _ = apply(dataclasses.replace(TINY, dtype=jnp.bfloat16), params, features)
    high, _ = apply(TINY, params, features)
    assert low.dtype == jnp.float32
    # 8 bits of mantissa through 4 blocks of 3 convolutions: 2 % of the largest feature.
    assert np.abs(low - high).max() < 0.02 * np.abs(high).max()


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(9, 6), (3, 2)])
def test_both_forms_of_the_depthwise_convolution(kernel, stride, size):
    rng = np.random.default_rng(kernel + stride)
    x = rng.standard_normal((2, *size, 4)).astype(np.float32)
    w = rng.standard_normal((kernel, kernel, 1, 4)).astype(np.float32)
    # efficientnet_pytorch's padding for an image of 224x224: one less in front when strided.
    back = (kernel - 1) // 2
    front = back if stride == 1 else back - 1
    padded = torch.nn.functional.pad(torch.tensor(x).permute(0, 3, 1, 2), (front, back) * 2)
    expected = torch.nn.functional.conv2d(
        padded, torch.tensor(w).permute(3, 2, 0, 1), stride=stride, groups=4
    ).permute(0, 2, 3, 1)
    for form in (depthwise, depthwise_convolution, depthwise_sum):
        np.testing.assert_allclose(
            form(jnp.asarray(x), jnp.asarray(w), stride), expected, atol=1e-5
        )


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 64, 32), r"\(B, T, 64\)"),
        ((64, 64), r"\(B, T, 64\)"),
        ((1, 33, 64), "33 frames and 64 mel bins is too small .* at least 34"),
    ],
)
def test_bad_shapes_are_named(shape, words):
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(EfficientNet(OPERA_CE).init, jax.random.key(0), jnp.zeros(shape))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mels": 8}, "too small"),
        ({"stages": (Stage(1, 4, 1, 4, 1),)}, "odd kernel"),
        ({"stages": (Stage(1, 3, 3, 4, 1),)}, "stride 1 or 2"),
    ],
)
def test_bad_configs_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(TINY, **change)
