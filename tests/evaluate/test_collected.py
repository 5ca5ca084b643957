"""A result with its interval, or with the reason why there is none."""

import numpy as np
import pytest

from medalign_jax.evaluate.collected import Measured, add_result, key_of, result_of
from medalign_jax.evaluate.intervals import interval, paired_interval
from medalign_jax.evaluate.statistics import mean_statistic

FIELDS = {"task": "t", "dataset": "d", "kind": "k", "stage": "s", "metric": "accuracy",
          "n_train": 3, "n_test": 12}  # fmt: skip
RNG = np.random.default_rng(0)
EARLIER, LATER = (mean_statistic(RNG.integers(0, 2, (2, 12))) for _ in range(2))
SUBJECTS = [f"p{n % 6}" for n in range(12)]
NOTES = {"notes": "4 are missing", "interval_notes": "over subjects"}


def test_a_score_has_its_interval_and_both_notes():
    result, found = result_of(LATER, SUBJECTS, **NOTES, **FIELDS)
    assert found == interval(LATER, SUBJECTS)
    assert (result.value, result.ci_low, result.ci_high) == (found.value, found.low, found.high)
    assert result.notes == "4 are missing; over subjects"


def test_a_difference_has_the_paired_one():
    result, found = result_of((EARLIER, LATER), SUBJECTS, folds=3, **FIELDS)
    assert found == paired_interval(EARLIER, LATER, SUBJECTS, folds=3)
    assert result.notes == ""


@pytest.mark.parametrize(
    ("subjects", "why"),
    [(["p0"] * 12, "one subject alone"), ([f"p{n % 2}" for n in range(12)], "only 2 subject")],
)
def test_too_few_subjects_leave_the_value_and_the_reason(subjects, why):
    ones = np.ones((1, 12))
    result, found = result_of((EARLIER, LATER), subjects, **NOTES, **FIELDS)
    assert found is None and result.ci_low is None
    assert result.value == pytest.approx(np.mean(LATER(ones) - EARLIER(ones)))
    assert result.notes.startswith(f"4 are missing; no interval: {why}")
    assert result_of(LATER, subjects, **FIELDS)[0].value == pytest.approx(np.mean(LATER(ones)))


def test_what_is_collected():
    into = Measured()
    add_result(into, LATER, SUBJECTS, **FIELDS)
    add_result(into, LATER, ["p0"] * 12, **(FIELDS | {"task": "alone"}))
    assert [result.task for result in into.results] == ["t", "alone"]
    assert list(into.intervals) == [key_of(into.results[0])]
