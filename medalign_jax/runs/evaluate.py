"""``python -m medalign_jax.evaluate``: measures encoders on labelled recordings, without training.

    python -m medalign_jax.evaluate --encoder workdirs/mine --encoder whisper=openai/whisper-base \\
        --manifest my/metadata.csv --tasks label age --folds 5 --aggregate subject --out results

Tasks, labels, splits and folds are checked before a recording is opened. Recordings are decoded
once for all encoders; embeddings are kept under OUT/embeddings, so a run that was stopped goes on,
and another one with more tasks or encoders embeds only what is new.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from medalign_jax.core import commands, processes, rendezvous
from medalign_jax.core.errors import UserError
from medalign_jax.core.files import check_no_folders, write_text
from medalign_jax.core.mesh import make_mesh
from medalign_jax.core.progress import Progress
from medalign_jax.core.provenance import provenance
from medalign_jax.data.recordings.dataset import MAX_SECONDS, AudioDataset, open_dataset
from medalign_jax.data.recordings.manifest import (
    Problem,
    Row,
    check_rows,
    read_manifest,
    write_problems,
)
from medalign_jax.data.tables import read_table as read_manifest_table
from medalign_jax.encoder import Encoder
from medalign_jax.evaluate import sources
from medalign_jax.evaluate.baseline_stages import BASELINES, baseline_stages, check_baselines
from medalign_jax.evaluate.baselines import random_encoder
from medalign_jax.evaluate.collected import Measured
from medalign_jax.evaluate.context import check_metadata, context_columns
from medalign_jax.evaluate.copies import search
from medalign_jax.evaluate.embedding_table import read_table
from medalign_jax.evaluate.embeddings import EmbeddingStore
from medalign_jax.evaluate.leaks import (
    Findings,
    describe_equals,
    describe_subjects,
    rows_of_equals,
)
from medalign_jax.evaluate.measure import measure
from medalign_jax.evaluate.probes import PROBES
from medalign_jax.evaluate.results import write_results
from medalign_jax.evaluate.spread import describe_ranks, ranks_of
from medalign_jax.evaluate.stages import RANDOM, Settings, Stage
from medalign_jax.evaluate.suite import AGGREGATES, Options, Suite
from medalign_jax.evaluate.tables import csv_of, tables_of, text_of
from medalign_jax.evaluate.tasks import columns_of
from medalign_jax.evaluate.trained import describe_trained
from medalign_jax.page import report
from medalign_jax.page.outline import headline_of, limits_of, map_of, scores_of

_RESULTS, _TABLE, _PAGE = "evaluation.json", "evaluation.csv", "report.html"
_BASELINES = tuple(name for name in BASELINES if name != "ridge")  # there are no vectors of reports
_NOT_SHOWN = frozenset({"arguments", "effective_rank"})  # of the facts: the page has them in words


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    return commands.ended(lambda: _run(arguments), given=arguments)


def _run(arguments: argparse.Namespace) -> None:
    rendezvous.join(*(getattr(arguments, name) for name in rendezvous.HELP))
    with processes.at_work_in(Path(arguments.out), advice="name another --out"):
        run(arguments)


def run(arguments: argparse.Namespace) -> Measured:
    """Everything from the arguments to the page.

    Raises:
      UserError: whatever is wrong with them.
    """
    check_no_folders(arguments.out, (_RESULTS, _TABLE, _PAGE))
    options, given = _options(arguments), sources.sources_of(arguments.encoder)
    if not given and not arguments.embeddings:
        raise UserError("name something to measure: --encoder, or --embeddings with a table")
    if arguments.embeddings:
        opened = _opened_table(arguments, options)
    else:
        opened = _opened_manifest(arguments, options, given)
    store = EmbeddingStore(Path(arguments.cache or Path(arguments.out) / "embeddings"))
    stages = _stages(arguments, opened, given, store)
    plain, guesses = baseline_stages(
        opened.suite, opened.rows, arguments.baselines, arguments.metadata, opened.data, store
    )
    found = Measured()
    if jax.process_index() == 0:
        suite = opened.suite
        found = measure(
            suite.tasks, suite.plans, suite.subjects, [*stages, *plain], options.settings, guesses,
            by_subject=options.aggregate == "scores",
        )  # fmt: skip
        _write(Path(arguments.out), arguments, opened, stages, found)
    return found


@dataclasses.dataclass(frozen=True)
class _Opened:
    """What there is to be measured on; `data` is None where there are only embeddings.

    Attributes:
      problems: of rows that were left out, and notes.
      findings: what may have leaked from training into testing.
    """

    suite: Suite
    rows: Sequence[Row]
    data: AudioDataset | None
    tables: Mapping[str, np.ndarray]
    problems: Sequence[Problem]
    findings: Findings


def _options(arguments: argparse.Namespace) -> Options:
    check_baselines(arguments.baselines)
    check_metadata(arguments.metadata, arguments.tasks)
    settings = Settings(
        tuple(arguments.probes), arguments.per_class, arguments.draws, arguments.seeds
    )
    return Options(
        tuple(arguments.tasks), arguments.folds, arguments.repeats, arguments.seed,
        arguments.aggregate, settings,
    )  # fmt: skip


def _opened_table(arguments: argparse.Namespace, options: Options) -> _Opened:
    """--embeddings without a manifest: labels and splits are columns of the table."""
    if arguments.manifest or arguments.encoder:
        raise UserError(
            "--embeddings brings its own columns; beside a manifest give the table as "
            "--encoder x.parquet"
        )
    path, name = arguments.embeddings, sources.stage_name(Path(arguments.embeddings))
    table = read_table(path)
    rows, problems = sources.rows_of(path, table, _targets(arguments, table.columns))
    checked = check_rows(rows, problems, arguments.max_bad_fraction)
    place = {number: i for i, number in enumerate(table.numbers)}
    embeddings = table.embeddings[[place[row.row] for row in checked.rows]]
    rows = rows_of_equals(checked.rows, embeddings, options.aggregate)
    suite = Suite.of(rows, options, arguments.dataset or Path(path).stem)
    _write_problems(arguments, checked.problems)
    findings = Findings(describe_equals(rows, embeddings, suite), describe_subjects(rows, suite))
    print(*suite.descriptions, *findings.sentences, sep="\n", flush=True)
    return _Opened(suite, rows, None, {name: embeddings}, checked.problems, findings)


def _targets(arguments: argparse.Namespace, columns: Sequence[str]) -> tuple[str, ...]:
    """Columns to keep: the tasks', those named for the metadata baseline, circumstances."""
    asked = [*columns_of(arguments.tasks), *arguments.metadata]
    return tuple(dict.fromkeys([*asked, *context_columns(columns, arguments.tasks)]))


