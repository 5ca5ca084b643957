"""In how many directions embeddings vary."""

import jax.numpy as jnp
import numpy as np
import pytest

from medalign_jax.evaluate.spread import describe_ranks, effective_rank, ranks_of
from medalign_jax.evaluate.stages import Stage
from medalign_jax.methods.student import embedding_health

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(6, 40), (40, 6)])
def test_rank_of_known_spectra(shape):
    """Orthogonal directions of variances λ: (Σλ)² / Σλ²; whatever the mean, the scale, the turn."""
    count = 3
    left = np.linalg.qr(RNG.standard_normal((shape[0], count + 1)) + 1.0)[0]
    left = np.linalg.qr(np.c_[np.ones(shape[0]), left])[0][:, 1 : count + 1]  # columns of mean 0
    right = np.linalg.qr(RNG.standard_normal((shape[1], count)))[0]
    variances = np.array([4.0, 2.0, 1.0])
    x = 7.0 + 10.0 * (left * np.sqrt(variances)) @ right.T
    assert effective_rank(x) == pytest.approx(49 / 21)


def test_a_line_has_one_direction_and_a_point_none():
    line = np.outer(np.arange(5.0), RNG.standard_normal(8))
    assert effective_rank(line) == pytest.approx(1.0)
    assert effective_rank(np.ones((5, 8))) == 0.0


def test_is_what_training_logs():
    x = RNG.standard_normal((12, 5)).astype(np.float32)
    logged = embedding_health(jnp.asarray(x), None)["effective_rank"]
    assert effective_rank(x) == pytest.approx(float(logged), rel=1e-4)


def test_stages_in_words():
    line = np.outer(np.arange(5.0), np.ones(3))
    square = np.eye(5)[:, :4]
    ranks = ranks_of([Stage("before", line), Stage("after", (line, square))])
    assert ranks["before"] == 1.0
    assert ranks["after"] == pytest.approx((1.0 + effective_rank(square)) / 2, abs=0.01)
    told = describe_ranks(ranks)
    assert told.startswith("Directions in which") and "before: 1.0; after: 2." in told
    assert describe_ranks({}) == ""
