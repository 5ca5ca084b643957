"""Scores of a test sample and their bootstrap intervals over subjects.

Every score is written once, as a *statistic*: a function that maps weights of the recordings,
(B, n), to values, (B, D), one column for each draw or seed. The score itself is the statistic
at weights of one; the bootstrap is the statistic at the counts with which each resample holds
the recordings. Two stages compared on the same weights give a paired interval.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from medalign_jax.errors import UserError

Statistic = Callable[[np.ndarray], np.ndarray]

_CHUNK_ELEMENTS = 1 << 18  # float64 values in one block of resamples: stays near the caches


class StatisticsError(UserError):
    """A score that the sample at hand does not define."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """A value with its percentile interval.

    Attributes:
      value: The score of the sample itself, averaged over draws.
      low: Lower end of the interval.
      high: Upper end of the interval.
      level: Coverage aimed at, 0.95 for 95 %.
      resamples: Resamples that the interval is made of.
      skipped: Resamples left out because a class of the sample was absent from them.
    """

    value: float
    low: float
    high: float
    level: float
    resamples: int
    skipped: int = 0

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclasses.dataclass(frozen=True)
class Auroc:
    """Macro one-vs-rest AUROC.

    Attributes:
      value: Mean over the classes that the sample defines; NaN when it defines none.
      per_class: (C,), NaN for a class without positives or without negatives.
      undefined: Indices of those classes; say them beside the value when there are any.
    """

    value: float
    per_class: np.ndarray
    undefined: tuple[int, ...]


# ---------------------------------------------------------------------------- statistics


def auroc_statistic(labels: np.ndarray, scores: np.ndarray) -> Statistic:
    """Macro one-vs-rest AUROC as a function of the recordings' weights.

    Ties count one half. With two classes only the scores of class 1 are read, which is the
    usual AUROC. Classes that the whole sample does not define (no positive, or no negative) are
    left out of the mean; weights that miss a class which the sample has give NaN.

    Args:
      labels: (n,) integer classes.
      scores: (n, C) or (D, n, C); only their order over recordings matters.

    Returns:
      A function from weights (B, n) to values (B, D).

    Raises:
      StatisticsError: shapes disagree, a label is out of range, a score is not finite, or no
        class is defined.
    """
    labels, scores = _check_scores(labels, scores)
    columns = range(1, 2) if scores.shape[-1] == 2 else range(scores.shape[-1])
    classes = [c for c in columns if 0 < np.sum(labels == c) < len(labels)]
    if not classes:
        raise StatisticsError(
            "AUROC is not defined: all recordings of the sample are of one class "
            f"({int(labels[0])}); a test split needs at least two"
        )

    def statistic(weights: np.ndarray) -> np.ndarray:
        by_recording = np.ascontiguousarray(np.asarray(weights, np.float64).T)  # (n, B)
        total = np.zeros((len(scores), by_recording.shape[1]))
        for c in classes:
            for d, score in enumerate(scores[..., c]):
                total[d] += _weighted_auroc(score, labels == c, by_recording)
        return (total / len(classes)).T

    return statistic


def mean_statistic(per_recording: np.ndarray) -> Statistic:
    """Weighted mean of a value that every recording has: accuracy, recall@k, absolute error.

    Args:
      per_recording: (n,) or (D, n).

    Returns:
      A function from weights (B, n) to values (B, D).
    """
    values = np.atleast_2d(np.asarray(per_recording, np.float64))
    if not np.all(np.isfinite(values)):
        raise StatisticsError("a value to be averaged over the recordings is not finite")

    def statistic(weights: np.ndarray) -> np.ndarray:
        weights = np.asarray(weights, np.float64)
        return weights @ values.T / weights.sum(axis=1, keepdims=True)

    return statistic


def class_mean_statistic(labels: np.ndarray, per_recording: np.ndarray) -> Statistic:
    """Mean over classes of the mean within a class (unweighted accuracy when fed with hits).

    Args:
      labels: (n,) integer classes; the classes that occur are averaged.
      per_recording: (n,) or (D, n).

    Returns:
      A function from weights (B, n) to values (B, D); NaN where a class has no weight.
    """
    labels = np.asarray(labels)
    values = np.atleast_2d(np.asarray(per_recording, np.float64))
    members = [labels == c for c in np.unique(labels)]

    def statistic(weights: np.ndarray) -> np.ndarray:
        weights = np.asarray(weights, np.float64)
        with np.errstate(invalid="ignore"):
            means = [
                weights[:, m] @ values[:, m].T / weights[:, m].sum(axis=1, keepdims=True)
                for m in members
            ]
        return np.mean(means, axis=0)

    return statistic


# --------------------------------------------------------------------------- plain scores


def auroc(labels: np.ndarray, scores: np.ndarray) -> Auroc:
    """Macro one-vs-rest AUROC of one set of scores, (n,) labels and (n, C) scores.

    Raises:
      StatisticsError: as `auroc_statistic`, except that undefined classes are reported.
    """
    labels, stacked = _check_scores(labels, scores)
    if len(stacked) != 1:
        raise StatisticsError("auroc takes scores (n, C); use auroc_statistic for (D, n, C)")
    n_classes = stacked.shape[-1]
    if n_classes == 2:  # the usual AUROC, whichever class is asked
        stacked = stacked[..., 1:] * np.array([-1.0, 1.0])
    per_class = np.full(n_classes, np.nan)
    ones = np.ones((len(labels), 1))
    for c in range(n_classes):
        per_class[c] = _weighted_auroc(stacked[0, :, c], labels == c, ones)[0]
    undefined = tuple(int(c) for c in np.flatnonzero(np.isnan(per_class)))
    value = float(np.nanmean(per_class)) if len(undefined) < n_classes else float("nan")
    return Auroc(value, per_class, undefined)


def mae(targets: np.ndarray, predictions: np.ndarray) -> float:
    """Mean absolute error, in the targets' unit."""
    return float(np.mean(np.abs(np.asarray(predictions) - np.asarray(targets))))


