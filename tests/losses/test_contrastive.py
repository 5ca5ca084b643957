"""InfoNCE, cosine, L2 and masked reconstruction against plain numpy formulas."""

import numpy as np
import pytest

from medalign_jax.errors import UserError
from medalign_jax.losses import cosine_loss, info_nce_loss, l2_loss, masked_patch_error

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
