"""What is asked of the recordings: label columns become tasks, and everything wrong with them.

A task is named by its column, with its kind after a colon where the values do not say it:

    label                 two or more words, or two numbers: classes
    age                   more than two different numbers: a regression
    grade:classification  numbers that are names of classes
    findings:labels       several labels in a cell ("wheeze; crackles"): one yes-or-no task for each

"none" is a class like any other, and among several labels it says that there are none. What became
of the cells is in `Task.description`. Only the text of a manifest is read here, so what is wrong is
known before a recording is opened.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from medalign_jax.core.errors import UserError
from medalign_jax.core.words import (
    did_you_mean,
    finite_number,
    is_comma_number,
    is_missing,
    is_none_in_words,
    plain_spelling,
)
from medalign_jax.data.recordings.manifest import Row
from medalign_jax.evaluate.context import holds_codes

KINDS = ("classification", "regression", "labels")
_OF_WORDS = ("classification", "labels")
_NONE = frozenset({"none", "no finding", "-"})  # of several labels, explicitly none
_SEPARATORS = re.compile(r"[;|+,]")
_MOSTLY = 0.9  # share of the answers that makes a column one of numbers
_SHOWN = 8  # classes that are printed with their numbers


class TaskError(UserError):
    """A task that the manifest does not define, or that a split cannot answer."""


@dataclasses.dataclass(frozen=True)
class Task:
    """One question about N recordings.

    Attributes:
      name: the column, and the label where a column holds several.
      dataset: name of the data.
      kind: "classification" or "regression".
      answers: (N,) int32 classes, -1 where unknown; or (N,) float64, NaN where unknown.
      classes: names of the classes, sorted; () for a regression.
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

    @property
    def description(self) -> str:
        """What is asked and of how many, for the screen."""
        missing = len(self.answers) - int(self.known.sum())
        without = f"; {missing} without an answer" if missing else ""
        if self.kind == "regression":
            least, most = np.nanmin(self.answers), np.nanmax(self.answers)
            return f"task '{self.name}': numbers from {least:g} to {most:g}{without}"
        counts = np.bincount(self.answers[self.known], minlength=len(self.classes))
        found = [f"{n} x '{name}'" for name, n in zip(self.classes, counts, strict=True)]
        more = f", {len(found) - _SHOWN} more classes" if len(found) > _SHOWN else ""
        return f"task '{self.name}': {', '.join(found[:_SHOWN])}{more}{without}"

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
      rows: of the manifest, read with `columns_of(names)` as targets.
      names: columns, with a kind after a colon where needed, see the module.
      dataset: name of the data.

    Raises:
      TaskError: no such column or kind, no value, one class only, or values that do not fit.
    """
    if not names:
        raise TaskError("no task is named; name a column of the manifest, such as 'label'")
    _check_commas(rows, names)
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
    texts = ["" if _says_nothing(text) else text for text in texts]
    if not any(texts):
        raise TaskError(f"task {name!r}: every value of column {column!r} is missing")
    if (kind or _kind(rows, column, texts)) == "regression":
        texts = ["" if is_missing(text) else text for text in texts]  # "none" is not a number
        return [_regression(rows, column, texts, dataset)]
    _check_spellings(column, texts)
    return [_classification(rows, column, texts, dataset)]


def _check_commas(rows: Sequence[Row], names: Sequence[str]) -> None:
    """Refuses columns whose numbers have commas; as words they would be classes, or baselines'."""
    words = {name.partition(":")[0] for name in names if name.partition(":")[2] in _OF_WORDS}
    for column in sorted({column for row in rows for column in row.targets} - words):
        given = [row for row in rows if not is_missing(row.targets.get(column))]
        commas = [row for row in given if is_comma_number(row.targets[column])]
        numbers = sum(finite_number(row.targets[column]) is not None for row in given)
        if commas and len(commas) + numbers == len(given) and not holds_codes(column):
            row = commas[0]
            raise TaskError(
                f"column {column!r}: row {row.row} ('{row.audio_path}') says "
                f"{row.targets[column]!r}; write numbers with a point, as 36.6, and nothing "
                f"between thousands (for names that look so ask for '{column}:classification')"
            )


def _says_nothing(text: str) -> bool:
    return is_missing(text) and not is_none_in_words(text)


def _check_spellings(column: str, labels: Iterable[str]) -> None:
    """Refuses two spellings of one name, which would be two classes."""
    counts = Counter(label for label in labels if label)
    names: dict[str, str] = {}
    for label, count in counts.items():
        other = names.setdefault(re.sub(r"[\s_-]+", " ", plain_spelling(label)), label)
        if other != label:
            raise TaskError(
                f"task {column!r}: {other!r} ({counts[other]} rows) and {label!r} ({count} rows) "
                "would be different classes, and differ in spelling only; give them one name"
            )


def _has_label(rows: Sequence[Row]) -> set[str]:
    return {"label"} if any(row.label for row in rows) else set()


def _kind(rows: Sequence[Row], column: str, texts: Sequence[str]) -> str:
    """Numbers make a regression; two different ones, as yes and no, are classes, and so is
    whatever stands in `label`. A word among many numbers may be either, and is refused."""
    given = [i for i, text in enumerate(texts) if not is_missing(text)]
    words = [i for i in given if finite_number(texts[i]) is None]
    numbers = {finite_number(texts[i]) for i in given} - {None}
    if column == "label" or len(numbers) <= 2 or len(words) > (1 - _MOSTLY) * len(given):
        return "classification"
    if words:
        row = rows[words[0]]
        raise TaskError(
            f"task {column!r}: {len(given) - len(words)} of {len(given)} values are numbers, but "
            f"row {row.row} ('{row.audio_path}') says {texts[words[0]]!r}; mend it, leave it "
            f"empty, or ask for '{column}:classification'"
        )
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
    """One task per label: yes where a cell names it, no where a cell names others or none."""
    cells = [{part.strip() for part in _SEPARATORS.split(text)} for text in texts]
    cells = [{label for label in cell if not _says_nothing(label)} for cell in cells]
    named = [label for cell in cells for label in cell if label.lower() not in _NONE]
    labels = sorted(set(named))
    if not labels:
        raise TaskError(f"task '{column}:labels': no cell names a label")
    _check_spellings(f"{column}:labels", named)
    tasks = []
    for label in labels:
        found = ["" if not cell else "yes" if label in cell else "no" for cell in cells]
        task = f"{column}: {label}"
        if len(set(found) - {""}) < 2:
            raise TaskError(f"task {task!r}: every recording that has labels has this one")
        tasks.append(_classification(rows, task, found, dataset))
    return tasks
