"""Leaving one group out: one model per fold, so that every question is answered by one that had not
seen its group (IEMOCAP's five sessions, the speakers of a corpus).

data.questions -- data.folds names the group --> folds -> a model each -> answers, pooled
       |                                           |
       +-> questions without a group --------------+ trained on in every fold
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from medalign_jax.core.errors import UserError
from medalign_jax.data.questions.question import Fold, Question, leave_one_out
from medalign_jax.runs.distill.arms import QuestionTask


class Folded(NamedTuple):
    """A file of questions: always trained on, folds, and the questions of all tests."""

    train: tuple[Question, ...]
    folds: tuple[Fold, ...]
    task: QuestionTask


def folded(config: ConfigDict, questions: Sequence[Question]) -> Folded:
    """Deals questions into folds by ``config.data.folds``.

    Args:
      config: data.folds is "subject_id" or a key of the questions' `extra`, e.g. "session".
      questions: those without the group are trained on in every fold.

    Raises:
      UserError: a benchmark beside the folds, no evaluation, no question with the group, or one
        without it that is held out.
      QuestionsError: fewer than two groups, or a subject in two of them.
    """
    key = config.data.folds
    _check(config)
    grouped = tuple(q for q in questions if _group(q, key))
    if not grouped:
        known = sorted({name for q in questions for name in q.extra})
        raise UserError(
            f"config.data.folds is {key!r}, which no question of {config.data.questions} has; it "
            f"is 'subject_id' or a key of their extra ({', '.join(known) or 'they have none'})"
        )
    train = tuple(q for q in questions if not _group(q, key))
    _refuse_held_out(train)
    if any(q.split not in ("", "train") for q in grouped):
        print(f"splits are passed over: each {key} is tested once and else trained on", flush=True)
    folds = tuple(leave_one_out(grouped, lambda q: _group(q, key)))
    return Folded(train, folds, _task(config, grouped))


def _check(config: ConfigDict) -> None:
    if not config.evaluate.enabled:
        raise UserError("config.data.folds trains models to be measured; set evaluate.enabled")
    for name in ("mmau", "emodb", "iemocap"):
        if config.data[name]:
            raise UserError(
                f"config.data.folds measures the questions of data.questions alone, one model "
                f"per fold; leave data.{name} empty, and measure it in a run of its own"
            )


def _refuse_held_out(always: Sequence[Question]) -> None:
    for question in always:
        if question.split not in ("", "train"):
            raise UserError(
                f"question '{question.id}' has the split '{question.split}' and no group of "
                "config.data.folds; every fold would be trained on it: leave it out of the file"
            )


def _group(question: Question, key: str) -> str:
    return question.subject_id if key == "subject_id" else question.extra.get(key, "")


def _task(config: ConfigDict, grouped: tuple[Question, ...]) -> QuestionTask:
    """A classification, by the likeliest option, where all have the same options."""
    options = {tuple(sorted(q.choices)) for q in grouped}
    classes = len(options) == 1 and options != {()}
    names = {q.task for q in grouped}
    name = names.pop() if len(names) == 1 and "" not in names else "folds"
    how = "rank" if classes else config.evaluate.answers
    return QuestionTask(name, Path(config.data.questions).stem, grouped, how, classes)


def asked(folds: Sequence[Fold], task: QuestionTask) -> tuple[Fold, ...]:
    """The folds with the tests that the task still has; without any, a fold goes."""
    kept = {question.id for question in task.questions}
    tests = [tuple(q for q in fold.test if q.id in kept) for fold in folds]
    return tuple(replace(fold, test=test) for fold, test in zip(folds, tests, strict=True) if test)
