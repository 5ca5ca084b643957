"""Intervals over subjects: by hand, against plain loops, and by how often they hold the truth."""

import time

import numpy as np
import pytest
from scipy.stats import norm
from scipy.stats import t as student

from benchmarks.chance import study
from benchmarks.coverage import CASES, coverage
from medalign_jax.evaluate import statistics as st
from medalign_jax.evaluate.intervals import LEAST_SUBJECTS, interval, paired_interval

RNG = np.random.default_rng(0)


def scored(subjects, recordings, classes=2, draws=1, signal=1.0, seed=0):
    """Labels by subject, scores (D, n, C) that know them a little, subjects."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(subjects) % classes, recordings)
    scores = rng.standard_normal((draws, len(labels), classes)) + signal * np.eye(classes)[labels]
    return labels, scores, np.repeat(np.arange(subjects), recordings)


def test_an_error_by_hand():
    """Three values, each of a subject of its own: Student's t on the logarithm of the mean."""
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 9.0])
    found = interval(st.mean_statistic(values), [None] * 6)
    mean, error = values.mean(), values.std(ddof=1) / 6**0.5
    weight = (values - mean) ** 2
    freedom = min(5.0, 1.5 * weight.sum() ** 2 / (weight**2).sum())
    factor = np.exp(student.isf(0.025, freedom) * error / mean)
    assert found.value == pytest.approx(mean)
    assert (found.low, found.high) == pytest.approx((mean / factor, mean * factor))
    assert (found.subjects, found.draws) == (6, 1)


def test_a_difference_by_hand():
    values = np.array([[1.0, 2.0, 3.0, 4.0, 5.0, 9.0], [2.0, 2.5, 3.5, 6.0, 5.5, 9.5]])
    pair = [st.mean_statistic(v, scale="free") for v in values]
    found = paired_interval(*pair, [None] * 6)
    change = values[1] - values[0]
    weight = (change - change.mean()) ** 2
    freedom = min(5.0, 1.5 * weight.sum() ** 2 / (weight**2).sum())
    half = student.isf(0.025, freedom) * change.std(ddof=1) / 6**0.5
    assert (found.low, found.high) == pytest.approx((change.mean() - half, change.mean() + half))
    t = change.mean() / (change.std(ddof=1) / 6**0.5)
    assert found.p_value == pytest.approx(2 * student.sf(t, freedom), rel=1e-6)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("decimals", [None, 0])
def test_the_score_without_each_subject_is_that_of_the_others(classes, decimals):
    labels, scores, subjects = scored(24, 3, classes, draws=2)
    scores = scores if decimals is None else scores.round(decimals)
    statistic = st.auroc_statistic(labels, scores)
    slow = np.concatenate([statistic((subjects != s)[None].astype(float)) for s in range(24)])
    np.testing.assert_allclose(statistic.without_each(subjects), slow, rtol=0, atol=1e-12)


