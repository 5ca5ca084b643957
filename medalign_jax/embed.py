"""``python -m medalign_jax.embed --checkpoint=WORKDIR FILES... --out=embeddings.parquet``.

Embeds any number of recordings, named one by one, by their folder or by a manifest, whose other
columns (labels, subjects) then stand beside the embeddings. Files are decoded ahead in threads and
stream through; memory does not grow with their number. Files that cannot be read are named, with
the reason, and their rows hold no embedding.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from medalign_jax.core import commands
from medalign_jax.core.files import printable
from medalign_jax.core.locks import held
from medalign_jax.core.progress import Progress
from medalign_jax.encoder import Encoder, load_encoder
from medalign_jax.evaluate.embedding_writer import TableWriter
from medalign_jax.search.files import Item, embedded, named_items


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 1 if any file could not be embedded."""
    arguments = _parser().parse_args(argv)
    return commands.ended(lambda: _run(arguments), given=arguments)


def _run(arguments: argparse.Namespace) -> int:
    try:
        return _embedded(arguments)
    except KeyboardInterrupt as stop:
        words = f"{arguments.out} was not written; the same command begins again"
        raise type(stop)(words) from None


def _embedded(arguments: argparse.Namespace) -> int:
    items = named_items(arguments.files, arguments.manifest)
    TableWriter.check(Path(arguments.out))
    encoder = load_encoder(arguments.encoder, arguments.checkpoint)
    problems = embed_files(encoder, items, Path(arguments.out), arguments.max_seconds)
    print(f"{len(items) - problems} embeddings of {encoder.width} numbers in {arguments.out}")
    if problems:
        print(f"{problems} files could not be embedded; column 'problem' says why")
    return 1 if problems else 0


def embed_files(
    encoder: Encoder,
    files: Sequence[Path | Item],
    out: Path,
    max_seconds: float | None = None,
) -> int:
    """Embeds files into a table, in their order; appears under its name when whole.

    Args:
      encoder: what embeds them.
      files: recordings.
      out: table with audio_path, seconds, embedding and problem, and the columns beside: Parquet
        (a list of float32 per embedding), or by its ending CSV (one column per number) or .npz.
      max_seconds: what is read of a longer recording; None reads all of it.

    Returns:
      The number of files without an embedding.

    Raises:
      UserError: a table of another kind, or another process writes it.
    """
    items = [file if isinstance(file, Item) else Item(file) for file in files]
    beside = tuple(dict.fromkeys(name for item in items for name in item.beside))
    progress = Progress(len(items), "embedding", "file")
    problems = 0
    with (
        held(out, folder=False, advice="name another --out"),
        TableWriter(out, encoder.width, beside) as table,
    ):
        for found in embedded(encoder, items, max_seconds):
            if found.problem is not None:
                problems += 1
                progress.say(found.problem)
            own = {
                "audio_path": printable(found.item.path),
                "seconds": found.seconds,
                "problem": found.problem,
                "embedding": found.vector,
            }
            table.add(own | dict(found.item.beside))
            progress.advance()
    progress.close()
    return problems


def _parser() -> argparse.ArgumentParser:
    parser = commands.ArgumentParser(
        prog="medalign embed", description="Embeds recordings into a table."
    )
    parser.add_argument("files", nargs="*", help="recordings, or folders of them")
    parser.add_argument(
        "--manifest", help="table of recordings (audio_path), whose other columns come along"
    )
    parser.add_argument(
        "--checkpoint", required=True, help="workdir of a run, its export folder, or weights"
    )
    parser.add_argument("--encoder", help="name of the encoder, for weights that do not say it")
    parser.add_argument(
        "--out", default="embeddings.parquet", help="table to write: .parquet, .csv or .npz"
    )
    parser.add_argument("--max_seconds", type=commands.seconds, help="read no more of a recording")
    return parser


if __name__ == "__main__":
    sys.exit(main())
