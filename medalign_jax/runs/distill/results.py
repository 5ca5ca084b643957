"""What a distillation is worth: scores of every stage, and paired differences between stages.

A stage is the student "before", or an arm of the ablation ("after" where there is only the one).
An arm's answers are a list, one per seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict

from medalign_jax.core.errors import UserError
from medalign_jax.data.questions.question import Question
from medalign_jax.evaluate import answers
from medalign_jax.evaluate.collected import result_of
from medalign_jax.evaluate.results import Result
from medalign_jax.evaluate.statistics import Statistic, class_mean_statistic, mean_statistic

if TYPE_CHECKING:
    from medalign_jax.runs.distill.arms import QuestionTask, Setting

Found = Mapping[str, Sequence[Mapping[str, Mapping[str, str]]]]

BEFORE = "before"
MINUS = " minus "
PART = ": task "  # how `answers.accuracy_results` names the questions of one task
FINER = (": difficulty ", ": sub-category ")  # and those of one difficulty, one sub-category
_KINDS = {"generate": "generation", "rank": "ranking"}


def results(setting: Setting, found: Found) -> list[Result]:
    """Every stage's scores, and the paired differences of `comparisons`.

    Scores: accuracy over all questions and by task, difficulty and sub-category; of a
    classification unweighted accuracy and accuracy. An arm's score is the mean over its seeds, and
    its interval covers the choice of test subjects. The interval of a difference covers the
    choice of seeds too, where there are several: both are resampled.

    Args:
      setting: tasks, and the config with seeds and arms.
      found: stage -> one per seed: task name -> question id -> response.

    Returns:
      QuestionTask by task: stages first, then differences, named "after minus before".

    Raises:
      UserError: no stage; a stage that lacks a task, or has another number of seeds than the
        config; an arm of a name that is taken.
      AnswersError: an answer to no question.
    """
    _check(setting, found)
    found = {stage: found[stage] for stage in ordered(setting.config, tuple(found))}
    collected: list[Result] = []
    for task in setting.tasks:
        runs = {
            stage: [predictions(task, answered[task.name]) for answered in seeds]
            for stage, seeds in found.items()
        }
        for stage, said in runs.items():
            collected += _scores(setting, task, stage, said)
        right = {
            stage: np.stack([answers.hits(task.questions, each) for each in said])
            for stage, said in runs.items()
        }
        for earlier, later in comparisons(setting.config, tuple(found)):
            for name, inside in _parts(task):
                pair = right[earlier][:, inside], right[later][:, inside]
                collected.append(_difference(setting, task, name, inside, (earlier, later), pair))
    return collected


def predictions(task: QuestionTask, responses: Mapping[str, str]) -> dict[str, str]:
    """What each response answers, by question id, ready for `answers.hits`."""
    choices = {question.id: question.choices for question in task.questions}
    return {id: answers.chosen(text, choices.get(id, ())) for id, text in responses.items()}


def comparisons(config: ConfigDict, stages: Sequence[str]) -> list[tuple[str, str]]:
    """Which differences are taken: pairs (earlier, later) of stages.

    Each arm with "before", each with `baseline_of` the arms, and any two arms whose losses differ
    in one setting alone, which then is what the difference shows.
    """
    arms = arms_among(stages)
    pairs = [(BEFORE, arm) for arm in arms] if BEFORE in stages else []
    pairs += [(baseline_of(arms), arm) for arm in arms if arm != baseline_of(arms)]
    losses = {arm: loss_of(config, arm) for arm in arms}
    for n, one in enumerate(arms):
        for other in arms[n + 1 :]:
            differs = [key for key in losses[one] if losses[one][key] != losses[other][key]]
            # Later is the one with the term that the other lacks.
            swap = len(differs) == 1 and not losses[other][differs[0]]
            pair = (other, one) if swap else (one, other)
            if len(differs) == 1 and pair not in pairs and pair[::-1] not in pairs:
                pairs.append(pair)
    return pairs


def arms_among(stages: Sequence[str]) -> list[str]:
    """The stages after distillation."""
    return [stage for stage in stages if stage != BEFORE]


def main_arm(config: ConfigDict, stages: Sequence[str]) -> str | None:
    """The first arm whose loss is the config's own, else the last one; None without arms."""
    arms = arms_among(stages)
    own = [arm for arm in arms if loss_of(config, arm) == {**config.loss}]
    return (own or arms[-1:] or [None])[0]


def ordered(config: ConfigDict, stages: Sequence[str]) -> list[str]:
    """Stages as the paper's tables have them: "before", then from losses of few terms to all."""

    def terms(arm: str) -> tuple:
        loss = loss_of(config, arm)
        text = loss["text_weight"] > 0
        return text, text and loss["layers_weight"] > 0, loss["acoustic_weight"], loss["every"]

    return [s for s in stages if s == BEFORE] + sorted(arms_among(stages), key=terms)


def baseline_of(arms: Sequence[str]) -> str:
    """The arm that the others are measured against: "sft", else the first."""
    return "sft" if "sft" in arms else arms[0]


def loss_of(config: ConfigDict, arm: str) -> dict[str, Any]:
    """The settings of an arm's loss: the config's, with the arm's changes."""
    changes = config.arms[arm] if config.arms and arm in config.arms else {}
    return {**config.loss, **changes}


