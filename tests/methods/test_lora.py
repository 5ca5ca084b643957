"""LoRA trees: which kernels, how they start, what they add, how they are laid out."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AbstractMesh

from medalign_jax.core.errors import UserError
from medalign_jax.core.mesh import AXES, named_leaves, shardings
from medalign_jax.models.layers.lora import (
    LoraConfig,
    as_variables,
    init_lora,
    lora_sharding,
    merge,
)
from medalign_jax.weights.tables.decoder import SHARDING

SHAPES = {
    "audio": {
        "layers": {"query": {"kernel": (2, 8, 8), "bias": (2, 8)}},
        "stem": {"conv1": {"kernel": (3, 8, 8)}},
        "proj": {"kernel": (8, 12)},
    },
    "text": {
        "embed": {"embedding": (20, 12)},
        "layers": {
            "attention": {"query": {"kernel": (3, 12, 16)}, "value": {"kernel": (3, 12, 4)}},
            "mlp": {"down": {"kernel": (3, 24, 12)}},
            "attention_norm": {"scale": (3, 12)},
        },
        "lm_head": {"kernel": (12, 20)},
    },
}
CONFIG = LoraConfig(
    rank=2,
    alpha=3.0,
    modules=[r"text/layers/attention/(query|value)/kernel", r"audio/proj/kernel$"],
)
ADAPTED = (
    "audio/proj/kernel",
    "text/layers/attention/query/kernel",
    "text/layers/attention/value/kernel",
)


def is_shape(node):
    return isinstance(node, tuple)


def abstract(dtype=jnp.float32):
    struct = lambda shape: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    return jax.tree.map(struct, SHAPES, is_leaf=is_shape)


def params(dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), dtype)  # noqa: E731
    return jax.tree.map(draw, abstract())


def trained(config=CONFIG, seed=1):
    """An adapter whose B is no longer zero."""
    rng = np.random.default_rng(seed)
    tree = init_lora(jax.random.key(seed), abstract(), config)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), tree)


def at(tree, path):
    return named_leaves(tree)[path]


def test_tree_has_the_nesting_of_the_adapted_kernels():
    shapes = {path: leaf.shape for path, leaf in named_leaves(trained()).items()}
    assert shapes == {
        "audio/proj/kernel/a": (8, 2),
        "audio/proj/kernel/b": (2, 12),
        "text/layers/attention/query/kernel/a": (3, 12, 2),
        "text/layers/attention/query/kernel/b": (3, 2, 16),
        "text/layers/attention/value/kernel/a": (3, 12, 2),
        "text/layers/attention/value/kernel/b": (3, 2, 4),
    }


def test_starts_as_peft_starts():
    wide = {"layers": {"up": {"kernel": jax.ShapeDtypeStruct((2, 400, 30), jnp.bfloat16)}}}
    config = LoraConfig(rank=50, alpha=1.0, modules=("kernel$",))
    a, b = (at(init_lora(jax.random.key(0), wide, config), f"layers/up/kernel/{s}") for s in "ab")
    assert a.dtype == b.dtype == jnp.float32 and not b.any()
    torch.manual_seed(0)
    reference = torch.empty(50, 400)
    torch.nn.init.kaiming_uniform_(reference, a=5**0.5)
    bound = 400**-0.5
    assert float(jnp.abs(a).max()) <= bound and float(reference.abs().max()) <= bound
    # Both fill the interval evenly: their extremes, and their spread.
    assert min(float(jnp.abs(a).max()), float(reference.abs().max())) > 0.999 * bound
    np.testing.assert_allclose(a.std(), bound / 3**0.5, rtol=0.01)
    np.testing.assert_allclose(reference.std().item(), bound / 3**0.5, rtol=0.01)
    assert jnp.abs(a[0] - a[1]).max() > bound  # each layer draws its own


def test_a_kernels_start_does_not_depend_on_the_others():
    alone = dataclasses.replace(CONFIG, modules=("query/kernel$",))
    more = dataclasses.replace(CONFIG, modules=("(query|value|down)/kernel$",))
    first, second = (init_lora(jax.random.key(3), abstract(), c) for c in (alone, more))
    path = "text/layers/attention/query/kernel/a"
    np.testing.assert_array_equal(at(first, path), at(second, path))
    other = at(second, "text/layers/attention/value/kernel/a")
    assert np.abs(np.asarray(at(first, path) - other)).max() > 0.01


def test_wrong_regexes_are_named_all_at_once():
    modules = (
        "text/layers/attention/query", "txt/layers", "norm", "embedding$", "conv1", "layers/query",
    )  # fmt: skip
    with pytest.raises(UserError) as caught:
        init_lora(jax.random.key(0), abstract(), LoraConfig(modules=modules))
    text = str(caught.value)
    for part in (
        "'txt/layers' matches no parameter",
        "text/layers/attention_norm/scale [3, 12] is not a matrix kernel",
        "text/embed/embedding [20, 12] is not a matrix kernel",
        "audio/stem/conv1/kernel [3, 8, 8] is not a matrix kernel",
        "audio/layers/query/bias [2, 8] is not a matrix kernel",
        "can be adapted: audio/layers/query/kernel, audio/proj/kernel, ",
    ):
        assert part in text
    assert "query/kernel [" not in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "lora.rank"),
        ({"rank": 2.5}, "lora.rank"),
        ({"alpha": 0.0}, "lora.alpha"),
        ({"alpha": float("nan")}, "lora.alpha"),
        ({"modules": ()}, "lora.modules"),
        ({"modules": "query/kernel"}, "lora.modules"),
        ({"modules": ("query(",)}, r"'query\(' is not a regex"),
    ],
)
def test_senseless_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        LoraConfig(**settings)


def test_variables_are_scaled_by_alpha_over_rank():
    lora = trained()
    variables = as_variables(lora, CONFIG)
    for path, leaf in named_leaves(lora).items():
        factor = 1.5 if path.endswith("/b") else 1.0
        np.testing.assert_array_equal(at(variables, path), factor * leaf)


def test_merge_equals_the_formula_in_float64():
    base, lora = params(), trained()
    merged = jax.jit(lambda p, t: merge(p, t, CONFIG))(base, lora)
    for path, leaf in named_leaves(merged).items():
        if path not in ADAPTED:
            np.testing.assert_array_equal(leaf, at(base, path))
            continue
        a, b = (np.asarray(at(lora, f"{path}/{side}"), np.float64) for side in "ab")
        expected = np.asarray(at(base, path), np.float64) + 3.0 / 2 * a @ b
        np.testing.assert_allclose(leaf, expected, rtol=0, atol=3e-6)
        # What the models do with the variables.
        variables = as_variables(lora, CONFIG)
        used = at(base, path) + at(variables, f"{path}/a") @ at(variables, f"{path}/b")
        np.testing.assert_allclose(leaf, used, rtol=0, atol=3e-6)
    start = merge(base, init_lora(jax.random.key(0), abstract(), CONFIG), CONFIG)
    jax.tree.map(np.testing.assert_array_equal, start, base)


def test_merge_keeps_bfloat16_and_rounds_once():
    base, lora = params(jnp.bfloat16), trained()
    merged = merge(base, lora, CONFIG)
    for path in ADAPTED:
        leaf = at(merged, path)
        assert leaf.dtype == jnp.bfloat16
        a, b = (np.asarray(at(lora, f"{path}/{side}"), np.float64) for side in "ab")
        expected = np.asarray(at(base, path), np.float64) + 1.5 * a @ b
        # Half a unit in the last of 8 binary digits; float32's own error on top.
        slack = np.abs(expected) * 2.0**-8 + 3e-6
        assert (np.abs(np.asarray(leaf, np.float64) - expected) <= slack).all()


def test_gradients_reach_both_factors():
    base = params()

    def loss(lora):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(merge(base, lora, CONFIG)))

    start = init_lora(jax.random.key(0), abstract(), CONFIG)
    for path, leaf in named_leaves(jax.grad(loss)(start)).items():
        assert leaf.any() == path.endswith("/b"), path  # B is zero, so A has no effect yet
    for path, leaf in named_leaves(jax.grad(loss)(trained())).items():
        assert np.isfinite(leaf).all() and leaf.all(), path


def test_an_adapter_of_another_model_is_refused():
    lora = trained()
    small = {"audio": params()["audio"]}
    with pytest.raises(UserError, match=r"no parameter text/layers/attention/query/kernel"):
        merge(small, lora, CONFIG)
    wide = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf], axis=-1), params())
    with pytest.raises(UserError, match=r"query/kernel/b is \[3, 2, 16\], not \[3, 2, 32\]"):
        merge(wide, lora, CONFIG)
    with pytest.raises(UserError, match=r"proj/kernel/a is \[8, 2\], not \[8, 4\]"):
        merge(params(), lora, dataclasses.replace(CONFIG, rank=4))
    del lora["audio"]["proj"]["kernel"]["b"]
    with pytest.raises(UserError, match=r"'audio/proj/kernel' has \['a'\]"):
        merge(params(), lora, CONFIG)


def test_the_adapter_lies_as_its_kernels_do():
    mesh = AbstractMesh((1, 4, 2), AXES)
    text = {"text": abstract()["text"]}
    config = LoraConfig(rank=2, modules=("(query|value|down|lm_head)/kernel$",))
    lora = jax.eval_shape(lambda: init_lora(jax.random.key(0), text, config))
    got = {
        path: tuple(leaf.spec)
        for path, leaf in named_leaves(shardings(lora, lora_sharding(SHARDING), mesh)).items()
    }
    assert got == {
        "text/layers/attention/query/kernel/a": (None, "fsdp", None),
        "text/layers/attention/query/kernel/b": (None, None, "tensor"),
        "text/layers/attention/value/kernel/a": (None, "fsdp", None),
        "text/layers/attention/value/kernel/b": (None, None, "tensor"),
        "text/layers/mlp/down/kernel/a": (None, "tensor", None),
        "text/layers/mlp/down/kernel/b": (None, None, "fsdp"),
        "text/lm_head/kernel/a": ("fsdp", None),
        "text/lm_head/kernel/b": (None, "tensor"),
    }


def test_the_table_matches_what_the_base_table_matches():
    rules = (
        (r"audio/.*proj", ("fsdp", "tensor")),
        (r"(query/bias|query/kernel)$|nothing$", (("data", "fsdp"), "tensor")),
        (r"lay[$e]rs.*[^$]own/kernel", ("tensor",)),
        (r"pri\$e$", ("fsdp", None)),
        (r"^text/lm_head/kernel$", (None, "fsdp", "tensor")),
        (r"kernel/[ab]", ("data", "data")),  # of nothing in the base tree
        (r"", ()),
    )
    paths = [*named_leaves(abstract()), "audio/proj/kernel2", "x/pri$e"]
    table = lora_sharding(rules)
    for path in paths:
        number = next(i for i, (pattern, _) in enumerate(rules) if re.search(pattern, path))
        for side in (0, 1):
            name = f"{path}/{'ab'[side]}"
            hits = [i for i, (pattern, _) in enumerate(table) if re.search(pattern, name)]
            assert hits[0] == 2 * number + side, path
    specs = [spec for _, spec in table]
    assert specs[:2] == [("fsdp", None), (None, "tensor")]
    assert specs[4:6] == [(None, None), (None, "tensor")]
    assert specs[8:10] == [(None, "fsdp", None), (None, None, "tensor")]
    assert specs[-2:] == [(None, None), (None, None)]
