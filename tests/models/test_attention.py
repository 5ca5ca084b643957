"""All back ends of attention give the same values and gradients."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from medalign_jax.models.layers.attention import _choose, _pairs, attention
from medalign_jax.models.layers.attention_splash import splash

B, T, S, D = 2, 17, 17, 8


def inputs(heads=4, key_heads=4, keys=S, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = ((B, T, heads, D), (B, keys, key_heads, D), (B, keys, key_heads, D))
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def by_hand(q, k, v, bias=None, mask=None, scale=None, causal=False, window=None):
    """Float64, one query at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    full = (B, q.shape[2], q.shape[1], k.shape[1])
    bias = np.broadcast_to(np.zeros(()) if bias is None else bias, full)
    mask = np.broadcast_to(np.ones((), bool) if mask is None else mask, full)
    out = np.zeros(q.shape)
    for b, h, t in np.ndindex(*full[:3]):
        seen = [
            s for s in range(full[3])
            if mask[b, h, t, s] and (not causal or s <= t)
            and (window is None or abs(t - s) < window)
        ]  # fmt: skip
        if not seen:
            continue
        n = h // (q.shape[2] // k.shape[2])
        scores = k[b, seen, n] @ q[b, t, h] * (D**-0.5 if scale is None else scale)
        weights = np.exp(scores + bias[b, h, t, seen])
        out[b, t, h] = weights @ v[b, seen, n] / weights.sum()
    return out


def cases():
    rng = np.random.default_rng(1)
    dense = rng.random((B, 4, T, S)) < 0.6
    padded = np.ones((B, 1, 1, S), bool)
    padded[1, :, :, 11:] = False
    blind = dense.copy()
    blind[0, 1, 3] = False
    blind[1, :, 5] = False
    bias = rng.standard_normal((1, 4, T, S)).astype(np.float32)
    return {
        "plain": {},
        "scale": {"scale": 0.7},
        "gqa": {"key_heads": 2},
        "multi-query": {"key_heads": 1},
        "causal": {"causal": True},
        "window": {"window": 4},
        "causal window gqa": {"causal": True, "window": 3, "key_heads": 2},
        "padding": {"mask": padded},
        "mask gqa": {"mask": dense, "key_heads": 2},
        "blind rows": {"mask": blind, "causal": True},
        "bias": {"bias": bias},
        "bias per batch, mask, gqa": {
            "bias": rng.standard_normal((B, 1, 1, S)).astype(np.float32),
            "mask": dense,
            "key_heads": 2,
        },
        "other length": {"keys": 9},
    }


CASES = cases()


@pytest.mark.parametrize("backend", ["xla", "blocked"])
@pytest.mark.parametrize("name", CASES)
def test_values(name, backend):
    options = dict(CASES[name])
    q, k, v = inputs(key_heads=options.pop("key_heads", 4), keys=options.pop("keys", S))
    out = attention(q, k, v, backend=backend, **options)
    np.testing.assert_allclose(out, by_hand(q, k, v, **options), atol=1e-6)


@pytest.mark.parametrize("pairs", [1, 2, "all"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_agree(name, pairs, monkeypatch):
    if pairs != "all":  # as many (example, key head) pairs per turn as fit
        monkeypatch.setattr("medalign_jax.models.layers.attention._pairs", lambda q, k: pairs)
    options = dict(CASES[name])
    q, k, v = inputs(key_heads=options.pop("key_heads", 4), keys=options.pop("keys", S))
    bias = options.pop("bias", None)
    weight = np.random.default_rng(2).standard_normal(q.shape).astype(np.float32)

    def gradients(backend):
        def loss(q, k, v, bias):
            return jnp.sum(weight * attention(q, k, v, bias=bias, backend=backend, **options))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2) + ((3,) if bias is not None else ())))(
            q, k, v, bias
        )

    for left, right in zip(gradients("xla"), gradients("blocked"), strict=True):
        assert np.isfinite(left).all() and np.abs(left).max() > 1e-3
        np.testing.assert_allclose(left, right, atol=1e-6 * max(1.0, np.abs(left).max()))


def test_gradient_matches_finite_differences():
    q, k, v = inputs(key_heads=2)
    jax.test_util.check_grads(
        lambda *args: attention(*args, causal=True, backend="blocked"), (q, k, v), 1, ["rev"],
        atol=1e-2, rtol=1e-2,
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["xla", "blocked"])
def test_blind_rows_are_zero_with_finite_gradients(backend):
    q, k, v = inputs()
    mask = jnp.zeros((1, 1, T, S), bool).at[:, :, 1:].set(True)

    def total(q, k, v):
        return jnp.sum(jnp.sin(attention(q, k, v, mask=mask, backend=backend)))

    assert not attention(q, k, v, mask=mask, backend=backend)[:, 0].any()
    to_q, to_k, to_v = jax.grad(total, argnums=(0, 1, 2))(q, k, v)
    assert all(np.isfinite(g).all() for g in (to_q, to_k, to_v))
    assert not to_q[:, 0].any() and to_q[:, 1].any()


