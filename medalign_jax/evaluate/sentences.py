"""How well recordings find words: the nearest class sentence, and their own reports.

Where a map between the two sides is fitted on training pairs, those pairs are counted in
`n_train`, and the kind is "nearest_sentence". Only where nothing is fitted and no class sentence
was trained on is it called "zero_shot". `retrieval` fits the map and finds the nearest.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from medalign_jax.evaluate import retrieval
from medalign_jax.evaluate.collected import Measured, add_result
from medalign_jax.evaluate.folds import Fold, describe_classes
from medalign_jax.evaluate.statistics import auroc_statistic, mean_statistic
from medalign_jax.evaluate.tasks import Task

DIRECTIONS = ("audio_to_report", "report_to_audio")
KS = (1, 5, 10)
_CERTAIN = 0.9  # what a random order finds so often is not worth asking


@dataclasses.dataclass(frozen=True)
class Words:
    """What stands for the recordings and for the classes in words.

    Attributes:
      reports: (N,) the report of each recording.
      class_sentences: of each fold, (C,) the K sentences that stand for each class: nothing of
        what the fold tests.
      trained: every text that a recording was aligned with, in any wording and any fold.
    """

    reports: tuple[str, ...]
    class_sentences: tuple[tuple[tuple[str, ...], ...], ...]
    trained: frozenset[str]

    @property
    def seen(self) -> bool:
        """Whether a class sentence was trained on, word for word; what else stands there, and
        capitals, do not count."""
        trained = {_only_words(text) for text in self.trained}
        classes = [texts for fold in self.class_sentences for texts in fold]
        return any(_only_words(text) in trained for texts in classes for text in texts)


def _only_words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.casefold()))


@dataclasses.dataclass(frozen=True)
class Space:
    """Where audio and text meet at a stage, on one fold.

    Attributes:
      audio: (N, D_a).
      text: (N, D_t) embedding of each recording's report.
      class_text: (C, K, D_t) embeddings of the class sentences.
      map: "procrustes" or "ridge", fitted on training pairs; "none" where heads were trained to
        meet in one space.
    """

    audio: np.ndarray
    text: np.ndarray
    class_text: np.ndarray
    map: retrieval.MapKind


@dataclasses.dataclass
class Shown:
    """What the page shows of one stage.

    Attributes:
      task: what its classes are of.
      predicted: position of a test recording that has an answer -> class number.
      confusion: (C, C) counts, rows are truths.
      nearest: position -> its three nearest reports as (text, centred cosine).
    """

    task: Task
    predicted: dict[int, int]
    confusion: np.ndarray
    nearest: dict[int, tuple[tuple[str, float], ...]]


def measure_sentences(
    task: Task,
    folds: Sequence[Fold],
    subjects: Sequence[str],
    words: Words,
    stage: str,
    spaces: Sequence[Space],
    into: Measured,
) -> Shown:
    """Adds the results of one stage; folds are pooled.

    Args:
      task: a classification of the recordings.
      folds: training pairs and test recordings.
      subjects: (N,) ids.
      words: reports and class sentences, of the same folds.
      stage: its name in the results.
      spaces: one per fold.
      into: gets the results.
    """
    shown = Shown(task, {}, np.zeros((len(task.classes),) * 2, int), {})
    parts = [
        _one_fold(task, fold, words, space, shown)
        for fold, space in zip(folds, spaces, strict=True)
    ]
    rows = np.concatenate([part.rows for part in parts])
    subject_of = [subjects[i] for i in rows]
    fitted = spaces[0].map != "none"
    kind = "nearest_sentence" if fitted or words.seen else "zero_shot"
    n_train = max(len(fold.train) for fold in folds) if fitted else 0
    shared = {"dataset": task.dataset, "stage": stage, "n_train": n_train, "n_test": len(rows)}
    how = _how(spaces[0].map, n_train)
    missed = [task.classes[c] for c in np.flatnonzero(shown.confusion.sum(axis=0) == 0)]
    never = [f"never named: {', '.join(missed)}"] if missed else []
    chance = _majority(task, folds)
    hits = mean_statistic(np.concatenate([part.hits for part in parts]), scale="share")
    add_result(
        into, hits, subject_of, len(parts), task=task.name, kind=kind, metric="accuracy", **shared,
        notes="; ".join([how, f"the most frequent class alone {chance:.3f}", *never]),
    )  # fmt: skip
    truth, scores = task.answers[rows], np.concatenate([part.scores for part in parts])
    class_notes = describe_classes(task, [folds])
    of_fold = np.repeat(np.arange(len(parts)), [len(part.rows) for part in parts])
    add_result(
        into, auroc_statistic(truth, scores, task.classes, of_fold), subject_of, len(parts),
        task=task.name,
        kind=kind, metric="auroc", notes="; ".join(filter(None, [how, class_notes])), **shared,
    )  # fmt: skip
    _add_retrieval(parts, subject_of, how, shared, into)
    return shown


@dataclasses.dataclass(frozen=True)
class _Part:
    """One fold's outcome; retrieval is None where the test part has one report."""

    rows: np.ndarray
    hits: np.ndarray
    scores: np.ndarray
    found: retrieval.Retrieval


