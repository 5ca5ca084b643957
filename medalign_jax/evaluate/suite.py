"""Tasks, folds and subjects of a data set, checked together: what every evaluation starts from.

`Suite.of` needs the rows of a manifest and nothing else, so whatever is wrong with tasks, labels,
splits and folds is said before a recording is opened. Where subjects are asked about, the answers
of a subject's recordings have to agree. With `aggregate="subject"` they become one row, the mean of
their features; with "scores" probes are fitted on recordings, and a subject's score is the mean of
its recordings' scores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from medalign_jax.data.recordings.manifest import Row
from medalign_jax.evaluate.folds import (
    Fold,
    check_folds,
    check_repeats,
    fold_of_splits,
    folds_by_subject,
)
from medalign_jax.evaluate.probes import VALIDATED
from medalign_jax.evaluate.stages import Settings, Stage
from medalign_jax.evaluate.tasks import Task, TaskError, tasks_of

AGGREGATES = ("recording", "subject", "scores")


@dataclasses.dataclass(frozen=True)
class Options:
    """What is evaluated and how.

    Attributes:
      tasks: columns of the manifest, see `tasks`.
      folds: folds by subject; 0 takes the manifest's column `split`.
      repeats: how often the folds are dealt anew.
      seed: of the folds.
      aggregate: "recording"; "subject": the mean of a subject's features; "scores": the mean of the
        scores of a subject's recordings.
      settings: probes, draws and seeds.
    """

    tasks: tuple[str, ...] = ("label",)
    folds: int = 0
    repeats: int = 1
    seed: int = 0
    aggregate: str = "recording"
    settings: Settings = dataclasses.field(default_factory=Settings)

    def __post_init__(self) -> None:
        if self.aggregate not in AGGREGATES:
            raise TaskError(
                f"aggregate is {self.aggregate!r}; it is one of {', '.join(AGGREGATES)}"
            )
        if self.folds < 0 or self.folds == 1 or self.repeats < 1:
            raise TaskError(
                f"folds={self.folds}, repeats={self.repeats}: 2 or more folds (0 for the "
                "manifest's splits), 1 or more repeats"
            )
        if self.seed < 0:
            raise TaskError(f"seed is {self.seed}; a seed is 0 or more")
        if self.repeats > 1 and not self.folds:
            raise TaskError("repeats deal folds anew: ask for folds too")


@dataclasses.dataclass(frozen=True)
class Suite:
    """Checked tasks over R rows, each one recording, or all recordings of a subject.

    Attributes:
      dataset: name of the data.
      options: as asked for.
      tasks: over R rows.
      plans: repeats of folds over R rows.
      subjects: (R,) ids.
      members: (R,) the recordings (positions in the manifest) of each row.
      count: N recordings.
    """

    dataset: str
    options: Options
    tasks: tuple[Task, ...]
    plans: tuple[tuple[Fold, ...], ...]
    subjects: tuple[str, ...]
    members: tuple[np.ndarray, ...]
    count: int

    @classmethod
    def of(
        cls, rows: Sequence[Row], options: Options, dataset: str, validation: bool = False
    ) -> Suite:
        """Checks everything.

        Args:
          rows: of the manifest, with the tasks' columns as targets.
          options: what is asked.
          dataset: name of the data.
          validation: whether a model is trained on each fold, which takes three of them.

        Raises:
          TaskError: anything that would stop the evaluation later.
        """
        tasks = tasks_of(rows, options.tasks, dataset)
        subjects = [row.subject_id or f"row {row.row}" for row in rows]
        members = _members(subjects, options.aggregate)
        gathered = tuple(_gathered(task, members, rows) for task in tasks)
        if options.aggregate == "scores":  # rows stay recordings, whose answers have to agree
            for task in tasks:
                _gathered(task, _members(subjects, "subject"), rows)
        tasks = gathered
        of_row = tuple(subjects[group[0]] for group in members)
        if validation and options.folds == 2:
            raise TaskError(
                "one model per fold takes 3 folds or more: one tests, one is for choices"
            )
        if options.folds:
            plans = tuple(
                folds_by_subject(of_row, tasks, options.folds, options.seed + r)
                for r in range(options.repeats)
            )
        else:
            plans = ((fold_of_splits([rows[group[0]] for group in members]),),)
        settings = options.settings
        for plan in plans:
            check_folds(tasks, plan, settings.per_class, VALIDATED & set(settings.probes))
        check_repeats(tasks, plans)
        return cls(dataset, options, tasks, plans, of_row, members, len(rows))

    def gather(self, features: np.ndarray) -> np.ndarray:
        """(N, D) of recordings -> (R, D) of rows: the mean over each row's recordings."""
        if len(features) != self.count:
            raise TaskError(f"{len(features)} rows of features for {self.count} recordings")
        if self.options.aggregate != "subject":
            return features
        return np.stack([features[group].mean(axis=0) for group in self.members])

    def answers(self, task: Task) -> np.ndarray:
        """(N,) of recordings: the answer of the row that each is in."""
        found = np.zeros(self.count, task.answers.dtype)
        for group, answer in zip(self.members, task.answers, strict=True):
            found[group] = answer
        return found

    def stage(self, name: str, features: np.ndarray | Sequence[np.ndarray], **fields) -> Stage:
        """A stage from features of recordings; several are those of one model per fold."""
        if isinstance(features, np.ndarray):
            return Stage(name, self.gather(features), **fields)
        return Stage(name, tuple(self.gather(x) for x in features), **fields)

    def training_folds(self) -> tuple[Fold, ...]:
        """The first plan over recordings, for training a model on each fold.

        Where folds were dealt, those that the next fold tests are kept from training for choices
        of the model. Probes are fitted on all but the test recordings.
        """
        return tuple(
            self._spread(fold.name, fold.train, fold.valid, fold.test)
            for fold in self.choice_folds()
        )

    def choice_folds(self) -> tuple[Fold, ...]:
        """The same over rows: what a choice between models may be made on."""
        plan = self.plans[0]
        if not self.options.folds:
            return plan
        folds = []
        for k, fold in enumerate(plan):
            valid = plan[(k + 1) % len(plan)].test
            folds.append(Fold(fold.name, np.setdiff1d(fold.train, valid), valid, fold.test))
        return tuple(folds)

    def tested_folds(self) -> tuple[Fold, ...]:
        """The folds of all repeats over recordings: whatever is tested beside anything."""
        others = (
            self._spread(fold.name, fold.train, fold.valid, fold.test)
            for plan in self.plans[1:]
            for fold in plan
        )
        return (*self.training_folds(), *others)

    @property
    def descriptions(self) -> tuple[str, ...]:
        """One sentence per task: what is asked, of how many."""
        return tuple(task.description for task in self.tasks)

    def _spread(self, name: str, *parts: np.ndarray) -> Fold:
        """Rows -> recordings."""
        empty = np.zeros(0, int)
        found = [np.concatenate([empty, *(self.members[i] for i in rows)]) for rows in parts]
        return Fold(name, *map(np.sort, found))


