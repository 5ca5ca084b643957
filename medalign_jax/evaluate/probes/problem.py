"""What a probe is asked, what it answers, and what is refused before anything is fitted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from medalign_jax.core.errors import UserError


class ProbeError(UserError):
    """Embeddings, labels or rows that a probe cannot be fitted on."""


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """One probe to fit on rows of a shared (N, D) matrix of features.

    Several labels are several binary problems; seeds, draws and folds are more problems.

    Attributes:
      targets: (N,) integer classes 0..classes - 1, or numbers for a regression. Rows that are
        neither in `train` nor in `valid` are not read.
      train: (n,) rows that are fitted on.
      test: (m,) rows that are predicted.
      groups: (N,) integers, one per subject; a choice inside the training rows never has a
        subject's rows on both of its sides.
      classes: number of classes; 0 for a regression.
      valid: (v,) rows on which the published protocol chooses its epoch; other probes don't
        read them.
      seed: of whatever the probe draws: inner folds, initial weights, order of examples.
    """

    targets: np.ndarray
    train: np.ndarray
    test: np.ndarray
    groups: np.ndarray
    classes: int
    valid: np.ndarray | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """What a probe says of the test rows.

    Attributes:
      scores: (m, classes) float64 probabilities, or (m,) numbers in the target's unit.
      note: what a reader of the scores has to know; empty where all is as it should be.
    """

    scores: np.ndarray
    note: str = ""


def check(x: np.ndarray, problems: Sequence[Problem]) -> np.ndarray:
    """The features as an array, when every problem can be fitted on them.

    Raises:
      ProbeError: the features are not a finite matrix, or a problem's rows, targets or groups
        don't fit them; with the number of the problem and the row.
    """
    x = np.asarray(x)
    if x.ndim != 2 or not x.shape[1] or x.dtype.kind not in "fiu":
        raise ProbeError(f"features of a probe are numbers (N, D); got {x.dtype} {x.shape}")
    finite = np.isfinite(x).all(axis=1)
    for number, problem in enumerate(problems):
        try:
            _check_rows(problem, finite)
            _check_targets(problem, len(x))
        except ProbeError as error:
            raise ProbeError(f"problem {number}: {error}") from None
    return x


def _check_rows(problem: Problem, finite: np.ndarray) -> None:
    """Rows exist, are finite, and are in one part only."""
    parts = {"training": problem.train, "test": problem.test}
    if problem.valid is not None:
        parts["validation"] = problem.valid
    seen: dict[int, str] = {}
    for name, rows in parts.items():
        rows = np.asarray(rows)
        if rows.ndim != 1 or not rows.size or rows.dtype.kind not in "iu":
            raise ProbeError(f"{name} rows are a list of integers, at least one; got {rows!r:.80}")
        outside = rows[(rows < 0) | (rows >= len(finite))]
        if outside.size:
            raise ProbeError(f"{name} row {outside[0]} is not one of the {len(finite)} rows")
        if not finite[rows].all():
            bad = rows[~finite[rows]]
            raise ProbeError(
                f"the features of {name} row {bad[0]} are not finite ({len(bad)} such rows); "
                "leave these recordings out, or see what their encoder made of them"
            )
        twice = next((int(row) for row in rows if int(row) in seen), None)
        if twice is not None:
            raise ProbeError(f"row {twice} is among the {seen[twice]} and the {name} rows")
        seen |= dict.fromkeys(rows.tolist(), name)


def _check_targets(problem: Problem, total: int) -> None:
    """Targets and groups have one entry per row, and training has what is to be distinguished."""
    for name in ("targets", "groups"):
        shape = np.shape(getattr(problem, name))
        if shape != (total,):
            raise ProbeError(f"{name} have one entry per row ({total}); got shape {shape}")
    if np.asarray(problem.groups).dtype.kind not in "iu":
        raise ProbeError("groups are integers, one per subject")
    parts = [("training", problem.train)]
    if problem.valid is not None:
        parts.append(("validation", problem.valid))
    for name, rows in parts:
        targets = np.asarray(problem.targets)[rows]
        if problem.classes == 0:
            _check_numbers(targets, rows, name)
        else:
            _check_classes(targets, rows, name, problem.classes)


def _check_numbers(targets: np.ndarray, rows: np.ndarray, name: str) -> None:
    if targets.dtype.kind not in "iuf":
        raise ProbeError(f"targets of a regression are numbers; got {targets.dtype}")
    if not np.isfinite(targets).all():
        row = rows[~np.isfinite(targets)][0]
        raise ProbeError(f"the target of {name} row {row} is not finite")


def _check_classes(targets: np.ndarray, rows: np.ndarray, name: str, classes: int) -> None:
    if classes < 2:
        raise ProbeError(f"a probe tells two or more classes apart, or classes=0; got {classes}")
    if targets.dtype.kind not in "iu":
        raise ProbeError(f"classes are integers (see class_indices); got {targets.dtype}")
    outside = (targets < 0) | (targets >= classes)
    if outside.any():
        raise ProbeError(
            f"the class of {name} row {rows[outside][0]} is {targets[outside][0]}, "
            f"not one of 0..{classes - 1}"
        )
    missing = sorted(set(range(classes)) - set(targets.tolist()))
    if missing and name == "training":
        raise ProbeError(
            f"no training row is of class {', '.join(map(str, missing))}: {classes} classes need "
            "an example each; give more training rows, or fewer classes"
        )
