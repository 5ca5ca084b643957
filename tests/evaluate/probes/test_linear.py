import warnings

import numpy as np
import pytest
import threadpoolctl
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import GridSearchCV, cross_val_predict

from benchmarks.penalties import CASES, scores_of
from medalign_jax.evaluate.probes import ProbeError, Problem, fit_linear, linear, linear_solver
from medalign_jax.evaluate.probes.inner_folds import inner_folds
from medalign_jax.evaluate.probes.linear import ALIKE


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """scikit-learn's small products take ten times as long when threads wait for each other."""
    with threadpoolctl.threadpool_limits(1):
        yield


def sample(n, width, classes, seed=0, test=60, strength=1.0):
    """Correlated features of different scales, of which a few carry the target."""
    rng = np.random.default_rng(seed)
    factors = rng.standard_normal((n + test, 12))
    x = factors @ rng.standard_normal((12, width)) + rng.standard_normal((n + test, width))
    x = x * rng.uniform(0.1, 10, width) + rng.uniform(-5, 5, width)
    if classes == 0:
        y = 20 + 3 * factors[:, 0] + rng.standard_normal(n + test)
    else:
        y = np.argmax(strength * factors[:, :classes] + rng.gumbel(size=(n + test, classes)), 1)
    return x, y


def problem(y, n, classes, **changes):
    rows = np.arange(len(y))
    return Problem(**{"targets": y, "train": rows[:n], "test": rows[n:], "groups": rows,
                      "classes": classes} | changes)  # fmt: skip


def standardised(x, n):
    return (x - x[:n].mean(axis=0)) / x[:n].std(axis=0)


def macro_auroc(y, scores):
    if scores.shape[1] == 2:
        return roc_auc_score(y, scores[:, 1])
    return roc_auc_score(y, scores, multi_class="ovr")


