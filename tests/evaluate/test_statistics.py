import time

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from medalign_jax.evaluate import statistics as st


def sample(n=149, classes=4, draws=1, signal=1.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    logits = rng.standard_normal((draws, n, classes)) + signal * np.eye(classes)[labels]
    scores = np.exp(logits)
    return labels, scores / scores.sum(-1, keepdims=True)


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("decimals", [None, 1])
def test_auroc_equals_sklearn_with_and_without_ties(classes, decimals):
    labels, scores = sample(classes=classes)
    scores = scores[0]
    if decimals is not None:
        scores = np.round(scores, decimals)
        assert len(np.unique(scores)) < len(scores)
    if classes == 2:
        expected = roc_auc_score(labels, scores[:, 1])
    else:
        one_hot = np.eye(classes)[labels]
        expected = roc_auc_score(one_hot, scores, average="macro")
    ours = st.auroc(labels, scores)
    assert ours.value == pytest.approx(expected, abs=1e-12)
    assert ours.undefined == ()
    statistic = st.auroc_statistic(labels, scores)
    assert statistic(np.ones((1, len(labels))))[0, 0] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("classes", [2, 4])
def test_weighted_auroc_equals_sklearn_on_repeated_recordings(classes):
    labels, scores = sample(n=40, classes=classes, draws=3)
    scores = np.round(scores, 1)
    counts = np.random.default_rng(1).integers(0, 4, (5, 40))
    values = st.auroc_statistic(labels, scores)(counts)
    assert values.shape == (5, 3)
    for b, count in enumerate(counts):
        rows = np.repeat(np.arange(40), count)
        for d in range(3):
            target = labels[rows] if classes == 2 else np.eye(classes)[labels[rows]]
            score = scores[d, rows, 1] if classes == 2 else scores[d, rows]
            assert values[b, d] == pytest.approx(roc_auc_score(target, score), abs=1e-12)


def test_class_absent_from_the_test_sample_is_left_out_and_named():
    labels, scores = sample(classes=4)
    labels = np.where(labels == 2, 1, labels)
    ours = st.auroc(labels, scores[0])
    assert ours.undefined == (2,)
    assert np.isnan(ours.per_class[2])
    kept = [0, 1, 3]
    expected = np.mean([roc_auc_score(labels == c, scores[0, :, c]) for c in kept])
    assert ours.value == pytest.approx(expected, abs=1e-12)
    assert st.auroc_statistic(labels, scores)(np.ones((1, 149)))[0, 0] == pytest.approx(expected)


def test_one_class_only_is_refused():
    with pytest.raises(st.StatisticsError, match="all recordings of the sample are of one class"):
        st.auroc_statistic(np.zeros(5, int), np.random.rand(5, 2))


def test_bad_scores_are_refused():
    labels, scores = sample(n=8, classes=2)
    with pytest.raises(st.StatisticsError, match="recording 3 is not finite"):
        st.auroc(labels, np.where(np.arange(8)[:, None] == 3, np.nan, scores[0]))
    with pytest.raises(st.StatisticsError, match="go with labels"):
        st.auroc(labels[:5], scores[0])
    with pytest.raises(st.StatisticsError, match=r"classes 0\.\.1"):
        st.auroc(labels + 1, scores[0])


def test_simple_scores():
    labels, predicted = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])
    assert st.accuracy(labels, predicted) == 0.75
    assert st.unweighted_accuracy(labels, predicted) == pytest.approx(
        balanced_accuracy_score(labels, predicted)
    )
    assert st.mae(np.array([1.0, 2.0]), np.array([2.0, 0.0])) == 1.5


def test_recordings_of_a_subject_come_together():
    subjects = ["a", "b", "a", None, "", None, "b"]
    counts = st.subject_counts(subjects, 500, seed=3)
    assert np.array_equal(counts[:, 0], counts[:, 2])
    assert np.array_equal(counts[:, 1], counts[:, 6])
    units = counts[:, [0, 1, 3, 4, 5]]  # without an id every recording is a subject
    assert np.all(units.sum(axis=1) == 5)
    assert not np.array_equal(units[:, 2], units[:, 4])
    assert np.array_equal(counts, st.subject_counts(subjects, 500, seed=3))
    assert not np.array_equal(counts, st.subject_counts(subjects, 500, seed=4))