def seeds_of(config: ConfigDict, stage: str) -> tuple[int, ...]:
    """Seeds of a stage's runs; the student before is one model, number 0."""
    return (0,) if stage == BEFORE else tuple(config.seeds)


def trained_on(setting: Setting) -> int:
    """Questions that a model is trained on; of folds the most."""
    return len(setting.train) + max((len(fold.train) for fold in setting.folds), default=0)


def _check(setting: Setting, found: Found) -> None:
    if not found:
        raise UserError("there are no answers to score; nothing was evaluated")
    for stage, runs in found.items():
        expected = len(seeds_of(setting.config, stage))
        if MINUS in stage or len(runs) != expected:
            raise UserError(
                f"stage {stage!r} has the answers of {len(runs)} runs, not of {expected}; "
                f'an arm is not named "{BEFORE}", and no name holds "{MINUS}"'
            )
        for run in runs:
            if lacking := [task.name for task in setting.tasks if task.name not in run]:
                raise UserError(f"stage {stage!r} has no answers to {', '.join(lacking)}")


def _scores(
    setting: Setting, task: QuestionTask, stage: str, runs: Sequence[dict[str, str]]
) -> list[Result]:
    """A stage's results, with each seed's own value in the notes."""
    seeds = seeds_of(setting.config, stage)
    n_train = 0 if stage == BEFORE else trained_on(setting)

    def measure(said: Any) -> list[Result]:
        score = answers.class_results if task.classes else answers.accuracy_results
        return score(
            task.questions, said, dataset=task.dataset, stage=stage, kind=_kind(task),
            n_train=n_train, name=task.name,
        )  # fmt: skip

    pooled = measure(runs)
    each = [[r.value for r in measure(run)] for run in runs] if len(runs) > 1 else []
    kept = []
    for n, result in enumerate(pooled):
        if result.task != task.name and result.n_test == len(task.questions):
            continue  # a group of all questions is not a group
        values = [column[n] for column in each]
        note = f"{_by_seed(seeds, values)}; the interval covers both" if values else ""
        notes = "; ".join(filter(None, [result.notes, note]))
        kept.append(replace(result, seeds=seeds, notes=notes))
    return kept


def _by_seed(seeds: Sequence[int], values: Sequence[float], sign: str = "") -> str:
    return "by seed " + ", ".join(
        f"{seed}: {value:{sign}.3f}" for seed, value in zip(seeds, values, strict=True)
    )


def _kind(task: QuestionTask) -> str:
    return _KINDS.get(task.how, task.how)


def metric_of(task: QuestionTask) -> str:
    """The score that a task is judged by."""
    return "unweighted_accuracy" if task.classes else "accuracy"


def _parts(task: QuestionTask) -> list[tuple[str, np.ndarray]]:
    """All questions, and those of each of several tasks of a benchmark: (n,) bool."""
    parts = [(task.name, np.ones(len(task.questions), bool))]
    values = np.array([question.task for question in task.questions])
    names = sorted(set(values) - {""})
    if task.classes or len(set(values)) == 1:
        return parts
    return parts + [(f"{task.name}{PART}{name}", values == name) for name in names]


def _difference(
    setting: Setting,
    task: QuestionTask,
    name: str,
    inside: np.ndarray,
    stages: tuple[str, str],
    right: tuple[np.ndarray, np.ndarray],
) -> Result:
    """Later minus earlier on the same questions; `right` is (seeds, n) of each."""
    config, (earlier, later) = setting.config, stages
    questions = [q for q, used in zip(task.questions, inside, strict=True) if used]
    seeds = seeds_of(config, later)
    # The one student before stands beside each seed.
    pair = [_statistic(task, questions, np.broadcast_to(r, right[1].shape)) for r in right]
    fields: dict[str, Any] = {
        "task": name, "dataset": task.dataset, "kind": _kind(task), "metric": metric_of(task),
        "stage": f"{later}{MINUS}{earlier}", "n_train": trained_on(setting),
        "n_test": len(questions), "seeds": seeds,
    }  # fmt: skip
    notes = "paired interval over test subjects; one seed, whose choice it does not cover"
    if len(seeds) > 1:
        few = " (few: it may be too narrow)" if len(seeds) < 10 else ""
        notes = f"paired interval over test subjects and {len(seeds)} seeds{few}"
        ones = np.ones((1, len(questions)))
        by_seed = np.ravel(pair[1](ones) - pair[0](ones))
        notes += f"; {_by_seed(seeds, by_seed, '+')}"
    subjects = [answers.subject_of(question) for question in questions]
    return result_of(tuple(pair), subjects, interval_notes=notes, **fields)[0]


def _statistic(task: QuestionTask, questions: Sequence[Question], right: np.ndarray) -> Statistic:
    if not task.classes:
        return mean_statistic(right)
    labels = np.unique([question.answer for question in questions], return_inverse=True)[1]
    return class_mean_statistic(labels, right)


def direction(result: Result) -> int:
    """1 or -1 where the interval of a difference lies above or below zero, else 0."""
    if result.ci_low is None or result.ci_low <= 0 <= result.ci_high:
        return 0
    return 1 if result.ci_low > 0 else -1