def _write_problems(arguments: argparse.Namespace, problems: Sequence[Problem]) -> None:
    """Beside the results; how many rows are unusable is also said on the screen."""
    if jax.process_index():
        return
    listed = Path(arguments.out) / "unusable_rows.jsonl"
    listed.parent.mkdir(parents=True, exist_ok=True)
    write_problems(problems, listed)
    if bad := len({problem.row for problem in problems if problem.fatal}):
        print(f"{bad} unusable rows are listed in {listed}", flush=True)


def _opened_manifest(arguments: argparse.Namespace, options: Options, given) -> _Opened:
    if not arguments.manifest:
        raise UserError("name the recordings: --manifest, or --embeddings with a table")
    path = Path(arguments.manifest)
    name = arguments.dataset or (path.name if path.is_dir() else path.resolve().parent.name)
    targets = _targets(arguments, ())
    if path.is_file():
        targets = _targets(arguments, read_manifest_table(path, "audio_path").columns)
        # What is wrong is said before anything is decoded.
        read = read_manifest(path, targets, reports_required=False)
        Suite.of(check_rows(*read, arguments.max_bad_fraction).rows, options, name)
    joinable = {}
    for source in given:
        if source.is_table:
            joinable[source.name] = (source.path, sources.read_joinable(source.path))
        else:
            source.check()
    progress = Progress(None, f"checking {path}", "file")
    data = open_dataset(
        path,
        targets=targets,
        max_seconds=arguments.max_seconds,
        max_bad_fraction=arguments.max_bad_fraction,
        reports_required=False,
        progress=lambda done, total: progress.advance(),
    )
    progress.close()
    _write_problems(arguments, data.problems)
    print(f"{path}: {len(data)} recordings", flush=True)
    tables = {name: sources.joined(*table, data.rows) for name, table in joinable.items()}
    searched = search(data, options.aggregate, not arguments.ignore_copies)
    suite = Suite.of(searched.data.rows, options, name)
    rows, found = searched.data.rows, tuple(searched.findings(suite))
    trained = [
        text for source in given if not source.is_table
        for text in describe_trained(source.name, source.path, searched.data, suite)
    ]  # fmt: skip
    findings = Findings(found, describe_subjects(rows, suite), tuple(trained))
    print(*suite.descriptions, *findings.sentences, sep="\n", flush=True)
    return _Opened(suite, rows, searched.data, tables, data.problems, findings)


