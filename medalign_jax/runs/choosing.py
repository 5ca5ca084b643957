"""Chooses among several alignments of a fold by recordings that are neither trained on nor tested.

Every fold chooses for itself, with subjects that it tests nothing on: one choice for all folds,
made on their validation recordings together, would have seen the labels of every subject.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, MutableMapping, Sequence

import numpy as np

from medalign_jax.core.errors import UserError
from medalign_jax.evaluate.folds import Fold
from medalign_jax.evaluate.probes import PROBES, Problem
from medalign_jax.evaluate.statistics import auroc
from medalign_jax.evaluate.suite import Suite
from medalign_jax.evaluate.tasks import Task
from medalign_jax.runs.arms import MAIN, Arm


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The alignment of each fold.

    Attributes:
      names: of the arms, one per fold.
      folds: their names.
      scores: name -> validation score of each arm there was to choose from, one per fold; empty
        where there was only one.
    """

    names: tuple[str, ...]
    folds: tuple[str, ...]
    scores: tuple[dict[str, float], ...]

    def describe(self) -> str:
        """One line for the tables; "" where nothing was chosen."""
        if not any(self.scores):
            return ""
        choices = []
        for fold, name, scores in zip(self.folds, self.names, self.scores, strict=True):
            others = ", ".join(f"{scores[other]:.3f}" for other in scores if other != name)
            choices.append(
                f"{fold}: {name} {scores[name]:.3f} (others {others})".removeprefix(": ")
            )
        return "chosen on validation subjects of " + "; ".join(choices)


def settle(
    suite: Suite, arms: Sequence[Arm], embedded: MutableMapping[str, list[np.ndarray]]
) -> Chosen:
    """The run's own alignment, or where there are candidates the best of them in each fold.

    The candidates themselves are not measured on test recordings: their embeddings are taken out
    of `embedded`, and those of the chosen ones stand under the name of the run's own alignment.

    Args:
      suite: tasks and folds.
      arms: of the run.
      embedded: stage -> (N, D) of each fold; changed.
    """
    folds = suite.choice_folds()
    names = tuple(fold.name for fold in folds)
    rivals = [MAIN, *(arm.name for arm in arms if arm.role == "candidate")]
    if len(rivals) == 1:
        return Chosen((MAIN,) * len(folds), names, ({},) * len(folds))
    found = {name: embedded[name] for name in rivals}
    scores = tuple(
        validation_scores(suite, fold, {name: found[name][k] for name in rivals})
        for k, fold in enumerate(folds)
    )
    chosen = Chosen(tuple(max(one, key=one.__getitem__) for one in scores), names, scores)
    for name in rivals[1:]:
        del embedded[name]
    embedded[MAIN] = [found[name][k] for k, name in enumerate(chosen.names)]
    print(chosen.describe(), flush=True)
    return chosen


def validation_scores(
    suite: Suite, fold: Fold, embedded: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """What the headline probe, fitted on a fold's training rows, reaches on its validation rows.

    Args:
      suite: tasks, and how recordings become rows.
      fold: over rows.
      embedded: name -> (N, D) of all recordings.

    Returns:
      name -> mean over the tasks: of the AUROC, and for a regression of minus the mean absolute
      error in deviations of the training answers. Tasks whose validation rows are all of one class
      do not count.

    Raises:
      UserError: there is nothing to choose by.
    """
    probe = PROBES[suite.options.settings.probes[0]]
    groups = np.unique(np.asarray(suite.subjects, str), return_inverse=True)[1].astype(np.int32)
    asked = [(task, _problem(task, fold, groups)) for task in suite.tasks]
    asked = [(task, problem) for task, problem in asked if _tells(task, problem)]
    if not asked:
        raise UserError(
            f"{fold.name or 'the validation split'}: no task has two answers among the validation "
            "recordings, so nothing can be chosen: give more of them, or no candidates"
        )
    found = {}
    for name, features in embedded.items():
        made = probe(suite.gather(features), [problem for _, problem in asked])
        pairs = zip(asked, made, strict=True)
        found[name] = float(np.mean([_score(*one, prediction.scores) for one, prediction in pairs]))
    return found


def _problem(task: Task, fold: Fold, groups: np.ndarray) -> Problem:
    train, valid = (rows[task.known[rows]] for rows in (fold.train, fold.valid))
    return Problem(
        targets=task.answers, train=train, test=valid, groups=groups, classes=len(task.classes)
    )


def _tells(task: Task, problem: Problem) -> bool:
    return len(np.unique(task.answers[problem.test])) > 1


def _score(task: Task, problem: Problem, scores: np.ndarray) -> float:
    truth = task.answers[problem.test]
    if task.kind == "regression":
        return -float(np.abs(truth - scores).mean() / task.answers[problem.train].std())
    return auroc(truth, scores).value
