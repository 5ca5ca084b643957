"""The small network, nearest neighbours, the published protocol, and what all of them refuse."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

from medalign_jax.evaluate import probes
from medalign_jax.evaluate.probes import MLPConfig, ProbeConfig, ProbeError, Problem, knn, mlp
from medalign_jax.evaluate.probes.inner_folds import inner_folds


def sample(n=120, width=10, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, width)) * rng.uniform(0.1, 10, width)
    return x, (x[:, 0] / x[:, 0].std() + 0.3 * rng.standard_normal(n) > 0).astype(int)


def problem(y, classes=2, **changes):
    rows = np.arange(len(y))
    return Problem(**{"targets": y, "train": rows[:80], "test": rows[80:], "groups": rows,
                      "classes": classes} | changes)  # fmt: skip


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_nearest_neighbours_equal_scikit_learn(metric):
    x, y = sample()
    z = (x - x[:80].mean(axis=0)) / x[:80].std(axis=0)
    theirs = KNeighborsClassifier(7, metric=metric, algorithm="brute").fit(z[:80], y[:80])
    share = np.bincount(y[:80]) / 80
    (ours,) = knn(x, [problem(y)], [7], metric)
    np.testing.assert_allclose(ours.scores, (7 * theirs.predict_proba(z[80:]) + share) / 8)
    theirs = KNeighborsRegressor(7, metric=metric, algorithm="brute").fit(z[:80], x[:80, 1])
    (ours,) = knn(x, [problem(x[:, 1], 0)], [7], metric)
    np.testing.assert_allclose(ours.scores, theirs.predict(z[80:]))


def test_ties_among_neighbours_count_all_and_k_is_chosen():
    x = np.repeat([[0.0, 1.0], [1.0, 0.0]], 4, axis=0)
    y = np.array([0, 0, 1, 1, 1, 1, 1, 1])
    x, y = np.r_[x, x[:1]], np.r_[y, 0]
    asked = Problem(y, np.arange(8), np.array([8]), np.arange(9), 2)
    (one,) = knn(x, [asked], [1], "euclidean")  # four rows at distance 0: two of each class
    np.testing.assert_allclose(one.scores, [[(2 + 0.25) / 5, (2 + 0.75) / 5]])
    x, y = sample()
    (chosen,) = knn(x, [problem(y)])
    noise = np.random.default_rng(0).integers(0, 2, len(y))
    (large,), (all_of,) = knn(x, [problem(noise)], [1, 60]), knn(x, [problem(noise)], [60])
    np.testing.assert_allclose(large.scores, all_of.scores)
    assert roc_auc_score(y[80:], chosen.scores[:, 1]) > 0.85


def test_network_learns_what_a_line_cannot_and_repeats():
    x, _ = sample(400)
    y = (np.abs(x[:, 0]) > 0.7 * x[:, 0].std()).astype(int)
    rows = np.arange(400)
    asked = [problem(y, train=rows[:300], test=rows[300:], seed=k) for k in (0, 0, 1)]
    config = MLPConfig(runs=2)
    first, again, other = mlp(x, asked, config)
    assert roc_auc_score(y[300:], first.scores[:, 1]) > 0.9
    assert np.array_equal(first.scores, again.scores)
    assert not np.array_equal(first.scores, other.scores)
    np.testing.assert_allclose(mlp(8 * x + 3, asked[:1], config)[0].scores, first.scores, atol=1e-3)
    target = 100 + 10 * (x[:, 0] / x[:, 0].std()) ** 2
    (numbers,) = mlp(x, [problem(target, 0, train=rows[:300], test=rows[300:])], config)
    error = np.mean((numbers.scores - target[300:]) ** 2)
    assert error < 0.3 * target[300:].var()


def test_published_protocol_says_when_it_has_not_converged():
    """Runs that train together equal runs alone, and the last epoch is named."""
    x, y = sample()
    rows = np.arange(len(y))
    parts = {"train": rows[:60], "valid": rows[60:80]}
    asked = [problem(y, seed=k, **parts) for k in (0, 1)]
    slow = ProbeConfig(epochs=3, learning_rate=1e-4)
    together = probes.opera(x / 100, asked, slow)
    expected = probes.classification_probe(
        (x[:60] / 100, y[:60]), (x[60:80] / 100, y[60:80]), x[80:] / 100, 2,
        seeds=[0, 1], config=slow,
    )  # fmt: skip
    for k in (0, 1):
        np.testing.assert_allclose(together[k].scores, expected.probabilities[k], atol=1e-6)
        first = "the chosen epoch is the first of 3: validation does not follow training"
        late = "the chosen epoch is the last of 3: not converged"
        assert together[k].note == {0: first, 1: "", 2: late}[int(expected.best_epoch[k])]
    (blind,) = probes.opera(x, [problem(y)], slow)
    assert blind.note == "no validation rows: the last epoch is taken"


def test_inner_folds_keep_groups_whole_and_classes_spread():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), rng.integers(1, 5, 60))
    y = (np.arange(60) % 6 == 0).astype(int)[groups]  # ten of sixty subjects
    folds = inner_folds(y, groups, 2, seed=0)
    for subject in range(60):
        assert len(set(folds.number[groups == subject])) == 1
    positive = [len(set(groups[(folds.number == k) & (y == 1)])) for k in range(5)]
    assert positive == [2] * 5
    assert folds.usable.all()
    assert folds.note == ""
    assert not np.array_equal(folds.number, inner_folds(y, groups, 2, seed=1).number)
    numbers = inner_folds(rng.standard_normal(100), np.arange(100), 0, seed=0)
    assert np.bincount(numbers.number).tolist() == [20] * 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": [0, 1, 100000]}, "problem 0: training row 100000 is not one of the 120 rows"),
        ({"train": [0, 1, 2, 90], "test": [90]}, "row 90 is among the training and the test rows"),
        ({"train": [3, 5]}, "the features of training row 3 are not finite"),
        ({"test": []}, "test rows are a list of integers, at least one"),
        ({"classes": 3}, "no training row is of class 2"),
        ({"classes": 1}, "two or more classes"),
        ({"targets": np.zeros(7, int)}, r"targets have one entry per row \(120\)"),
        ({"targets": np.full(120, 0.5)}, "classes are integers"),
        ({"targets": np.full(120, np.nan), "classes": 0}, "target of training row 0 is not finite"),
        ({"groups": np.full(120, 0.5)}, "groups are integers"),
    ],
)
@pytest.mark.parametrize("name", ["linear", "mlp", "knn", "opera"])
def test_what_no_probe_takes(name, change, message):
    x, y = sample()
    x[3] = np.nan
    change = {k: np.asarray(v, int) if isinstance(v, list) else v for k, v in change.items()}
    rows = np.delete(np.arange(80), 3)
    with pytest.raises(ProbeError, match=message):
        probes.PROBES[name](x, [problem(y, **{"train": rows} | change)])