def _stages(arguments: argparse.Namespace, opened: _Opened, given, store) -> list[Stage]:
    """Encoders in the order that they were given, then random weights of each kind of encoder."""
    mesh = make_mesh(devices=jax.local_devices())  # each process embeds a share of the recordings
    encoders = {s.name: s.load(mesh) for s in given if not s.is_table}
    random = _random(encoders, arguments.seed) if "random" in arguments.baselines else {}
    embedded = dict(opened.tables)
    if encoders:
        embedded |= store.embed(encoders | random, opened.data)
    order = [s.name for s in given] or list(opened.tables)
    stages = [opened.suite.stage(name, embedded[name]) for name in order]
    return stages + [opened.suite.stage(name, embedded[name], role="baseline") for name in random]


def _random(encoders: Mapping[str, Encoder], seed: int) -> dict[str, Encoder]:
    """One for all encoders of the same architecture and settings, named by the first of them."""
    first: dict[str, str] = {}
    for name, encoder in encoders.items():
        first.setdefault(json.dumps(encoder.settings(), sort_keys=True), name)
    return {f"{name}{RANDOM}": random_encoder(encoders[name], seed)
            for name in first.values()}  # fmt: skip


# ------------------------------------------------------------------------------- output


def _write(out: Path, arguments, opened: _Opened, stages: Sequence[Stage], found) -> None:
    out.mkdir(parents=True, exist_ok=True)
    ranks = ranks_of(stages)
    facts = _provenance(arguments, opened) | {"effective_rank": ranks}
    write_results(out / _RESULTS, found.results, facts)
    write_text(out / _TABLE, csv_of(found.results))
    tables = tables_of(found.results)
    print("\n" + text_of(tables) + "\n", flush=True)
    print(describe_ranks(ranks), flush=True)
    names = [stage.name for stage in stages if stage.role == "encoder"]
    headline = f"{', '.join(names)} on {opened.suite.dataset}."
    if len(names) > 1:
        headline = headline_of(found, opened.suite, names[0], names[-1])
    maps, sounds = map_of(opened.suite, stages, opened.rows, opened.data)
    data = report.ReportData(
        title=f"Encoders measured on {opened.suite.dataset}",
        headline=headline,
        summary=_summary(opened),
        warnings=opened.findings.warnings,
        facts=[(name, str(value)) for name, value in facts.items() if _shown(name, value)],
        scores=scores_of(found, opened.suite),
        tables=tables,
        maps=maps,
        sounds=sounds,
        map_note="Principal components of the training rows, test rows shown.",
        results=found.results,
        unusable=[
            report.UnusableRow(p.row, p.audio_path, p.reason) for p in opened.problems if p.fatal
        ],
        limits=[
            *limits_of(opened.suite, opened.rows),
            describe_ranks(ranks),
            *opened.findings.sentences,
        ],
    )
    report.write_report(out / _PAGE, data)
    print(f"{headline}\npage: {out / _PAGE}", flush=True)