@pytest.mark.parametrize("penalty", [300.0, 1.0, 1e-3])
@pytest.mark.parametrize(("n", "width"), [(60, 150), (300, 40)])
@pytest.mark.parametrize("classes", [2, 4])
def test_classification_equals_scikit_learn(n, width, classes, penalty):
    """Weak penalties on 60 rows of 150 features are the separable case."""
    x, y = sample(n, width, classes)
    z = standardised(x, n)
    theirs = LogisticRegression(C=1 / penalty, tol=1e-12, max_iter=10_000, solver="newton-cg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its line search ends where rounding begins
        theirs.fit(z[:n], y[:n])
    (ours,) = fit_linear(x, [problem(y, n, classes)], [penalty])
    assert ours.note == ""
    np.testing.assert_allclose(ours.weights, theirs.coef_.T, atol=1e-4)
    scores, expected = ours(x[n:]), theirs.predict_proba(z[n:])
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    assert macro_auroc(y[n:], scores) == pytest.approx(macro_auroc(y[n:], expected), abs=1e-6)


@pytest.mark.parametrize("penalty", [300.0, 1.0, 1e-3])
@pytest.mark.parametrize(("n", "width"), [(60, 150), (300, 40)])
def test_regression_equals_scikit_learn(n, width, penalty):
    x, y = sample(n, width, 0)
    z, mean, deviation = standardised(x, n), y[:n].mean(), y[:n].std()
    theirs = Ridge(alpha=penalty, solver="svd").fit(z[:n], (y[:n] - mean) / deviation)
    (ours,) = fit_linear(x, [problem(y, n, 0)], [penalty])
    assert ours.note == ""
    np.testing.assert_allclose(ours.weights[:, 0], theirs.coef_, atol=1e-4)
    np.testing.assert_allclose(ours(x[n:]), theirs.predict(z[n:]) * deviation + mean, atol=1e-4)


def within_folds(y, held, scores):
    """Macro AUROC by the pairs of each fold, of probabilities (n, C) of rows that were held out."""
    classes = range(1, 2) if scores.shape[1] == 2 else range(scores.shape[1])
    values = []
    for c in classes:
        parts = [(y[out] == c, scores[out, c]) for out in held]
        weights = [truth.sum() * (~truth).sum() for truth, _ in parts]
        found = [roc_auc_score(*part) for part, w in zip(parts, weights, strict=True) if w]
        values.append(np.average(found, weights=[w for w in weights if w]))
    return np.mean(values)


@pytest.mark.parametrize("classes", [0, 2, 4])
def test_penalty_is_the_one_that_a_grid_search_chooses(classes):
    n = 300
    x, y = sample(n, 40, classes)
    groups = np.arange(len(y)) // 3
    grid = np.logspace(4, -2, 7)
    folds = inner_folds(y[:n], groups[:n], classes, seed=3)
    splits = [(np.flatnonzero(~out), np.flatnonzero(out)) for out in folds.held_out()]
    if classes:
        search = GridSearchCV(
            LogisticRegression(tol=1e-8, max_iter=1000), {"C": 1 / grid},
            scoring="neg_log_loss", cv=splits,
        )  # fmt: skip
        targets, factor = y[:n], 1
    else:
        search = GridSearchCV(Ridge(), {"alpha": grid}, scoring="neg_mean_squared_error", cv=splits)
        targets, factor = (y[:n] - y[:n].mean()) / y[:n].std(), 2
    search.fit(standardised(x, n)[:n], targets)
    (ours,) = fit_linear(x, [problem(y, n, classes, groups=groups, seed=3)], grid)
    expected = -search.cv_results_["mean_test_score"]
    np.testing.assert_allclose(factor * ours.losses, expected, rtol=2e-3)
    chosen = search.best_index_
    if classes:
        held, z = folds.held_out(), standardised(x, n)[:n]
        aurocs = np.array([
            within_folds(y[:n], held, cross_val_predict(
                LogisticRegression(C=1 / penalty, tol=1e-8, max_iter=1000), z, y[:n],
                cv=splits, method="predict_proba"))
            for penalty in grid
        ])  # fmt: skip
        np.testing.assert_allclose(ours.aurocs, aurocs, atol=1e-3)
        chosen = np.argmin(np.where(aurocs >= aurocs.max() - ALIKE, expected, np.inf))
    assert ours.penalty == grid[chosen]
    assert 0 < chosen < len(grid) - 1


@pytest.mark.parametrize(("n", "width", "classes"), [(60, 150, 2), (60, 150, 3), (300, 40, 4)])
def test_losses_of_the_choice_are_the_exact_ones(n, width, classes):
    """Equal to `linear_solver.RESOLUTION`; 2.6e-4 is the largest seen here."""
    x, y = sample(n, width, classes)
    grid = width * np.logspace(1, -3, 13)
    (ours,) = fit_linear(x, [problem(y, n, classes, seed=3)], grid)
    z = standardised(x, n)[:n]
    held = inner_folds(y[:n], np.arange(n), classes, seed=3).held_out()
    exact = np.zeros(len(grid))
    for k, penalty in enumerate(grid):
        theirs = LogisticRegression(C=1 / penalty, tol=1e-9, max_iter=10_000)
        for out in held:
            theirs.fit(z[~out], y[:n][~out])
            exact[k] += log_loss(y[:n][out], theirs.predict_proba(z[out])) / len(held)
    np.testing.assert_allclose(ours.losses, exact, rtol=linear_solver.RESOLUTION)
    alike = ours.aurocs >= ours.aurocs.max() - ALIKE
    chosen = exact[grid == ours.penalty].item()
    assert alike[grid == ours.penalty].item()
    assert chosen <= exact[alike].min() * (1 + 2 * linear_solver.RESOLUTION)


def test_a_probe_that_ranks_well_goes_before_one_that_says_nothing():
    """The hardest case; all of them by `python -m benchmarks.penalties`."""
    best, least_loss, chosen = np.mean([scores_of(CASES[0], seed) for seed in range(6)], axis=0)
    assert chosen > least_loss + 0.005 and chosen > best - 0.03


def test_scale_and_shift_of_embeddings_do_not_matter():
    x, y = sample(300, 40, 2)
    asked = [problem(y, 300, 2)]
    (scores,) = linear(x, asked)
    for moved in (1000 * x, 1e-6 * x, x + 50, x * np.linspace(0.1, 30, 40) - 7):
        np.testing.assert_allclose(linear(moved, asked)[0].scores, scores.scores, atol=1e-7)


def test_rotation_does_not_matter_without_a_penalty():
    x, y = sample(300, 40, 2)
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((40, 40)))[0]
    (scores,), (turned,) = (linear(a, [problem(y, 300, 2)], [0.0]) for a in (x, x @ turn))
    assert scores.note == turned.note == ""
    np.testing.assert_allclose(turned.scores, scores.scores, atol=1e-7)


def test_problems_together_equal_problems_alone():
    """Other targets, other rows, other kinds: answers come in the order of the questions."""
    x, y = sample(300, 40, 2)
    target = x[:, 0] + x[:, 1]
    asked = [
        problem(y, 300, 2, seed=1), problem(target, 300, 0), problem(1 - y, 300, 2),
        problem(y, 300, 2, train=np.arange(0, 290)),
    ]  # fmt: skip
    together = linear(x, asked)
    for one, expected in zip(asked, together, strict=True):
        np.testing.assert_allclose(linear(x, [one])[0].scores, expected.scores, atol=1e-6)
    np.testing.assert_allclose(together[0].scores.sum(axis=1), 1)


