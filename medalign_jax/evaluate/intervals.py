"""Intervals that cover: of scores, and of differences between two scores of the same recordings.

The unit is the subject. A score's variance over test subjects comes from the score without each
subject (the jackknife, Efron & Stein 1981; for AUROC the clustered DeLong variance of Obuchowski
1997 up to its small-sample factor). Of that variance the interval is built on the scale of the
score:

* *shares* (AUROC, accuracy, recall) by Wilson's score interval (1927) at the effective sample
  size n = value (1 - value) / variance, with a quantile of Student's t. Near 0 and 1 few subjects
  decide the variance, so 1 / n is averaged with what it were if the recordings of a subject were
  copies of each other; that prior weighs as one subject beside the effective number of subjects
  that the variance rests on, and stands alone where every recording is right;
* *errors* (MAE) by Student's t on the logarithm; its degrees of freedom are 1.5 times the
  effective number of subjects that the variance rests on, so that skewed errors widen it;
* everything else by Student's t as it is.

Columns of a statistic (few-label draws, seeds, repeats of folds) are a random sample of training
choices, crossed with the subjects:

    value(subjects, column) = score + s(subjects) + c(column) + sc(subjects, column).

The interval is of `score`, that is, for other subjects and other columns. The variance of the mean
over D columns is var(s) + var(sc) / D + var(c) / D. The jackknife of the mean over columns
estimates the first two; var(c) is the variance between columns less var(sc), the jackknife of the
columns' deviations from their mean. Degrees of freedom after Satterthwaite (1946). One column
says nothing of other training choices; neither do the columns of one pool of training recordings
of other pools.

Folds are trained on each other's test subjects, and would come out alike, all too good or all too
bad, for other subjects; that share of the variance cannot be estimated from them (Bengio &
Grandvalet 2004). It is allowed for as Nadeau & Bengio (2003) do, as if scores of two folds had the
correlation n_test / (n_test + n_train): the variance over subjects counts 1 + K / (K - 1) times.
What that gives is measured by `python -m benchmarks.chance`.

Constants were chosen by simulation: `python -m benchmarks.coverage`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

import numpy as np
from scipy.special import stdtrit  # Student's t: all of scipy.stats takes a second to import

from medalign_jax.evaluate.statistics import Interval, Statistic, StatisticsError

LEAST_SUBJECTS = 5  # of a class, or in all where there are no classes: fewer give no interval

_PRIOR_SUBJECTS = 1.0
_DEGREES_PER_SUBJECT = 1.5
_CHUNK_ELEMENTS = 1 << 20


def interval(
    statistic: Statistic,
    subjects: Sequence[Hashable | None],
    *,
    level: float = 0.95,
    least: int = LEAST_SUBJECTS,
    folds: int = 1,
) -> Interval:
    """Interval of a statistic, averaged over its columns, for other subjects and other columns.

    Args:
      statistic: from weights (B, n) to values (B, D), as `evaluate.statistics` makes them; any
        other function of that kind is taken as "free" and evaluated once for each subject.
      subjects: (n,) ids; a recording without one (None or "") is a subject of its own.
      level: coverage.
      least: subjects that every class needs.
      folds: that were trained on each other's test subjects; 1 for a training part of its own.

    Raises:
      StatisticsError: one subject alone; a class has fewer than `least` subjects (all subjects
        together, where there are no classes), or all subjects of a score that is not a share agree.
    """
    part = _measure(statistic, _group_numbers(subjects), least, folds)
    low, high = part.ends(_tail(level))
    return _make(part.value, low, high, level, part)


def paired_interval(
    before: Statistic,
    after: Statistic,
    subjects: Sequence[Hashable | None],
    *,
    level: float = 0.95,
    least: int = LEAST_SUBJECTS,
    folds: int = 1,
) -> Interval:
    """Interval of `after` minus `before`, on the same subjects and columns, with its p value.

    The difference of two shares has the interval of Zou & Donner (2008, MOVER): the two scores'
    own intervals, joined by the correlation that the paired variance implies. All else is
    Student's t on the jackknife of the difference. The p value is one minus the highest level at
    which the interval leaves out zero.

    Args:
      before: of n recordings and D columns, or one column that stands beside each of `after`'s.
      after: of the same recordings in the same order, column by column trained on the same.
      subjects, level, least, folds: as `interval`.

    Raises:
      StatisticsError: as `interval`; or the numbers of columns differ.
    """
    groups, tail = _group_numbers(subjects), _tail(level)
    parts = [_measure(s, groups, least, folds) for s in (before, after)]
    columns = {part.columns for part in parts} - {1}
    if len(columns) > 1:
        raise StatisticsError(
            f"stages have different numbers of draws ({[part.columns for part in parts]}), "
            "so their draws cannot be paired"
        )
    both = _Pair(*parts, parts[1].minus(parts[0]))
    low, high = both.ends(tail)
    return _make(both.difference.value, low, high, level, both.difference, both.p_value())


# -------------------------------------------------------------------------------- one score


@dataclasses.dataclass(frozen=True)
class _Part:
    """A score and what its interval is made of.

    Attributes:
      values: (D,) of the columns.
      spread: (K, D) jackknife deviations, scaled so that the sum of their squares over subjects
        is the variance.
      strata: (K,) classes of subjects, between which degrees of freedom are shared out.
      scale: "share", "error" or "free".
      prior: effective number of subjects of a share, see `effective_subjects`.
      overlap: how many times the variance over subjects counts, since folds share training sets.
    """

    values: np.ndarray
    spread: np.ndarray
    strata: np.ndarray
    scale: str
    prior: float
    overlap: float = 1.0

    @property
    def columns(self) -> int:
        return len(self.values)

    @property
    def value(self) -> float:
        return float(self.values.mean())

    @property
    def over_subjects(self) -> float:
        """Variance of the mean over columns between subjects."""
        return self.overlap * float(np.sum(self.spread.mean(axis=1) ** 2))

    @property
    def over_columns(self) -> float:
        """Variance of the mean over columns by the choice of columns."""
        if self.columns == 1:
            return 0.0
        crossed = self.spread - self.spread.mean(axis=1, keepdims=True)
        crossed = np.sum(crossed**2) / (self.columns - 1)
        return max(0.0, float(np.var(self.values, ddof=1) - crossed)) / self.columns

    @property
    def variance(self) -> float:
        return self.over_subjects + self.over_columns

    @property
    def contributing(self) -> float:
        """Effective number of subjects that the variance rests on; 0 where it is 0."""
        squares = self.spread.mean(axis=1) ** 2
        return float(squares.sum() ** 2 / np.sum(squares**2)) if squares.any() else 0.0

    @property
    def degrees(self) -> float:
        """Degrees of freedom of the variance (Satterthwaite 1946)."""
        squares = self.overlap * self.spread.mean(axis=1) ** 2
        sizes = np.bincount(self.strata)
        parts = np.bincount(self.strata, squares)[sizes > 0]
        freedom = np.maximum(1, sizes[sizes > 0] - 1)
        total = squares.sum()
        own = total**2 / np.sum(parts**2 / freedom) if total > 0 else float(freedom.min())
        if self.scale != "share":
            own = min(own, max(1.0, _DEGREES_PER_SUBJECT * self.contributing))
        if self.columns == 1 or not (between := np.var(self.values, ddof=1) / self.columns) > 0:
            return float(own)
        squared = total**2 / own + between**2 / (self.columns - 1)
        return float(min(own, self.variance**2 / squared)) if self.variance > 0 else float(own)

    def minus(self, other: _Part) -> _Part:
        values, spread = self.values - other.values, self.spread - other.spread
        return _Part(values, spread, self.strata, "free", np.nan, self.overlap)

    def ends(self, tail: float) -> tuple[float, float]:
        """The interval that leaves out `tail` on either side."""
        quantile = -float(stdtrit(max(1.0, self.degrees), tail))
        if self.scale == "share":
            return _wilson(self.value, self._inverse_size(), quantile)
        if not self.variance > 0:
            raise StatisticsError("all subjects agree exactly: no spread to make an interval of")
        half = quantile * self.variance**0.5
        if self.scale == "error":
            factor = float(np.exp(half / self.value))
            return self.value / factor, self.value * factor
        return self.value - half, self.value + half

    def _inverse_size(self) -> float:
        """1 / effective sample size of a share."""
        unit = self.value * (1 - self.value)
        if not (0 < self.value < 1 and self.over_subjects > 0):
            return 1 / self.prior
        weight = self.contributing
        own = (weight * self.over_subjects / unit + _PRIOR_SUBJECTS / self.prior) / (
            weight + _PRIOR_SUBJECTS
        )
        return own + self.over_columns / unit


def _wilson(share: float, inverse_size: float, quantile: float) -> tuple[float, float]:
    z = quantile**2 * inverse_size
    centre = (share + z / 2) / (1 + z)
    half = (z * share * (1 - share) + z * z / 4) ** 0.5 / (1 + z)
    return max(0.0, centre - half), min(1.0, centre + half)


# ------------------------------------------------------------------------------- differences


@dataclasses.dataclass(frozen=True)
class _Pair:
    """Two scores of the same recordings, and their difference."""

    before: _Part
    after: _Part
    difference: _Part

    def ends(self, tail: float) -> tuple[float, float]:
        if {self.before.scale, self.after.scale} != {"share"}:
            return self.difference.ends(tail)
        value, r = self.difference.value, self._correlation()
        before, after = self.before.ends(tail), self.after.ends(tail)
        down = self.after.value - after[0], before[1] - self.before.value
        up = after[1] - self.after.value, self.before.value - before[0]
        low, high = (
            max(0.0, a * a + b * b - 2 * r * a * b) ** 0.5 for a, b in (down, up)
        )  # fmt: skip
        return value - low, value + high

    def _correlation(self) -> float:
        a, b = self.before.variance, self.after.variance
        if not (a > 0 and b > 0):
            return 0.0
        return float(np.clip((a + b - self.difference.variance) / (2 * (a * b) ** 0.5), -1, 1))

    def p_value(self) -> float:
        """Twice the tail at which an end of the interval meets zero, by bisection of its log."""
        if self.difference.value == 0:
            return 1.0

        def leaves_out_zero(tail: float) -> bool:
            low, high = self.ends(tail)
            return low > 0 or high < 0

        few, many = np.log(1e-16), np.log(0.5)
        if leaves_out_zero(np.exp(few)):
            return 2 * float(np.exp(few))
        for _ in range(40):
            middle = (few + many) / 2
            few, many = (few, middle) if leaves_out_zero(np.exp(middle)) else (middle, many)
        return float(2 * np.exp(many))


# ---------------------------------------------------------------------------------- helpers


def _measure(statistic: Statistic, groups: np.ndarray, least: int, folds: int) -> _Part:
    overlap = 1.0 if folds < 2 else 1 + folds / (folds - 1)
    values = np.asarray(statistic(np.ones((1, len(groups)))))[0]
    count = groups.max() + 1
    if hasattr(statistic, "without_each"):
        statistic.check_subjects(groups, least)
        without, strata = statistic.without_each(groups), statistic.strata(groups)
        scale, prior = statistic.scale, np.nan
        if scale == "share":
            prior = statistic.effective_subjects(float(values.mean()), groups) / overlap
    else:
        if count < least:
            raise StatisticsError(f"only {count} subjects; an interval needs {least}")
        without, strata = _without_each(statistic, groups), np.zeros(count, int)
        scale, prior = "free", np.nan
    if not (np.all(np.isfinite(values)) and np.all(np.isfinite(without))):
        raise StatisticsError("the score is not defined without one of the subjects")
    spread = ((count - 1) / count) ** 0.5 * (without - values)
    return _Part(values, spread, strata, scale, prior, overlap)


def _without_each(statistic: Statistic, groups: np.ndarray) -> np.ndarray:
    count = groups.max() + 1
    step = max(1, _CHUNK_ELEMENTS // len(groups))
    blocks = [np.arange(i, min(i + step, count)) for i in range(0, count, step)]
    return np.concatenate(
        [np.asarray(statistic((groups != b[:, None]).astype(float))) for b in blocks]
    )


def _group_numbers(subjects: Sequence[Hashable | None]) -> np.ndarray:
    """(n,) numbers 0..K-1 of the subjects."""
    if not len(subjects):
        raise StatisticsError("an interval needs recordings; there are none")
    index: dict[Hashable, int] = {}
    groups = np.array([
        index.setdefault(("recording", i) if s is None or s == "" else ("subject", s), len(index))
        for i, s in enumerate(subjects)
    ])  # fmt: skip
    if len(index) == 1:
        raise StatisticsError("one subject alone")
    return groups


def _tail(level: float) -> float:
    if not 0 < level < 1:
        raise StatisticsError(f"level is a coverage between 0 and 1, not {level}")
    return (1 - level) / 2


_METHODS = {
    "share": "Wilson's interval, effective sample size over subjects (jackknife), Student's t",
    "error": "Student's t over subjects (jackknife), logarithm",
    "free": "Student's t over subjects (jackknife)",
}


def _make(value, low, high, level, part: _Part, p_value: float | None = None) -> Interval:
    method = _METHODS[part.scale]
    if part.overlap > 1:
        method += ", widened as folds share training sets"
    return Interval(
        float(value), float(low), float(high), level,
        method=method, subjects=len(part.strata), draws=part.columns, p_value=p_value,
    )  # fmt: skip
