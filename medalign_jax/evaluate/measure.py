"""Measures stages side by side: every task, by every probe, on every fold, with intervals.

tasks + folds + features of each stage -> problems -> probes -> predictions of the test recordings
                                                                 |
                          values, paired differences, means over tasks, Holm's correction

Every recording is predicted by probes that saw none of its subject's recordings. Where there are
several folds their predictions are scored together, an AUROC by the pairs of each fold; draws of
few labels, seeds and repeats of the folds are columns of one statistic, and count in its interval.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

import numpy as np

from medalign_jax.core.errors import UserError
from medalign_jax.evaluate import probes
from medalign_jax.evaluate.collected import Measured, correct_for_tasks
from medalign_jax.evaluate.comparing import add_stages
from medalign_jax.evaluate.folds import Fold
from medalign_jax.evaluate.stages import Guess, Settings, Stage
from medalign_jax.evaluate.tasks import Task

_LEAST_PROBABILITY = 1e-6  # of a class that a probe rules out, as neighbours may
_TIED_DIGITS = 13  # of the largest score
_SEEDED = frozenset({"mlp", "opera"})  # the others give the same whatever the seed


def measure(
    tasks: Sequence[Task],
    plans: Sequence[Sequence[Fold]],
    subjects: Sequence[str],
    stages: Sequence[Stage],
    settings: Settings,
    guesses: Sequence[Guess] = (),
    by_subject: bool = False,
) -> Measured:
    """Every task, probe and stage; differences from the first stage and from plain statistics.

    Args:
      tasks: what is asked; their data set must be the same.
      plans: repeats of folds; each tests every test recording once, the same ones in each.
      subjects: (N,) one id per recording.
      stages: the first is what encoders, controls and references are compared with.
      settings: how.
      guesses: baselines that need no features.
      by_subject: whether a subject has one score, the mean of its recordings': of log
        probabilities, or of numbers. Answers of a subject's recordings must be the same.

    Raises:
      UserError: features that do not fit the recordings, or a probe that cannot be fitted.
    """
    _check(stages, plans, len(subjects))
    found = Measured()
    groups = np.unique(np.asarray(subjects, str), return_inverse=True)[1].astype(np.int32)
    for task in tasks:
        rows = np.concatenate([_known(task, fold.test) for fold in plans[0]])
        found.tested[task.name] = np.sort(rows)
        found.folds[task.name] = np.stack([_fold_of(found.tested[task.name], p) for p in plans])
    notes: dict[tuple[str, str, str], dict[str, int]] = {}
    for stage in stages:
        for kind in settings.kinds:
            _probe(stage, kind, tasks, plans, groups, settings, found, notes)
    for guess in guesses:
        _guess(guess, tasks, plans, settings.probes[0], found)
    if by_subject:
        _average_by_subject(np.asarray(subjects, str), {g.name for g in guesses}, found)
    fits = {key: counts.pop("") for key, counts in notes.items()}
    stage_notes = {key: _joined(counts, fits[key]) for key, counts in notes.items()} | {
        (task.name, settings.probes[0], guess.name): guess.notes.get(task.kind, "")
        for guess in guesses for task in tasks
    }  # fmt: skip
    add_stages(tasks, plans, subjects, stages, settings, stage_notes, found)
    correct_for_tasks(found)
    return found


def _joined(counts: Mapping[str, int], fits: int) -> str:
    """Notes of the fits of one stage, each once, and of how many of the fits it is said."""
    return "; ".join(
        note if n == fits == 1 else f"{note} ({n} of {fits} fits)" for note, n in counts.items()
    )


def _check(stages: Sequence[Stage], plans: Sequence[Sequence[Fold]], count: int) -> None:
    if len({stage.name for stage in stages}) < len(stages) or not stages:
        raise UserError("stages need names of their own, and there has to be one")
    for stage in stages:
        if isinstance(stage.features, tuple) and (
            len(plans) > 1 or len(stage.features) != len(plans[0])
        ):
            raise UserError(
                f"stage {stage.name!r}: {len(stage.features)} models for {len(plans[0])} folds "
                f"in {len(plans)} repeats; a model belongs to one fold"
            )
        for k in range(len(plans[0])):
            if np.ndim(stage.of(k)) != 2 or len(stage.of(k)) != count:
                raise UserError(
                    f"stage {stage.name!r}: features of shape {np.shape(stage.of(k))} for {count} "
                    "recordings"
                )


def _fold_of(rows: np.ndarray, plan: Sequence[Fold]) -> np.ndarray:
    """The number of the fold that tests each row."""
    number = np.full(rows.max(initial=0) + 1, -1)
    for k, fold in enumerate(plan):
        number[np.intersect1d(fold.test, rows)] = k
    return number[rows]


def _known(task: Task, rows: np.ndarray) -> np.ndarray:
    return rows[task.known[rows]]


# ------------------------------------------------------------------------------- probes


def _probe(stage, kind, tasks, plans, groups, settings, found: Measured, notes) -> None:
    """One probe of one stage: all tasks, repeats, folds, draws and seeds in one call for each
    matrix of features."""
    name = kind.partition("_")[0]
    few, probe = kind != name, probes.PROBES[name]
    jobs: dict[int, list] = {}
    for p, plan in enumerate(plans):
        for k, fold in enumerate(plan):
            place = k if isinstance(stage.features, tuple) else 0
            for task in tasks:
                if few and task.kind == "regression":
                    continue
                made = _problems(task, fold, groups, settings, name, few)
                jobs.setdefault(place, []).extend((task, p, fold, r, x) for r, x in made)
    filled: dict[str, np.ndarray] = {}
    for place, listed in jobs.items():
        outcome = probe(stage.of(place), [problem for *_, problem in listed])
        for (task, p, _, r, problem), prediction in zip(listed, outcome, strict=True):
            runs = max(job[3] for job in listed if job[0] is task) + 1
            _place(filled, task, problem.test, p * runs + r, runs * len(plans), prediction, found)
            _note(notes, (task.name, kind, stage.name), prediction.note)
    for task in tasks:
        if task.name in filled:
            found.scores[task.name, kind, stage.name] = filled[task.name]


def _problems(task: Task, fold: Fold, groups, settings: Settings, probe: str, few: bool):
    """(run, problem) of a task and a fold."""
    train, test = _known(task, fold.train), _known(task, fold.test)
    if not len(test):
        return []
    reads = probe in probes.VALIDATED
    shared = {
        "targets": task.answers,
        "test": test,
        "groups": groups,
        "classes": len(task.classes),
        "valid": _known(task, fold.valid) if reads and len(fold.valid) else None,
    }
    if few:
        drawn = probes.few_shot_draws(
            task.answers[train], settings.per_class, settings.draws, seed=0
        )
        return [
            (r, probes.Problem(train=train[draw], seed=r, **shared)) for r, draw in enumerate(drawn)
        ]
    seeds = settings.seeds if probe in _SEEDED else 1
    return [(seed, probes.Problem(train=train, seed=seed, **shared)) for seed in range(seeds)]


def _place(filled, task, rows, run, runs, prediction, found: Measured) -> None:
    """Puts a fold's predictions where its recordings stand among all tested ones."""
    tested = found.tested[task.name]
    if task.name not in filled:
        shape = (runs, len(tested), *np.shape(prediction.scores)[1:])
        filled[task.name] = np.full(shape, np.nan)
    filled[task.name][run, np.searchsorted(tested, rows)] = prediction.scores


