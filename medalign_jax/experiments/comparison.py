"""Measures encoders side by side: linear probes, zero-shot classification, retrieval.

Every number comes with a bootstrap interval over the subjects of the test split, and every
difference between two stages with a paired one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from medalign_jax.data.manifest import Row
from medalign_jax.errors import UserError
from medalign_jax.evaluate import probes, retrieval, statistics
from medalign_jax.evaluate.results import Result


@dataclass(frozen=True)
class ProbeSettings:
    """How probes are run.

    Attributes:
      per_class: labels a class in the few-label probe.
      draws: number of few-label draws.
      seeds: number of seeds of the full-label probe.
      resamples: of the bootstrap.
    """

    per_class: int = 10
    draws: int = 20
    seeds: int = 5
    resamples: int = 2000


@dataclass(frozen=True)
class Task:
    """One question about the recordings, with its splits.

    Attributes:
      name: column of the manifest.
      dataset: name of the data.
      kind: "classification" or "regression".
      train, valid, test: positions of the recordings that have an answer.
      answers: by position; text for classes, numbers for regression.
      subjects: by position, "" where unknown.
    """

    name: str
    dataset: str
    kind: str
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    answers: np.ndarray
    subjects: np.ndarray


@dataclass
class Comparison:
    """What was measured.

    Attributes:
      results: one number each.
      intervals: (task kind, stage) -> interval of the headline metric.
      classes: class names of the classification task.
      confusion: (C, C) counts of the zero-shot prediction, rows are truths.
      predictions: by position in the data set, the class named by zero-shot.
      similarity: (n test, U) cosine of test recordings and distinct reports, last stage.
      reports: the U reports.
    """

    results: list[Result] = field(default_factory=list)
    intervals: dict[tuple[str, str], statistics.Interval] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    confusion: np.ndarray | None = None
    predictions: dict[int, str] = field(default_factory=dict)
    similarity: np.ndarray | None = None
    reports: tuple[str, ...] = ()


def make_task(rows: Sequence[Row], name: str, dataset: str) -> Task:
    """A task from the column `name` ("label" or a target): numbers make it a regression.

    Raises:
      UserError: a split without answers.
    """
    texts = [row.label if name == "label" else row.targets.get(name) for row in rows]
    known = [bool(text) for text in texts]
    if not any(known):
        raise UserError(f"evaluation: no recording has a value in column {name!r}")
    numeric = name != "label" and all(_number(text) for text in texts if text)
    fill = "nan" if numeric else ""
    answers = np.array([text or fill for text in texts], float if numeric else object)
    splits = np.array([row.split for row in rows])
    parts = {s: np.flatnonzero((splits == s) & known) for s in ("train", "valid", "test")}
    for split in ("train", "test"):
        if not len(parts[split]):
            raise UserError(f"evaluation of {name!r}: no recording of split {split!r} has a value")
    subjects = np.array([row.subject_id or f"row {row.row}" for row in rows], object)
    kind = "regression" if numeric else "classification"
    return Task(name, dataset, kind, **parts, answers=answers, subjects=subjects)


def class_names(task: Task) -> tuple[str, ...]:
    """Classes of the training split, sorted."""
    return tuple(sorted(set(task.answers[task.train])))


def _number(text: str) -> bool:
    try:
        return np.isfinite(float(text))
    except ValueError:
        return False


def compare_probes(
    task: Task, stages: Mapping[str, np.ndarray], settings: ProbeSettings, into: Comparison
) -> None:
    """Linear probes of every stage's embeddings (N, D), and each difference from the first."""
    if task.kind == "regression":
        _compare_regression(task, stages, settings, into)
        return
    for kind in ("probe", f"probe_{settings.per_class}_labels"):
        scores = {}
        for stage, embeddings in stages.items():
            scores[stage], seeds, used = _classify(task, embeddings, kind, settings)
        _add_stages(task, kind, "auroc", scores, seeds, used, settings, into)


def _classify(task: Task, embeddings: np.ndarray, kind: str, settings: ProbeSettings):
    """AUROC statistic of one stage, the seeds behind it, the number of training examples."""
    train, valid, test = task.train, task.valid, task.test
    names, (y, y_valid, y_test) = probes.class_indices(
        list(task.answers[train]), list(task.answers[valid]), list(task.answers[test])
    )
    draws, seeds, used = None, tuple(range(settings.seeds)), len(train)
    if kind != "probe":
        draws = probes.few_shot_draws(y, settings.per_class, settings.draws, seed=0)
        seeds, used = tuple(range(settings.draws)), draws.shape[1]
    held_out = (embeddings[valid], y_valid) if len(valid) else None
    scores = probes.classification_probe(
        (embeddings[train], y), held_out, embeddings[test], len(names), draws=draws, seeds=seeds
    )
    return statistics.auroc_statistic(y_test, scores.probabilities), seeds, used


def _compare_regression(task, stages, settings, into) -> None:
    train, valid, test = task.train, task.valid, task.test
    answers = task.answers.astype(np.float32)
    seeds, errors = tuple(range(settings.seeds)), {}
    for stage, embeddings in stages.items():
        held_out = (embeddings[valid], answers[valid]) if len(valid) else None
        scores = probes.regression_probe(
            (embeddings[train], answers[train]), held_out, embeddings[test], seeds=seeds
        )
        errors[stage] = statistics.mean_statistic(np.abs(scores.predictions - answers[test]))
    guess = np.abs(answers[train].mean() - answers[test])
    errors["mean predictor"] = statistics.mean_statistic(guess[None])
    _add_stages(task, "probe", "mae", errors, seeds, len(train), settings, into)


