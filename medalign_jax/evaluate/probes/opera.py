"""The published protocol (`opera_protocol.py`), called like the other probes."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np

from medalign_jax.evaluate.probes import opera_protocol
from medalign_jax.evaluate.probes.opera_training import ProbeConfig
from medalign_jax.evaluate.probes.problem import Prediction, Problem, check


def opera(
    x: np.ndarray,
    problems: Sequence[Problem],
    config: ProbeConfig | None = None,
    regression: ProbeConfig = opera_protocol.REGRESSION,
) -> list[Prediction]:
    """One run of the published linear probe for each problem, with the problem's seed.

    Its 64 epochs of small steps seldom converge; the note says so when the epoch chosen on the
    validation rows is the last one. Without validation rows the last epoch is taken.

    Args:
      x: (N, D) features.
      problems: problems on rows of x. Those that differ only in training rows and seeds train
        together.
      config: protocol of classification, by default as published.
      regression: protocol of regression.

    Raises:
      ProbeError: as `problem.check`; or a probe diverged.
    """
    x = check(x, problems)
    config = ProbeConfig() if config is None else config
    together: dict[tuple, list[int]] = collections.defaultdict(list)
    for number, problem in enumerate(problems):
        together[_key(problem)].append(number)
    found: dict[int, Prediction] = {}
    for numbers in together.values():
        runs = [problems[number] for number in numbers]
        predictions = _runs(x, runs, regression if runs[0].classes == 0 else config)
        found |= dict(zip(numbers, predictions, strict=True))
    return [found[number] for number in range(len(problems))]


def _key(problem: Problem) -> tuple:
    valid = b"" if problem.valid is None else np.asarray(problem.valid).tobytes()
    return (problem.classes, len(problem.train), valid, np.asarray(problem.test).tobytes(),
            np.asarray(problem.targets).tobytes())  # fmt: skip


def _runs(x: np.ndarray, runs: list[Problem], config: ProbeConfig) -> list[Prediction]:
    """Predictions of problems that share everything but training rows and seeds."""
    first = runs[0]
    targets = np.asarray(first.targets)
    valid, why = _validation(first)
    pool = np.unique(np.concatenate([run.train for run in runs]))
    same = all(np.array_equal(run.train, first.train) for run in runs)
    rows = np.asarray(first.train) if same else pool
    arguments = (
        (x[rows], targets[rows]),
        None if valid is None else (x[valid], targets[valid]),
        x[first.test],
    )
    options = {
        "draws": None if same else np.stack([np.searchsorted(pool, r.train) for r in runs]),
        "seeds": [run.seed for run in runs],
        "config": config,
    }
    if first.classes:
        scores = opera_protocol.classification_probe(*arguments, first.classes, **options)
        outputs = scores.probabilities
    else:
        scores = opera_protocol.regression_probe(*arguments, **options)
        outputs = scores.predictions
    first = config.select_every  # the first epoch that may be chosen is the one before it
    last = (config.epochs // config.select_every) * config.select_every - 1
    notes = [why or _note(int(epoch), first, last, config.epochs) for epoch in scores.best_epoch]
    return [
        Prediction(np.asarray(output, np.float64), note)
        for output, note in zip(outputs, notes, strict=True)
    ]


def _validation(problem: Problem) -> tuple[np.ndarray | None, str]:
    """Rows to choose the epoch by; or None, and what is said of it."""
    if problem.valid is None:
        return None, "no validation rows: the last epoch is taken"
    rows = np.asarray(problem.valid)
    if problem.classes and len(np.unique(np.asarray(problem.targets)[rows])) < 2:
        return None, "validation rows are all of one class: the last epoch is taken"
    return rows, ""


def _note(epoch: int, first: int, last: int, epochs: int) -> str:
    if epoch < first:
        return f"the chosen epoch is the first of {epochs}: validation does not follow training"
    return "" if epoch < last else f"the chosen epoch is the last of {epochs}: not converged"