def accuracy(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Share of recordings whose predicted class is the label."""
    return float(np.mean(np.asarray(labels) == np.asarray(predicted)))


def unweighted_accuracy(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Mean over the classes of the sample of the share found (unweighted average recall)."""
    hits = np.asarray(labels) == np.asarray(predicted)
    return float(class_mean_statistic(labels, hits)(np.ones((1, len(hits))))[0, 0])


# ------------------------------------------------------------------------------ bootstrap


def subject_counts(subjects: Sequence[Hashable | None], resamples: int, seed: int) -> np.ndarray:
    """How often each resample of subjects holds each recording.

    Subjects are drawn with replacement, as many as there are; all recordings of a subject come
    together. A recording whose subject is None or "" is a subject of its own.

    Args:
      subjects: One id a recording.
      resamples: Number of resamples, B.
      seed: Same seed, same counts.

    Returns:
      (B, n) int counts.
    """
    if not len(subjects) or resamples < 1:
        raise StatisticsError("a bootstrap needs at least one recording and one resample")
    index: dict[Hashable, int] = {}
    of_recording = [
        index.setdefault(("recording", i) if s is None or s == "" else ("subject", s), len(index))
        for i, s in enumerate(subjects)
    ]
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(index), np.full(len(index), 1 / len(index)), size=resamples)
    return counts[:, of_recording]


def bootstrap(
    statistic: Statistic,
    subjects: Sequence[Hashable | None],
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    resample_draws: bool = False,
) -> Interval:
    """Percentile bootstrap interval of a statistic over subjects.

    The statistic is averaged over its draws in every resample, so the interval is that of the
    average over draws and covers the choice of test subjects. `resample_draws` resamples the
    draws too, which adds the choice of training examples.

    Args:
      statistic: From weights (B, n) to values (B, D).
      subjects: (n,) ids, see `subject_counts`.
      resamples: Number of resamples.
      level: Coverage.
      seed: Seed of the resamples.
      resample_draws: Also draw the D columns with replacement.

    Raises:
      StatisticsError: more than half of the resamples leave the statistic undefined, as with
        very few subjects in a class.
    """
    return _interval([statistic], subjects, resamples, level, seed, resample_draws)