@pytest.mark.parametrize("backend", ["xla", "blocked"])
def test_large_scores_do_not_overflow(backend):
    q, k, v = inputs()
    out = attention(100 * q, k, v, backend=backend)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out, by_hand(q, k, v, scale=100 * D**-0.5), atol=1e-4)


@pytest.mark.parametrize("backend", ["xla", "blocked"])
def test_bfloat16_keeps_its_type(backend):
    q, k, v = inputs(dtype=jnp.bfloat16)
    out = attention(q, k, v, backend=backend)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), by_hand(q, k, v), atol=2e-2)


def test_auto_picks_by_size():
    small = jax.ShapeDtypeStruct((1, 64, 4, 8), jnp.float32)
    large = jax.ShapeDtypeStruct((8, 1024, 6, 64), jnp.float32)
    assert _choose(small, small, platform="cpu") == "xla"
    assert _choose(large, large, platform="cpu") == "blocked"


@pytest.mark.parametrize(
    ("platform", "shape", "dtype", "expected"),
    [
        ("tpu", (2, 256, 4, 64), jnp.bfloat16, "splash"),
        ("tpu", (2, 200, 4, 128), jnp.bfloat16, "xla"),
        ("gpu", (2, 200, 4, 64), jnp.bfloat16, "cudnn"),
        ("gpu", (2, 200, 4, 64), jnp.float32, "xla"),
        ("gpu", (2, 200, 4, 256), jnp.bfloat16, "xla"),  # Gemma's heads are too wide for it
        ("gpu", (2, 1, 4, 64), jnp.bfloat16, "xla"),
        ("gpu", (2, 63, 4, 64), jnp.bfloat16, "xla"),
    ],
)
def test_auto_picks_by_platform(platform, shape, dtype, expected):
    if jax.device_count() > 1:
        pytest.skip("several devices, and no mesh is set")
    q = jax.ShapeDtypeStruct(shape, dtype)
    assert _choose(q, q, platform=platform) == expected
    if platform == "gpu":  # cuDNN's windows look back only
        assert _choose(q, q, platform=platform, two_sided=True) == "xla"
    over_queries = jax.ShapeDtypeStruct((1, 1, shape[1], shape[1]), bool)
    assert platform == "gpu" or _choose(q, q, None, over_queries, platform) == "xla"


@pytest.mark.parametrize(
    ("causal", "window"), [(True, None), (True, 40), (False, None), (False, 30)]
)
def test_splash_equals_xla(causal, window):
    """The kernel's text, interpreted: values and gradients at real tokens, within 1e-5.

    Two query heads per key head, head width 24 made up to 128, padding at either side.
    """
    rng = np.random.default_rng(0)
    shapes = ((2, 128, 4, 24), (2, 128, 2, 24), (2, 128, 2, 24))
    q, k, v = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    column = np.arange(128)
    mask = np.stack([column < 100, column >= 50])
    weight = rng.standard_normal(q.shape).astype(np.float32) * mask[:, :, None, None]
    keys = jnp.asarray(mask[:, None, None, :])

    def both(run):
        def total(q, k, v):
            out = run(q, k, v)
            return jnp.sum(out * weight), out

        (_, out), gradients = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(q, k, v)
        return [out * mask[:, :, None, None], *gradients]

    fused = both(lambda q, k, v: splash(q, k, v, keys, 0.3, causal, window, interpret=True))
    plain = both(
        lambda q, k, v: attention(
            q, k, v, mask=keys, scale=0.3, causal=causal, window=window, backend="xla"
        )
    )
    for one, other in zip(fused, plain, strict=True):
        assert np.abs(other).max() > 0.1
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def for_cudnn(name):
    """Inputs and options of a case that cuDNN's kernel takes; see `fused_cases`."""
    options = dict(CASES[name])
    sizes = {"key_heads": options.pop("key_heads", 4), "keys": options.pop("keys", S)}
    return inputs(**sizes, dtype=jnp.bfloat16), options


def fused_cases():
    ahead = {name for name, case in CASES.items() if "window" in case and "causal" not in case}
    return [name for name in CASES if name not in ahead and "bias" not in name]


def value_and_gradients(backend, options, weight):
    def total(q, k, v):
        out = attention(q, k, v, backend=backend, **options).astype(jnp.float32)
        return jnp.sum(out * weight), out

    return jax.value_and_grad(total, (0, 1, 2), has_aux=True)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN's kernel needs an NVIDIA card")
