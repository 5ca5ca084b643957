import numpy as np
import pytest

from medalign_jax.evaluate.report_ridge import GRID, predicted_reports

linear_model = pytest.importorskip("sklearn.linear_model")


def world(noise, subjects=60, each=2, width=30):
    """Features of which three directions are what reports say."""
    rng = np.random.default_rng(0)
    said = np.repeat(rng.standard_normal((subjects, 3)), each, axis=0)
    features = rng.standard_normal((subjects * each, width)) * noise
    features[:, :3] += said
    vectors = (said @ rng.standard_normal((3, 8)) + 5).astype(np.float32)
    return features * 7 + 2, vectors, np.repeat(np.arange(subjects), each)


def test_it_is_ridge_regression_with_a_penalty_of_the_grid():
    features, vectors, groups = world(0.5)
    train = np.flatnonzero(groups < 40)
    found = predicted_reports(features, vectors, train, groups)
    x = (features - features[train].mean(axis=0)) / features[train].std(axis=0)
    fits = [
        linear_model.Ridge(alpha=features.shape[1] * penalty).fit(x[train], vectors[train])
        for penalty in GRID
    ]
    differences = [np.abs(fit.predict(x) - found).max() for fit in fits]
    assert min(differences) < 1e-4
    errors = [np.mean((fit.predict(x) - vectors)[groups >= 40] ** 2) for fit in fits]
    chosen = int(np.argmin(differences))
    assert errors[chosen] < 1.1 * min(errors), "nearly the best of other subjects"


def test_features_that_say_nothing_are_told_nothing():
    features, vectors, groups = world(0.5)
    rng = np.random.default_rng(1)
    train = np.flatnonzero(groups < 40)
    found = predicted_reports(rng.permutation(features), vectors, train, groups)
    rest = groups >= 40
    spread = vectors[rest].std()
    assert np.abs(found[rest] - vectors[train].mean(axis=0)).mean() < 0.3 * spread


def test_what_is_tested_is_not_read():
    features, vectors, groups = world(0.5)
    train = np.flatnonzero(groups < 40)
    changed = np.where((groups < 40)[:, None], vectors, -100)
    first, second = (predicted_reports(features, v, train, groups) for v in (vectors, changed))
    np.testing.assert_array_equal(first, second)
