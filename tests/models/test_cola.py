"""COLA's projection and loss against the published ones, and its own rules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medalign_jax.losses.contrastive import cola_logits, cola_loss
from medalign_jax.models.encoders.cola import Cola
from medalign_jax.models.encoders.efficientnet import OPERA_CE, EfficientNetConfig, Stage
from medalign_jax.models.encoders.htsat import OPERA_CT, HTSATConfig
from medalign_jax.models.encoders.vit_mae import SMALL
from medalign_jax.weights.load import load
from medalign_jax.weights.tables import opera_ce, opera_ct
from tests.models.rule_weights import noise, published, structured, with_gain

PUBLISHED = {
    "opera_ct": (OPERA_CT, opera_ct.TABLE, ("",)),
    "opera_ce": (OPERA_CE, opera_ce.TABLE, ("", "gain16_")),
}
SWIN = HTSATConfig(
    mels=16, spec_size=32, embed_width=8, depths=(1, 1), heads=(2, 2), window=4, projection=6
)
CONVOLUTIONS = EfficientNetConfig(
    frames=32, mels=16, stem=4, width=12, projection=6,
    stages=(Stage(1, 3, 1, 4, 1), Stage(2, 3, 2, 6, 1)),
)  # fmt: skip


@pytest.fixture(scope="module", params=PUBLISHED)
def fixture(request, shared):
    """Module, expected outputs, and parameters by prefix of the outputs."""
    config, table, prefixes = PUBLISHED[request.param]
    made = published(shared, request.param)
    features = jax.ShapeDtypeStruct((1, 251, 64), jnp.float32)
    tree = jax.eval_shape(Cola(config).init, jax.random.key(0), features)["params"]
    tensors = {"": made.tensors, "gain16_": with_gain(made.tensors)}
    params = {prefix: load(tensors[prefix], table, tree) for prefix in prefixes}
    return Cola(config), made.expected, params


def test_projections_logits_and_loss(fixture):
    module, expected, params = fixture
    pair = jax.jit(lambda p, x, y: module.apply({"params": p}, x, y, method="project_pair"))
    inputs = {
        "cola": (noise(0, 4, 251), noise(1, 4, 251)),
        "cola_structured": (structured(4, 251, 0.0), structured(4, 251, 0.5)),
    }
    for prefix in params:
        for kind, (first, second) in inputs.items():
            name = f"{prefix}{kind}"
            query, key = pair(params[prefix], first, second)
            if kind == "cola":
                np.testing.assert_allclose(query, expected[f"{name}_proj1"], atol=5e-6, rtol=0)
                np.testing.assert_allclose(key, expected[f"{name}_proj2"], atol=5e-6, rtol=0)
            logits = cola_logits(query, key)
            np.testing.assert_allclose(logits, expected[f"{name}_logits"], atol=5e-5, rtol=0)
            loss = cola_loss(logits)
            assert loss.shape == (4,) and loss.dtype == jnp.float32
            np.testing.assert_allclose(loss.mean(), expected[f"{name}_loss"], atol=1e-5, rtol=0)


def test_feature_of_512_numbers_is_g(fixture):
    module, expected, params = fixture
    run = jax.jit(
        lambda p, x: module.apply({"params": p}, x, method=lambda m, x: m.g(m.embed(x)[0]))
    )
    for prefix in params:
        made = run(params[prefix], noise(0, 2, 251))
        np.testing.assert_allclose(made, expected[f"{prefix}feature512_T251"], atol=5e-6, rtol=0)


@pytest.fixture(scope="module", params=[SWIN, CONVOLUTIONS], ids=["htsat", "efficientnet"])
def small(request):
    module = Cola(request.param)
    pair = np.random.default_rng(0).random((2, 3, 32, 16), dtype=np.float32)
    return module, random_params(module), pair


def random_params(module):
    """Numbers from NumPy: to compile `init` takes longer than the rest of a test."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        name, z = path[-1].key, rng.standard_normal(leaf.shape)
        if name in ("scale", "var"):
            return jnp.asarray(1.0 + 0.1 * np.abs(z), jnp.float32)
        fan_in = max(np.prod(leaf.shape[:-1]), 1) if name == "kernel" else 100
        return jnp.asarray(z / np.sqrt(fan_in), jnp.float32)

    features = jax.ShapeDtypeStruct((1, 32, 16), jnp.float32)
    tree = jax.eval_shape(module.init, jax.random.key(0), features)["params"]
    return jax.tree_util.tree_map_with_path(draw, tree)


def call(module, params, *inputs, method):
    return jax.jit(lambda p, *x: module.apply({"params": p}, *x, method=method))(params, *inputs)


