"""From the embeddings of a finished AcuLa run to its results and its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from medalign_jax.core.errors import UserError
from medalign_jax.core.files import write_text
from medalign_jax.data.recordings.dataset import AudioDataset
from medalign_jax.evaluate.baseline_stages import baseline_stages
from medalign_jax.evaluate.collected import Measured
from medalign_jax.evaluate.embeddings import EmbeddingStore
from medalign_jax.evaluate.folds import Fold
from medalign_jax.evaluate.measure import measure
from medalign_jax.evaluate.report_ridge import predicted_reports
from medalign_jax.evaluate.results import write_results
from medalign_jax.evaluate.sentences import Shown, Space, Words, measure_sentences
from medalign_jax.evaluate.spread import describe_ranks, ranks_of
from medalign_jax.evaluate.stages import BY_RIDGE, PLAIN, Stage
from medalign_jax.evaluate.suite import Suite
from medalign_jax.evaluate.tables import csv_of, tables_of, text_of
from medalign_jax.evaluate.tasks import Task
from medalign_jax.reports.templates import prompts
from medalign_jax.runs import model_card, page
from medalign_jax.runs.alignment import Aligned, Run
from medalign_jax.runs.arms import Arm
from medalign_jax.runs.space import export_spaces, incomparable
from medalign_jax.runs.workdir import note_provenance
from medalign_jax.search.common_space import AUDIO, TEXT, Heads

_SENTENCES = 32  # reports that stand for a class without a name
_ROLES = {"before": "encoder", "supervised": "reference", "random weights": "baseline"}


def check_sentences(config: ConfigDict, arms: Sequence[Arm]) -> None:
    """Refuses sentences where sounds and texts would not be compared as they were aligned.

    Raises:
      UserError: candidates, whose teacher and heads may differ from fold to fold, or a side that is
        standardised over each batch.
    """
    if not (config.evaluate.enabled and config.evaluate.sentences):
        return
    if reason := incomparable(config, arms):
        raise UserError(
            f"nearest class sentences and retrieval cannot be measured: {reason}; set "
            "evaluate.sentences=False"
        )


def check_settings(config: ConfigDict, suite: Suite) -> None:
    """Refuses tasks that a stage of the config cannot learn.

    Raises:
      UserError: names the key, and what to do.
    """
    if config.supervised.enabled and suite.tasks[0].kind != "classification":
        raise UserError(
            f"supervised.enabled: the first task, {suite.tasks[0].name!r}, is a regression; put a "
            "classification first, or turn it off"
        )
    if config.evaluate.enabled and (task := _task_of(config, suite)) is not None:
        for fold in suite.training_folds():
            _check_classes(task, fold)


def _check_classes(task: Task, fold: Fold) -> None:
    """A fold keeps some of its training recordings for choices; sentences come from the others."""
    for c, name in enumerate(task.classes):
        if not (task.answers[fold.train] == c).any():
            where = f", {fold.name}" if fold.name else ""
            raise UserError(
                f"task {task.name!r}{where}: beside what is kept for choices no training recording "
                f"is {name!r}, so there are no sentences of it; ask for fewer folds, or set "
                "evaluate.sentences=False"
            )


def measure_run(
    run: Run,
    arms: Sequence[Arm],
    embedded: Mapping[str, Sequence[np.ndarray]],
    aligned: Sequence[Aligned],
    notes: Mapping[str, str],
) -> None:
    """evaluation.json, evaluation.csv, the tables on the screen, and report.html.

    Args:
      run: what was run.
      arms: its alignments.
      embedded: stage -> (N, D) of each fold, or one for all folds.
      aligned: the run's own alignment, one per fold.
      notes: stage -> what a reader must know of it.
    """
    config, suite = run.config, run.suite
    words = _words(run)
    vectors = None if words is None else _class_vectors(run, words)  # by all processes
    roles = _ROLES | {arm.name: arm.role for arm in arms}
    stages = [
        suite.stage(name, _features(list(found)), role=roles[name], notes=notes.get(name, ""))
        for name, found in embedded.items()
    ]
    stages.sort(key=lambda stage: stage.role == "baseline")
    plain, guesses = baseline_stages(
        suite, run.data.rows, tuple(config.evaluate.baselines), tuple(config.evaluate.metadata),
        run.data, EmbeddingStore(run.workdir / "embeddings"),
    )  # fmt: skip
    if jax.process_index():
        return
    if "ridge" in config.evaluate.baselines and config.teacher.mode == "cached":
        plain += _by_ridge(run, aligned, [stages[0], *plain])
    found = measure(
        suite.tasks, suite.plans, suite.subjects, [*stages, *plain], suite.options.settings,
        guesses, by_subject=suite.options.aggregate == "scores",
    )  # fmt: skip
    shown = {}
    if words is not None:
        for stage, spaces in _spaces(run, embedded, aligned, vectors).items():
            shown[stage] = _sentences(run, stage, spaces, words, found)
    ranks = ranks_of(stages)
    facts = note_provenance(
        run.workdir, recordings=len(run.data), effective_rank=ranks, **run.findings.provenance()
    )
    export_spaces(run, arms, aligned, embedded["after"])
    limits, chosen = page.limits_of_run(run, describe_ranks(ranks)), notes.get("after", "")
    model_card.write(run, embedded["after"][0].shape[1], found.results, facts, limits, chosen)
    write_results(run.workdir / "evaluation.json", found.results, facts)
    write_text(run.workdir / "evaluation.csv", csv_of(found.results))
    print("\n" + text_of(tables_of(found.results)), describe_ranks(ranks), sep="\n\n", flush=True)
    page.write(run, stages, found, shown, facts, chosen)


def _features(found: list[np.ndarray]) -> np.ndarray | list[np.ndarray]:
    """One matrix where all folds have the same, as of published weights."""
    same = all(np.array_equal(found[0], other) for other in found[1:])
    return found[0] if same else found


def _by_ridge(run: Run, aligned: Sequence[Aligned], stages: Sequence[Stage]) -> list[Stage]:
    """What the reports bring to fixed features: those of the first stage, and the plain ones.

    Rows that are means over a subject's recordings get the mean of its reports' vectors.
    """
    means = run.suite.gather(run.texts(run.config).means(run.reports))
    groups = np.unique(np.asarray(run.suite.subjects, str), return_inverse=True)[1]
    made = []
    for stage in (s for s in stages if s.name in (stages[0].name, PLAIN)):
        found = []
        for k, (fold, outcome) in enumerate(zip(run.suite.choice_folds(), aligned, strict=True)):
            vectors = means if outcome.whitening is None else outcome.whitening(means)
            found.append(predicted_reports(stage.of(k), vectors, fold.train, groups))
        features = found[0] if len(found) == 1 else tuple(found)
        made.append(Stage(f"{stage.name}{BY_RIDGE}", features, "baseline"))
    return made


# ------------------------------------------------------------------------------- words


def _task_of(config: ConfigDict, suite: Suite) -> Task | None:
    """The task "label" over recordings, if sentences are asked for and it is a classification."""
    if not config.evaluate.sentences or suite.options.aggregate != "recording":
        return None
    labels = [t for t in suite.tasks if t.name == "label" and t.kind == "classification"]
    return labels[0] if labels else None


def _task(run: Run) -> Task | None:
    return _task_of(run.config, run.suite)


def _words(run: Run) -> Words | None:
    task = _task(run)
    if task is None:
        return None
    sentences = tuple(_class_sentences(run.data, task, part.fold.train) for part in run.parts)
    reports = tuple(texts[0] for texts in run.reports.texts)
    return Words(reports, sentences, _trained_texts(run))


def _trained_texts(run: Run) -> frozenset[str]:
    """What the recordings of any fold were aligned with, simulated ones mixed in included."""
    count = 1 if run.config.reports.use == "first" else None
    wordings = (texts for part in run.parts for texts in part.train_reports.texts)
    return frozenset(text for texts in wordings for text in texts[:count])


def _class_sentences(
    data: AudioDataset, task: Task, train: np.ndarray
) -> tuple[tuple[str, ...], ...]:
    """(C,) sentences that stand for each class, equally many, of a fold's training rows alone: a
    test report must not become a prompt."""
    classes = [_sentences_of(data, task, train, c) for c in range(len(task.classes))]
    least = min(map(len, classes))
    return tuple(texts[:least] for texts in classes)


def _sentences_of(data: AudioDataset, task: Task, train: np.ndarray, c: int) -> tuple[str, ...]:
    """Prompts of the class's diagnosis, else its training reports."""
    rows = [i for i in train if task.answers[i] == c]
    diagnoses = {data.rows[i].metadata.get("diagnosis", "") for i in rows}
    if len(diagnoses) == 1 and (diagnosis := diagnoses.pop()):
        return prompts(diagnosis, data.rows[rows[0]].metadata.get("organ", ""))
    texts = dict.fromkeys(data.reports(i, 1, 0)[0] for i in rows)
    return tuple(texts)[:_SENTENCES]