def paired_bootstrap(
    before: Statistic,
    after: Statistic,
    subjects: Sequence[Hashable | None],
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    resample_draws: bool = False,
) -> Interval:
    """Interval of `after` minus `before`, both taken on the same resamples (and draws).

    Arguments and errors as `bootstrap`; the two statistics are of the same recordings in the
    same order and, with `resample_draws`, of the same draws.
    """
    return _interval([before, after], subjects, resamples, level, seed, resample_draws)


def _interval(statistics, subjects, resamples, level, seed, resample_draws) -> Interval:
    if not 0 < level < 1:
        raise StatisticsError(f"level is a coverage between 0 and 1, not {level}")
    counts = subject_counts(subjects, resamples, seed)
    whole = [np.ravel(s(np.ones((1, counts.shape[1])))) for s in statistics]
    if len({len(values) for values in whole}) != 1 and resample_draws:
        raise StatisticsError(
            f"stages have different numbers of draws ({[len(v) for v in whole]}), "
            "so their draws cannot be paired"
        )
    point = _difference([values.mean() for values in whole])
    samples = []
    step = max(1, _CHUNK_ELEMENTS // counts.shape[1])
    rng = np.random.default_rng([seed, 1])
    for start in range(0, resamples, step):
        block = counts[start : start + step]
        values = [s(block) for s in statistics]
        if resample_draws:
            n = values[0].shape[1]
            share = rng.multinomial(n, np.full(n, 1 / n), size=len(block)) / n
            samples.append(_difference([(v * share).sum(axis=1) for v in values]))
        else:
            samples.append(_difference([v.mean(axis=1) for v in values]))
    sample = np.concatenate(samples)
    kept = sample[~np.isnan(sample)]
    if not np.isfinite(point) or len(kept) < resamples / 2:
        raise StatisticsError(
            f"only {len(kept)} of {resamples} bootstrap resamples hold every class: too few "
            "subjects in a class for an interval; report the value without one"
        )
    low, high = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(point), float(low), float(high), level, len(kept), resamples - len(kept))


def _difference(values):
    return values[0] if len(values) == 1 else values[1] - values[0]


# -------------------------------------------------------------------------------- helpers


def _weighted_auroc(score: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted AUROC of (n,) scores, (n,) booleans and (n, B) weights: (B,).

    For each positive the weight of the negatives below it, plus half of that at the same score
    (Mann-Whitney U), by one sort and one cumulative sum for all resamples.
    """
    positives, negatives = np.flatnonzero(positive), np.flatnonzero(~positive)
    negatives = negatives[np.argsort(score[negatives], kind="stable")]
    below = np.zeros((len(negatives) + 1, weights.shape[1]))
    np.cumsum(weights[negatives], axis=0, out=below[1:])
    left = np.searchsorted(score[negatives], score[positives], side="left")
    right = np.searchsorted(score[negatives], score[positives], side="right")
    weight = weights[positives]
    wins = np.einsum("pb,pb->b", weight, below[left])
    # Without ties, as nearly always, the second half is the first again.
    ties = np.flatnonzero(left != right)
    wins += 0.5 * np.einsum("pb,pb->b", weight[ties], below[right[ties]] - below[left[ties]])
    pairs = weight.sum(axis=0) * below[-1]
    return np.divide(wins, pairs, out=np.full(len(wins), np.nan), where=pairs > 0)


def _check_scores(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels, scores = np.asarray(labels), np.asarray(scores)
    scores = scores[None] if scores.ndim == 2 else scores
    if scores.ndim != 3 or labels.shape != scores.shape[1:2] or not len(labels):
        raise StatisticsError(
            f"scores (n, C) or (D, n, C) go with labels (n,); got {scores.shape} and {labels.shape}"
        )
    if scores.shape[-1] < 2:
        raise StatisticsError("AUROC needs scores of at least two classes")
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= scores.shape[-1]:
        raise StatisticsError(f"labels are integer classes 0..{scores.shape[-1] - 1}")
    if not np.all(np.isfinite(scores)):
        bad = np.argwhere(~np.isfinite(scores))[0]
        raise StatisticsError(f"score of draw {bad[0]}, recording {bad[1]} is not finite")
    return labels, scores
