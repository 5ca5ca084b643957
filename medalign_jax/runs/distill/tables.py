"""A distillation's results as tables, laid out as the paper's: stages down, tasks across."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medalign_jax.evaluate.results import Result
from medalign_jax.evaluate.tables import Table
from medalign_jax.runs.distill.results import FINER, MINUS, PART, direction

Losses = Mapping[str, Mapping[str, Any]]


def ablation_table(results: Sequence[Result], losses: Losses | None = None) -> str:
    """All of `tables` as Markdown, `weights` after them."""
    found = [*tables(results), *([weights(losses)] if losses else [])]
    return "\n\n".join(_markdown(table) for table in found) + "\n"


def weights(losses: Losses) -> Table:
    """The weights that each arm was trained with; `losses`: arm -> its settings of the loss."""
    rows = []
    for arm, loss in losses.items():
        text = loss["text_weight"]
        layers = text * loss["layers_weight"]
        rows.append(
            (
                arm,
                f"{loss['sft_weight']:g}",
                f"{text * loss['top_weight']:g}",
                f"{layers:g}",
                str(loss["every"]) if layers else "",
                f"{loss['acoustic_weight']:g}",
            )
        )
    head = (
        "Arm", "Cross-entropy (alpha_SFT)", "Teacher, top", "Teacher, layers", "Every k-th layer",
        "Acoustic (alpha_ac)",
    )  # fmt: skip
    return Table("Weights of the loss's terms, as trained", head, tuple(rows))


def tables(results: Sequence[Result]) -> list[Table]:
    """Scores in percent by stage and task; differences; scores by difficulty and sub-category."""
    shown = _judged(results)
    names = dict.fromkeys(r.task for r in shown if not any(f in r.task for f in FINER))
    # The whole of a benchmark stands after its parts, as an average does.
    wholes = list(dict.fromkeys(name.split(PART)[0] for name in names))
    order = [n for whole in wholes for n in (*_parts_of(names, whole), whole)]
    stages = [r for r in shown if MINUS not in r.stage]
    changes = [r for r in shown if MINUS in r.stage]
    metrics = {whole: next(r.metric for r in shown if r.task == whole) for whole in wholes}
    heads = [_column(name, metrics, names) for name in order]
    found = [_grid("Score in %, with its 95 % interval", "Stage", stages, order, heads, _score)]
    if changes:
        caption = (
            "Paired difference in percentage points, with its 95 % interval; "
            "an arrow where the interval leaves out zero"
        )
        found.append(_grid(caption, "Difference", changes, order, heads, _change))
    for whole in wholes:
        groups = [r for r in stages if any(r.task.startswith(whole + f) for f in FINER)]
        if groups:
            found.append(_finer(whole, groups))
    return found


def _judged(results: Sequence[Result]) -> list[Result]:
    """Without the plain accuracy of a classification, which is judged by the unweighted one."""
    classes = {r.task for r in results if r.metric == "unweighted_accuracy"}
    return [r for r in results if r.task not in classes or r.metric == "unweighted_accuracy"]


def _parts_of(names: Mapping[str, None], whole: str) -> list[str]:
    return [name for name in names if name.startswith(whole + PART)]


def _column(name: str, metrics: Mapping[str, str], names: Mapping[str, None]) -> str:
    whole, _, part = name.partition(PART)
    metric = metrics[whole].replace("_", " ")
    if part:
        return f"{whole} {part}"
    return f"{whole} {'average' if _parts_of(names, whole) else metric}"


def _grid(caption, corner, results, order, heads, cell) -> Table:
    by_key = {(r.stage, r.task): cell(r) for r in results}
    rows = [
        (stage, *(by_key.get((stage, name), "") for name in order))
        for stage in dict.fromkeys(r.stage for r in results)
    ]
    return Table(caption, (corner, *heads), tuple(rows))


def _finer(whole: str, results: Sequence[Result]) -> Table:
    """Groups down, stages across: there are more groups than stages."""
    stages = tuple(dict.fromkeys(r.stage for r in results))
    cells = {(r.task, r.stage): _score(r) for r in results}
    counts = {r.task: r.n_test for r in results}
    rows = [
        (group.removeprefix(f"{whole}: "), str(n), *(cells[group, stage] for stage in stages))
        for group, n in counts.items()
    ]
    return Table(f"{whole}: score in % by group", ("Group", "Questions", *stages), tuple(rows))


def _score(result: Result) -> str:
    text = f"{100 * result.value:.1f}"
    if result.ci_low is None:
        return text
    return f"{text} [{100 * result.ci_low:.1f}, {100 * result.ci_high:.1f}]"


def _change(result: Result) -> str:
    text = f"{100 * result.value:+.1f}"
    if result.ci_low is None:
        return f"{text} (no interval)"
    arrow = {1: "↑ ", -1: "↓ "}.get(direction(result), "")
    return f"{arrow}{text} [{100 * result.ci_low:+.1f}, {100 * result.ci_high:+.1f}]"


def _markdown(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(c.replace("|", r"\|").split()) for c in cells) + " |"

    rule = "|" + "|".join([" :-- ", *[" --: "] * (len(table.head) - 1)]) + "|"
    return "\n".join([f"{table.caption}", "", line(table.head), rule, *map(line, table.rows)])
