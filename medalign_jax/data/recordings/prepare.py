"""Checks a manifest and writes it as an array_record data set.

    medalign prepare --manifest=recordings.csv --out=prepared

Prints what is wrong and why, and a summary by split and label, and writes a folder that
`open_dataset` (and TFDS) opens without decoding audio; see `medalign_jax.data.recordings.records`.
A run that is killed leaves nothing under the name of `--out`; the next one clears up after it.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import numpy as np

from medalign_jax.core import commands
from medalign_jax.core.files import check_name, encoded, sync
from medalign_jax.core.local_paths import local
from medalign_jax.core.locks import held
from medalign_jax.core.seals import seal
from medalign_jax.data.recordings import records
from medalign_jax.data.recordings.dataset import MAX_SECONDS, AudioDataset, open_dataset
from medalign_jax.data.recordings.manifest import (
    LINES_IN_MESSAGE,
    SPLITS,
    ManifestError,
    Row,
    list_problems,
    problem_table,
    without_folder,
)
from medalign_jax.data.recordings.records import Recipe
from medalign_jax.data.recordings.sources import Clip

TEXT_COLUMNS = ("audio_path", "subject_id", "split", "label", "report")


def write_records(
    dataset: AudioDataset,
    recipe: Recipe,
    manifest: str | Path,
    out: str | Path,
    progress: Callable[[int, int], None] | None = None,
) -> bool:
    """Writes a data set as a prepared folder, whole or not at all.

    Args:
      dataset: opened from `manifest` as `recipe` says.
      recipe: remembered in the folder.
      manifest: paths inside its folder are written relative to it.
      out: the folder to make; if it is there with the same content, nothing is done.
      progress: called with (recordings written, recordings in all).

    Returns:
      Whether something was written.

    Raises:
      ManifestError: `out` holds something else.
      LockedError: another process writes to it.
      AudioError: a file has become unreadable since it was checked.
    """
    out, manifest = local(out), Path(manifest)
    rows = [without_folder(row, manifest.parent) for row in dataset.rows]
    content = _content(rows, [row.audio_path for row in dataset.rows])
    if _is_there(out, recipe, content):
        return False
    out.parent.mkdir(parents=True, exist_ok=True)
    with _stage(out) as stage:
        folder, cut = _write_tfds(dataset, rows, recipe, stage, progress)
        _write_rows(folder, dataset, content)
        description = {"manifest": manifest.name, "rows": len(rows), "cut": cut}
        _write_description(folder, recipe, description | {"content": _digest(content)})
        os.rename(folder, out)
        sync(out.parent)
    return True


def _write_tfds(
    dataset: AudioDataset,
    rows: Sequence[Row],
    recipe: Recipe,
    stage: Path,
    progress: Callable[[int, int], None] | None,
) -> tuple[Path, int]:
    """Writes TFDS's files below `stage`: their folder, and how many recordings were cut."""
    import tensorflow_datasets as tfds

    done = cut = 0
    seconds = recipe.max_seconds
    longest = np.inf if seconds is None else round(seconds * recipe.sample_rate)

    def written(clip: Clip) -> None:
        nonlocal done, cut
        done, cut = done + 1, cut + (len(clip.samples) >= longest)
        if progress is not None:
            progress(done, len(rows))

    tfds.disable_progress_bar()
    builder = _builder(dataset, rows, stage, written)
    # TFDS says what it does on stdout; here progress is the caller's.
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        builder.download_and_prepare()
    return Path(builder.data_dir), cut


