"""Gathers what the report page shows from a finished AcuLa run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict

from medalign_jax.audio import clip
from medalign_jax.data import reports
from medalign_jax.data.dataset import AudioDataset
from medalign_jax.evaluate import report
from medalign_jax.evaluate import report_figures as figures
from medalign_jax.evaluate.map import embedding_map
from medalign_jax.evaluate.results import write_results
from medalign_jax.experiments import build
from medalign_jax.experiments import comparison as compare
from medalign_jax.experiments.workdir import note_provenance
from medalign_jax.train.metrics import read_metrics

if TYPE_CHECKING:
    from medalign_jax.experiments.acula import Run

_ROLES = {"before": "before", "after": "after"}
_PLAYED = 6


def class_sentences(data: AudioDataset, task: compare.Task, name: str) -> tuple[str, ...]:
    """The sentences that stand for a class: prompts of its diagnosis, else its training reports.

    Only training rows are read, so that no test report becomes a prompt.
    """
    rows = [i for i in task.train if task.answers[i] == name]
    diagnoses = {data.rows[i].metadata.get("diagnosis", "") for i in rows}
    if len(diagnoses) == 1 and (diagnosis := diagnoses.pop()):
        organ = data.rows[rows[0]].metadata.get("organ", "")
        return reports.prompts(diagnosis, organ)
    texts = dict.fromkeys(data.reports(i, 1, 0)[0] for i in rows)
    return tuple(texts)[:32]


def write(
    this: Run,
    tasks: list[compare.Task],
    embeddings: Mapping[str, np.ndarray],
    outcome: compare.Comparison,
) -> None:
    """evaluation.json, the table on the screen, and report.html."""
    facts = note_provenance(this.workdir, recordings=len(this.data))
    write_results(this.workdir / "evaluation.json", outcome.results, facts)
    print(compare.table(outcome), flush=True)
    headline = _headline(tasks, outcome, this.config.evaluate.per_class)
    data = report.ReportData(
        title="AcuLa: an audio encoder before and after alignment",
        headline=headline,
        summary=_summary(this),
        facts=_facts(this, facts),
        bars=_bars(tasks, outcome),
        curves=_curves(this.workdir),
        maps=_maps(tasks[0], embeddings),
        map_note="Principal components of the training recordings, test recordings shown.",
        confusions=_confusions(outcome),
        recordings=_recordings(this, tasks[0], outcome),
        results=outcome.results,
        unusable=[
            report.UnusableRow(p.row, p.audio_path, p.reason) for p in this.data.problems if p.fatal
        ],
        limits=_limits(this),
    )
    report.write_report(this.workdir / "report.html", data)
    print(headline)
    print(f"page: {this.workdir / 'report.html'}", flush=True)


def _headline(tasks, outcome: compare.Comparison, per_class: int) -> str:
    """The few-label probe in words; the full probe where the task has no classes."""
    task = tasks[0]
    regression = task.kind == "regression"
    kind = "probe" if regression else f"probe_{per_class}_labels"
    what = f"AUROC of the {per_class}-labels-a-class probe on {task.dataset}"
    if regression:
        what = f"error of the linear probe of {task.name} on {task.dataset}"
    key, found = f"{task.name}/{kind}", outcome.intervals
    if (key, "after minus before") not in found or (key, "before") not in found:
        return f"The test split has too few subjects for an interval of the {what}; see the table."
    return report.comparison_sentence(
        what,
        found[key, "before"],
        found[key, "after"],
        found[key, "after minus before"],
        found.get((key, "ceiling")),
        higher_is_better=not regression,
    )


def _summary(this: Run) -> str:
    splits = ", ".join(f"{n} {name}" for name, n in sorted(this.data.splits().items()))
    start = this.config.encoder.source or "pre-trained by masked reconstruction on the same split"
    return (
        f"{len(this.data)} recordings ({splits}). The encoder ({this.made.name}, {start}) was "
        f"aligned with {this.config.teacher.source} on the training split only. Embeddings are "
        "frozen for every probe; intervals are 95 % bootstrap intervals over subjects."
    )


def _facts(this: Run, provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    config = this.config
    loss = config.loss
    align = f"{loss.align} ({loss.estimator})" if loss.align == "cka" else loss.align
    return [
        ("method", f"AcuLa, {align}, λ_align {loss.align_weight}, λ_SSM {loss.ssm_weight}"),
        ("encoder", this.made.name),
        ("teacher", f"{config.teacher.source}, layer {config.teacher.layer}"),
        ("data", data_name(config)),
        ("learning rate", f"{config.optimizer.learning_rate:g}"),
        ("batch", f"{config.train.batch_size} in {config.train.accumulate} part(s)"),
        ("devices", str(provenance["devices"])),
        ("git commit", str(provenance["git_commit"])),
        ("versions", ", ".join(f"{k} {v}" for k, v in provenance["packages"].items())),
    ]


def data_name(config: ConfigDict) -> str:
    """A name for the data: the folder of the manifest."""
    if not config.data.manifest:
        return "simulated auscultation"
    path = Path(config.data.manifest).resolve()
    return path.name if path.is_dir() else path.parent.name


def _bars(tasks, outcome: compare.Comparison) -> list[figures.Bars]:
    charts = []
    for task in tasks:
        for kind in dict.fromkeys(r.kind for r in outcome.results if r.task == task.name):
            rows = [r for r in outcome.results if (r.task, r.kind) == (task.name, kind)]
            shown = [r for r in rows if " minus " not in r.stage]
            bars = tuple(
                figures.Bar(r.stage, r.value, r.ci_low, r.ci_high, _ROLES.get(r.stage, "reference"))
                for r in shown
            )
            metric = rows[0].metric
            origin = 0.5 if metric == "auroc" else 0.0
            title = f"{task.name}: {kind.replace('_', ' ')}"
            name = "chance" if origin else ""
            charts.append(figures.Bars(title, bars, metric, origin, name, shown[-1].notes))
    return charts


_CURVES = (
    ("CKA", ("cka", "valid/cka")),
    ("Reconstruction error", ("reconstruction", "valid/reconstruction")),
    ("Loss", ("loss", "valid/loss")),
    ("Effective rank of the embeddings", ("effective_rank", "valid/effective_rank")),
    ("Learning rate", ("learning_rate",)),
)


def _curves(workdir: Path) -> list[figures.Curves]:
    lines = read_metrics(workdir / "metrics.jsonl")
    charts = []
    for title, names in _CURVES:
        series = []
        for name in names:
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                label = "held out" if name.startswith("valid/") else "training"
                series.append(figures.Series(label, *np.array(points, float).T))
        if series:
            charts.append(figures.Curves(title, tuple(series)))
    return charts


def _maps(task: compare.Task, embeddings: Mapping[str, np.ndarray]) -> list[figures.MapPanel]:
    if task.kind != "classification":
        return []
    panels = []
    for stage, values in embeddings.items():
        placed = embedding_map(values[task.train], values[task.test])
        labels = [str(answer) for answer in task.answers[task.test]]
        panels.append(
            figures.MapPanel(stage, placed.coordinates[1], labels, tuple(placed.explained))
        )
    return panels


def _confusions(outcome: compare.Comparison) -> list[figures.Confusion]:
    if outcome.confusion is None:
        return []
    caption = "Zero-shot classification after alignment; rows are the true classes."
    title = "Zero-shot, test split"
    return [figures.Confusion(title, outcome.classes, outcome.confusion, caption)]


def _recordings(this: Run, task: compare.Task, outcome) -> list[report.Recording]:
    """A few test recordings, spread over the classes, with their nearest reports."""
    places = {int(i): n for n, i in enumerate(task.test)}
    samples, shown = build.samples_of(this.config, this.made), []
    for i in _spread(task):
        row, waveform = this.data.rows[i], this.data.waveform(i)
        window = clip.fit(waveform[:samples], samples)
        shown.append(
            report.Recording(
                name=Path(row.audio_path).name,
                waveform=waveform,
                sample_rate=this.data.sample_rate,
                label=row.label or "",
                predicted=outcome.predictions.get(i, ""),
                report=this.reports.texts[i][0],
                features=np.asarray(this.made.front_end(window[None]))[0],
                nearest=_nearest(outcome, places[i], this.reports.texts[i][0]),
            )
        )
    return shown


def _nearest(outcome: compare.Comparison, place: int, own: str) -> tuple[report.Nearest, ...]:
    """The three reports nearest to a test recording after alignment."""
    if outcome.similarity is None:
        return ()
    scores = outcome.similarity[place]
    return tuple(
        report.Nearest(outcome.reports[j], float(scores[j]), outcome.reports[j] == own)
        for j in np.argsort(-scores)[:3]
    )


def _spread(task: compare.Task) -> list[int]:
    """Test recordings taken in turn from the classes."""
    groups: dict[str, list[int]] = {}
    for i in task.test:
        name = str(task.answers[i]) if task.kind == "classification" else ""
        groups.setdefault(name, []).append(int(i))
    turns = [group[n] for n in range(_PLAYED) for group in groups.values() if n < len(group)]
    return turns[:_PLAYED]


def _limits(this: Run) -> list[str]:
    limits = [
        "The embeddings describe sounds; they are not a diagnosis.",
        "Zero-shot classification reads the class from the nearest sentence; the map between the "
        "two spaces is fitted on training pairs.",
    ]
    if len({row.subject_id for row in this.data.rows}) == len(this.data):
        limits.append(
            "Every recording counts as a subject of its own. Where the data names no subjects, "
            "recordings of one person may stand in two splits, and the intervals are too narrow."
        )
    if not this.config.data.manifest:
        limits.append("The recordings are simulated; nothing here says how real ones would do.")
    return limits
