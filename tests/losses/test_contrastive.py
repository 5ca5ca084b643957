"""InfoNCE, cosine, L2 and masked reconstruction against plain numpy formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medalign_jax.core.errors import UserError
from medalign_jax.losses import cka_loss, cosine_loss, info_nce_loss, l2_loss, masked_patch_error
from medalign_jax.losses.contrastive import same_rows

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((2, 6, 5)).astype(np.float32)
UNIT = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (X, Y)]


def _log_softmax_diagonal(logits):
    return np.diagonal(logits - np.log(np.exp(logits).sum(1, keepdims=True)))


def test_info_nce():
    logits = UNIT[0] @ UNIT[1].T / 0.1
    expected = -(_log_softmax_diagonal(logits) + _log_softmax_diagonal(logits.T)).mean() / 2
    assert float(info_nce_loss(X, Y, temperature=0.1)) == pytest.approx(expected, rel=1e-5)


def test_cosine_and_l2():
    assert float(cosine_loss(X, Y)) == pytest.approx(
        1 - (UNIT[0] * UNIT[1]).sum(1).mean(), rel=1e-5
    )
    assert float(l2_loss(X, Y)) == pytest.approx(((X - Y) ** 2).mean(), rel=1e-5)


@pytest.mark.parametrize("loss", [info_nce_loss, cosine_loss, l2_loss])
def test_masked_rows_do_not_count(loss):
    padded = [np.concatenate([v, np.full((3, 5), 50, np.float32)]) for v in (X, Y)]
    mask = np.arange(9) < 6
    assert float(loss(*padded, mask=mask)) == pytest.approx(float(loss(X, Y)), rel=1e-5)


def test_unequal_shapes_are_named():
    with pytest.raises(UserError, match=r"\(6, 5\) and \(6, 4\)"):
        l2_loss(X, Y[:, :4])


def test_masked_patch_error():
    target = RNG.standard_normal((2, 4, 3)).astype(np.float32)
    predicted = target + np.arange(4, dtype=np.float32)[None, :, None]
    removed = np.array([[1, 0, 0, 1], [0, 1, 1, 0]])
    got = masked_patch_error(predicted, target, removed)
    np.testing.assert_allclose(got, [(0 + 9) / 2, (1 + 4) / 2], rtol=1e-5)
    assert not np.any(np.asarray(masked_patch_error(predicted, target, removed * 0)))


def test_equal_reports_are_not_negatives():
    """64 recordings, 4 reports, perfectly aligned: ln 16 where equal reports repel each other."""
    text = np.eye(4, dtype=np.float32)[np.arange(64) % 4]
    apart = float(info_nce_loss(text, text, temperature=0.01))
    assert apart == pytest.approx(np.log(16), abs=1e-4)
    together = info_nce_loss(text, text, temperature=0.01, same=same_rows(text))
    assert float(together) == pytest.approx(0, abs=1e-5)
    wrong = info_nce_loss(text[::-1], text, temperature=0.1, same=same_rows(text))
    assert float(wrong) > 5


def test_several_positives_by_hand():
    same = np.array([0, 0, 1, 2, 2, 2])[:, None] == np.array([0, 0, 1, 2, 2, 2])
    share = np.exp(UNIT[0] @ UNIT[1].T / 0.1)
    forward = -np.log((share * same).sum(1) / share.sum(1))
    backward = -np.log((share * same).sum(0) / share.sum(0))
    found = float(info_nce_loss(X, Y, temperature=0.1, same=same))
    assert found == pytest.approx((forward + backward).mean() / 2, rel=1e-5)


def test_equal_rows_are_found_whatever_their_size():
    rows = np.concatenate([1e3 * X, 1e-3 * Y, 1e3 * X[2:4]])
    same = np.asarray(same_rows(jnp.asarray(rows)))
    expected = np.eye(14, dtype=bool)
    expected[[2, 3, 12, 13], [12, 13, 2, 3]] = True
    np.testing.assert_array_equal(same, expected)


@pytest.mark.parametrize("loss", [info_nce_loss, cosine_loss, l2_loss, cka_loss])
def test_nan_in_masked_rows_reaches_neither_value_nor_gradient(loss):
    padded = [np.concatenate([v, np.full((3, 5), np.nan, np.float32)]) for v in (X, Y)]
    mask = np.arange(9) < 6
    value, gradients = jax.value_and_grad(lambda x, y: loss(x, y, mask=mask), (0, 1))(*padded)
    expected, wanted = jax.value_and_grad(loss, (0, 1))(X, Y)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    for found, right in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(found[:6], right, rtol=1e-4, atol=1e-6)
        assert not np.any(np.asarray(found[6:]))
