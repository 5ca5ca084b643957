"""``medalign report RUN RUN... --out=page.html``: results of several runs on one page.

A run is a workdir or a folder of `medalign evaluate`, whatever has an `evaluation.json`; NAME=RUN
gives it a name. Runs stand side by side and are not compared pair by pair: for an interval of the
difference of two encoders measure them together (`medalign evaluate --encoder A --encoder B`).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medalign_jax.core import commands
from medalign_jax.core.errors import UserError
from medalign_jax.core.files import check_no_folders
from medalign_jax.evaluate.results import Result, read_results
from medalign_jax.evaluate.stages import MINUS
from medalign_jax.evaluate.tables import Table, tables_of, text_of
from medalign_jax.page import figures, report
from medalign_jax.page.outline import chart_of

_RESULTS = "evaluation.json"
_MOST = 20  # rows of a chart
_LONGEST = 60  # characters of a run's name
_APART = (
    "Runs stand side by side. Intervals that overlap do not show that there is no difference, nor "
    "those that do not that one run caused it: measure the encoders together "
    "(medalign evaluate --encoder A --encoder B) for a paired interval. Data sets of one name need "
    "not hold the same recordings."
)


@dataclasses.dataclass(frozen=True)
class _Run:
    name: str
    results: Sequence[Result]
    provenance: Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    return commands.ended(lambda: _run(arguments), given=arguments)


def _run(arguments: argparse.Namespace) -> None:
    out = Path(arguments.out)
    check_no_folders(out.parent, (out.name,))
    runs = [_read(name, folder) for name, folder in _named(arguments.runs)]
    results, shared = _together([_with_data(run, runs) for run in runs])
    tables = tables_of(results)
    names = ", ".join(run.name for run in runs)
    page = report.ReportData(
        title=arguments.title or f"{len(runs)} run{'s' if len(runs) > 1 else ''} side by side",
        headline=names + ".",
        summary=f"Equal in every run, and shown once: {', '.join(shared)}." if shared else "",
        scores=_charts(results),
        tables=[*tables, *_facts(runs)],
        results=results,
        limits=[*([_APART] if len(runs) > 1 else []), *_unlike(runs)],
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    report.write_report(out, page)
    print(f"{text_of(tables)}\n\npage: {out}", flush=True)
    for line in _unlike(runs):
        print(f"note: {line}", flush=True)


def _named(given: Sequence[str]) -> list[tuple[str, Path]]:
    """Name and folder of each run; the folders' last parts where no name is given."""
    named = []
    for text in given:
        name, equals, path = text.partition("=")
        own = bool(equals) and "/" not in name  # of a folder with "=" in it ./ says that it is one
        folder = Path(path if own else text)
        named.append((name if own else folder.resolve().name, folder))
    for name, folder in named:
        if not name or MINUS in name or ": " in name or len(name) > _LONGEST:
            raise UserError(
                f"{name[:40]!r} cannot be the name of a run (1 to {_LONGEST} characters, without "
                f"'{MINUS}' and ': '); give another: NAME={folder}"
            )
    if twice := [name for name, count in Counter(name for name, _ in named).items() if count > 1]:
        folders = [folder for name, folder in named if name == twice[0]]
        raise UserError(
            f"two runs are called {twice[0]!r}; name them: A={folders[0]} B={folders[1]}"
        )
    return named


def _read(name: str, folder: Path) -> _Run:
    path = folder / _RESULTS if folder.is_dir() else folder
    if not path.is_file():
        raise UserError(
            f"{folder} has no {_RESULTS}; a run is a workdir that was evaluated, or the --out of "
            "medalign evaluate"
        )
    return _Run(name, *read_results(path))


def _with_data(run: _Run, runs: Sequence[_Run]) -> _Run:
    """Tasks with their data set behind them, where there are several data sets."""
    if len({result.dataset for each in runs for result in each.results}) == 1:
        return run
    results = [dataclasses.replace(r, task=f"{r.task} ({r.dataset})") for r in run.results]
    return dataclasses.replace(run, results=results)


def _together(runs: Sequence[_Run]) -> tuple[list[Result], list[str]]:
    """All results, each stage with its run's name; what is the same in all runs once.

    Returns:
      The results, and the stages that are the same.
    """
    if len(runs) == 1:
        return list(runs[0].results), []
    values = [{r.key: dataclasses.replace(r, notes="") for r in run.results} for run in runs]
    stages = {r.stage for run in runs for r in run.results}
    same = {stage for stage in stages if _equal(stage, values)}
    shared = sorted(stage for stage in same if same.issuperset(stage.split(MINUS)))
    first = [r for r in runs[0].results if r.stage in shared]
    own = [
        dataclasses.replace(r, stage=_with_name(run.name, r.stage, shared))
        for run in runs
        for r in run.results
        if r.stage not in shared
    ]
    return [*own, *first], shared


def _equal(stage: str, values: Sequence[Mapping[str, Result]]) -> bool:
    of_stage = [{key: r for key, r in each.items() if r.stage == stage} for each in values]
    return all(each == of_stage[0] for each in of_stage) and bool(of_stage[0])


def _with_name(run: str, stage: str, shared: Sequence[str]) -> str:
    return MINUS.join(part if part in shared else f"{run}: {part}" for part in stage.split(MINUS))


def _charts(results: Sequence[Result]) -> list[figures.Scores]:
    """One chart for each task and kind of measurement, its first metric."""
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for r in results:
        if MINUS not in r.stage:
            groups.setdefault((r.dataset, r.task, r.kind), []).append(r)
    charts = []
    several = len({dataset for dataset, _, _ in groups}) > 1
    for (dataset, task, kind), rows in groups.items():
        rows = [r for r in rows if r.metric == rows[0].metric]
        title = f"{task}: {kind.replace('_', ' ')}" + (f", {dataset}" if several else "")
        charts += [chart_of(title, rows[n : n + _MOST]) for n in range(0, len(rows), _MOST)]
    return charts


def _facts(runs: Sequence[_Run]) -> list[Table]:
    """What was in force, of each run."""
    keys = dict.fromkeys(
        key
        for run in runs
        for key, value in run.provenance.items()
        if isinstance(value, str | int | float | bool)
    )
    rows = tuple((key, *(str(run.provenance.get(key, "")) for run in runs)) for key in keys)
    head = ("what was in force", *(run.name for run in runs))
    return [Table("Provenance of the runs", head, rows)] if rows else []


def _unlike(runs: Sequence[_Run]) -> list[str]:
    """Measurements of one name that were made on different numbers of recordings."""
    counts: dict[tuple[str, str, str], dict[str, int]] = {}
    for run in runs:
        for r in run.results:
            counts.setdefault((r.dataset, r.task, r.kind), {})[run.name] = r.n_test
    return [
        f"{task} ({kind}) of {dataset} was tested on different numbers of recordings: "
        + ", ".join(f"{n} in {name}" for name, n in found.items())
        for (dataset, task, kind), found in counts.items()
        if len(set(found.values())) > 1
    ]


def _parser() -> argparse.ArgumentParser:
    parser = commands.ArgumentParser(
        prog="medalign report", description="Results of several runs on one page."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="workdir or folder, or NAME=folder")
    parser.add_argument("--out", required=True, help="the page to write, e.g. compared.html")
    parser.add_argument("--title", help="its heading")
    return parser


if __name__ == "__main__":
    sys.exit(main())
