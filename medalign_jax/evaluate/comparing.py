"""Results of stages side by side: scores, paired differences, means over tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from medalign_jax.evaluate import statistics
from medalign_jax.evaluate.collected import MEAN_OF, Measured, add_identical, add_result
from medalign_jax.evaluate.folds import Fold, describe_classes
from medalign_jax.evaluate.probes import PROBES
from medalign_jax.evaluate.stages import BY_RIDGE, MINUS, PLAIN, Settings, Stage
from medalign_jax.evaluate.tasks import Task

Scores = Mapping[str, statistics.Statistic]  # by stage


def add_stages(
    tasks: Sequence[Task],
    plans: Sequence[Sequence[Fold]],
    subjects: Sequence[str],
    stages: Sequence[Stage],
    settings: Settings,
    notes: Mapping[tuple[str, str, str], str],
    into: Measured,
) -> None:
    """Results of all predictions in `into.scores`.

    Args:
      tasks, plans, subjects, stages, settings: as `measure.measure` takes them.
      notes: (task, kind, stage) -> what a probe has to say.
      into: holds predictions, gets the results.
    """
    class_notes = {task.name: describe_classes(task, plans) for task in tasks if task.classes}
    table = _Table(stages, notes, class_notes, np.asarray(subjects, object), into)
    for task in tasks:
        for kind in settings.kinds:
            scores = {s: v for (t, k, s), v in into.scores.items() if (t, k) == (task.name, kind)}
            if scores:
                table.task(task, kind, scores, _trained_on(task, plans, kind, settings))
    classes = [task for task in tasks if task.kind == "classification"]
    if len(classes) > 1:
        for kind in settings.kinds:
            counts = [_trained_on(task, plans, kind, settings) for task in classes]
            table.mean(classes, kind, max(counts))


def _trained_on(task: Task, plans, kind: str, settings: Settings) -> int:
    """Training recordings of a probe; of several folds the most."""
    if kind not in PROBES:
        return settings.per_class * len(task.classes)
    return max(int(task.known[fold.train].sum()) for plan in plans for fold in plan)


class _Table:
    """Adds lines: one per stage, one per pair of stages."""

    def __init__(self, stages, notes: Mapping, class_notes: Mapping, subjects: np.ndarray, into):
        """`class_notes`: task -> what is to be said of its AUROCs."""
        self.stages, self.notes, self.class_notes = stages, notes, class_notes
        self.subjects, self.into = subjects, into

    def task(self, task: Task, kind: str, scores: Mapping[str, np.ndarray], n_train: int) -> None:
        """All stages of a task."""
        rows = self.into.tested[task.name]
        truth = task.answers[rows]
        for metric, statistic_of in _METRICS[task.kind].items():
            if metric == "accuracy" and kind not in PROBES:
                continue  # of few labels the AUROC says it
            by_stage = {s: statistic_of(truth, value, task.classes, self._folds(task, value))
                        for s, value in scores.items()}  # fmt: skip
            runs = max(len(value) for value in scores.values())
            class_notes = self.class_notes[task.name] if metric == "auroc" else ""
            self._lines(
                [task], by_stage, rows, class_notes, task=task.name, dataset=task.dataset,
                kind=kind, metric=metric, n_train=n_train, n_test=len(rows),
                seeds=tuple(range(runs)),
            )  # fmt: skip

    def mean(self, tasks: Sequence[Task], kind: str, n_train: int) -> None:
        """Mean AUROC over tasks; resampled subjects are the same in all of them."""
        tested, scores = self.into.tested, self.into.scores
        rows = np.unique(np.concatenate([tested[task.name] for task in tasks]))
        by_stage, runs = {}, 1
        for stage in dict.fromkeys(stage for (_, k, stage) in scores if k == kind):
            found = [scores.get((task.name, kind, stage)) for task in tasks]
            if any(value is None for value in found):
                continue
            runs = max(runs, *map(len, found))
            parts = [
                (np.searchsorted(rows, tested[task.name]),
                 statistics.auroc_statistic(task.answers[tested[task.name]], value, task.classes,
                                            self._folds(task, value)))
                for task, value in zip(tasks, found, strict=True)
            ]  # fmt: skip
            by_stage[stage] = AverageOverTasks(parts)
        if by_stage:
            class_notes = "; ".join(
                f"{t.name}: {self.class_notes[t.name]}" for t in tasks if self.class_notes[t.name]
            )
            self._lines(
                tasks, by_stage, rows, class_notes, task=f"{MEAN_OF}{len(tasks)} tasks",
                dataset=tasks[0].dataset, kind=kind, metric="auroc", n_train=n_train,
                n_test=len(rows), seeds=tuple(range(runs)),
            )  # fmt: skip

    def _folds(self, task: Task, scores: np.ndarray) -> np.ndarray:
        """(D, m) the fold that tested a recording in each column of scores (D, m, ...)."""
        folds = self.into.folds[task.name]
        return np.repeat(folds, len(scores) // len(folds), axis=0)

    def _lines(
        self, tasks: Sequence[Task], by_stage: Scores, rows: np.ndarray, class_notes: str, **fields
    ) -> None:
        subjects = self.subjects[rows]
        count = 1 + max(int(self.into.folds[task.name].max()) for task in tasks)
        for stage, score in by_stage.items():
            notes = _joined(self._notes(fields["task"], fields["kind"], stage), class_notes)
            add_result(self.into, score, subjects, count, stage=stage, notes=notes, **fields)
        for later, earlier in self._pairs(by_stage):
            stage = f"{later}{MINUS}{earlier}"
            if self._identical(tasks, fields["kind"], later, earlier):
                add_identical(self.into, subjects, stage=stage, notes=class_notes, **fields)
                continue
            add_result(
                self.into, (by_stage[earlier], by_stage[later]), subjects, count, stage=stage,
                notes=_joined("paired interval", class_notes), **fields,
            )  # fmt: skip

    def _identical(self, tasks: Sequence[Task], kind: str, later: str, earlier: str) -> bool:
        """Whether two stages predict the same of every test recording."""
        scores = self.into.scores
        return all(
            np.array_equal(scores[task.name, kind, later], scores[task.name, kind, earlier])
            for task in tasks
        )

    def _pairs(self, by_stage: Scores) -> list[tuple[str, str]]:
        """Each stage against the first, each encoder against the plain statistics, and each that
        was trained with reports against what these bring to fixed features."""
        first = self.stages[0].name
        pairs = [(s.name, first) for s in self.stages[1:] if s.role != "baseline"]
        encoders = [s.name for s in self.stages if s.role == "encoder"]
        pairs += [(name, PLAIN) for name in encoders]
        ridge = [s.name for s in self.stages if s.name.endswith(BY_RIDGE)]
        pairs += [(name, other) for name in encoders if name != first for other in ridge]
        return [(a, b) for a, b in pairs if a in by_stage and b in by_stage and a != b]

    def _notes(self, task: str, kind: str, stage: str) -> str:
        own = next((s.notes for s in self.stages if s.name == stage), "")
        return _joined(own, self.notes.get((task, kind, stage), ""))


def _joined(*notes: str) -> str:
    return "; ".join(filter(None, notes))


class AverageOverTasks:
    """Mean of statistics that each see some of the recordings: the mean AUROC of several tasks.

    A statistic as `evaluate.statistics` makes them; leaving a subject out leaves it out of all
    tasks that it takes part in.
    """

    scale = "share"

    def __init__(self, parts: Sequence[tuple[np.ndarray, statistics.AurocStatistic]]):
        """`parts`: the recordings (positions) that a statistic uses, and the statistic."""
        self._parts = parts

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """(B, D) values at weights (B, n)."""
        return np.mean([statistic(weights[:, rows]) for rows, statistic in self._parts], axis=0)

    def without_each(self, groups: np.ndarray) -> np.ndarray:
        """(K, D) values without each of the K subjects, from (n,) subject numbers."""
        found = []
        for rows, statistic in self._parts:
            there, own = np.unique(groups[rows], return_inverse=True)
            whole = statistic(np.ones((1, len(rows))))
            values = np.repeat(whole, groups.max() + 1, axis=0)
            values[there] = statistic.without_each(own)
            found.append(values)
        return np.mean(found, axis=0)

    def strata(self, groups: np.ndarray) -> np.ndarray:
        """(K,) zeros: the tasks divide the subjects differently."""
        return np.zeros(groups.max() + 1, int)

    def check_subjects(self, groups: np.ndarray, least: int) -> None:
        """Raises StatisticsError where a task has too few subjects of a class."""
        for rows, statistic in self._parts:
            statistic.check_subjects(groups[rows], least)

    def effective_subjects(self, value: float, groups: np.ndarray) -> float:
        """As of one task, if the tasks' scores rose and fell together."""
        sizes = [
            statistic.effective_subjects(value, np.unique(groups[rows], return_inverse=True)[1])
            for rows, statistic in self._parts
        ]
        return 1 / float(np.mean([1 / size for size in sizes]))


def _accuracy(truth: np.ndarray, scores: np.ndarray, classes, folds) -> statistics.Statistic:
    del classes, folds
    return statistics.mean_statistic(statistics.hits(truth, scores), scale="share")


def _error(truth: np.ndarray, predictions: np.ndarray, classes, folds) -> statistics.Statistic:
    del classes, folds
    return statistics.mean_statistic(np.abs(predictions - truth), scale="error")


_METRICS = {
    "classification": {"auroc": statistics.auroc_statistic, "accuracy": _accuracy},
    "regression": {"mae": _error},
}