def _shown(name: str, value: object) -> bool:
    """Facts of one line; what was found stands in sentences."""
    return name not in _NOT_SHOWN and isinstance(value, str | int | float)


def _summary(opened: _Opened) -> str:
    suite, options = opened.suite, opened.suite.options
    what = f"{suite.count} recordings of {len(set(suite.subjects))} subjects"
    how = "the manifest's splits"
    if options.folds:
        how = f"{options.folds} folds by subject, AUROC by the pairs of each fold"
        how += f", dealt {options.repeats} times" if options.repeats > 1 else ""
    rows = {
        "recording": "a row is a recording",
        "subject": "a row is a subject's mean",
        "scores": "fitted on recordings, a subject's score is the mean of its recordings'",
    }[options.aggregate]
    return (
        f"{what}; {how}; {rows}. Encoders are frozen; intervals are 95 % intervals over subjects."
    )


def _provenance(arguments: argparse.Namespace, opened: _Opened) -> dict:
    flags = {key: value for key, value in vars(arguments).items() if key not in rendezvous.HELP}
    return provenance() | {
        "recordings": opened.suite.count,
        "subjects": len(set(opened.suite.subjects)),
        **opened.findings.provenance(),
        "arguments": json.loads(json.dumps(flags)),
    }


def _parser() -> argparse.ArgumentParser:
    parser = commands.ArgumentParser(
        prog="medalign evaluate",
        description="Measures encoders on labelled recordings: probes, baselines, intervals.",
        epilog=sources.__doc__.split("\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--encoder",
        action="append",
        default=[],
        metavar="SOURCE",
        help="workdir, export, NAME=weights, or a table of embeddings; may be repeated",
    )
    add("--manifest", help="CSV, JSONL or Parquet file, or a prepared folder")
    add("--embeddings", help="table of embeddings with its own labels, in place of a manifest")
    add(
        "--tasks",
        nargs="+",
        default=["label"],
        help="label columns; NAME:regression, NAME:classification, NAME:labels (several per cell)",
    )
    add("--out", required=True, help="folder for evaluation.json, evaluation.csv, report.html")
    add("--folds", type=int, default=0, help="folds by subject; 0: the manifest's splits")
    add("--repeats", type=int, default=1, help="how often the folds are dealt anew")
    add(
        "--aggregate",
        default="recording",
        choices=AGGREGATES,
        help="subject: a row is the mean of a subject's features; scores: a subject's score is the "
        "mean of its recordings' scores",
    )
    add(
        "--probes",
        nargs="+",
        default=["linear"],
        choices=sorted(PROBES),
        help="the first is the headline (default: linear)",
    )
    add("--per_class", type=int, default=0, help="also with so many recordings of each class")
    add("--draws", type=int, default=20, help="draws of few labels")
    add("--seeds", type=int, default=5, help="seeds of probes that start at random")
    add("--seed", type=int, default=0, help="of the folds")
    add("--baselines", nargs="*", default=list(_BASELINES), help=", ".join(_BASELINES))
    add("--metadata", nargs="*", default=[], help="more columns for the metadata baseline")
    add("--ignore_copies", action="store_true", help="do not look for near-copies")
    add("--cache", help="folder of embeddings (default: OUT/embeddings)")
    add("--dataset", help="name of the data (default: the manifest's folder)")
    add(
        "--max_seconds",
        type=commands.seconds,
        default=MAX_SECONDS,
        help="read no more of a recording",
    )
    add("--max_bad_fraction", type=float, default=0.01, help="unusable rows that are tolerated")
    rendezvous.add_flags(parser)
    return parser  # fmt: skip
