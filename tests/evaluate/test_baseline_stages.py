"""Baselines of a data set as stages and guesses."""

import numpy as np

from medalign_jax.evaluate.baseline_stages import baseline_stages
from medalign_jax.evaluate.measure import measure
from medalign_jax.evaluate.stages import CONSTANT, Settings, Stage
from medalign_jax.evaluate.suite import Options, Suite
from tests.evaluate.evaluation_rows import rows


def test_the_constant_of_numbers_is_told_to_be_a_mean():
    """Of skewed numbers the median has the lesser absolute error, which the note says."""
    found = rows(age=lambda i: 20 + 60 * (i // 2 % 5 == 0))
    settings = Settings(per_class=0)
    suite = Suite.of(found, Options(("label", "age:regression"), settings=settings), "toy")
    _, guesses = baseline_stages(suite, found, ("majority",))
    x = np.random.default_rng(0).standard_normal((suite.count, 2))
    measured = measure(suite.tasks, suite.plans, suite.subjects, [Stage("x", x)], settings, guesses)
    notes = {(r.task, r.metric): r.notes for r in measured.results if r.stage == CONSTANT}
    assert "the mean of the training answers" in notes["age", "mae"]
    assert "median has the least absolute error" in notes["age", "mae"]
    assert "median" not in notes["label", "auroc"] + notes["label", "accuracy"]
    (fold,) = suite.plans[0]
    train, test = (suite.tasks[1].answers[part] for part in (fold.train, fold.test))
    (value,) = (r.value for r in measured.results if (r.stage, r.task) == (CONSTANT, "age"))
    assert value == np.abs(test - train.mean()).mean() > np.abs(test - np.median(train)).mean()
