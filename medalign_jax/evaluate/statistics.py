"""Scores of a test sample: AUROC, shares, errors.

Every score is written once, as a *statistic*: a function that maps weights of the recordings,
(B, n), to values, (B, D), one column for each draw, seed or repeat. The score itself is the
statistic at weights of one. What an interval needs to know besides (the score without each
subject, how many subjects of each class there are, the scale) the statistics below say
themselves; `evaluate.intervals` makes intervals of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from medalign_jax.core.errors import UserError

Statistic = Callable[[np.ndarray], np.ndarray]


class StatisticsError(UserError):
    """A score, or an interval, that the sample at hand does not define."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """A value with its interval.

    Attributes:
      value: the score of the sample itself, averaged over draws.
      low: lower end of the interval.
      high: upper end of the interval.
      level: coverage aimed at, 0.95 for 95 %.
      method: how it was made, in words.
      subjects: subjects behind it.
      draws: columns (draws, seeds, repeats of folds) whose spread is in it; with 1 the interval
        is that of the one training run at hand.
      p_value: of a difference, two-sided, against no difference; None of a score.
    """

    value: float
    low: float
    high: float
    level: float
    method: str = ""
    subjects: int = 0
    draws: int = 1
    p_value: float | None = None

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclasses.dataclass(frozen=True)
class Auroc:
    """Macro one-vs-rest AUROC.

    Attributes:
      value: mean over the classes that the sample defines; NaN when it defines none.
      per_class: (C,), NaN for a class without positives or without negatives.
      undefined: indices of those classes; say them beside the value when there are any.
    """

    value: float
    per_class: np.ndarray
    undefined: tuple[int, ...]


# ---------------------------------------------------------------------------- statistics


class AurocStatistic:
    """Macro one-vs-rest AUROC of (n,) labels and (D, n, C) scores; see `auroc_statistic`."""

    scale = "share"

    def __init__(
        self,
        labels: np.ndarray,
        scores: np.ndarray,
        names: Sequence[str] | None = None,
        folds: np.ndarray | None = None,
    ):
        self._labels, self._scores = _check_scores(labels, scores)
        count = self._scores.shape[-1]
        self._names = names
        self._folds = _check_folds(folds, self._scores.shape[:2])
        columns = range(1, 2) if count == 2 else range(count)
        self._classes = [c for c in columns if self._is_defined(c)]
        if not self._classes:
            raise StatisticsError(
                "AUROC is not defined: all recordings of the sample are of one class "
                f"({int(self._labels[0])}); a test split needs at least two"
                if folds is None
                else "AUROC is not defined: in no fold are test recordings of two classes"
            )

    def _parts(self, d: int) -> list[np.ndarray]:
        """Recordings that column d compares with each other."""
        fold = self._folds[min(d, len(self._folds) - 1)]
        return [np.flatnonzero(fold == number) for number in np.unique(fold)]

    def _pairs(self, d: int, c: int) -> list[np.ndarray]:
        """Those of `_parts` with recordings of class c and others."""
        positive = self._labels == c
        return [rows for rows in self._parts(d) if 0 < np.sum(positive[rows]) < len(rows)]

    def _is_defined(self, c: int) -> bool:
        return all(self._pairs(d, c) for d in range(len(self._folds)))

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """(B, D) values at weights (B, n)."""
        by_recording = np.ascontiguousarray(np.asarray(weights, np.float64).T)  # (n, B)
        total = np.zeros((len(self._scores), by_recording.shape[1]))
        for c in self._classes:
            positive = self._labels == c
            for d, score in enumerate(self._scores[..., c]):
                total[d] += _share(
                    _weighted_wins(score[rows], positive[rows], by_recording[rows])
                    for rows in self._pairs(d, c)
                )
        return (total / len(self._classes)).T

    def without_each(self, groups: np.ndarray) -> np.ndarray:
        """(K, D) values without each of the K subjects, from (n,) subject numbers.

        By placements (DeLong, DeLong & Clarke-Pearson 1988), a subject's taken together
        (Obuchowski 1997): one sort per column and class.
        """
        count = groups.max() + 1
        values = np.zeros((count, len(self._scores)))
        for c in self._classes:
            positive = self._labels == c
            for d, score in enumerate(self._scores[..., c]):
                values[:, d] += _share(
                    _wins_without(score[rows], positive[rows], groups[rows], count)
                    for rows in self._pairs(d, c)
                )
        return values / len(self._classes)

    def strata(self, groups: np.ndarray) -> np.ndarray:
        """(K,) the rarest class of each subject."""
        return _rarest(self._labels, groups)

    def check_subjects(self, groups: np.ndarray, least: int) -> None:
        """Raises StatisticsError where a class, or its rest, has fewer than `least` subjects."""
        for c in self._classes:
            for name, members in (("of", self._labels == c), ("not of", self._labels != c)):
                other = len(self._scores[0, 0]) == 2 and name == "not of"
                name = ("of", 1 - c) if other else (name, c)
                _check_count(groups[members], least, *name, self._names)

    def effective_subjects(self, value: float, groups: np.ndarray) -> float:
        """n with variance value (1 - value) / n if the recordings of a subject were copies.

        Hanley & McNeil 1982, the larger of the variances of the score and of its mirror image;
        over several classes as if their AUROCs rose and fell together.
        """
        spreads = []
        for c in self._classes:
            found = []  # of each fold (pairs, variance / (value (1 - value)))
            for rows in self._pairs(0, c):
                positive = self._labels[rows] == c
                m, n = _kish(groups[rows][positive]), _kish(groups[rows][~positive])
                q = (1 - value) / (2 - value), value / (1 + value)
                worst = max((m - 1) * q[0] + (n - 1) * q[1], (m - 1) * q[1] + (n - 1) * q[0])
                found.append((m * n, (1 + worst) / (m * n)))
            pairs, spread = np.array(found).T
            spreads.append(np.sum((pairs / pairs.sum()) ** 2 * spread))
        return 1 / float(np.mean(spreads))


class MeanStatistic:
    """Weighted mean of (D, n) values, within classes first where given; see `mean_statistic`."""

    def __init__(self, values, labels=None, scale=None, names: Sequence[str] | None = None):
        self._values = np.atleast_2d(np.asarray(values, np.float64))
        if not np.all(np.isfinite(self._values)):
            raise StatisticsError("a value to be averaged over the recordings is not finite")
        n = self._values.shape[1]
        self._by_class = labels is not None
        self._labels = np.zeros(n, int) if labels is None else np.asarray(labels)
        if self._labels.shape != (n,):
            raise StatisticsError(f"{n} values go with {n} labels; got {self._labels.shape}")
        self._classes, self._names = np.unique(self._labels), names
        self.scale = scale or _scale_of(self._values)
        if self.scale not in ("share", "error", "free"):
            raise StatisticsError(f"scale is 'share', 'error' or 'free', not {self.scale!r}")

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """(B, D) values at weights (B, n)."""
        weights = np.asarray(weights, np.float64)
        return np.mean([self._mean(weights, self._labels == c) for c in self._classes], axis=0)

    def _mean(self, weights: np.ndarray, members: np.ndarray) -> np.ndarray:
        weights = weights[:, members]
        with np.errstate(invalid="ignore"):
            return weights @ self._values[:, members].T / weights.sum(axis=1, keepdims=True)

    def without_each(self, groups: np.ndarray) -> np.ndarray:
        """(K, D) values without each of the K subjects, from (n,) subject numbers."""
        count, means = groups.max() + 1, []
        for c in self._classes:
            members = self._labels == c
            own, values = groups[members], self._values[:, members]
            sums = np.stack([np.bincount(own, v, minlength=count) for v in values], axis=1)
            sizes = np.bincount(own, minlength=count)[:, None]
            with np.errstate(invalid="ignore"):
                means.append((values.sum(axis=1) - sums) / (sizes.sum() - sizes))
        return np.mean(means, axis=0)

    def strata(self, groups: np.ndarray) -> np.ndarray:
        """(K,) the rarest class of each subject; all the same where no classes are given."""
        return _rarest(self._labels, groups)

    def check_subjects(self, groups: np.ndarray, least: int) -> None:
        """Raises StatisticsError where there are fewer than `least` subjects (of a class)."""
        for c in self._classes:
            kind = ("of", c) if self._by_class else ("", None)
            _check_count(groups[self._labels == c], least, *kind, self._names)

    def effective_subjects(self, value: float, groups: np.ndarray) -> float:
        """n with variance value (1 - value) / n if the recordings of a subject were copies."""
        del value
        spreads = [1 / _kish(groups[self._labels == c]) for c in self._classes]
        return len(spreads) ** 2 / float(np.sum(spreads))


def auroc_statistic(
    labels: np.ndarray,
    scores: np.ndarray,
    names: Sequence[str] | None = None,
    folds: np.ndarray | None = None,
) -> AurocStatistic:
    """Macro one-vs-rest AUROC as a function of the recordings' weights.

    Where probes of several folds predicted, only recordings of the same fold are compared, and
    the pairs of all folds count alike. Probes of different folds score on scales of their own, and
    a training part that lacks a class has test recordings with more of it: pooled, scores without
    any signal give less than 0.5 (Parker, Guenter & Bedo 2007; Airola et al. 2011).

    Ties count one half. With two classes only the scores of class 1 are read, which is the
    usual AUROC. Classes that the whole sample does not define (no positive, or no negative) are
    left out of the mean; weights that miss a class which the sample has give NaN.

    Args:
      labels: (n,) integer classes.
      scores: (n, C) or (D, n, C); only their order over recordings matters.
      names: the C classes' names, for messages.
      folds: (n,), or (D, n) where the columns were dealt differently: the fold that tested a
        recording. None compares all.

    Returns:
      A function from weights (B, n) to values (B, D).

    Raises:
      StatisticsError: shapes disagree, a label is out of range, a score is not finite, or no
        class is defined.
    """
    return AurocStatistic(labels, scores, names, folds)


def mean_statistic(per_recording: np.ndarray, scale: str | None = None) -> MeanStatistic:
    """Weighted mean of a value that every recording has: accuracy, recall@k, absolute error.

    Args:
      per_recording: (n,) or (D, n).
      scale: on which an interval is built: "share" (values from 0 to 1), "error" (never
        negative) or "free". By default a share where all values are 0 or 1, an error where
        none is negative.

    Returns:
      A function from weights (B, n) to values (B, D).
    """
    return MeanStatistic(per_recording, scale=scale)


def class_mean_statistic(
    labels: np.ndarray, per_recording: np.ndarray, names: Sequence[str] | None = None
) -> MeanStatistic:
    """Mean over classes of the mean within a class (unweighted accuracy when fed with hits).

    Args:
      labels: (n,) integer classes; the classes that occur are averaged.
      per_recording: (n,) or (D, n).
      names: the classes' names, for messages.

    Returns:
      A function from weights (B, n) to values (B, D); NaN where a class has no weight.
    """
    return MeanStatistic(per_recording, labels, names=names)


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
        per_class[c] = _share([_weighted_wins(stacked[0, :, c], labels == c, ones)])[0]
    undefined = tuple(int(c) for c in np.flatnonzero(np.isnan(per_class)))
    value = float(np.nanmean(per_class)) if len(undefined) < n_classes else float("nan")
    return Auroc(value, per_class, undefined)


def mae(targets: np.ndarray, predictions: np.ndarray) -> float:
    """Mean absolute error, in the targets' unit."""
    return float(np.mean(np.abs(np.asarray(predictions) - np.asarray(targets))))