def test_wide_designs_that_share_axes_are_still_exact():
    n, width = 620, 300
    x, y = sample(n, width, 2)
    parts = [np.arange(0, 500), np.arange(100, 600)]
    asked = [problem(y, n, 2, train=rows) for rows in parts]
    for rows, ours in zip(parts, fit_linear(x, asked, [1.0]), strict=True):
        z = (x - x[rows].mean(axis=0)) / x[rows].std(axis=0)
        theirs = LogisticRegression(tol=1e-12, max_iter=1000, solver="newton-cholesky")
        theirs.fit(z[rows], y[rows])
        np.testing.assert_allclose(ours.weights, theirs.coef_.T, atol=1e-6)


def test_random_labels_are_at_chance_and_planted_ones_are_found():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((360, 40))
    labels = rng.integers(0, 2, (20, 360))
    asked = [problem(y, 300, 2, seed=k) for k, y in enumerate(labels)]
    answers = linear(x, asked[:10]) + linear(x, asked[10:])
    found = [roc_auc_score(y[300:], p.scores[:, 1]) for y, p in zip(labels, answers, strict=True)]
    half = 2.093 * np.std(found, ddof=1) / np.sqrt(20)  # Student's t, 19 degrees of freedom
    assert abs(np.mean(found) - 0.5) < half < 0.06
    planted = (x[:, :3].sum(axis=1) + 0.3 * rng.standard_normal(360) > 0).astype(int)
    (scores,) = linear(x, [problem(planted, 300, 2)])
    assert roc_auc_score(planted[300:], scores.scores[:, 1]) > 0.95


def test_constant_features_and_unseen_test_classes():
    x, y = sample(300, 40, 2)
    (scores,) = linear(x, [problem(y, 300, 2)], [1.0])
    x = np.c_[x[:, :40], np.full(360, 3.3)]
    x[300:, 40] = 1e6  # constant in training only
    y = np.where(np.arange(360) >= 350, 7, y)  # the test rows' targets are not read
    (padded,) = linear(x, [problem(y, 300, 2)], [1.0])
    np.testing.assert_allclose(padded.scores, scores.scores, atol=1e-9)
    (flat,) = linear(np.ones((360, 5)), [problem(y, 300, 2)], [1.0])
    np.testing.assert_allclose(flat.scores[:, 1], y[:300].mean(), atol=1e-9)


@pytest.mark.parametrize("classes", [0, 2, 4])
def test_features_that_are_constant_in_training_move_nothing(classes):
    """Neither their number nor, in another problem's training rows, that they vary there."""
    x, y = sample(90, 6, classes)
    last = np.arange(30, 120)
    asked = [problem(y, 90, classes), problem(y, 90, classes, train=last, test=np.arange(30))]
    dead = np.zeros((len(x), 6))
    dead[:10, :3] = np.random.default_rng(5).standard_normal((10, 3))  # not among `last`
    (_, expected) = fit_linear(x, asked)
    (_, found) = fit_linear(np.c_[x, dead], asked)
    assert found.penalty == expected.penalty
    np.testing.assert_allclose(found(np.c_[x, dead]), expected(x), atol=1e-6)
    (expected, _), (found, _) = fit_linear(x, asked), fit_linear(np.c_[x, 0 * dead + 7], asked)
    assert found.penalty == expected.penalty
    np.testing.assert_allclose(found(np.c_[x, 0 * dead + 7]), expected(x), atol=1e-6)


def test_notes_say_what_the_choice_stands_on():
    x, y = sample(60, 150, 2)
    few = np.zeros(len(y), int)
    few[30:] = 1
    assert "2 inner folds" in linear(x, [problem(y, 60, 2, groups=few)])[0].note
    (alone,) = fit_linear(x, [problem(y, 60, 2, groups=np.zeros(len(y), int))])
    assert "one subject" in alone.note
    assert "the middle of the grid is taken" in alone.note
    assert alone.penalty == pytest.approx(150 * 10 ** (3 - 6 * 5 / 9))
    single = np.where(np.arange(len(y)) == 4, 1, 0)  # one row of class 1
    assert "1 of 5 inner folds left out" in linear(x, [problem(single, 60, 2)])[0].note
    noise = problem(np.random.default_rng(1).standard_normal(len(y)), 60, 0)
    assert "strongest of the grid" in linear(x, [noise], [1e9, 1.0])[0].note


def test_what_does_not_converge_is_said():
    """Separable classes without a penalty have no solution."""
    x, y = sample(60, 150, 2)
    (model,) = fit_linear(x, [problem(y, 60, 2)], [0.0])
    assert "separable and there is no penalty" in model.note


@pytest.mark.parametrize("penalties", [[], [-1.0], [np.nan], 3.0])
def test_penalties_that_are_refused(penalties):
    with pytest.raises(ProbeError, match="penalties are finite numbers"):
        linear(np.ones((4, 2)), [problem(np.arange(4) % 2, 2, 2)], penalties)
