"""Writes what a distillation found: evaluation.json, ablations.md, report.html."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medalign_jax.core.errors import UserError
from medalign_jax.core.files import write_text
from medalign_jax.core.provenance import provenance_rows
from medalign_jax.evaluate.results import Result, write_results
from medalign_jax.page import figures, report
from medalign_jax.runs.distill import examples as distill_examples
from medalign_jax.runs.distill import results as scoring
from medalign_jax.runs.distill import tables as distill_tables
from medalign_jax.runs.workdir import note_provenance
from medalign_jax.train.metrics import read_metrics

if TYPE_CHECKING:
    from medalign_jax.runs.distill.arms import QuestionTask, Setting

AFTER = "after"  # the stage of a run without arms
_DIFFERENCES = 12  # more differences than these are in the table alone


def write(setting: Setting, found: scoring.Found) -> None:
    """Scores the answers and writes evaluation.json, ablations.md and report.html.

    Args:
      setting: of the run; its workdir is written to.
      found: stage -> one per seed: task name -> question id -> response.

    Raises:
      UserError: see `results.results`; a damaged metrics or problems file.
    """
    workdir = setting.workdir
    found = {stage: found[stage] for stage in scoring.ordered(setting.config, tuple(found))}
    results = scoring.results(setting, found)
    facts = note_provenance(workdir)
    write_results(workdir / "evaluation.json", results, facts)
    losses = {arm: scoring.loss_of(setting.config, arm) for arm in scoring.arms_among(tuple(found))}
    table = distill_tables.ablation_table(results, losses)
    write_text(workdir / "ablations.md", table)
    print(table, flush=True)
    lines = headline(setting, tuple(found), results)
    data = report.ReportData(
        title="Audio reasoning distillation",
        headline="\n".join(lines[:2]),
        summary="\n".join([*lines[2:], _summary(setting, found)]),
        facts=_facts(setting, facts),
        scores=_scores(setting, tuple(found), results),
        tables=[*distill_tables.tables(results), distill_tables.weights(losses)],
        curves=_curves(setting, tuple(found)),
        examples=distill_examples.examples(setting, found),
        example_note=distill_examples.note(setting, tuple(found)),
        results=results,
        unusable=_unusable(setting, tuple(found)),
        limits=_limits(setting, found),
    )
    report.write_report(workdir / "report.html", data)
    print("\n".join(lines))
    print(f"page: {workdir / 'report.html'}", flush=True)


def arm_folder(workdir: Path, arm: str, seed: int) -> Path:
    """Where a run of an arm keeps its metrics, answers and export; of arm "" the workdir itself."""
    return workdir / "arms" / f"{_as_name(arm)}_{seed}" if arm else workdir


def fold_folder(folder: Path, fold: str) -> Path:
    """Where an arm's model of one fold keeps its metrics and answers."""
    return folder / "folds" / _as_name(fold)


def _as_name(text: str) -> str:
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in text)


def _folders(setting: Setting, stages: Sequence[str]) -> dict[str, list[Path]]:
    """Folders of every arm's runs, one per seed, or one per seed and fold."""
    found = {}
    for arm in scoring.arms_among(stages):
        name = arm if setting.config.arms else ""
        runs = [arm_folder(setting.workdir, name, seed) for seed in setting.config.seeds]
        if setting.folds:
            runs = [fold_folder(run, fold.name) for run in runs for fold in setting.folds]
        found[arm] = runs
    return found


# ----------------------------------------------------------------------------------- in words


def headline(setting: Setting, stages: Sequence[str], results: Sequence[Result]) -> list[str]:
    """The outcome in plain words, one line per comparison.

    The config's own loss against "before", against the baseline, and against the arm that lacks
    one of its terms; then that arm against "before" and against the one that lacks a term of its
    own, and so on. Brackets hold the paired interval of the difference; only where it leaves out
    zero is a change called one.
    """
    pairs = scoring.comparisons(setting.config, stages)
    judged = {task.name: scoring.metric_of(task) for task in setting.tasks}
    by_key = {(r.task, r.stage): r for r in results if r.metric == judged.get(r.task)}
    lines = []
    for earlier, later in _compared(setting, stages, pairs):
        moves = [
            _clause(
                name,
                by_key[name, f"{later}{scoring.MINUS}{earlier}"],
                by_key[name, earlier].value,
                by_key[name, later].value,
            )
            for name in judged
        ]
        what = "After distillation" if later == AFTER else f"{later} against {earlier}"
        lines.append(f"{what}: {'; '.join(moves)}.")
    if not lines:
        return ["The student before distillation is all that was measured."]
    lines[0] += " Brackets: paired 95 % interval of the difference, in points."
    return lines