def hits(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(..., n) probability that the class of the highest score (..., n, C) is the label (n,).

    Classes of equal scores share it evenly, so that no name comes before another.
    """
    best = scores == scores.max(axis=-1, keepdims=True)
    return best[..., np.arange(len(labels)), labels] / best.sum(axis=-1)


def accuracy(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Share of recordings whose predicted class is the label."""
    return float(np.mean(np.asarray(labels) == np.asarray(predicted)))


def unweighted_accuracy(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Mean over the classes of the sample of the share found (unweighted average recall)."""
    hits = np.asarray(labels) == np.asarray(predicted)
    return float(class_mean_statistic(labels, hits)(np.ones((1, len(hits))))[0, 0])


# -------------------------------------------------------------------------------- helpers


def _share(parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Wins over pairs, both summed over parts; NaN where there is no pair."""
    wins, pairs = (np.sum(values, axis=0) for values in zip(*parts, strict=True))
    return np.divide(wins, pairs, out=np.full(len(wins), np.nan), where=pairs > 0)


def _weighted_wins(
    score: np.ndarray, positive: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs won, and pairs, of (n,) scores, (n,) booleans and (n, B) weights: (B,) each.

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
    return wins, weight.sum(axis=0) * below[-1]


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


def _wins_without(
    score: np.ndarray, positive: np.ndarray, groups: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs won, and pairs, of (n,) scores without each of `count` groups: (count,) each."""
    rank = np.unique(score, return_inverse=True)[1]
    ranks = rank.max() + 1
    p, n = groups[positive], groups[~positive]
    below = _wins(rank[positive], rank[~positive], ranks)
    above = _wins(-1 - rank[~positive] + ranks, -1 - rank[positive] + ranks, ranks)
    # Pairs within a group are taken away twice: count them by ranks that are apart by group.
    key = groups * ranks + rank
    keys, own = np.unique(key, return_inverse=True)
    first = np.searchsorted(keys, np.arange(count) * ranks)  # of each group's ranks
    before = np.bincount(own[~positive], minlength=len(keys) + 1).cumsum()
    before = np.r_[0, before][first]
    within = _wins(own[positive], own[~positive], len(keys)) - before[p]
    wins = (
        below.sum()
        - np.bincount(p, below, minlength=count)
        - np.bincount(n, above, minlength=count)
        + np.bincount(p, within, minlength=count)
    )
    pairs = (len(p) - np.bincount(p, minlength=count)) * (len(n) - np.bincount(n, minlength=count))
    return wins, pairs


def _check_folds(folds: np.ndarray | None, shape: tuple[int, int]) -> np.ndarray:
    """(1, n) or (D, n)."""
    if folds is None:
        return np.zeros((1, shape[1]), int)
    folds = np.atleast_2d(np.asarray(folds))
    if folds.shape not in ((1, shape[1]), shape):
        raise StatisticsError(f"folds {folds.shape} do not go with {shape} draws and recordings")
    return folds


def _wins(ranks: np.ndarray, others: np.ndarray, count: int) -> np.ndarray:
    """How many of `others` lie below each of `ranks`, ties half; integer ranks below `count`."""
    at = np.bincount(others, minlength=count)
    below = np.cumsum(at) - at
    return below[ranks] + 0.5 * at[ranks]


def _rarest(labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(K,) of each group the class, numbered, that the fewest groups have."""
    _, numbers = np.unique(labels, return_inverse=True)
    pairs = np.unique(np.stack([groups, numbers], axis=1), axis=0)
    frequency = np.bincount(pairs[:, 1])
    pairs = pairs[np.lexsort((frequency[pairs[:, 1]], pairs[:, 0]))]
    return pairs[np.unique(pairs[:, 0], return_index=True)[1], 1]


def _kish(groups: np.ndarray) -> float:
    """Effective number of groups of unequal sizes (Kish 1965): the number where they are equal."""
    sizes = np.unique(groups, return_counts=True)[1]
    return float(sizes.sum() ** 2 / np.sum(sizes**2))


def _check_count(groups, least: int, relation: str, c, names: Sequence[str] | None) -> None:
    if (found := len(np.unique(groups))) >= least:
        return
    of = f" {relation} class {(names[c] if names is not None else str(c))!r}" if relation else ""
    raise StatisticsError(
        f"only {found} subject{'' if found == 1 else 's'}{of}; an interval needs {least}"
    )


def _scale_of(values: np.ndarray) -> str:
    if np.all((values == 0) | (values == 1)):
        return "share"
    return "error" if values.min() >= 0 else "free"


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's (1979) adjusted p values, in the order given: (m,).

    At most `alpha` of all families of true null hypotheses have an adjusted value of `alpha` or
    less, however the tests depend on each other.

    Raises:
      StatisticsError: a value that is not a probability.
    """
    p = np.asarray(p_values, np.float64)
    if p.ndim != 1 or not np.all((p >= 0) & (p <= 1)):
        raise StatisticsError(f"p values lie between 0 and 1; got {p_values}")
    order = np.argsort(p, kind="stable")
    steps = (len(p) - np.arange(len(p))) * p[order]
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(steps))
    return adjusted