@pytest.mark.parametrize("name", fused_cases())
def test_cudnn_equals_xla(name):
    """Values and gradients in bfloat16, within its rounding."""
    arrays, options = for_cudnn(name)
    weight = np.random.default_rng(2).standard_normal(arrays[0].shape).astype(np.float32)

    def both(backend):
        (_, out), grads = jax.jit(value_and_gradients(backend, options, weight))(*arrays)
        return [np.asarray(x, np.float32) for x in (out, *grads)]

    for fused, plain in zip(both("cudnn"), both("xla"), strict=True):
        assert np.abs(plain).max() > 0.1
        np.testing.assert_allclose(fused, plain, rtol=0, atol=2e-2 * np.abs(plain).max())


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the card itself is asked")
@pytest.mark.parametrize("name", fused_cases())
def test_cudnn_is_given_shapes_that_it_takes(name, monkeypatch):
    """What jax checks on the way to the kernel, forward and backward, without the kernel."""
    from jax._src.cudnn import fused_attention_stablehlo as kernel

    monkeypatch.setattr(kernel, "check_cudnn_version", lambda: 91_000)
    monkeypatch.setattr(kernel, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    arrays, options = for_cudnn(name)
    traced = jax.make_jaxpr(value_and_gradients("cudnn", options, 1.0))(*arrays)
    assert str(traced).count("dot_product_attention_fwd") and "dot_product_attention_bwd" in str(
        traced
    )
    assert [x.aval.shape for x in traced.jaxpr.outvars[1:]] == [
        arrays[0].shape, *(x.shape for x in arrays)
    ]  # fmt: skip


SPLASH_FOR_TPU = """
import functools, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from medalign_jax.models.layers.attention import attention
slice = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
mesh = Mesh(np.array(slice.devices).reshape(1, 2, 2), ("data", "fsdp", "tensor"))
whole = NamedSharding(mesh, P(("data", "fsdp"), None, "tensor", None))
def array(shape, dtype=jnp.bfloat16, sharding=whole):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
q, k = array((4, 512, 8, 64)), array((4, 512, 2, 64))
mask = array((4, 1, 1, 512), bool, NamedSharding(mesh, P(("data", "fsdp"))))
for window in (None, 128):
    def loss(q, k, v, mask):
        out = attention(q, k, v, mask=mask, causal=True, window=window, backend="splash")
        return jnp.sum(out.astype(jnp.float32) ** 2)
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        text = step.trace(q, k, k, mask).lower(lowering_platforms=("tpu",)).compile().as_text()
    assert "tpu_custom_call" in text, "no kernel in the program"
    assert "all-gather" not in text, "a device looks at other devices' texts or heads"
"""


def test_splash_compiles_for_a_tpu_slice():
    """Forward and backward for a v5e:2x2, divided over texts and heads; nothing is run."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, which compiles for TPUs, is not installed (pip install libtpu)")
    settings = {
        "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }  # fmt: skip
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SPLASH_FOR_TPU], env={**os.environ, **settings}, cwd=root,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": "flash"}, "unknown backend"),
        ({"mask": np.ones((B, 1, 1, S))}, "boolean"),
        ({"mask": np.ones((B, 3, 1, S), bool)}, "broadcast"),
        ({"bias": np.ones((4, T, S), np.float32)}, "broadcast"),
        ({"window": 0}, "window"),
        ({"backend": "cudnn"}, "NVIDIA"),
        ({"backend": "splash"}, "multiple of 128"),
    ],
)
def test_bad_arguments_are_named(options, words):
    if options.get("backend") == "cudnn" and jax.default_backend() == "gpu":
        pytest.skip("a GPU is here, so cuDNN is not an error")
    with pytest.raises(ValueError, match=words):
        attention(*inputs(), **options)


def test_causal_needs_equal_lengths():
    with pytest.raises(ValueError, match="T == S"):
        attention(*inputs(keys=9), causal=True)
    with pytest.raises(ValueError, match="multiple"):
        attention(*inputs(heads=4, key_heads=3))


@pytest.mark.parametrize(
    ("count", "rows", "keys", "pairs"),
    [
        (64, 304, 152, 16),
        (24, 517, 517, 2),
        (7, 304, 152, 7),
        (31, 304, 152, 1),
        (4, 4096, 4096, 1),
    ],
)
def test_a_turn_takes_as_many_pairs_as_the_cache_holds(count, rows, keys, pairs):
    q, k = (jax.ShapeDtypeStruct((count, n, 16), jnp.float32) for n in (rows, keys))
    assert _pairs(q, k) == pairs
