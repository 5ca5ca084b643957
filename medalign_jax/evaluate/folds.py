"""Which recordings a probe is fitted on and which it is tested on, always apart by subject."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Hashable, Sequence

import numpy as np

from medalign_jax.data.recordings.manifest import Row
from medalign_jax.datasets.splits import deal_folds
from medalign_jax.evaluate.tasks import Task, TaskError


@dataclasses.dataclass(frozen=True)
class Fold:
    """Positions of recordings; no subject is in two of the three.

    Attributes:
      name: "" where there is only the one.
      train: (n,) what probes are fitted on.
      valid: (v,) for choices; may be empty.
      test: (m,) what is predicted.
    """

    name: str
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray

    def split_of(self, count: int) -> list[str]:
        """For each of `count` recordings "train", "valid", "test" or ""."""
        names = np.full(count, "", object)
        for name in ("train", "valid", "test"):
            names[getattr(self, name)] = name
        return names.tolist()


def fold_of_splits(rows: Sequence[Row]) -> Fold:
    """The one fold that the manifest's column `split` says.

    Raises:
      TaskError: nothing to train on or to test on.
    """
    splits = np.array([row.split for row in rows])
    parts = {name: np.flatnonzero(splits == name) for name in ("train", "valid", "test")}
    for name in ("train", "test"):
        if not len(parts[name]):
            raise TaskError(
                f"no recording is of split {name!r}; fill the manifest's column 'split', or ask "
                "for folds by subject (--folds 5)"
            )
    return Fold("", **parts)


def folds_by_subject(
    subjects: Sequence[Hashable],
    tasks: Sequence[Task],
    count: int,
    seed: int = 0,
) -> tuple[Fold, ...]:
    """Folds that each test other subjects, with like shares of every class in each.

    Subjects are dealt out by `datasets.splits.deal_folds`, which keeps the shares of the classes
    of several tasks at once.

    Args:
      subjects: (N,) one id per recording.
      tasks: what to stratify by; regressions do not count.
      count: number of folds, at least 2.
      seed: same seed, same folds.

    Raises:
      TaskError: fewer than two folds, or fewer subjects than folds.
    """
    names = list(dict.fromkeys(subjects))
    if not 2 <= count <= len(names):
        raise TaskError(
            f"{count} folds of {len(names)} subjects cannot be made; ask for 2 to {len(names)}"
        )
    number = {name: i for i, name in enumerate(names)}
    of_recording = np.array([number[subject] for subject in subjects])
    dealt = deal_folds(_traits(of_recording, tasks), count, seed)[of_recording]
    return tuple(
        Fold(f"fold {k}", np.flatnonzero(dealt != k), np.zeros(0, int), np.flatnonzero(dealt == k))
        for k in range(count)
    )


def _traits(of_recording: np.ndarray, tasks: Sequence[Task]) -> np.ndarray:
    """(S, T) bool: which classes a subject has recordings of."""
    columns = [np.zeros((of_recording.max() + 1, 0), bool)]
    for task in tasks:
        found = np.zeros((of_recording.max() + 1, len(task.classes)), bool)
        if task.kind == "classification":
            known = task.known
            found[of_recording[known], task.answers[known]] = True
        columns.append(found)
    return np.concatenate(columns, axis=1)


def check_folds(
    tasks: Sequence[Task],
    folds: Sequence[Fold],
    per_class: int = 0,
    validated: Collection[str] = (),
) -> None:
    """Everything that would stop a probe, before anything is embedded.

    Args:
      tasks: what is asked.
      folds: where it is trained and tested.
      per_class: labels of each class that a few-label probe draws; 0 for none.
      validated: probes that choose on validation recordings, if there are any.

    Raises:
      TaskError: names task, class and fold.
    """
    for task in tasks:
        tested = np.concatenate([fold.test[task.known[fold.test]] for fold in folds])
        if not len(tested):
            raise TaskError(f"task {task.name!r}: no test recording has an answer")
        if task.kind == "classification" and len(np.unique(task.answers[tested])) < 2:
            name = task.classes[task.answers[tested[0]]]
            raise TaskError(
                f"task {task.name!r}: every test recording is {name!r}; AUROC needs a second class"
            )
        if task.kind == "regression" and len(np.unique(task.answers[tested])) < 2:
            raise TaskError(
                f"task {task.name!r}: every test recording has {task.answers[tested[0]]:g}: there "
                "is no variance to predict"
            )
        if task.kind == "classification":
            _check_pairs(task, [folds])
        for fold in folds:
            where = f"task {task.name!r}" + (f", {fold.name}" if fold.name else "")
            _check_training(task, fold, per_class, where)
            if validated and len(fold.valid) and not task.known[fold.valid].any():
                raise TaskError(
                    f"{where}: no validation recording has an answer, and the probe "
                    f"{', '.join(sorted(validated))} chooses by them; give some an answer, or make "
                    "no split 'valid'"
                )


def check_repeats(tasks: Sequence[Task], plans: Sequence[Sequence[Fold]]) -> None:
    """What would stop an AUROC over repeats of folds that each pass `check_folds`.

    Raises:
      TaskError: names the task.
    """
    for task in tasks:
        if task.kind == "classification":
            _check_pairs(task, plans)


def compared(task: Task, folds: Sequence[Fold]) -> np.ndarray:
    """(C,) the number of folds that test recordings of a class beside recordings of others.

    An AUROC compares recordings of the same fold alone, so a class with 0 is not in it.
    """
    counts = np.stack([
        np.bincount(task.answers[fold.test[task.known[fold.test]]], minlength=len(task.classes))
        for fold in folds
    ])  # fmt: skip
    return np.sum((counts > 0) & (counts < counts.sum(axis=1, keepdims=True)), axis=0)


def describe_classes(task: Task, plans: Sequence[Sequence[Fold]]) -> str:
    """Which classes an AUROC leaves out, and which of them not all folds compare; "" if none.

    Args:
      task: a classification.
      plans: repeats of folds.
    """
    counts = np.stack([compared(task, plan) for plan in plans])
    tested = {int(c) for fold in plans[0] for c in np.unique(task.answers[fold.test])}
    least, most, folds = counts.min(axis=0), counts.max(axis=0), len(plans[0])
    out = [
        f"{name!r} ({_absence(c in tested, most[c])})"
        for c, name in enumerate(task.classes) if not least[c]
    ]  # fmt: skip
    some = [
        f"{name!r} in {least[c]}" + (f" to {most[c]}" if most[c] > least[c] else "")
        for c, name in enumerate(task.classes) if 0 < least[c] < folds
    ]  # fmt: skip
    notes = []
    if out:
        kept = len(task.classes) - len(out)
        notes.append(f"mean over {kept} of {len(task.classes)} classes, without {', '.join(out)}")
    if some:
        notes.append(f"compared with other classes: {', '.join(some)} of {folds} folds")
    return "; ".join(notes)


def _absence(tested: bool, most: int) -> str:
    """Why a class is not in an AUROC; `most`: the folds of a repeat that compare it."""
    if not tested:
        return "in no test recording"
    return "not beside others in every repeat" if most else "in no fold beside others"


def _check_pairs(task: Task, plans: Sequence[Sequence[Fold]]) -> None:
    """Some class is compared in every repeat."""
    if np.stack([compared(task, plan) for plan in plans]).all(axis=0).any():
        return
    again = "the same class with others in every repeat" if len(plans) > 1 else "two classes"
    raise TaskError(
        f"task {task.name!r}: {len(plans[0])} folds leave too few recordings in each to test "
        f"{again}, and AUROC compares recordings of the same fold; ask for fewer folds"
    )


def _check_training(task: Task, fold: Fold, per_class: int, where: str) -> None:
    train = fold.train[task.known[fold.train]]
    if task.kind == "regression":
        if len(np.unique(task.answers[train])) < 2:
            raise TaskError(f"{where}: the training recordings have fewer than two values")
        return
    counts = np.bincount(task.answers[train], minlength=len(task.classes))
    if lacking := [repr(task.classes[c]) for c in np.flatnonzero(counts == 0)]:
        raise TaskError(
            f"{where}: no training recording is {', '.join(lacking)}; leave these recordings out, "
            "or ask for fewer folds"
        )
    small = {task.classes[c]: int(n) for c, n in enumerate(counts) if n < per_class}
    if small:
        found = ", ".join(f"{n} of {name!r}" for name, n in small.items())
        raise TaskError(
            f"{where}: {per_class} labels of each class cannot be drawn: there are only {found}; "
            "ask for fewer with per_class, or for none with 0"
        )
