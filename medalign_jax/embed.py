"""``python -m medalign_jax.embed --checkpoint=WORKDIR FILES... --out=embeddings.parquet``.

Embeds any number of recordings. Files are decoded ahead in threads and stream through; memory does
not grow with their number. Files that cannot be read are named, with the reason, and their rows
hold no embedding.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from medalign_jax.audio import io
from medalign_jax.encoder import Encoder, load_encoder
from medalign_jax.errors import UserError
from medalign_jax.files import writing_whole
from medalign_jax.locks import held
from medalign_jax.train.progress import Progress

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
_AHEAD = 16  # files decoded ahead of the encoder
_ROW_GROUP = 512  # rows written at a time

_SCHEMA = pa.schema(
    [
        ("audio_path", pa.string()),
        ("seconds", pa.float64()),
        ("embedding", pa.list_(pa.float32())),
        ("problem", pa.string()),
    ]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 1 if any file could not be embedded."""
    arguments = _parser().parse_args(argv)
    try:
        files = expand(arguments.files)
        encoder = load_encoder(arguments.encoder, arguments.checkpoint)
        problems = embed_files(encoder, files, Path(arguments.out), arguments.max_seconds)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(files) - problems} embeddings of {encoder.width} numbers in {arguments.out}")
    if problems:
        print(f"{problems} files could not be embedded; column 'problem' says why")
    return 1 if problems else 0


def embed_files(
    encoder: Encoder, files: Sequence[Path], out: Path, max_seconds: float | None = None
) -> int:
    """Embeds files into a Parquet table, in their order; appears under its name when whole.

    Args:
      encoder: what embeds them.
      files: recordings.
      out: table with audio_path, seconds, embedding (list of float32) and problem.
      max_seconds: what is read of a longer recording; None reads all of it.

    Returns:
      The number of files without an embedding.

    Raises:
      LockedError: another process writes the table.
    """
    progress = Progress(len(files), "embedding", "file")
    notes: deque[tuple[str, float, str | None]] = deque()
    problems = 0

    def readable() -> Iterator[tuple[np.ndarray, int]]:
        for path, waveform, problem in _read_ahead(files, encoder.sample_rate, max_seconds):
            seconds = len(waveform) / encoder.sample_rate if problem is None else 0.0
            notes.append((str(path), seconds, problem))
            if problem is None:
                yield waveform, encoder.sample_rate

    with (
        held(out, folder=False, advice="name another --out"),
        writing_whole(out) as temporary,
        pq.ParquetWriter(temporary, _SCHEMA) as writer,
    ):
        rows: list[dict] = []
        for vector in _aligned(encoder.stream(readable()), notes):
            path, seconds, problem = notes.popleft()
            if problem is not None:
                problems += 1
                progress.say(f"{path}: {problem}")
            rows.append(
                {"audio_path": path, "seconds": seconds, "embedding": vector, "problem": problem}
            )
            progress.advance()
            if len(rows) >= _ROW_GROUP:
                writer.write_table(pa.Table.from_pylist(rows, _SCHEMA))
                rows = []
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, _SCHEMA))
    progress.close()
    return problems


def _aligned(vectors: Iterable[np.ndarray], notes: deque) -> Iterator[list[float] | None]:
    """One item a file, in order: its vector, or None where it could not be read."""
    for vector in vectors:
        while notes[0][2] is not None:
            yield None
        yield vector.tolist()
    while notes:
        yield None


def _read_ahead(
    files: Sequence[Path], sample_rate: int, max_seconds: float | None
) -> Iterator[tuple[Path, np.ndarray, str | None]]:
    """(file, waveform, None) or (file, empty, reason), in order, a few files ahead."""

    def read(path: Path) -> tuple[Path, np.ndarray, str | None]:
        try:
            waveform = io.read(path, sample_rate, max_seconds)
            io.check_waveform(waveform, path)
            return path, waveform, None
        except io.AudioError as error:
            return path, np.zeros(0, np.float32), str(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting = deque(pool.submit(read, path) for path in files[:_AHEAD])
        for path in [*files[_AHEAD:], *[None] * len(waiting)]:
            yield waiting.popleft().result()
            if path is not None:
                waiting.append(pool.submit(read, path))


def expand(arguments: Iterable[str]) -> list[Path]:
    """Files as given; a folder stands for the recordings in it, sorted.

    Raises:
      UserError: a path that does not exist, or a folder without recordings.
    """
    files = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
            if not found:
                raise UserError(f"{path} holds no recording ({', '.join(SUFFIXES)})")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    return files


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m medalign_jax.embed", description="Embeds recordings into a Parquet table."
    )
    parser.add_argument("files", nargs="+", help="recordings, or folders of them")
    parser.add_argument(
        "--checkpoint", required=True, help="workdir of a run, its export folder, or weights"
    )
    parser.add_argument("--encoder", help="name of the encoder, for weights that do not say it")
    parser.add_argument("--out", default="embeddings.parquet", help="table to write")
    parser.add_argument("--max_seconds", type=float, help="read no more of a recording")
    return parser


if __name__ == "__main__":
    sys.exit(main())