def _note(notes: dict, key: tuple[str, str, str], note: str) -> None:
    """Several fits often say the same: it is noted once, with how many said it; "" counts all."""
    counts = notes.setdefault(key, {"": 0})
    counts[""] += 1
    if note:
        counts[note] = counts.get(note, 0) + 1


def _average_by_subject(subjects: np.ndarray, guesses: Container[str], found: Measured) -> None:
    """A subject's first tested recording stands for it, with the mean of all of them."""
    own: dict[str, np.ndarray] = {}
    for task, rows in found.tested.items():
        _, first, number = np.unique(subjects[rows], return_index=True, return_inverse=True)
        order = np.argsort(first)
        own[task] = np.argsort(order)[number]
        found.tested[task] = rows[first[order]]
        found.folds[task] = found.folds[task][:, first[order]]
    for (task, kind, stage), scores in found.scores.items():
        logged = scores.ndim == 3 and stage not in guesses
        values = np.log(np.maximum(scores, _LEAST_PROBABILITY)) if logged else scores
        mean = _means(values, own[task])
        if logged:
            mean = np.exp(mean - mean.max(axis=-1, keepdims=True))
            mean /= mean.sum(axis=-1, keepdims=True)
        found.scores[task, kind, stage] = mean


def _means(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """(P, N, ...) and the number of each recording's group -> (P, G, ...), with ties kept.

    The last bit of a sum over n values depends on n and on their order, and an AUROC would rank
    groups by it: n equal values give just that value, and the rest of the noise is rounded off.
    """
    _, first = np.unique(group, return_index=True)
    apart = np.zeros((len(values), len(first), *values.shape[2:]))
    np.add.at(apart, (slice(None), group), values - values[:, first[group]])
    size = np.bincount(group).reshape(1, -1, *[1] * (values.ndim - 2))
    means = values[:, first] + apart / size
    largest = np.abs(means).max(initial=0.0)
    if not 0.0 < largest < np.inf:
        return means
    return np.round(means / largest, _TIED_DIGITS) * largest


def _guess(guess: Guess, tasks, plans, kind: str, found: Measured) -> None:
    for task in tasks:
        filled: dict[str, np.ndarray] = {}
        for p, plan in enumerate(plans):
            for fold in plan:
                rows = _known(task, fold.test)
                scores = guess.predict(task, fold) if len(rows) else None
                if scores is not None:
                    made = probes.Prediction(np.asarray(scores))
                    _place(filled, task, rows, p, len(plans), made, found)
        if filled:
            found.scores[task.name, kind, guess.name] = filled[task.name]