def _class_vectors(run: Run, words: Words) -> list[np.ndarray]:
    """(C, K, H) of each fold, as the teacher gives them; it reads a text once."""
    folds = words.class_sentences
    texts = list(dict.fromkeys(text for fold in folds for texts in fold for text in texts))
    vectors = run.texts(run.config).teacher.embed(texts)
    place = {text: i for i, text in enumerate(texts)}
    return [np.stack([vectors[[place[text] for text in texts]] for texts in fold])
            for fold in folds]  # fmt: skip


def _spaces(run: Run, embedded, aligned: Sequence[Aligned], vectors) -> dict[str, list[Space]]:
    """Where audio and text meet before and after, one per fold."""
    config, kind = run.config, run.config.evaluate.map
    means = run.texts(config).means(run.reports)
    spaces: dict[str, list[Space]] = {"before": []}
    if -1 in tuple(config.loss.layers):
        spaces["after"] = []
    for k, outcome in enumerate(aligned):
        text, classes = means, vectors[k]
        if outcome.whitening is not None:
            text, classes = outcome.whitening(text), outcome.whitening(classes)
        before = embedded["before"][k]
        # Nothing was trained to bring these two together: without a map they cannot be compared.
        start = "procrustes" if kind == "none" else kind
        spaces["before"].append(Space(before, text, classes, start))
        if "after" in spaces:
            heads = Heads(config.loss.hidden, config.loss.out, outcome.heads)
            audio = heads(AUDIO, embedded["after"][k])
            text, classes = heads(TEXT, text), heads(TEXT, classes)
            spaces["after"].append(Space(audio, text, classes, kind))
    return spaces


def _sentences(run: Run, stage: str, spaces, words: Words, found: Measured) -> Shown:
    folds = [part.fold for part in run.parts]
    subjects = run.suite.subjects
    return measure_sentences(_task(run), folds, subjects, words, stage, spaces, found)