def test_mean_interval_agrees_with_the_normal_one():
    values = np.random.default_rng(0).standard_normal(400)
    interval = st.bootstrap(st.mean_statistic(values), [None] * 400, resamples=4000)
    half = 1.96 * values.std() / 20
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_coverage_is_nominal_with_correlated_recordings():
    """Ignoring subjects would cover about 60 %: the recordings of one are nearly copies."""
    rng = np.random.default_rng(0)
    subjects = np.repeat(np.arange(40), 5)
    covered = {"by subject": 0, "by recording": 0}
    trials = 200
    for trial in range(trials):
        values = rng.standard_normal(40)[subjects] + 0.2 * rng.standard_normal(200)
        for name, ids in (("by subject", subjects), ("by recording", [None] * 200)):
            interval = st.bootstrap(st.mean_statistic(values), ids, resamples=400, seed=trial)
            covered[name] += interval.low <= 0 <= interval.high
    assert 0.90 <= covered["by subject"] / trials <= 0.98
    assert covered["by recording"] / trials < 0.75


def test_auroc_interval_covers_the_truth():
    """Scores N(1, 1) against N(0, 1): AUROC is Phi(1 / sqrt 2) = 0.7602."""
    rng = np.random.default_rng(0)
    trials, covered = 200, 0
    for trial in range(trials):
        labels = np.arange(150) % 2
        scores = rng.standard_normal(150) + labels
        statistic = st.auroc_statistic(labels, np.stack([-scores, scores], 1))
        interval = st.bootstrap(statistic, [None] * 150, resamples=400, seed=trial)
        covered += interval.low <= 0.76025 <= interval.high
    assert 0.90 <= covered / trials <= 0.985


def test_paired_interval_is_narrower_than_the_difference_of_two():
    labels, before = sample(signal=1.0, draws=3)
    after = before + 0.05 * np.eye(4)[labels]
    subjects = [None] * len(labels)
    first, second = st.auroc_statistic(labels, before), st.auroc_statistic(labels, after)
    difference = st.paired_bootstrap(first, second, subjects)
    apart = [st.bootstrap(s, subjects) for s in (first, second)]
    assert difference.value == pytest.approx(apart[1].value - apart[0].value)
    assert difference.low > 0  # every recording improved
    assert difference.high - difference.low < 0.5 * (apart[0].high - apart[0].low)
    same = st.paired_bootstrap(first, first, subjects)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_average_over_draws_and_resampled_draws():
    rng = np.random.default_rng(0)
    draw_effect = np.array([-1.0, 0.0, 1.0])[:, None]
    values = draw_effect + 0.01 * rng.standard_normal((3, 60))
    statistic = st.mean_statistic(values)
    fixed = st.bootstrap(statistic, [None] * 60)
    drawn = st.bootstrap(statistic, [None] * 60, resample_draws=True)
    assert fixed.value == drawn.value == pytest.approx(values.mean())
    assert fixed.high - fixed.low < 0.02
    assert drawn.high - drawn.low > 1.0
    with pytest.raises(st.StatisticsError, match="cannot be paired"):
        st.paired_bootstrap(
            statistic, st.mean_statistic(values[:2]), [None] * 60, resample_draws=True
        )


def test_resamples_without_a_class_are_counted_or_refused():
    labels, scores = sample(n=30, classes=2)
    labels = np.r_[np.ones(3, int), np.zeros(27, int)]
    interval = st.bootstrap(st.auroc_statistic(labels, scores), [None] * 30)
    assert interval.skipped > 0
    assert interval.skipped + interval.resamples == 2000
    # every positive is of one subject, of two in all
    subjects = ["p"] * 3 + ["q"] * 27
    with pytest.raises(st.StatisticsError, match="too few subjects in a class"):
        st.bootstrap(st.auroc_statistic(labels, scores), subjects, resamples=200)


def test_chunks_do_not_change_the_result(monkeypatch):
    labels, scores = sample()
    statistic = st.auroc_statistic(labels, scores)
    whole = st.bootstrap(statistic, [None] * 149, resamples=300)
    monkeypatch.setattr(st, "_CHUNK_ELEMENTS", 149 * 7)
    assert st.bootstrap(statistic, [None] * 149, resamples=300) == whole


def test_three_stages_of_twenty_draws_take_seconds():
    start = time.perf_counter()
    labels, _ = sample()
    for stage in range(3):
        _, scores = sample(draws=20, seed=stage)
        interval = st.bootstrap(st.auroc_statistic(labels, scores), [None] * 149)
        assert interval.low < interval.value < interval.high
    assert time.perf_counter() - start < 30