def _one_fold(task: Task, fold: Fold, words: Words, space: Space, shown: Shown) -> _Part:
    rows = fold.test[task.known[fold.test]]
    mapping = retrieval.fit_map(space.audio[fold.train], space.text[fold.train], space.map)
    outcome = retrieval.nearest_sentence(space.audio[rows], space.class_text, mapping)
    truth = task.answers[rows]
    reports = [words.reports[i] for i in rows]
    found = retrieval.retrieve(space.audio[rows], space.text[rows], reports, mapping, KS)
    np.add.at(shown.confusion, (truth, outcome.predicted), 1)
    shown.predicted |= dict(zip(rows.tolist(), outcome.predicted.tolist(), strict=True))
    _show_nearest(rows, fold, space, mapping, found.reports, reports, shown)
    return _Part(rows, outcome.hits(truth), outcome.scores, found)


def _show_nearest(rows, fold, space, mapping, distinct, reports, shown: Shown) -> None:
    """Cosines of differences from the training means, so that they spread around 0."""
    first = [reports.index(text) for text in distinct]
    audio, text = mapping.audio(space.audio[rows]), mapping.text(space.text[rows[first]])
    audio = _unit(audio - mapping.audio(space.audio[fold.train]).mean(axis=0))
    text = _unit(text - mapping.text(space.text[fold.train]).mean(axis=0))
    for i, row in zip(rows.tolist(), audio @ text.T, strict=True):
        best = np.argsort(-row, kind="stable")[:3]
        shown.nearest[i] = tuple((distinct[j], float(row[j])) for j in best)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _add_retrieval(parts: Sequence[_Part], subjects, how: str, shared: dict, into) -> None:
    """recall@k, left out where k reaches the number of things to choose from, or a random order
    finds nearly always."""
    distinct = min(len(part.found.reports) for part in parts)
    choices = {"audio_to_report": distinct, "report_to_audio": min(len(p.rows) for p in parts)}
    for direction in DIRECTIONS:
        for k in (k for k in KS if k < choices[direction]):
            recalls = [getattr(part.found, direction) for part in parts]
            found = np.concatenate([recall.hits[k] for recall in recalls])
            hits = mean_statistic(found, scale="share")
            sizes = [len(part.rows) for part in parts]
            guess = np.average([recall.chance[k] for recall in recalls], weights=sizes)
            if guess > _CERTAIN:
                continue
            note = f"{how}; {distinct} distinct reports; a random order {guess:.3f}"
            add_result(
                into, hits, subjects, len(parts), task=direction, kind="retrieval",
                metric=f"recall@{k}", notes=note, **shared,
            )  # fmt: skip


def _how(kind: str, n_train: int) -> str:
    if kind == "none":
        return "cosine, no map"
    return f"through a {kind} map fitted on {n_train} training pairs"


def _majority(task: Task, folds: Sequence[Fold]) -> float:
    """Share of test recordings of the class that is most frequent in training."""
    right, count = 0, 0
    for fold in folds:
        train, test = (task.answers[part[task.known[part]]] for part in (fold.train, fold.test))
        right += int(np.sum(test == np.bincount(train).argmax()))
        count += len(test)
    return right / count