@pytest.mark.parametrize("classes", [2, 4])
def test_so_it_is_within_folds_and_where_labels_vary_within_a_subject(classes):
    labels, scores, subjects = scored(24, 4, classes, draws=2)
    labels = np.where(np.arange(96) % 7 == 0, (labels + 1) % classes, labels)
    folds = np.stack([subjects % 3, subjects // 8])
    statistic = st.auroc_statistic(labels, scores.round(1), folds=folds)
    slow = np.concatenate([statistic((subjects != s)[None].astype(float)) for s in range(24)])
    np.testing.assert_allclose(statistic.without_each(subjects), slow, rtol=0, atol=1e-12)
    found = interval(statistic, subjects)
    assert found.low < found.value < found.high


def test_all_correct_is_not_certain():
    labels, scores, subjects = scored(20, 2, signal=50.0)
    found = interval(st.auroc_statistic(labels, scores), subjects)
    assert found.value == 1.0 == found.high and 0.6 < found.low < 0.95
    hits = interval(st.mean_statistic(np.ones(40)), subjects)
    assert hits.high == 1.0 and hits.low == pytest.approx(0.82, abs=0.03)


def test_recordings_of_a_subject_count_as_one():
    labels, scores, subjects = scored(30, 1, signal=1.0)
    alone = interval(st.auroc_statistic(labels, scores), subjects)
    copies = st.auroc_statistic(np.repeat(labels, 8), np.repeat(scores, 8, axis=1))
    together = interval(copies, np.repeat(subjects, 8))
    assert (together.low, together.high) == pytest.approx((alone.low, alone.high), abs=1e-9)
    apart = interval(copies, [None] * 240)
    assert apart.high - apart.low < 0.5 * (alone.high - alone.low)


def test_draws_widen_an_interval_by_their_spread():
    effect = np.linspace(-1, 1, 9)[:, None]
    values = effect + 0.01 * RNG.standard_normal((9, 60))
    one = interval(st.mean_statistic(values.mean(0, keepdims=True), scale="free"), [None] * 60)
    many = interval(st.mean_statistic(values, scale="free"), [None] * 60)
    assert many.value == pytest.approx(one.value) and many.draws == 9
    half = student.isf(0.025, 8) * effect.std(ddof=1) / 3
    assert many.high - many.value == pytest.approx(half, rel=0.05)
    assert one.high - one.low < 0.02


def test_too_few_subjects_of_a_class_are_told_with_its_name():
    labels = np.repeat([0, 0, 0, 0, 0, 0, 1, 1], 3)
    scores = RNG.standard_normal((24, 2))
    subjects = np.repeat(np.arange(8), 3)
    statistic = st.auroc_statistic(labels, scores, ("normal", "murmur"))
    with pytest.raises(st.StatisticsError, match=f"only 2.*'murmur'.*needs {LEAST_SUBJECTS}"):
        interval(statistic, subjects)
    with pytest.raises(st.StatisticsError, match="only 2"):
        paired_interval(statistic, statistic, subjects)


def test_the_same_twice_is_not_a_difference():
    labels, scores, subjects = scored(40, 2, draws=3)
    statistic = st.auroc_statistic(labels, scores)
    same = paired_interval(statistic, statistic, subjects)
    assert same.value == 0 and same.p_value == 1 and same.low <= 0 <= same.high


def test_columns_that_cannot_be_paired_are_refused():
    pair = [st.mean_statistic(RNG.random((draws, 30))) for draws in (2, 3)]
    with pytest.raises(st.StatisticsError, match="cannot be paired"):
        paired_interval(*pair, [None] * 30)


def test_holm_by_hand():
    assert st.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert st.holm([0.5, 0.9]).tolist() == [1.0, 1.0]
    with pytest.raises(st.StatisticsError):
        st.holm([0.1, 1.2])


def test_large_samples_agree_with_the_normal_interval():
    """Scores N(1, 1) against N(0, 1): AUROC is Phi(1 / sqrt 2)."""
    labels = np.arange(4000) % 2
    values = np.random.default_rng(1).standard_normal(4000) + labels
    statistic = st.auroc_statistic(labels, np.stack([-values, values], 1))
    found = interval(statistic, [None] * 4000)
    assert found.low < norm.cdf(0.5**0.5) < found.high
    expected = 1.96 * ((statistic.without_each(np.arange(4000)) - found.value) ** 2).sum() ** 0.5
    assert (found.high - found.low) / 2 == pytest.approx(expected, rel=0.01)


# The hardest cells; all of them, at 1,000 repetitions, by `python -m benchmarks.coverage`.
HARD = [c for c in CASES if c.subjects == 20 and c.recordings == 2]


@pytest.mark.parametrize("case", HARD, ids=str)
def test_intervals_of_few_subjects_cover(case):
    """Nominal is 0.95 and at least 0.93 is wanted; 0.90 leaves room for the repetitions."""
    found = coverage(case, 100 if "difference" in case.kind else 400, seed=1)
    assert found.covered >= 0.90 and found.certain == 0
    assert found.width < 1


def test_twenty_thousand_recordings_take_seconds():
    labels, scores, subjects = scored(5000, 4, draws=20)
    begun = time.process_time()
    found = interval(st.auroc_statistic(labels, scores), subjects)
    assert time.process_time() - begun < 20
    assert found.high - found.low < 0.03


@pytest.mark.parametrize(("folds", "times"), [(1, 1.0), (2, 3.0), (5, 2.25)])
def test_folds_widen_by_the_training_sets_that_they_share(folds, times):
    """Nadeau & Bengio (2003): the variance counts 1 + K / (K - 1) times, for every scale."""
    values = np.array([[1.0, 2.0, 3.0, 4.0, 5.0, 9.0], [2.0, 2.5, 3.5, 6.0, 5.5, 9.5]])
    pair = [st.mean_statistic(v, scale="free") for v in values]
    plain, found = (paired_interval(*pair, [None] * 6, folds=f) for f in (1, folds))
    assert found.high - found.low == pytest.approx(times**0.5 * (plain.high - plain.low))
    errors = st.mean_statistic(values[0], scale="error")
    plain, found = (interval(errors, [None] * 6, folds=f) for f in (1, folds))
    ratio = np.log(found.high / found.low) / np.log(plain.high / plain.low)
    assert ratio == pytest.approx(times**0.5)
    right = st.mean_statistic(np.arange(400.0) % 4 < 3, scale="share")
    plain, found = (interval(right, [None] * 400, folds=f) for f in (1, folds))
    half = student.isf(0.025, 399) * (times * 0.75 * 0.25 / 400) ** 0.5  # Wilson's, nearly
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.02)


def test_labels_that_say_nothing_are_at_chance_by_the_whole_evaluation():
    """Few and small; `python -m benchmarks.chance` has the figures of docs/measuring.md."""
    studies = [study(24, seed) for seed in range(8)]
    values = np.array([one["first"].value for one in studies])
    assert abs(values.mean() - 0.5) < 3 * values.std(ddof=1) / 8**0.5
    planted = study(60, 0, planted=3.0)
    assert planted["second minus first"].ci_low > 0 and planted["second"].value > 0.9
