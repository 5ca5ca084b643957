"""Gathers what the report page shows from a finished AcuLa run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medalign_jax.audio import clip
from medalign_jax.core.provenance import provenance_rows
from medalign_jax.evaluate.collected import Measured
from medalign_jax.evaluate.sentences import Shown
from medalign_jax.evaluate.spread import describe_ranks
from medalign_jax.evaluate.stages import Stage
from medalign_jax.evaluate.suite import Suite
from medalign_jax.evaluate.tables import tables_of
from medalign_jax.evaluate.tasks import Task
from medalign_jax.page import figures, report
from medalign_jax.page.outline import headline_of, limits_of, map_of, scores_of, spread
from medalign_jax.runs.alignment import Run
from medalign_jax.runs.parts.audio import samples_of
from medalign_jax.train.metrics import read_metrics

_PLAYED = 6


def write(
    run: Run,
    stages: Sequence[Stage],
    found: Measured,
    shown: Mapping[str, Shown],
    provenance: Mapping[str, Any],
    chosen: str = "",
) -> None:
    """report.html, and its first sentence on the screen.

    Args:
      run: what was run.
      stages: what was measured.
      found: results of all stages.
      shown: stage -> what the nearest sentences and reports were.
      provenance: of the run.
      chosen: where the alignment is one of several candidates: which, and by what.
    """
    headline = headline_of(found, run.suite, "before", "after", "supervised")
    maps, sounds = map_of(run.suite, stages, run.data.rows, run.data)
    data = report.ReportData(
        title="AcuLa: an audio encoder before and after alignment",
        headline=headline,
        warnings=run.findings.warnings,
        summary="\n".join(filter(None, [_summary(run), chosen[:1].upper() + chosen[1:]])),
        facts=_facts(run, provenance),
        scores=scores_of(found, run.suite),
        tables=tables_of(found.results),
        curves=_curves(run.parts[0].folder),
        maps=maps,
        sounds=sounds,
        map_note="Principal components of the training recordings, test recordings shown.",
        confusions=_confusions(shown),
        recordings=_recordings(run, shown.get("after") or shown.get("before")),
        results=found.results,
        unusable=[
            report.UnusableRow(p.row, p.audio_path, p.reason) for p in run.data.problems if p.fatal
        ],
        limits=limits_of_run(run, describe_ranks(provenance["effective_rank"])),
    )
    report.write_report(run.workdir / "report.html", data)
    print(headline)
    print(f"page: {run.workdir / 'report.html'}", flush=True)


def _summary(run: Run) -> str:
    config, count = run.config, len(run.suite.plans[0])
    if count > 1:
        splits = f"{count} folds by subject, one model trained for each, predictions pooled"
    else:
        splits = ", ".join(f"{n} {name}" for name, n in sorted(run.data.splits().items()))
    start = config.encoder.source or "pre-trained by masked reconstruction on the training part"
    return (
        f"{len(run.data)} recordings ({splits}). The encoder ({run.made.name}, {start}) was "
        f"aligned with {config.teacher.source} on training recordings only. Embeddings are "
        "frozen for every probe; intervals are 95 % intervals over subjects."
    )


def _facts(run: Run, provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    config = run.config
    loss = config.loss
    align = f"{loss.align} ({loss.estimator})" if loss.align == "cka" else loss.align
    return [
        ("method", f"AcuLa, {align}, λ_align {loss.align_weight}, λ_SSM {loss.ssm_weight}"),
        ("encoder", run.made.name),
        ("teacher", f"{config.teacher.source}, layer {config.teacher.layer}"),
        ("data", run.suite.dataset),
        ("learning rate", f"{config.optimizer.learning_rate:g}"),
        *provenance_rows(provenance, config.train.batch_size, config.train.accumulate),
    ]


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


def _confusions(shown: Mapping[str, Shown]) -> list[figures.Confusion]:
    caption = "Rows are the true classes, columns the class of the nearest sentence."
    return [
        figures.Confusion(
            f"Nearest class sentence, {stage}", found.task.classes, found.confusion, caption
        )
        for stage, found in shown.items()
    ]


def _recordings(run: Run, shown: Shown | None) -> list[report.Recording]:
    """A few test recordings, spread over the classes, with their nearest reports."""
    samples, played = samples_of(run.config, run.made.front_end.sample_rate), []
    for i in _played(run.suite, run.suite.tasks[0] if shown is None else shown.task):
        row, waveform = run.data.rows[i], run.data.waveform(i)
        window = clip.fit(waveform[:samples], samples)
        own = run.reports.texts[i][0]
        nearest, predicted = (), ""
        if shown is not None:
            nearest = tuple(report.Nearest(t, s, t == own) for t, s in shown.nearest[i])
            predicted = shown.task.classes[shown.predicted[i]]
        played.append(
            report.Recording(
                name=Path(row.audio_path).name,
                waveform=waveform,
                sample_rate=run.data.sample_rate,
                label=row.label or "",
                predicted=predicted,
                report=own,
                features=np.asarray(run.made.front_end(window[None]))[0],
                nearest=nearest,
            )
        )
    return played


def _played(suite: Suite, task: Task) -> list[int]:
    """Test recordings of the first fold, taken in turn from the classes of a task."""
    fold = suite.plans[0][0]
    test = fold.test[task.known[fold.test]]
    labels = [task.answers[r] if task.kind == "classification" else 0 for r in test]
    return [int(suite.members[test[n]][0]) for n in spread(labels, _PLAYED)]


def limits_of_run(run: Run, ranks: str) -> list[str]:
    """What a reader must not conclude, with what may have leaked; `ranks` is `describe_ranks`'s."""
    limits = [
        "The embeddings describe sounds; they are not a diagnosis.",
        *limits_of(run.suite, run.data.rows),
    ]
    limits.append(ranks)
    limits += run.findings.sentences
    if not run.config.data.manifest:
        limits.append("The recordings are simulated; nothing here says how real ones would do.")
    return limits
