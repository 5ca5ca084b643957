"""Recordings as commands name them: files, folders, manifests; read ahead, embedded in order."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from medalign_jax.audio import io
from medalign_jax.audio.containers import CONVERT
from medalign_jax.core.errors import UserError
from medalign_jax.core.files import printable
from medalign_jax.core.local_paths import place_of
from medalign_jax.data.recordings.manifest import COLUMNS
from medalign_jax.data.tables import SUFFIXES as TABLES
from medalign_jax.data.tables import BadRecord, read_table
from medalign_jax.encoder import NOT_FINITE, Encoder
from medalign_jax.evaluate.embedding_writer import OWN_COLUMNS

SUFFIXES = (".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".mp2", ".aif", ".aiff",
            ".aifc", ".au", ".w64", ".rf64", ".caf")  # fmt: skip
"""What is taken from a folder."""

UNREADABLE = (".m4a", ".m4b", ".mp4", ".aac", ".webm", ".wma", ".amr", ".3gp", ".mka", ".mov",
              ".ape", ".wv", ".ra", ".voc", ".dsf")  # fmt: skip
"""Recordings in a folder that `audio.io` cannot read: named, not passed over."""

_AHEAD = 16  # files decoded ahead of the encoder


@dataclasses.dataclass(frozen=True)
class Item:
    """A recording to embed.

    Attributes:
      path: its file.
      beside: columns of the table that it is given.
      problem: why it cannot be embedded, known before it is opened; None if nothing is.
    """

    path: Path
    beside: Mapping[str, str] = dataclasses.field(default_factory=dict)
    problem: str | None = None


@dataclasses.dataclass(frozen=True)
class Embedded:
    """A recording and what came of it.

    Attributes:
      item: the recording.
      seconds: how long what was read of it is.
      vector: (D,), or None where it could not be embedded.
      problem: why it could not, or None.
    """

    item: Item
    seconds: float
    vector: np.ndarray | None
    problem: str | None


def embedded(
    encoder: Encoder, items: Sequence[Item], max_seconds: float | None = None
) -> Iterator[Embedded]:
    """Embeds recordings in their order; memory does not grow with their number.

    Args:
      encoder: what embeds them.
      items: recordings.
      max_seconds: what is read of a longer recording; None reads all of it.
    """
    notes: deque[tuple[Item, float, str | None]] = deque()

    def readable() -> Iterator[tuple[np.ndarray, int]]:
        for item, waveform, problem in _read_ahead(items, encoder.sample_rate, max_seconds):
            seconds = len(waveform) / encoder.sample_rate if problem is None else 0.0
            notes.append((item, seconds, problem))
            if problem is None:
                yield waveform, encoder.sample_rate

    for vector in _aligned(encoder.stream(readable()), notes):
        item, seconds, problem = notes.popleft()
        if vector is not None and not np.isfinite(vector).all():
            vector, problem = None, f"{printable(item.path)}: {NOT_FINITE}"
        yield Embedded(item, seconds, vector, problem)


def _aligned(vectors: Iterable[np.ndarray], notes: deque) -> Iterator[np.ndarray | None]:
    """One item per file, in order: its vector, or None where it could not be read."""
    for vector in vectors:
        while notes[0][2] is not None:
            yield None
        yield vector
    while notes:
        yield None


def _read_ahead(
    items: Sequence[Item], sample_rate: int, max_seconds: float | None
) -> Iterator[tuple[Item, np.ndarray, str | None]]:
    """(item, waveform, None) or (item, empty, reason), in order, a few files ahead."""

    def read(item: Item) -> tuple[Item, np.ndarray, str | None]:
        nothing = np.zeros(0, np.float32)
        if item.problem is not None:
            return item, nothing, item.problem
        try:
            waveform = io.read(item.path, sample_rate, max_seconds)
            io.check_waveform(waveform, item.path)
            return item, waveform, None
        except io.AudioError as error:
            return item, nothing, str(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting = deque(pool.submit(read, item) for item in items[:_AHEAD])
        for item in [*items[_AHEAD:], *[None] * len(waiting)]:
            yield waiting.popleft().result()
            if item is not None:
                waiting.append(pool.submit(read, item))


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def expand(arguments: Iterable[str], say: Callable[[str], None] = _say) -> list[Path]:
    """Files as given; a folder stands for the recordings in it, sorted.

    Args:
      arguments: paths of files and folders.
      say: takes a line on what a folder holds that is left out: what macOS leaves beside files
        (``._x.wav``, ``__MACOSX``), and recordings of a kind that cannot be read.

    Raises:
      UserError: a path that does not exist, a table, or a folder without recordings.
    """
    files = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            files += _recordings(path, say)
        elif path.exists():
            if path.suffix.lower() in TABLES:
                raise UserError(
                    f"{printable(path)} is a table; give a table of recordings as --manifest"
                )
            files.append(path)
        else:
            raise UserError(f"{printable(path)}: no such file or folder")
    return files


def _recordings(folder: Path, say: Callable[[str], None]) -> list[Path]:
    """The recordings in a folder and the folders in it."""
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES + UNREADABLE)
    left = [
        p for p in found if p.name.startswith("._") or "__MACOSX" in p.relative_to(folder).parts
    ]
    other = [p for p in found if p not in set(left) and p.suffix.lower() in UNREADABLE]
    kept = [p for p in found if p not in {*left, *other}]
    notes = []
    if left:
        notes.append(f"{len(left)} files that macOS left beside others (._*, __MACOSX)")
    if other:
        kinds = Counter(path.suffix.lower() for path in other)
        which = ", ".join(f"{count} {suffix}" for suffix, count in sorted(kinds.items()))
        notes.append(
            f"{len(other)} recordings that cannot be read ({which}; the first is "
            f"{printable(other[0])}): {CONVERT}"
        )
    if not kept:
        but = f", but {' and '.join(notes)}" if notes else ""
        raise UserError(f"{printable(folder)} holds no recording ({', '.join(SUFFIXES)}){but}")
    for note in notes:
        say(f"{printable(folder)}: left out are {note}")
    return kept


def read_items(path: str | Path, say: Callable[[str], None] = _say) -> list[Item]:
    """The recordings of a manifest, with all of its other columns beside them, as text.

    Args:
      path: CSV, JSONL or Parquet with the column `audio_path`, as `data.manifest` reads it.
      say: takes a line on cells and columns that are left out.

    Raises:
      ManifestError: the file is not such a table.
    """
    table = read_table(path, "audio_path", COLUMNS)
    carried = [name for name in table.columns if name and name not in OWN_COLUMNS]
    if own := sorted(set(table.columns) & set(OWN_COLUMNS) - {"audio_path"}):
        say(f"{path}: columns {', '.join(own)} are left out: the table has its own")
    items, bad = [], Counter()
    for number, record in enumerate(table.records, start=1):
        whole = not isinstance(record, BadRecord)
        cells = record if whole else record.cells
        name = cells.get("audio_path", "").strip()
        problem = None
        if not whole and record.column in ("", "audio_path"):
            problem = f"row {number}: {record.reason}"
        elif not name:
            problem = f"row {number}: no audio_path"
        elif not whole:
            bad[record.column] += 1
        beside = {column: cells.get(column, "") for column in carried}
        items.append(Item(Path(place_of(Path(path).parent, name)), beside, problem))
    for column, count in bad.items():
        say(f"{path}: column '{column}' holds no text in {count} rows, which are empty there")
    return items


def named_items(files: Sequence[str], manifest: str | None) -> list[Item]:
    """The recordings that a command names one way or the other.

    Raises:
      UserError: in both ways, in neither, or what is named is not there.
    """
    if bool(files) == bool(manifest):
        raise UserError("name the recordings: files and folders, or --manifest, not both")
    if manifest:
        return read_items(manifest)
    return [Item(path) for path in expand(files)]