def _compared(
    setting: Setting, stages: Sequence[str], pairs: Sequence[tuple[str, str]]
) -> list[tuple[str, str]]:
    main = scoring.main_arm(setting.config, stages)
    if main is None:
        return []
    baseline = scoring.baseline_of(scoring.arms_among(stages))
    wanted = [(scoring.BEFORE, main), (baseline, main)]
    lacking = _lacking(setting, main, stages)
    while lacking is not None:
        wanted += [(lacking, main), (scoring.BEFORE, lacking)]
        main, lacking = lacking, _lacking(setting, lacking, stages)
    return [pair for pair in dict.fromkeys(wanted) if pair in pairs]


def _lacking(setting: Setting, main: str, stages: Sequence[str]) -> str | None:
    """The last arm whose loss is the main arm's without one term."""
    own = scoring.loss_of(setting.config, main)
    found = None
    for arm in scoring.arms_among(stages):
        loss = scoring.loss_of(setting.config, arm)
        differs = [key for key in own if own[key] != loss[key]]
        if len(differs) == 1 and own[differs[0]] and loss[differs[0]] == 0:
            found = arm
    return found


def _clause(name: str, change: Result, earlier: float, later: float) -> str:
    what = f"{name} {change.metric.replace('_', ' ')}"
    path = f"from {100 * earlier:.1f} % to {100 * later:.1f} %"
    if change.ci_low is None:
        return f"{what} went {path}, but without an interval nothing can be concluded"
    interval = f"{100 * change.ci_low:+.1f} to {100 * change.ci_high:+.1f}"
    if not (move := scoring.direction(change)):
        return f"no clear change in {what} ({interval})"
    return f"{what} {'rose' if move > 0 else 'fell'} {path} ({interval})"


def _summary(setting: Setting, found: scoring.Found) -> str:
    seeds = tuple(setting.config.seeds)
    arms = scoring.arms_among(found)
    tested = ", ".join(f"{len(task.questions)} of {task.name}" for task in setting.tasks)
    text = f"{scoring.trained_on(setting)} questions to distil from; tested on {tested}. "
    if setting.folds:
        text += f"{len(setting.folds)} folds: each group is answered by a model without it. "
    if len(arms) > 1:
        text += f"{len(arms)} arms from the same student, "
        text += f"each with {len(seeds)} seed{'s' if len(seeds) > 1 else ''}. "
    return (
        f"{text}Intervals are 95 % intervals: of scores over test subjects, of "
        f"differences over {_covered(setting)}."
    )


def _covered(setting: Setting) -> str:
    seeds = len(tuple(setting.config.seeds))
    return f"test subjects and {seeds} seeds" if seeds > 1 else "test subjects"


