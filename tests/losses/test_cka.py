"""CKA: published numbers, estimators, gradients, degenerate inputs."""

import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medalign_jax.core.errors import UserError
from medalign_jax.losses import cka, cka_loss
from medalign_jax.models.layers.heads import ProjectionHead


@pytest.fixture(scope="module")
def alignment(shared):
    folder = shared / "fixtures"
    meta = json.loads((folder / "acula_alignment.json").read_text())
    return meta["cases"], np.load(folder / "acula_alignment.npz")


def _case(meta: dict) -> tuple[np.ndarray, np.ndarray]:
    i, n, p, q = meta["index"], meta["B"], meta["d_audio"], meta["d_language"]
    a = np.random.default_rng(1000 + i).standard_normal((n, p))
    t = np.random.default_rng(2000 + i).standard_normal((n, q))
    if meta["variant"] == "related":
        u = np.random.default_rng(4000 + i).standard_normal((n, 16))
        a = 0.3 * a + u @ (np.random.default_rng(3000 + i).standard_normal((16, p)) / 4)
        t = 0.3 * t + u @ (np.random.default_rng(5000 + i).standard_normal((16, q)) / 4)
    return a.astype(np.float32), t.astype(np.float32)


def test_published_values(alignment):
    cases, expected = alignment
    loss = jax.jit(cka_loss, static_argnames="estimator")
    for name, meta in cases.items():
        audio, text = _case(meta)
        biased = float(loss(audio, text, estimator="biased"))
        assert biased == pytest.approx(float(expected[f"{name}_samplegram"]), abs=2e-6), name
        if audio.shape[1] == text.shape[1]:
            released = float(loss(audio, text, estimator="released"))
            assert released == pytest.approx(float(expected[name]), abs=2e-6), name


def test_published_gradients(alignment):
    cases, expected = alignment
    gradients = jax.jit(jax.grad(lambda a, t: cka_loss(a, t, estimator="released"), (0, 1)))
    for name, meta in cases.items():
        if f"{name}_grad_audio" not in expected:
            continue
        for side, grad in zip(("audio", "lang"), gradients(*_case(meta)), strict=True):
            norm = float(expected[f"{name}_grad_{side}_norm"])
            np.testing.assert_allclose(jnp.linalg.norm(grad), norm, rtol=2e-5)
            got = np.asarray(grad[:2, :16])
            np.testing.assert_allclose(got, expected[f"{name}_grad_{side}"], atol=2e-5 * norm)


def test_heads_with_published_weights(alignment, shared):
    _, expected = alignment
    entries = json.loads((shared / "fixtures/acula_alignment.json").read_text())["state_dict"]
    weights = {}
    for entry in entries:
        name, shape = entry["name"], entry["shape"]
        z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
        z = z.astype(np.float32)
        fan_in = np.prod(shape[1:]) ** 0.5
        weights[name] = z / fan_in if entry["rule"] == "fan_in" else np.float32(0.05) * z
    outputs = {}
    for side, seed, width in (("audio", 0, 384), ("language", 1, 2048)):
        get = lambda n, s=side: weights[f"{s}_projection_mlp.layers.{n}"]  # noqa: E731
        params = {
            "hidden": {"kernel": get("0.weight").T, "bias": get("0.bias")},
            "out": {"kernel": get("3.weight").T, "bias": get("3.bias")},
        }
        x = np.random.default_rng(seed).random((24, width), dtype=np.float32)
        outputs[side] = ProjectionHead().apply({"params": params}, x)
        np.testing.assert_allclose(outputs[side], expected[f"mlp_{side}"], atol=5e-6)
    released = cka_loss(outputs["audio"], outputs["language"], estimator="released")
    assert float(released) == pytest.approx(float(expected["mlp_cka"]), abs=2e-6)


def test_unbiased_equals_the_textbook_estimator():
    """Against eq. 5 of Song et al. 2012, written out in float64."""

    def hsic(k, m):
        n = len(k)
        k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
        one = np.ones(n)
        return (
            np.trace(k @ m)
            + one @ k @ one * (one @ m @ one) / ((n - 1) * (n - 2))
            - 2 / (n - 2) * (one @ k @ m @ one)
        )

    rng = np.random.default_rng(0)
    x = rng.standard_normal((12, 40)) + 3.0
    y = np.concatenate([x[:, :5], rng.standard_normal((12, 20))], 1) - 1.0
    k, m = x @ x.T, y @ y.T
    expected = hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))
    assert float(cka(x.astype(np.float32), y.astype(np.float32))) == pytest.approx(
        expected, abs=2e-6
    )


