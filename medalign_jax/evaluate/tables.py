"""Results laid out for people: one row per stage, one column per task; on screen, page, as CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from collections.abc import Sequence

from medalign_jax.evaluate.results import Result
from medalign_jax.evaluate.stages import MINUS

# Parts of a result's notes without which its number misleads.
_TELLING = re.compile(
    r"no interval|converged|does not follow|the most frequent class alone|a random order|fitted on"
)


@dataclasses.dataclass(frozen=True)
class Table:
    """Texts in rows and columns: names in the first column, scores in the others.

    Attributes:
      caption: what it shows.
      head: (C,) names of the columns.
      rows: (C,) texts each.
      notes: what a reader must know of them, below the table.
    """

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.head):
                raise ValueError(
                    f"table {self.caption!r}: {len(row)} cells for {len(self.head)} columns"
                )


def tables_of(results: Sequence[Result]) -> list[Table]:
    """For each kind of measurement and metric its values, then its paired differences.

    Tasks are columns; what is retrieved has one column for each metric instead.
    """
    tables = []
    for kind in dict.fromkeys(result.kind for result in results):
        of_kind = [result for result in results if result.kind == kind]
        for metrics in _groups(of_kind):
            chosen = [result for result in of_kind if result.metric in metrics]
            for differences in (False, True):
                rows = [r for r in chosen if (MINUS in r.stage) == differences]
                if rows:
                    tables.append(_table(kind, metrics, differences, rows))
    return tables


def _groups(results: Sequence[Result]) -> list[tuple[str, ...]]:
    metrics = tuple(dict.fromkeys(result.metric for result in results))
    recalls = tuple(m for m in metrics if m.startswith("recall@"))
    return [(m,) for m in metrics if m not in recalls] + ([recalls] if recalls else [])


def _table(kind: str, metrics: Sequence[str], differences: bool, rows: Sequence[Result]) -> Table:
    name = kind.replace("_", " ")
    what = "paired differences of " if differences else ""
    caption = f"{name}: {what}{metrics[0] if len(metrics) == 1 else 'recall'}"
    columns = list(dict.fromkeys((r.task, r.metric) for r in rows))
    stages = list(dict.fromkeys(r.stage for r in rows))
    cells = {(r.stage, r.task, r.metric): _cell(r, differences) for r in rows}
    heads = [task if len(metrics) == 1 else f"{task} {metric}" for task, metric in columns]
    lines = tuple(
        (stage, *(cells.get((stage, *column), "") for column in columns)) for stage in stages
    )
    names = ("stage", *(head.replace("_", " ") for head in heads))
    return Table(caption, names, lines, () if differences else _notes(rows))


def _notes(rows: Sequence[Result]) -> tuple[str, ...]:
    """What `_TELLING` finds in the notes, each once, with the stages of which it is said."""
    stages: dict[str, dict[str, None]] = {}
    for result in rows:
        for note in filter(_TELLING.search, result.notes.split("; ")):
            stages.setdefault(note, {})[result.stage] = None
    every = len({result.stage for result in rows})
    return tuple(
        note if len(of) == every else f"{', '.join(of)}: {note}" for note, of in stages.items()
    )


def _cell(result: Result, signed: bool) -> str:
    form = "+.3f" if signed else ".3f"
    value = format(result.value, form)
    if result.ci_low is None or result.ci_high is None:
        return f"{value} (no interval)"
    return f"{value} ({result.ci_low:{form}} to {result.ci_high:{form}})"


def text_of(tables: Sequence[Table]) -> str:
    """Aligned text."""
    return "\n\n".join(map(_text, tables))


def _text(table: Table) -> str:
    lines = [table.head, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.head))]
    rows = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines)
    notes = [f"  {note}" for note in table.notes]
    return "\n".join([table.caption, *(row.rstrip() for row in rows), *notes])


def csv_of(results: Sequence[Result]) -> str:
    """One line per result, with the fields of `evaluation.json`; seeds as their number."""
    names = [field.name for field in dataclasses.fields(Result)]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(names)
    for result in results:
        values = dataclasses.asdict(result) | {"seeds": len(result.seeds)}
        writer.writerow(["" if values[name] is None else values[name] for name in names])
    return stream.getvalue()
