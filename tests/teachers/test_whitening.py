"""Whitening of report vectors."""

import numpy as np
import pytest

from medalign_jax.core.errors import UserError
from medalign_jax.teachers.whitening import fit_whitening

RNG = np.random.default_rng(0)
VECTORS = (RNG.standard_normal((200, 6)) * [9, 3, 1, 0.3, 1e-3, 0] + 5).astype(np.float32)


def test_kept_directions_have_unit_variance_and_are_uncorrelated():
    white = fit_whitening(VECTORS, 1.0)
    np.testing.assert_allclose(np.cov(white(VECTORS).T, bias=True), np.eye(white.width), atol=1e-3)


def test_share_decides_how_many_directions_are_kept():
    assert [fit_whitening(VECTORS, share).width for share in (0.5, 0.95, 0.995)] == [1, 2, 3]


def test_few_distinct_reports_give_one_direction_less():
    repeated = VECTORS[[0, 1, 2, 3] * 30]
    assert fit_whitening(repeated, 1.0).width == 3


def test_other_shapes_go_through():
    white = fit_whitening(VECTORS, 0.95)
    stacked = white(VECTORS.reshape(20, 10, 6))
    np.testing.assert_array_equal(stacked.reshape(200, -1), white(VECTORS))


def test_equal_reports_and_bad_shares_are_named():
    with pytest.raises(UserError, match="nothing to align"):
        fit_whitening(np.ones((9, 4), np.float32), 0.9)
    with pytest.raises(UserError, match=r"teacher\.whiten .* got 1\.5"):
        fit_whitening(VECTORS, 1.5)


def test_what_is_kept_is_told():
    kept = fit_whitening(VECTORS, 0.95)
    assert kept.describe() == "whitening keeps 2 directions of 6, 99 % of the reports' variance"


def test_fewer_directions_than_classes_need_are_refused():
    assert fit_whitening(VECTORS, 0.95, classes=3).width == 2
    with pytest.raises(UserError, match=r"keeps 1 of 6 .*3 classes .* fewer than 2: raise"):
        fit_whitening(VECTORS, 0.5, classes=3)