def _add_stages(task, kind, metric, scores, seeds, used, settings, into: Comparison) -> None:
    shared = {
        "task": task.name,
        "dataset": task.dataset,
        "kind": kind,
        "metric": metric,
        "n_train": used,
        "n_test": len(task.test),
        "seeds": seeds,
    }
    first, subjects = next(iter(scores)), list(task.subjects[task.test])
    for stage, score in scores.items():
        _add(into, subjects, settings, [score], stage=stage, **shared)
        if stage not in (first, "mean predictor"):
            name = f"{stage} minus {first}"
            pair = [scores[first], score]
            _add(into, subjects, settings, pair, stage=name, notes="paired interval", **shared)


def _add(into: Comparison, subjects: list, settings: ProbeSettings, scores: list, **fields) -> None:
    """A result with its interval; without one, and the reason, where subjects are too few."""
    measure = statistics.bootstrap if len(scores) == 1 else statistics.paired_bootstrap
    try:
        interval = measure(*scores, subjects, resamples=settings.resamples)
    except statistics.StatisticsError as error:
        values = [float(np.mean(score(np.ones((1, len(subjects)))))) for score in scores]
        notes = "; ".join(filter(None, [fields.pop("notes", ""), f"no interval: {error}"]))
        value = values[-1] - (values[0] if len(values) > 1 else 0.0)
        into.results.append(Result(value=value, ci_low=None, ci_high=None, notes=notes, **fields))
        return
    into.intervals[f"{fields['task']}/{fields['kind']}", fields["stage"]] = interval
    into.results.append(Result.of(interval, **fields))


@dataclass(frozen=True)
class Space:
    """Where audio and text meet at a stage: embeddings of all recordings, and of texts.

    Attributes:
      audio: (N, D_a).
      text: (N, D_t) embedding of each recording's report.
      class_text: (C, K, D_t) embeddings of the sentences that stand for each class.
    """

    audio: np.ndarray
    text: np.ndarray
    class_text: np.ndarray


def compare_zero_shot(
    task: Task,
    classes: tuple[str, ...],
    spaces: Mapping[str, Space],
    report_texts: Sequence[str],
    kind: str,
    settings: ProbeSettings,
    into: Comparison,
) -> None:
    """Zero-shot classification and retrieval on the test split.

    The map between the two sides (`evaluate.retrieval.fit_map`) is fitted on training pairs.
    """
    truth = np.array([classes.index(answer) for answer in task.answers[task.test]])
    hits, recalls = {}, {}
    note = f"through a {kind} map fitted on training pairs" if kind != "none" else "cosine, no map"
    for stage, space in spaces.items():
        mapping = retrieval.fit_map(space.audio[task.train], space.text[task.train], kind)
        outcome = retrieval.zero_shot(space.audio[task.test], space.class_text, mapping)
        hits[stage] = (outcome.predicted == truth).astype(float)
        found = retrieval.retrieve(
            space.audio[task.test],
            space.text[task.test],
            [report_texts[i] for i in task.test],
            mapping,
        )
        for direction in ("audio_to_report", "report_to_audio"):
            recall = getattr(found, direction)
            for k, values in recall.hits.items():
                recalls[direction, k, stage] = (values, recall.chance[k])
        into.classes = classes
        into.similarity, into.reports = found.similarity, found.reports
        into.confusion = _confusion(truth, outcome.predicted, len(classes))
        into.predictions = {
            int(i): classes[c] for i, c in zip(task.test, outcome.predicted, strict=True)
        }
    _add_zero_shot(task, hits, recalls, note, 1 / len(classes), settings, into)


def _add_zero_shot(task, hits, recalls, note, chance, settings, into) -> None:
    shared = {"dataset": task.dataset, "n_train": 0, "n_test": len(task.test)}
    subjects = list(task.subjects[task.test])

    def add(values, **fields):
        _add(into, subjects, settings, [statistics.mean_statistic(values)], **shared, **fields)

    for stage, values in hits.items():
        add(
            values, task=task.name, kind="zero_shot", stage=stage, metric="accuracy",
            notes=f"{note}; chance {chance:.3f}",
        )  # fmt: skip
    for (direction, k, stage), (values, guess) in recalls.items():
        add(
            values, task=direction, kind="retrieval", stage=stage, metric=f"recall@{k}",
            notes=f"{note}; chance {guess:.3f}",
        )  # fmt: skip


def _confusion(truth: np.ndarray, predicted: np.ndarray, count: int) -> np.ndarray:
    table = np.zeros((count, count), int)
    np.add.at(table, (truth, predicted), 1)
    return table


def table(comparison: Comparison) -> str:
    """All results as aligned text."""
    lines = [("task", "kind", "stage", "metric", "value", "95 % interval", "n test")]
    for r in comparison.results:
        interval = "" if r.ci_low is None else f"{r.ci_low:.3f} to {r.ci_high:.3f}"
        line = (r.task, r.kind, r.stage, r.metric, f"{r.value:.3f}", interval, str(r.n_test))
        lines.append(line)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(row.rstrip() for row in rows)
