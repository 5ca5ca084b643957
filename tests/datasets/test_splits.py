"""Folds with like shares of every label."""

import numpy as np
import pytest

from medalign_jax.datasets.splits import SplitError, deal_folds


@pytest.mark.parametrize("folds", [0, 1, 4])
def test_as_many_folds_as_can_be(folds):
    with pytest.raises(SplitError, match="folds"):
        deal_folds(np.eye(3), folds, 0)


def test_folds_share_out_every_label():
    """Rare labels are spread one by one, which a draw by lot does not do."""
    rng = np.random.default_rng(0)
    labels = rng.random((80, 5)) < np.array([0.35, 0.4, 0.35, 0.35, 0.06])
    for seed in range(3):
        fold = deal_folds(labels, 5, seed)
        counts = np.stack([labels[fold == f].sum(0) for f in range(5)])
        assert np.bincount(fold, minlength=5).max() == 16
        assert (np.ptp(counts, axis=0) <= 3).all() and np.ptp(counts[:, 4]) <= 1, counts
    assert (deal_folds(labels, 5, 0) == deal_folds(labels, 5, 0)).all()
    assert (deal_folds(labels, 5, 0) != deal_folds(labels, 5, 1)).any()


def test_rows_are_dealt_out_where_there_is_no_label_at_all():
    dealt = deal_folds(np.zeros((31, 0), bool), 3, 0)
    assert sorted(np.bincount(dealt)) == [10, 10, 11]


def test_rows_without_any_label_are_dealt_out_too():
    fold = deal_folds(np.zeros((10, 2)), 5, 0)
    assert sorted(fold) == sorted([0, 1, 2, 3, 4] * 2)
