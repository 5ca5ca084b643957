"""What an evaluation has found so far: results, their intervals, and predictions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from medalign_jax.evaluate import intervals
from medalign_jax.evaluate.results import Result
from medalign_jax.evaluate.statistics import Interval, Statistic, StatisticsError, holm

MEAN_OF = "mean of "  # begins the name of a mean over tasks


@dataclasses.dataclass
class Measured:
    """Collected results.

    Attributes:
      results: one number each.
      intervals: (task, kind, stage, metric) -> interval, for results that have one.
      scores: (task, kind, stage) -> predictions, (R, m, C) or (R, m), of `tested[task]`.
      tested: task -> (m,) positions of the test recordings of all folds, ascending.
      folds: task -> (P, m) the fold that tests each of them, for each repeat of the folds.
    """

    results: list[Result] = dataclasses.field(default_factory=list)
    intervals: dict[tuple[str, str, str, str], Interval] = dataclasses.field(default_factory=dict)
    scores: dict[tuple[str, str, str], np.ndarray] = dataclasses.field(default_factory=dict)
    tested: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    folds: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def result_of(
    score: Statistic | tuple[Statistic, Statistic],
    subjects: Sequence,
    folds: int = 1,
    *,
    notes: str = "",
    interval_notes: str = "",
    **fields,
) -> tuple[Result, Interval | None]:
    """A result with its interval over subjects; without one, and the reason, where there is none.

    Args:
      score: a statistic, or (earlier, later) for the paired interval of their difference.
      subjects: one id per recording that the statistic weighs.
      folds: that tested them, see `intervals.interval`.
      notes: of the result, whether there is an interval or not.
      interval_notes: about the interval; left out where there is none.
      **fields: others of the `Result`.

    Returns:
      The result, and its interval or None.
    """
    pair = score if isinstance(score, tuple) else (score,)
    measure = intervals.interval if len(pair) == 1 else intervals.paired_interval
    try:
        interval = measure(*pair, list(subjects), folds=folds)
    except StatisticsError as error:
        values = [float(np.mean(s(np.ones((1, len(subjects)))))) for s in pair]
        value = values[-1] - (values[0] if len(values) > 1 else 0.0)
        notes = _joined(notes, f"no interval: {error}")
        return Result(value=value, ci_low=None, ci_high=None, notes=notes, **fields), None
    return Result.of(interval, notes=_joined(notes, interval_notes), **fields), interval


def _joined(*notes: str) -> str:
    return "; ".join(filter(None, notes))


def add_result(
    into: Measured,
    score: Statistic | tuple[Statistic, Statistic],
    subjects: Sequence,
    folds: int = 1,
    **fields,
) -> None:
    """Adds what `result_of` makes.

    Args:
      into: gets the result, and its interval if it has one.
      score, subjects, folds, **fields: as of `result_of`.
    """
    result, interval = result_of(score, subjects, folds, **fields)
    if interval is not None:
        into.intervals[key_of(result)] = interval
    into.results.append(result)


def add_identical(into: Measured, subjects: Sequence, **fields) -> None:
    """The difference of two stages whose predictions are the same: 0, without any doubt.

    Args:
      into: gets it.
      subjects: one id per recording.
      **fields: of the `Result`.
    """
    count = len(set(subjects))
    interval = Interval(0.0, 0.0, 0.0, 0.95, "identical predictions", count, p_value=1.0)
    notes = _joined(fields.pop("notes", ""), "the predictions are identical")
    result = Result.of(interval, notes=notes, **fields)
    into.intervals[key_of(result)] = interval
    into.results.append(result)


def key_of(result: Result) -> tuple[str, str, str, str]:
    """Key of `Measured.intervals`."""
    return result.task, result.kind, result.stage, result.metric


def correct_for_tasks(into: Measured) -> None:
    """Writes the p value of every paired difference into its notes, and Holm's correction over
    the tasks that were asked the same."""
    families: dict[tuple[str, str, str], list[int]] = {}
    for i, result in enumerate(into.results):
        interval = into.intervals.get(key_of(result))
        if interval is not None and interval.p_value is not None:
            family = (result.kind, result.metric, result.stage)
            families.setdefault(family, []).append(i)
    for places in families.values():
        single = [i for i in places if not into.results[i].task.startswith(MEAN_OF)]
        values = {i: into.intervals[key_of(into.results[i])].p_value for i in places}
        corrected = {}
        if len(single) > 1:
            adjusted = holm([values[i] for i in single])
            corrected = dict(zip(single, adjusted, strict=True))
        for i in places:
            note = f"p {values[i]:.2g}"
            if i in corrected:
                note += f", by Holm over {len(single)} tasks {corrected[i]:.2g}"
            old = into.results[i]
            into.results[i] = dataclasses.replace(old, notes=f"{old.notes}; {note}".lstrip("; "))
