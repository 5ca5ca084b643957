"""Scores of answers to questions: MMAU's accuracy, and unweighted accuracy of classes.

An answer is a model's text; what it answers is found by MMAU's own rule (`matches`), or by the
likelihood of the options (`rank_options`). Where no answer was given, it is wrong. Intervals
resample subjects; a question without a subject counts with those of the same recording.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from medalign_jax.core.errors import UserError
from medalign_jax.data.questions.question import Question
from medalign_jax.evaluate.collected import result_of
from medalign_jax.evaluate.results import Result
from medalign_jax.evaluate.statistics import (
    Statistic,
    class_mean_statistic,
    mean_statistic,
)
from medalign_jax.text.options import named_option
from medalign_jax.text.reasoning import final_answer

Predictions = Mapping[str, str]

_WORD = re.compile(r"\w+")


class AnswersError(UserError):
    """Answers that do not belong to the questions."""


def matches(prediction: str, answer: str, choices: Sequence[str]) -> bool:
    """MMAU's rule: whether a free text gives the right option.

    Texts are lower-cased and cut into sets of words (runs of word characters). A prediction is
    right if it has words, has all of the answer's, and none that is in a wrong option but not in
    the answer. So an option whose set of words is the answer's counts as right too, which happens
    in the real file (options that differ in order alone).

    Args:
      prediction: what the model wrote as its answer (see `text.reasoning.final_answer`).
      answer: the right option.
      choices: all options; without any, only the first two conditions hold.
    """
    said, right = _words(prediction), _words(answer)
    wrong = {word for choice in choices for word in _words(choice)} - right
    return bool(said) and right <= said and not said & wrong


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.lower()))


def chosen(response: str, choices: Sequence[str], letters: bool = True) -> str:
    """What a whole response answers, ready for `matches`.

    The text of <RESPONSE> (or what there is in its place); with `letters`, the option where that
    text names one by its letter, "(B)", which MMAU's rule does not read.
    """
    answer = final_answer(response)
    option = named_option(answer, choices) if letters and choices else None
    return answer if option is None else option


def hits(questions: Sequence[Question], predictions: Predictions) -> np.ndarray:
    """Which questions are answered right, (n,) bool.

    Args:
      questions: n questions, ids all different.
      predictions: what is answered, by question id; a missing one is wrong.

    Raises:
      AnswersError: no question, an id twice, or an answer to no question.
    """
    ids = [question.id for question in questions]
    if not ids:
        raise AnswersError("there are no questions to score")
    if twice := [id for id, count in Counter(ids).items() if count > 1]:
        raise AnswersError(f"the id '{twice[0]}' is that of more than one question")
    if stray := sorted(predictions.keys() - set(ids)):
        raise AnswersError(
            f"{len(stray)} answers belong to no question, the first to '{stray[0]}'; score the "
            "questions that were asked"
        )
    return np.array([matches(predictions.get(q.id) or "", q.answer, q.choices) for q in questions])


def accuracy_results(
    questions: Sequence[Question],
    predictions: Predictions | Sequence[Predictions],
    *,
    dataset: str,
    stage: str,
    kind: str = "generation",
    n_train: int = 0,
    name: str = "question answering",
) -> list[Result]:
    """Accuracy over all questions, by task, by difficulty and by sub-category.

    Args:
      questions: n questions.
      predictions: by question id, or several of these, one per seed, whose scores are averaged.
      dataset, stage, kind, n_train: see `Result`.
      name: `Result.task` over all; groups are named "<name>: <field> <value>".

    Returns:
      Results, all first; the number of missing answers is in the notes.

    Raises:
      AnswersError: see `hits`.
    """
    runs = _runs(predictions)
    right = np.stack([hits(questions, run) for run in runs])
    missing = np.stack([[not run.get(q.id) for q in questions] for run in runs])
    common = {"dataset": dataset, "stage": stage, "kind": kind, "n_train": n_train,
              "seeds": range(len(runs))}  # fmt: skip
    return [
        _result(
            mean_statistic(right[:, inside]),
            [question for question, used in zip(questions, inside, strict=True) if used],
            task=task,
            metric="accuracy",
            notes=_missing_note(missing[:, inside]),
            **common,
        )
        for task, inside in _groups(questions, name)
    ]


def _groups(questions: Sequence[Question], name: str) -> list[tuple[str, np.ndarray]]:
    """All questions and every group of them: names, and which are inside (n,) bool."""
    groups = [(name, np.ones(len(questions), bool))]
    fields = {"task": "task", "difficulty": "difficulty", "sub-category": "sub_category"}
    for label, field in fields.items():
        values = np.array([getattr(question, field) for question in questions])
        groups += [(f"{name}: {label} {v}", values == v) for v in sorted(set(values) - {""})]
    return groups


def class_results(
    questions: Sequence[Question],
    predictions: Predictions | Sequence[Predictions],
    *,
    dataset: str,
    stage: str,
    kind: str = "generation",
    n_train: int = 0,
    name: str = "speech emotion",
) -> list[Result]:
    """Unweighted accuracy (mean recall over the classes), and accuracy, of classification.

    The classes are the questions' answers. For leave-one-group-out pass what `pool_folds` gives:
    every question is scored once, by the model that had not seen its group.

    Args, raises:
        As `accuracy_results`; also AnswersError where questions have different options.
    """
    if len(options := {tuple(sorted(question.choices)) for question in questions}) > 1:
        raise AnswersError(f"questions of one classification have {len(options)} sets of options")
    runs = _runs(predictions)
    right = np.stack([hits(questions, run) for run in runs])
    missing = np.stack([[not run.get(q.id) for q in questions] for run in runs])
    names, labels = np.unique([question.answer for question in questions], return_inverse=True)
    common = {"task": name, "dataset": dataset, "stage": stage, "kind": kind, "n_train": n_train,
              "seeds": range(len(runs)), "notes": _missing_note(missing)}  # fmt: skip
    statistics = {"unweighted_accuracy": class_mean_statistic(labels, right, names.tolist()),
                  "accuracy": mean_statistic(right)}  # fmt: skip
    return [
        _result(statistic, questions, metric=metric, **common)
        for metric, statistic in statistics.items()
    ]


def pool_folds(
    folds: Sequence[tuple[Sequence[Question], Predictions]],
) -> tuple[list[Question], dict[str, str]]:
    """The test questions of all folds, each with the answer of its own fold's model.

    Raises:
      AnswersError: a question is tested in two folds, or an answer is to one of another fold.
    """
    questions: list[Question] = []
    pooled: dict[str, str] = {}
    seen: set[str] = set()
    for number, (tested, predictions) in enumerate(folds):
        ids = {question.id for question in tested}
        if twice := sorted(ids & seen):
            raise AnswersError(f"question '{twice[0]}' is tested in more than one fold")
        if stray := sorted(predictions.keys() - ids):
            raise AnswersError(f"fold {number} answers '{stray[0]}', which it does not test")
        seen |= ids
        questions += tested
        pooled |= predictions
    return questions, pooled


def expand_options(questions: Sequence[Question]) -> list[Question]:
    """One question per option, answered by it without reasoning: what likelihood ranking scores.

    Raises:
      AnswersError: a question without options.
    """
    found = []
    for question in questions:
        if not question.choices:
            raise AnswersError(f"question '{question.id}' has no options to be ranked")
        found += [
            replace(question, id=f"{question.id}/{n}", answer=choice, reasoning=None, extra={})
            for n, choice in enumerate(question.choices)
        ]
    return found


def rank_options(
    questions: Sequence[Question],
    log_probs: Sequence[float] | np.ndarray,
    lengths: Sequence[int] | np.ndarray | None = None,
) -> dict[str, str]:
    """The most likely option of each question, as predictions by question id.

    Args:
      questions: n questions with options.
      log_probs: (m,) of the options, in the order of `expand_options`.
      lengths: (m,) tokens of each; with them the mean per token is ranked, without them the sum.

    Raises:
      AnswersError: not one finite number per option (-inf is allowed, but not for all).
    """
    count = sum(len(question.choices) for question in questions)
    scores = np.asarray(log_probs, np.float64)
    if scores.shape != (count,):
        raise AnswersError(f"{count} options, but log-probabilities of shape {scores.shape}")
    if lengths is not None:
        scores = scores / np.asarray(lengths, np.float64)
    found, first = {}, 0
    for question in questions:
        part = scores[first : first + len(question.choices)]
        first += len(question.choices)
        if np.isnan(part).any() or not part.max(initial=-np.inf) > -np.inf:
            raise AnswersError(f"question '{question.id}': no option has a probability ({part})")
        found[question.id] = question.choices[int(part.argmax())]
    return found


def _runs(predictions: Predictions | Sequence[Predictions]) -> list[Predictions]:
    runs = [predictions] if isinstance(predictions, Mapping) else list(predictions)
    if not runs:
        raise AnswersError("there are no answers to score")
    return runs


def _missing_note(missing: np.ndarray) -> str:
    count = int(missing.sum())
    return f"{count} of {missing.size} answers are missing and count as wrong" if count else ""


def _result(
    statistic: Statistic,
    questions: Sequence[Question],
    notes: str,
    **fields: object,
) -> Result:
    """A result with its interval, or without one where there are too few subjects."""
    subjects = [subject_of(question) for question in questions]
    return result_of(statistic, subjects, notes=notes, n_test=len(questions), **fields)[0]


def subject_of(question: Question) -> str:
    """Who is resampled: a question without a subject counts with those of the same recording."""
    return question.subject_id or (question.audio or (question.id,))[0]
