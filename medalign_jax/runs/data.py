"""The recordings of a run: those of its manifest, or simulated ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from medalign_jax.architecture import Architecture
from medalign_jax.core import processes
from medalign_jax.core.progress import Progress
from medalign_jax.data.recordings.dataset import (
    AudioDataset,
    check_joined,
    concatenate,
    open_dataset,
)
from medalign_jax.data.recordings.manifest import (
    Row,
    read_manifest,
    rows_of_table,
    write_problems,
)
from medalign_jax.data.tables import Table, read_table
from medalign_jax.datasets.near_copies import check_no_copies
from medalign_jax.datasets.simulated.simulate import write_dataset
from medalign_jax.evaluate.context import context_columns
from medalign_jax.evaluate.tasks import columns_of

_MIX_SEED = 1000  # added: simulated recordings beside simulated ones must be others


def open_data(
    config: ConfigDict,
    workdir: Path,
    made: Architecture,
    check: Callable[[Sequence[Row]], object] | None = None,
) -> AudioDataset:
    """All recordings of the manifest (or, without one, simulated ones); problems are listed.

    Rows that cannot be used are written to ``unusable_rows.jsonl`` in the workdir and counted on
    the screen.

    Args:
      config: of the run.
      workdir: its folder.
      made: the encoder, for its sample rate.
      check: called with the rows of a manifest before any recording is opened; raises where a
        task cannot be answered.
    """
    data, reports_required = config.data, config.method == "acula"
    if data.manifest:
        path = Path(data.manifest)
        targets = _targets(config, path)
        if check is not None and path.is_file():
            rows, _ = read_manifest(path, targets, reports_required=reports_required)
            if rows:  # else `open_dataset` says what is wrong with them
                check(rows)
    else:
        path = simulated_manifest(config, workdir, data.simulated, "simulated", check)
        targets = _targets(config, path)
    progress = Progress(None, f"checking {path}", "file")
    dataset = open_dataset(
        path,
        targets=targets,
        sample_rate=made.front_end.sample_rate,
        max_seconds=data.max_seconds,
        max_bad_fraction=data.max_bad_fraction,
        reports_required=reports_required,
        progress=lambda done, total: progress.advance(),
    )
    progress.close()
    if jax.process_index() == 0:  # one writer
        write_problems(dataset.problems, workdir / "unusable_rows.jsonl")
    bad = sum(problem.fatal for problem in dataset.problems)
    splits = ", ".join(f"{count} {name}" for name, count in sorted(dataset.splits().items()))
    print(f"{path}: {len(dataset)} recordings ({splits})", flush=True)
    if bad:
        print(f"{bad} unusable rows are listed in {workdir / 'unusable_rows.jsonl'}", flush=True)
    return dataset


def _targets(config: ConfigDict, path: Path) -> tuple[str, ...]:
    """Columns to keep: those named, the tasks', and, of a file, those that state circumstances."""
    evaluate = config.evaluate
    tasks = tuple(evaluate.get("tasks", ()))
    named = [*config.data.targets, *columns_of(tasks), *evaluate.get("metadata", ())]
    if path.is_file() and "metadata" in evaluate.get("baselines", ()):
        named += context_columns(read_table(path, "audio_path").columns, tasks)
    return tuple(dict.fromkeys(named))


def data_name(config: ConfigDict) -> str:
    """A name for the data: the folder of the manifest."""
    if not config.data.manifest:
        return "simulated auscultation"
    path = Path(config.data.manifest).resolve()
    return path.name if path.is_dir() else path.parent.name


def simulated_manifest(
    config: ConfigDict,
    workdir: Path,
    count: int,
    name: str,
    check: Callable[[Sequence[Row]], object] | None = None,
) -> Path:
    """Simulated recordings under ``workdir/name``, written once (anew for another request).

    Args:
      config: of the run.
      workdir: its folder.
      count: recordings.
      name: of their folder.
      check: called with their rows before there is any sound.
    """
    folder = workdir / name

    def check_records(records: list[dict[str, str]]) -> None:
        columns = tuple(dict.fromkeys(column for record in records for column in record))
        table, targets = Table(columns, tuple(records)), _targets(config, folder)
        check(rows_of_table(folder / "metadata.csv", table, targets, folder=folder)[0])

    if not (folder / "metadata.csv").exists():
        print(f"simulating {count} recordings of auscultation", flush=True)

    def write(check: Callable | None = None) -> Path:
        return write_dataset(
            folder,
            count,
            config.seed,
            seconds=config.data.simulated_seconds,
            kinds=tuple(config.data.simulated_kinds),
            anew=True,
            check=check,
        )

    processes.by_first(lambda: write(None if check is None else check_records))
    return write()  # finds what is there


def training_part(config: ConfigDict, dataset: AudioDataset, workdir: Path) -> AudioDataset:
    """The training split, with config.data.mix simulated recordings joined to it."""
    train = dataset.split("train")
    if not config.data.mix:
        return train
    block = config.copy_and_resolve_references()
    with block.unlocked():
        block.seed += _MIX_SEED
    manifest = simulated_manifest(block, workdir, config.data.mix, "simulated_mix")
    mixed = open_dataset(
        manifest, max_seconds=config.data.max_seconds, sample_rate=dataset.sample_rate
    )
    added = mixed.split("train")
    check_joined(dataset, added)
    check_no_copies(dataset, added)
    return concatenate([train, added])