def test_only_the_unbiased_estimator_is_near_zero_for_independent_samples():
    rng = np.random.default_rng(1)
    pairs = rng.standard_normal((200, 2, 24, 512)).astype(np.float32)
    values = {
        e: jax.jit(jax.vmap(lambda p, e=e: cka(p[0], p[1], estimator=e)))
        for e in ("unbiased", "biased")
    }
    assert abs(float(values["unbiased"](pairs).mean())) < 0.01
    assert float(values["biased"](pairs).mean()) == pytest.approx(0.96, abs=0.01)


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_invariances_and_mask(estimator):
    rng = np.random.default_rng(2)
    x = rng.standard_normal((16, 6)).astype(np.float32)
    y = (x @ rng.standard_normal((6, 9)) + rng.standard_normal((16, 9))).astype(np.float32)
    rotation = np.linalg.qr(rng.standard_normal((9, 9)))[0].astype(np.float32)
    value = cka(x, y, estimator=estimator)
    np.testing.assert_allclose(cka(x, x, estimator=estimator), 1.0, atol=1e-6)
    moved = cka(x * 1e4 + 7, y @ rotation * 1e-4, estimator=estimator)
    np.testing.assert_allclose(moved, value, atol=2e-5)
    assert abs(float(cka(x, y[::-1], estimator=estimator)) - float(value)) > 0.1
    padded_x = np.concatenate([x, np.full((5, 6), 1e3, np.float32)])
    padded_y = np.concatenate([y, np.full((5, 9), np.nan, np.float32)])
    mask = np.arange(21) < 16
    np.testing.assert_allclose(
        cka(padded_x, padded_y, estimator=estimator, mask=mask), value, atol=2e-6
    )


def test_feature_side_equals_gram_side():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((200, 6)).astype(np.float32)
    y = (x[:, :4] + rng.standard_normal((200, 4))).astype(np.float32)
    centred = [v - v.mean(0) for v in (x.astype(float), y.astype(float))]
    k, m = (v @ v.T for v in centred)
    expected = (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())
    assert float(cka(x, y, estimator="biased")) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("estimator", ["unbiased", "biased", "released"])
def test_constant_features_give_zero_and_finite_gradients(estimator):
    rng = np.random.default_rng(4)
    x = rng.standard_normal((8, 5)).astype(np.float32)
    constant = np.tile(np.linspace(-3.1, 900.7, 5, dtype=np.float32), (8, 1))
    value, grads = jax.value_and_grad(lambda a, b: cka(a, b, estimator=estimator), (0, 1))(
        x, constant
    )
    assert float(value) == 0.0
    assert all(not np.any(np.asarray(g)) for g in grads)


def test_gradient_against_finite_differences():
    rng = np.random.default_rng(5)
    x, y = rng.standard_normal((2, 10, 4))
    with jax.enable_x64(True):
        from jax.test_util import check_grads

        # The function computes in float32, so differences are taken at a matching step.
        check_grads(
            lambda a: cka(a, jnp.asarray(y, jnp.float32)),
            (jnp.asarray(x, jnp.float32),),
            1,
            modes=["rev"],
            atol=2e-2,
            rtol=2e-2,
            eps=1e-2,
        )


def test_too_few_samples_and_bad_arguments_are_named():
    x = np.zeros((3, 2), np.float32)
    with pytest.raises(UserError, match="at least 4 samples, got 3"):
        cka(x, x)
    with pytest.raises(UserError, match="'other' is not one of"):
        cka(x, x, estimator="other")
    with pytest.raises(UserError, match=r"\(3, 2\) and \(4, 2\)"):
        cka(x, np.zeros((4, 2), np.float32))
    with pytest.raises(UserError, match="equal widths, got 2 and 3"):
        cka(x, np.zeros((3, 3), np.float32), estimator="released")