def _facts(setting: Setting, provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    config, loss = setting.config, setting.config.loss
    weights = (
        f"text {loss.text_weight:g} (top {loss.top_weight:g}, layers {loss.layers_weight:g}), "
        f"acoustic {loss.acoustic_weight:g}, supervised {loss.sft_weight:g}"
    )
    trained = f"LoRA, rank {config.lora.rank}" if config.lora.enabled else "all parameters"
    return [
        ("method", "source- and layer-wise distillation"),
        ("student", config.student.source or "small, trained in this run"),
        ("text teacher", config.teacher.source or "small, trained in this run"),
        ("loss", weights),
        ("divergence", f"{loss.divergence}; of hidden states {loss.hidden}, every {loss.every}"),
        ("learns", trained),
        ("data", config.data.questions or "simulated hearts"),
        ("seeds", ", ".join(map(str, config.seeds))),
        ("learning rate", f"{config.optimizer.learning_rate:g}"),
        *provenance_rows(provenance, config.train.batch_size, config.train.accumulate),
    ]


def _limits(setting: Setting, found: scoring.Found) -> list[str]:
    limits = [
        "Answers are not a diagnosis, and the reasoning that a model writes need not be how it "
        "came to its answer.",
        "An answer is matched by MMAU's rule, after an option that is named by its letter has been "
        "put in words; a response without an answer counts as wrong.",
    ]
    pairs = scoring.comparisons(setting.config, tuple(found))
    if len(pairs) * len(setting.tasks) > 1:
        limits.append(
            f"{len(pairs)} comparisons on {len(setting.tasks)} task(s), and the intervals are not "
            "widened for their number: of twenty without any effect about one seems to have one."
        )
    seeds = len(tuple(setting.config.seeds))
    if seeds == 1:
        limits.append(
            "One seed: the intervals do not cover what another order of the training data or "
            "another start of the new parameters would have given."
        )
    elif seeds < 10:
        limits.append(
            f"{seeds} seeds are few: the spread between them is known roughly. Each seed's own "
            "value is in the notes of the results."
        )
    questions = [q for task in setting.tasks for q in task.questions]
    if not all(q.subject_id for q in questions):
        limits.append(
            "Where the data names no subjects, recordings count as subjects of their own; if "
            "one person was recorded more than once, the intervals are too narrow."
        )
    if not setting.config.data.questions:
        limits.append(
            "Student and teacher are tiny, their questions made by rules: this shows that the "
            "method works as published, not how well a full-size model would do."
        )
    return limits


# -------------------------------------------------------------------------------- figures


def _scores(
    setting: Setting, stages: Sequence[str], results: Sequence[Result]
) -> list[figures.Scores]:
    """Of every task its stages, and its differences where they are not too many."""
    charts = []
    for task in setting.tasks:
        rows = [r for r in results if (r.task, r.metric) == (task.name, scoring.metric_of(task))]
        scores = [r for r in rows if scoring.MINUS not in r.stage]
        changes = [r for r in rows if scoring.MINUS in r.stage]
        metric = scoring.metric_of(task).replace("_", " ")
        how = {"generate": "answers written", "rank": "likeliest option"}.get(task.how, task.how)
        chance = _chance(task)
        charts.append(
            figures.Scores(
                f"{task.name}: {metric}",
                tuple(
                    _score(r, "before" if r.stage == scoring.BEFORE else "after") for r in scores
                ),
                metric,
                "higher",
                chance or None,
                "a blind choice",
                f"{task.dataset}, {len(task.questions)} questions, {how}.",
            )
        )
        if 0 < len(changes) <= _DIFFERENCES:
            charts.append(
                figures.Scores(
                    f"{task.name}: paired differences",
                    tuple(_score(r, "after") for r in changes),
                    f"difference in {metric}",
                    "higher",
                    0.0,
                    "no difference",
                    f"Paired intervals over {_covered(setting)}.",
                )
            )
    return charts


def _score(result: Result, role: str) -> figures.Score:
    return figures.Score(result.stage, result.value, result.ci_low, result.ci_high, role)


def _chance(task: QuestionTask) -> float:
    """Accuracy of a blind choice among the options; 0 where some question has none."""
    counts = [len(question.choices) for question in task.questions]
    return float(np.mean([1 / n for n in counts])) if all(counts) else 0.0


_CURVES = (
    ("Loss", "loss"),
    ("Divergence of the next-token distributions", "top"),
    ("Divergence of paired layers", "layers"),
    ("Divergence from the acoustic teacher", "acoustic"),
    ("Cross-entropy of the response", "cross_entropy"),
    ("Accuracy of the next token", "accuracy"),
)


def _curves(setting: Setting, stages: Sequence[str]) -> list[figures.Curves]:
    """One line per arm, the mean over its seeds, in training and where there is one held out."""
    over = [
        f"{len(each)} {name}"
        for each, name in ((tuple(setting.config.seeds), "seeds"), (setting.folds, "folds"))
        if len(each) > 1
    ]
    logs = {
        arm: [read_metrics(folder / "metrics.jsonl") for folder in folders]
        for arm, folders in _folders(setting, stages).items()
    }
    charts = []
    for prefix, where in (("", "training"), ("valid/", "held out")):
        for title, name in _CURVES:
            series = [_mean_line(arm, lines, prefix + name) for arm, lines in logs.items()]
            if kept := tuple(line for line in series if line is not None):
                mean = f", mean over {' and '.join(over)}" if over else ""
                charts.append(figures.Curves(title, kept, y_label=f"{where}{mean}"))
    return charts


def _mean_line(name: str, logs: Sequence[Sequence[dict]], metric: str) -> figures.Series | None:
    """Mean over the logs at the steps that all of them have; a term of weight 0 has no line."""
    runs = [{line["step"]: float(line[metric]) for line in log if metric in line} for log in logs]
    steps = sorted(set.intersection(*map(set, runs)))
    if not steps:
        return None
    means = np.mean([[run[step] for step in steps] for run in runs], axis=0)
    return figures.Series(name, np.array(steps), means)


def _unusable(setting: Setting, stages: Sequence[str]) -> list[report.UnusableRow]:
    """What was left out of training and benchmarks: every ``unusable_*.jsonl`` of the run."""
    folders = [folder for each in _folders(setting, stages).values() for folder in each]
    rows: dict[tuple, None] = {}
    for folder in dict.fromkeys([setting.workdir, *folders]):
        for path in sorted(folder.glob("unusable_*.jsonl")):
            listed = path.stem.removeprefix("unusable_").replace("_", " ")
            for problem in _problems(path):
                reason = f"{listed}: {problem['reason']}"
                rows[problem["row"], problem["audio_path"], reason] = None
    return [report.UnusableRow(*key) for key in rows]


def _problems(path: Path) -> list[dict[str, Any]]:
    """The fatal ones of a file by `data.manifest.write_problems`."""
    found = []
    for n, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            problem = json.loads(line)
        except ValueError as error:  # no JSON, or no text
            raise UserError(f"{path}, line {n} is damaged: {line[:80]!r}") from error
        if not isinstance(problem, dict) or {"row", "audio_path", "reason"} - set(problem):
            raise UserError(f"{path}, line {n} names no row, audio_path and reason: {line[:80]!r}")
        if problem.get("fatal", True):
            found.append(problem)
    return found