def _members(subjects: Sequence[str], aggregate: str) -> tuple[np.ndarray, ...]:
    if aggregate != "subject":
        return tuple(np.array([i]) for i in range(len(subjects)))
    found: dict[str, list[int]] = {}
    for i, subject in enumerate(subjects):
        found.setdefault(subject, []).append(i)
    return tuple(np.array(group) for group in found.values())


def _gathered(task: Task, members: Sequence[np.ndarray], rows: Sequence[Row]) -> Task:
    """The task over rows of recordings.

    Raises:
      TaskError: recordings of one subject have different answers.
    """
    answers = np.full(len(members), np.nan if task.kind == "regression" else -1)
    answers = answers.astype(task.answers.dtype)
    for r, group in enumerate(members):
        known = group[task.known[group]]
        if not len(known):
            continue
        values = np.unique(task.answers[known])
        if len(values) > 1:
            names = [task.classes[int(v)] if task.classes else f"{v:g}" for v in values[:2]]
            raise TaskError(
                f"task {task.name!r} is not a matter of the subject: recordings of "
                f"{rows[group[0]].subject_id!r} have {' and '.join(map(repr, names))}; evaluate "
                "recordings (aggregate=recording)"
            )
        answers[r] = values[0]
    return dataclasses.replace(task, answers=answers)
