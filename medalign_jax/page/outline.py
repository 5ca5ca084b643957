"""What a page says of any evaluation: its first sentence, its charts, its map, its limits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medalign_jax.data.recordings.dataset import AudioDataset
from medalign_jax.data.recordings.manifest import Row
from medalign_jax.evaluate.collected import MEAN_OF, Measured
from medalign_jax.evaluate.projection import embedding_map
from medalign_jax.evaluate.results import LOWER_IS_BETTER, Result
from medalign_jax.evaluate.stages import MINUS, Stage
from medalign_jax.evaluate.suite import Suite
from medalign_jax.page import figures, report
from medalign_jax.page.recordings import Sound
from medalign_jax.page.wording import metric_name

_ROLES = {"before": "before", "after": "after"}
_HEARD = 20  # points of a map that have a sound


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


def scores_of(found: Measured, suite: Suite) -> list[figures.Scores]:
    """One chart for each task and kind of probe, its first metric."""
    charts = []
    tasks = dict.fromkeys(r.task for r in found.results if r.kind in suite.options.settings.kinds)
    for task in tasks:
        for kind in suite.options.settings.kinds:
            rows = [r for r in found.results if (r.task, r.kind) == (task, kind)]
            rows = [r for r in rows if MINUS not in r.stage and r.metric == rows[0].metric]
            if rows:
                charts.append(chart_of(f"{task}: {kind.replace('_', ' ')}", rows))
    return charts


def chart_of(title: str, rows: Sequence[Result]) -> figures.Scores:
    """A chart of results of one metric."""
    scores = tuple(figures.Score(r.stage, r.value, r.ci_low, r.ci_high, _role(r)) for r in rows)
    metric = rows[0].metric
    better = "lower" if metric in LOWER_IS_BETTER else "higher"
    chance = 0.5 if metric == "auroc" else None
    return figures.Scores(title, scores, metric_name(metric), better, chance)


def _role(result: Result) -> str:
    """The look: on a page of several runs a stage has its run's name in front."""
    return _ROLES.get(result.stage.rpartition(": ")[2], "reference")


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


def map_of(
    suite: Suite, stages: Sequence[Stage], rows: Sequence[Row], data: AudioDataset | None = None
) -> tuple[figures.Maps | None, list[Sound]]:
    """Encoders' test rows of the first fold on the training rows' principal components.

    Args:
      suite: what is asked; there is a map if its first task has classes.
      stages: baselines have no map.
      rows: of the recordings.
      data: where to hear a few of them, spread over the classes.
    """
    task = suite.tasks[0]
    if task.kind != "classification":
        return None, []
    fold, panels = suite.plans[0][0], []
    test = fold.test[task.known[fold.test]]
    labels = [task.classes[c] for c in task.answers[test]]
    about = [_about(rows[suite.members[r][0]]) for r in test]
    heard = [] if data is None else spread(labels, _HEARD)
    for stage in (stage for stage in stages if stage.role != "baseline"):
        placed = embedding_map(stage.of(0)[fold.train], stage.of(0)[test])
        panels.append(figures.MapPanel(stage.name, placed.coordinates[1], placed.explained))
    places = {point: sound for sound, point in enumerate(heard)}
    sounds = [_sound(data, suite.members[test[p]][0], labels[p]) for p in heard]
    return figures.Maps(panels, labels, about, places), sounds


def _about(row: Row) -> str:
    name = Path(row.audio_path).name
    return f"{name}: {row.report}" if row.report else name


def _sound(data: AudioDataset, i: int, label: str) -> Sound:
    name = f"{Path(data.rows[i].audio_path).name} ({label})"
    return Sound(name, data.waveform(i), data.sample_rate)


def spread(labels: Sequence[object], count: int) -> list[int]:
    """So many places at most, taken from the labels in turn."""
    groups: dict[object, list[int]] = {}
    for i, label in enumerate(labels):
        groups.setdefault(label, []).append(i)
    turns = [group[n] for n in range(count) for group in groups.values() if n < len(group)]
    return turns[:count]
