"""What is asked of the recordings: label columns become tasks, and everything wrong with them.

A task is named by its column, with its kind after a colon where the values do not say it:

    label                 two or more words, or two numbers: classes
    age                   more than two different numbers: a regression
    grade:classification  numbers that are names of classes
    findings:labels       several labels in a cell ("wheeze; crackles"): one yes-or-no task for each

Only the text of a manifest is read here, so what is wrong is known before a recording is opened.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from medalign_jax.data.manifest import Row
from medalign_jax.data.tables import did_you_mean, finite_number, is_missing
from medalign_jax.errors import UserError

KINDS = ("classification", "regression", "labels")
_NONE = frozenset({"none", "no finding", "-"})  # of several labels, explicitly none
_SEPARATORS = re.compile(r"[;|+]")


class TaskError(UserError):
    """A task that the manifest does not define, or that a split cannot answer."""


@dataclasses.dataclass(frozen=True)
class Task:
    """One question about N recordings.

    Attributes:
      name: The column, and the label where a column holds several.
      dataset: Name of the data.
      kind: "classification" or "regression".
      answers: (N,) int32 classes, -1 where unknown; or (N,) float64, NaN where unknown.
      classes: Names of the classes, sorted; () for a regression.
    """

    name: str
    dataset: str
    kind: str
    answers: np.ndarray
    classes: tuple[str, ...] = ()

    @property
    def known(self) -> np.ndarray:
        """(N,) bool: the recordings that have an answer."""
        return ~np.isnan(self.answers) if self.kind == "regression" else self.answers >= 0

    def select(self, rows: np.ndarray) -> Task:
        """The same question about some of the recordings."""
        return dataclasses.replace(self, answers=self.answers[rows])


def columns_of(names: Sequence[str]) -> tuple[str, ...]:
    """The columns that tasks are made of, without "label", which every manifest may have."""
    found = dict.fromkeys(name.partition(":")[0] for name in names)
    return tuple(column for column in found if column != "label")


def tasks_of(rows: Sequence[Row], names: Sequence[str], dataset: str) -> tuple[Task, ...]:
    """The tasks of those names, in their order.

    Args:
      rows: Of the manifest, read with `columns_of(names)` as targets.
      names: Columns, with a kind after a colon where needed, see the module.
      dataset: Name of the data.

    Raises:
      TaskError: no such column or kind, no value, one class only, or values that do not fit.
    """
    if not names:
        raise TaskError("no task is named; name a column of the manifest, such as 'label'")
    tasks = [task for name in names for task in _tasks_of(rows, name, dataset)]
    twice = {task.name for task in tasks if [t.name for t in tasks].count(task.name) > 1}
    if twice:
        raise TaskError(f"the task {sorted(twice)[0]!r} is named twice")
    return tuple(tasks)


def _tasks_of(rows: Sequence[Row], name: str, dataset: str) -> list[Task]:
    column, _, kind = name.partition(":")
    if kind and kind not in KINDS:
        raise TaskError(
            f"task {name!r}: unknown kind {kind!r}{did_you_mean(kind, KINDS)}; "
            f"there are {', '.join(KINDS)}"
        )
    texts = [(row.label if column == "label" else row.targets.get(column)) or "" for row in rows]
    if not any(texts):
        known = sorted({c for row in rows for c in row.targets} | ({"label"} & _has_label(rows)))
        raise TaskError(
            f"task {name!r}: no recording has a value in column {column!r}"
            f"{did_you_mean(column, known)}; columns with values are {', '.join(known) or 'none'}"
        )
    if kind == "labels":
        return _labels(rows, column, texts, dataset)
    texts = ["" if is_missing(text) else text for text in texts]  # "none" is no class
    if not any(texts):
        raise TaskError(f"task {name!r}: every value of column {column!r} is missing")
    kind = kind or _kind(column, texts)
    make = _regression if kind == "regression" else _classification
    return [make(rows, column, texts, dataset)]


def _has_label(rows: Sequence[Row]) -> set[str]:
    return {"label"} if any(row.label for row in rows) else set()


def _kind(column: str, texts: Sequence[str]) -> str:
    """Numbers make a regression; two different ones, as yes and no, are classes, and so is
    whatever stands in `label`."""
    values = {text for text in texts if text}
    numbers = [finite_number(text) for text in values]
    if column == "label" or None in numbers or len(set(numbers)) <= 2:
        return "classification"
    return "regression"


def _regression(rows: Sequence[Row], column: str, texts: Sequence[str], dataset: str) -> Task:
    answers = np.full(len(texts), np.nan)
    for i, text in enumerate(texts):
        if text and (value := finite_number(text)) is None:
            raise TaskError(
                f"task {column!r} is a regression, but row {rows[i].row} "
                f"('{rows[i].audio_path}') says {text!r}; mend it, leave it empty, or ask for "
                f"'{column}:classification'"
            )
        if text:
            answers[i] = value
    if np.nanmin(answers) == np.nanmax(answers):
        raise TaskError(f"task {column!r}: every recording has {np.nanmin(answers):g}")
    return Task(column, dataset, "regression", answers)


def _classification(rows: Sequence[Row], column: str, texts: Sequence[str], dataset: str) -> Task:
    classes = tuple(sorted({text for text in texts if text}, key=_natural))
    known = sum(map(bool, texts))
    if len(classes) < 2:
        raise TaskError(
            f"task {column!r}: every recording is {classes[0]!r}; nothing to tell apart"
        )
    if len(classes) > max(2, known // 2):
        raise TaskError(
            f"task {column!r} has {len(classes)} classes for {known} recordings: is it a name or "
            f"a number? For a number ask for '{column}:regression'"
        )
    number = {name: i for i, name in enumerate(classes)}
    answers = np.array([number[text] if text else -1 for text in texts], np.int32)
    return Task(column, dataset, "classification", answers, classes)


def _natural(text: str) -> tuple:
    value = finite_number(text)
    return (0, value, text) if value is not None else (1, 0.0, text)


def _labels(rows: Sequence[Row], column: str, texts: Sequence[str], dataset: str) -> list[Task]:
    """One task a label: yes where a cell names it, no where a cell names others or none."""
    cells = [{part.strip() for part in _SEPARATORS.split(text)} - {""} for text in texts]
    labels = sorted({label for cell in cells for label in cell if label.lower() not in _NONE})
    if not labels:
        raise TaskError(f"task '{column}:labels': no cell names a label")
    tasks = []
    for label in labels:
        found = ["" if not cell else "yes" if label in cell else "no" for cell in cells]
        task = f"{column}: {label}"
        if len(set(found) - {""}) < 2:
            raise TaskError(f"task {task!r}: every recording that has labels has this one")
        tasks.append(_classification(rows, task, found, dataset))
    return tasks
