"""What a page says of any evaluation: its first sentence, its bars, its limits."""

from __future__ import annotations

from collections.abc import Sequence

from medalign_jax.data.recordings.manifest import Row
from medalign_jax.evaluate.collected import MEAN_OF, Measured
from medalign_jax.evaluate.projection import embedding_map
from medalign_jax.evaluate.stages import MINUS, Stage
from medalign_jax.evaluate.suite import Suite
from medalign_jax.page import figures, report

_ROLES = {"before": "before", "after": "after"}


def headline_of(found: Measured, suite: Suite, before: str, after: str, reference: str = "") -> str:
    """The headline probe in words: of the mean over tasks where there are several."""
    kind = suite.options.settings.probes[0]
    classes = [task for task in suite.tasks if task.kind == "classification"]
    metric = "auroc" if classes else "mae"
    task = suite.tasks[0].name if not classes else classes[0].name
    what = f"AUROC of the {kind} probe of {task} on {suite.dataset}"
    if len(classes) > 1:
        task = f"{MEAN_OF}{len(classes)} tasks"
        what = f"mean AUROC of the {kind} probes of {len(classes)} tasks on {suite.dataset}"
    elif not classes:
        what = f"error of the {kind} probe of {task} on {suite.dataset}"
    names = (before, after, f"{after}{MINUS}{before}")
    intervals = [found.intervals.get((task, kind, stage, metric)) for stage in names]
    if any(interval is None for interval in intervals):
        return f"The test part has too few subjects for an interval of the {what}; see the table."
    return report.comparison_sentence(
        what,
        *intervals,
        found.intervals.get((task, kind, reference, metric)),
        higher_is_better=bool(classes),
    )


def bars_of(found: Measured, suite: Suite) -> list[figures.Bars]:
    """One chart for each task and kind of probe, its first metric."""
    charts = []
    tasks = dict.fromkeys(r.task for r in found.results if r.kind in suite.options.settings.kinds)
    for task in tasks:
        for kind in suite.options.settings.kinds:
            rows = [r for r in found.results if (r.task, r.kind) == (task, kind)]
            rows = [r for r in rows if MINUS not in r.stage and r.metric == rows[0].metric]
            if not rows:
                continue
            bars = tuple(
                figures.Bar(r.stage, r.value, r.ci_low, r.ci_high, _ROLES.get(r.stage, "reference"))
                for r in rows
            )
            metric = rows[0].metric
            origin = 0.5 if metric == "auroc" else 0.0
            title = f"{task}: {kind.replace('_', ' ')}"
            charts.append(figures.Bars(title, bars, metric, origin, "chance" if origin else ""))
    return charts


def limits_of(suite: Suite, rows: Sequence[Row]) -> list[str]:
    """What a reader must not conclude.

    Args:
      suite: what is asked.
      rows: of the recordings.
    """
    limits = [
        "Differences between stages are paired over subjects; p values of several tasks are "
        "corrected by Holm in the notes of each result.",
    ]
    if suite.options.folds:
        limits.append(
            "Folds share training subjects: their intervals are widened for that by a rule "
            "(Nadeau and Bengio, 2003), since the folds themselves cannot show by how much "
            "scores would move with other subjects in training (benchmarks/chance.py)."
        )
    unnamed = sum(not row.names_subject for row in rows)
    if unnamed:
        limits.append(
            f"{unnamed} of {len(rows)} recordings name no subject: each counts as a subject of its "
            "own, near-copies as one. Recordings of one person may stand in two splits, and "
            "the intervals are too narrow."
        )
    elif len({row.subject_id for row in rows}) == len(rows):
        limits.append(
            "Every recording is of another subject. Should these names be those of recordings, "
            "recordings of one person may stand in two splits, and the intervals are too narrow."
        )
    return limits


def map_of(suite: Suite, stages: Sequence[Stage]) -> list[figures.MapPanel]:
    """Encoders' test rows of the first fold on the training rows' principal components, if the
    first task has classes."""
    task = suite.tasks[0]
    if task.kind != "classification":
        return []
    fold, panels = suite.plans[0][0], []
    test = fold.test[task.known[fold.test]]
    for stage in (stage for stage in stages if stage.role != "baseline"):
        placed = embedding_map(stage.of(0)[fold.train], stage.of(0)[test])
        labels = [task.classes[c] for c in task.answers[test]]
        panels.append(
            figures.MapPanel(stage.name, placed.coordinates[1], labels, tuple(placed.explained))
        )
    return panels