def _builder(
    dataset: AudioDataset, rows: Sequence[Row], folder: Path, written: Callable[[Clip], None]
):
    """The TFDS builder that writes these recordings below `folder`."""
    import tensorflow_datasets as tfds

    text = _text_features(rows)

    class Auscultation(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Recordings of heart and lung sounds with their reports or metadata."""

        name = records.NAME
        VERSION = tfds.core.Version(f"{records.FORMAT}.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                description=f"Mono audio at {dataset.sample_rate} Hz; waveform = audio * scale.",
                features=tfds.features.FeaturesDict(records.audio_features() | text),
                disable_shuffling=True,  # records stay in the order of rows.jsonl
            )

        def _split_generators(self, dl_manager):
            present = {row.split for row in rows}
            return {s: self._generate_examples(s) for s in SPLITS if s in present}

        def _generate_examples(self, split):
            indices = [i for i, row in enumerate(rows) if row.split == split]
            for index, clip in _ahead(dataset.clip, indices):
                audio = {"audio": clip.samples, "scale": np.float32(clip.scale)}
                yield index, audio | _text(rows[index], text)
                written(clip)

    return Auscultation(data_dir=str(folder), file_format="array_record")


def _text_features(rows: Sequence[Row]) -> dict[str, object]:
    """Every column of the rows as text; a nested dict for metadata and for targets."""
    import tensorflow_datasets as tfds

    features: dict[str, object] = {name: tfds.features.Text() for name in TEXT_COLUMNS}
    for group in ("metadata", "targets"):
        names = sorted({name for row in rows for name in getattr(row, group)})
        if names:
            features[group] = {name: tfds.features.Text() for name in names}
    return features


def _text(row: Row, features: dict[str, object]) -> dict[str, object]:
    """A row's columns for its record; a missing value is the empty text."""
    found: dict[str, object] = {}
    for name, feature in features.items():
        value = getattr(row, name)
        nested = isinstance(feature, dict)
        found[name] = {k: value.get(k, "") for k in feature} if nested else value or ""
    return found


def _ahead(read: Callable[[int], Clip], indices: Sequence[int]) -> Iterator[tuple[int, Clip]]:
    """Reads in threads, some recordings at a time."""
    with ThreadPoolExecutor(max_workers=min(16, (os.cpu_count() or 1) + 2)) as pool:
        for start in range(0, len(indices), 64):
            part = indices[start : start + 64]
            yield from zip(part, pool.map(read, part), strict=True)


@contextlib.contextmanager
def _stage(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` that one process at a time may have."""
    stage = out.with_name(out.name + ".incomplete")
    with held(out, folder=False, advice="name another --out"):
        if stage.exists():  # left by a run that was killed
            shutil.rmtree(stage)
        stage.mkdir()
        try:
            yield stage
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def _content(rows: Sequence[Row], paths: Sequence[str]) -> list[dict[str, object]]:
    """The rows as JSON objects, with the SHA-256 of each audio file."""
    with ThreadPoolExecutor() as pool:
        digests = pool.map(records.sha256, paths)
        return [asdict(row) | {"sha256": d} for row, d in zip(rows, digests, strict=True)]


def _digest(content: list[dict[str, object]]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write_rows(folder: Path, dataset: AudioDataset, content: list[dict[str, object]]) -> None:
    order = [i for split in SPLITS for i, row in enumerate(dataset.rows) if row.split == split]
    number = {index: record for record, index in enumerate(order)}
    with open(folder / records.ROWS, "wb") as file:
        for index, columns in enumerate(content):
            place = {"record": number[index], "sound": dataset.sounds[index]}
            file.write(encoded(json.dumps(columns | place, ensure_ascii=False) + "\n"))


def _write_description(folder: Path, recipe: Recipe, facts: dict[str, object]) -> None:
    description = {
        "format": records.FORMAT,
        **asdict(recipe),
        **facts,
        "files": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
        "rows_sha256": records.sha256(folder / records.ROWS),
        "written_by": {p: metadata.version(p) for p in ("tensorflow-datasets", "array_record")},
    }
    text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
    (folder / records.DESCRIPTION).write_bytes(encoded(text))
    seal(folder, but=records.shards(description["files"]))
    for file in folder.iterdir():
        sync(file)
    sync(folder)


def refuse_other_content(out: str | Path, recipe: Recipe) -> None:
    """Looks at what is under `out` before anything is decoded.

    Raises:
      ManifestError: a file, a folder with other things, or a data set prepared otherwise.
      UserError: a name that is not UTF-8.
    """
    out = Path(out)
    check_name(out.absolute())
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / records.DESCRIPTION).is_file():
        raise ManifestError(f"'{out}' exists and is not a prepared data set; name another --out")
    if other := recipe.differences(records.read_description(out)):
        raise ManifestError(
            f"'{out}' was prepared otherwise: {'; '.join(other)}. Name another --out, or delete it"
        )


def _is_there(out: Path, recipe: Recipe, content: list[dict[str, object]]) -> bool:
    refuse_other_content(out, recipe)
    if not (out / records.DESCRIPTION).is_file():
        return False
    there = records.read_description(out)
    if there.get("content") != _digest(content):
        raise ManifestError(
            f"'{out}' was prepared from other rows or recordings ({there.get('rows')} of "
            f"'{there.get('manifest')}'; now {len(content)}); name another --out, or delete it"
        )
    records.check_files(out, there)
    return True


def summary(dataset: AudioDataset) -> str:
    """Recordings by label (lines) and split (columns)."""
    splits = [split for split in SPLITS if split in dataset.splits()]
    labels = Counter((row.label or "(none)", row.split) for row in dataset.rows)
    names = sorted({label for label, _ in labels})
    lines = [["label", *splits, "all"]]
    for name in names:
        counts = [labels[name, split] for split in splits]
        lines.append([name, *map(str, counts), str(sum(counts))])
    totals = [dataset.splits()[split] for split in splits]
    lines.append(["all", *map(str, totals), str(sum(totals))])
    wide = max(len(line[0]) for line in lines)
    return "\n".join(f"{line[0]:<{wide}}" + "".join(f"{c:>8}" for c in line[1:]) for line in lines)


def _progress(what: str) -> Callable[[int, int], None]:
    terminal = sys.stderr.isatty()

    def show(done: int, total: int) -> None:
        if terminal and (done % 16 == 0 or done == total):
            end = "\n" if done == total else ""
            print(f"\r{what} {done}/{total}", end=end, file=sys.stderr, flush=True)

    return show


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = commands.ArgumentParser(prog="medalign prepare",
                                     description=__doc__.split("\n")[0])  # fmt: skip
    parser.add_argument("--manifest", required=True, help="CSV, JSONL or Parquet file")
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--targets", default="", help="further columns to keep: a,b")
    for name, default, text in (
        ("--max_bad_fraction", 0.01, "share of rows that may be unusable"),
        ("--max_seconds", MAX_SECONDS, "what is kept of a longer recording"),
        ("--sample_rate", 16_000, "Hz, of the prepared audio"),
    ):
        help_text = f"{text} (default {default})"
        parser.add_argument(name, type=type(default), default=default, help=help_text)
    text = "also take rows without report and metadata, to pre-train on"
    parser.add_argument("--allow_no_report", action="store_true", help=text)
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    """Checks, prints and writes.

    Raises:
      UserError: see `open_dataset` and `write_records`.
    """
    targets = tuple(name.strip() for name in arguments.targets.split(",") if name.strip())
    recipe = Recipe(arguments.sample_rate, arguments.max_seconds, targets)
    out = Path(arguments.out)
    refuse_other_content(out, recipe)
    dataset = open_dataset(
        arguments.manifest,
        targets=targets,
        max_seconds=arguments.max_seconds,
        sample_rate=arguments.sample_rate,
        max_bad_fraction=arguments.max_bad_fraction,
        reports_required=not arguments.allow_no_report,
        progress=_progress("checked"),
    )
    if dataset.problems:
        print(problem_table(dataset.problems, limit=LINES_IN_MESSAGE), end="\n\n")
    print(summary(dataset), end="\n\n")
    if write_records(dataset, recipe, arguments.manifest, out, _progress("written")):
        print(f"{len(dataset)} recordings written to '{out}'")
    else:
        print(f"'{out}' holds this data set already; nothing to do")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    arguments = _arguments(argv)
    return commands.ended(
        lambda: run(arguments),
        lambda error: list_problems(getattr(error, "problems", ()), arguments.out),
        given=arguments,
    )