def test_it_is_its_encoder(small):
    module, params, (first, _) = small
    encoder = module.bind({"params": params}).encoder
    feature, inner = call(module, params, first, method="embed")
    alone = jax.jit(lambda p, x: type(encoder)(module.config).apply({"params": p}, x))
    # Another program, which XLA may round differently.
    np.testing.assert_allclose(feature, alone(params["encoder"], first), atol=1e-6, rtol=0)
    config = module.config
    assert feature.shape == (3, config.width)
    assert inner["tokens"].shape[1] == np.prod(config.grid(32))
    for i, width in enumerate(config.layer_widths):
        assert inner[f"block{i:02d}"].shape[::2] == (3, width)
    assert params.keys() == {"encoder", "g", "layer_norm", "linear"}


def test_stretch_needs_no_parameters():
    features = jnp.ones((2, 20, 16))
    assert Cola(SWIN).apply({}, features, method="stretch").shape == (2, SWIN.frames, 16)
    np.testing.assert_array_equal(
        Cola(CONVOLUTIONS).apply({}, features, method="stretch"), features
    )


def test_logits_are_queries_of_the_first_with_keys_of_the_second(small):
    module, params, (first, second) = small
    query, key = call(module, params, first, second, method="project_pair")
    np.testing.assert_allclose(key, call(module, params, second, method="project"), atol=1e-6)
    assert np.abs(key).max() <= 1.0
    logits = call(module, params, first, second, method="cola_logits")
    np.testing.assert_allclose(logits, np.asarray(query) @ np.asarray(key).T, atol=1e-5)


def test_gradient_reaches_all_but_the_statistics(small):
    module, params, (first, _) = small
    key = np.random.default_rng(2).standard_normal((3, 6)).astype(np.float32)

    def loss(params):
        _, query = module.apply({"params": params}, first)
        return cola_loss(cola_logits(query, key)).mean()

    gradient = jax.jit(jax.grad(loss))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(leaf).all(), name
        assert bool(leaf.any()) != ("'mean'" in name or "'var'" in name), name


def test_dropout_draws_from_each_examples_own_key():
    module = Cola(CONVOLUTIONS)
    features = np.random.default_rng(0).random((2, 32, 16), dtype=np.float32)
    params = random_params(module)
    params["linear"]["kernel"] = jnp.eye(CONVOLUTIONS.projection)
    keys = jax.random.split(jax.random.key(2), 2)

    def pair(rows, keys=None):
        inputs = (features[rows], features[rows], *([] if keys is None else [keys[rows]]))
        return call(module, params, *inputs, method="project_pair")

    whole = pair(slice(0, 2), keys)
    for row in (0, 1):
        alone = pair(slice(row, row + 1), keys)
        for left, right in zip(whole, alone, strict=True):
            np.testing.assert_allclose(left[row], right[0], atol=1e-5)
    # With equal inputs and a linear layer that does nothing only dropout tells query from key.
    plain = pair(slice(0, 2))
    np.testing.assert_allclose(*plain, atol=1e-6)
    assert np.abs(whole[0] - whole[1]).max() > 1e-3


def test_dropout_of_the_tanh_scales_what_is_kept():
    module = Cola(CONVOLUTIONS, dropout=0.5)
    features = np.random.default_rng(0).random((400, 32, 16), dtype=np.float32)
    params = random_params(module)
    keys = jax.random.split(jax.random.key(2), 400)
    key = jax.jit(lambda k: module.apply({"params": params}, features, k, method="project"))(keys)
    # 2400 draws: 0.5 within five standard deviations.
    assert abs(float(jnp.mean(key == 0.0)) - 0.5) < 0.05
    assert np.abs(key).max() > 1.0


def test_masked_samples_are_nobodys_candidate():
    logits = jax.random.normal(jax.random.key(0), (4, 4))
    mask = jnp.array([True, True, False, True])
    kept = np.array([0, 1, 3])
    expected = cola_loss(logits[kept][:, kept])
    loss = cola_loss(logits, mask)
    np.testing.assert_allclose(loss[kept], expected, rtol=1e-6)
    assert loss[2] == 0.0
    gradient = jax.grad(lambda x: cola_loss(x, mask).sum())(logits)
    assert np.isfinite(gradient).all()
    assert not gradient[2].any() and not gradient[:, 2].any()


def test_the_loss_looks_at_rows_only():
    logits = jnp.array([[2.0, 0.0], [5.0, 1.0]])
    expected = [np.log1p(np.exp(-2.0)), np.log1p(np.exp(4.0))]
    np.testing.assert_allclose(cola_loss(logits), expected, rtol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match="no encoder for a ViTMAEConfig"):
        Cola(SMALL).init(jax.random.key(0), jnp.zeros((1, 64, 64)))
    with pytest.raises(ValueError, match=r"\(B, B\)"):
        cola_loss(jnp.zeros((2, 3)))


def test_bfloat16_compute_stays_close(small):
    module, params, (first, _) = small
    low_module = Cola(dataclasses.replace(module.config, dtype=jnp.bfloat16))
    low, high = (call(m, params, first, method="project") for m in (low_module, module))
    assert low.dtype == jnp.float32
    # Values of tanh; the LayerNorm of six numbers before it may enlarge an error of 1 %.
    np.testing.assert_allclose(low, high, atol=0.1, rtol=0)
