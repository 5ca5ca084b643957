"""``medalign query --checkpoint=WORKDIR FILES...``: what recordings sound like, in words.

Prints for each recording the nearest training reports, or with --text how near words of your own
are; with --index the recordings of a table of embeddings that are most like it. Several recordings
are ordered by each text as well: search by words over a folder. Numbers are cosines, to be compared
with each other and not across models; they are not a diagnosis.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from medalign_jax.core import commands
from medalign_jax.core.errors import UserError
from medalign_jax.core.files import printable
from medalign_jax.encoder import load_encoder
from medalign_jax.search.common_space import CommonSpace, load_space
from medalign_jax.search.files import Embedded, embedded, named_items
from medalign_jax.search.index import EmbeddingIndex


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 1 if any file could not be embedded."""
    arguments = _parser().parse_args(argv)
    return commands.ended(lambda: _run(arguments), given=arguments)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.count < 1:
        raise UserError(f"--count is {arguments.count}; ask for 1 or more")
    if arguments.index and (arguments.text or arguments.teacher):
        raise UserError("--index compares recordings with recordings: leave out --text, --teacher")
    items = named_items(arguments.files, arguments.manifest)
    index = EmbeddingIndex.read(arguments.index) if arguments.index else None
    space = None
    if index is None:
        space = load_space(arguments.checkpoint, teacher=arguments.teacher)
        texts = space.embed_texts(arguments.text) if arguments.text else None  # fails before files
    encoder = load_encoder(None, arguments.checkpoint) if space is None else space.encoder
    found = list(embedded(encoder, items, arguments.max_seconds))
    heard = [each for each in found if each.vector is not None]
    for each in found:
        if each.problem is not None:
            print(f"error: {each.problem}", file=sys.stderr)
    if heard and space is None:
        _show(arguments, _similar(index, heard, arguments.count))
    elif heard:
        sounds = space.meeting.sounds(np.stack([each.vector for each in heard]))
        if texts is None:
            _show(arguments, _reports(space, heard, sounds, arguments.count))
        else:
            _show(arguments, _compared(heard, sounds @ texts.T, arguments.text))
            _order(arguments, heard, sounds @ texts.T)
    return 1 if len(heard) < len(found) else 0


Rows = list[tuple[str, list[dict[str, Any]]]]  # recording -> what is near it, best first


def _similar(index: EmbeddingIndex, heard: Sequence[Embedded], count: int) -> Rows:
    rows = []
    hits = index.similar(np.stack([each.vector for each in heard]), count)
    for each, best in zip(heard, hits, strict=True):
        near = [
            {"similarity": hit.similarity, "recording": hit.path}
            | {name: cell for name, cell in hit.columns.items() if cell and name != "seconds"}
            for hit in best
        ]
        rows.append((printable(each.item.path), near))
    return rows


def _reports(space: CommonSpace, heard: Sequence[Embedded], sounds: np.ndarray, count: int) -> Rows:
    return [
        (
            printable(each.item.path),
            [{"similarity": near.similarity, "report": near.text} for near in nearest],
        )
        for each, nearest in zip(heard, space.nearest(sounds, count), strict=True)
    ]


def _compared(heard: Sequence[Embedded], cosines: np.ndarray, texts: Sequence[str]) -> Rows:
    return [
        (
            printable(each.item.path),
            [{"similarity": float(row[m]), "text": texts[m]} for m in np.argsort(-row)],
        )
        for each, row in zip(heard, cosines, strict=True)
    ]


def _order(arguments: argparse.Namespace, heard: Sequence[Embedded], cosines: np.ndarray) -> None:
    """For each text the recordings that are nearest to it, where there are several."""
    if arguments.json or len(heard) < 2:
        return
    for m, text in enumerate(arguments.text):
        print(f"\nnearest to '{text}':")
        for n in np.argsort(-cosines[:, m], kind="stable")[: arguments.count]:
            print(f"  {cosines[n, m]:+.3f}  {printable(heard[n].item.path)}")


def _show(arguments: argparse.Namespace, rows: Rows) -> None:
    for name, near in rows:
        if arguments.json:
            print(json.dumps({"recording": name, "near": near}, ensure_ascii=False))
            continue
        print(name)
        for each in near:
            similarity, first, *_ = each.values()
            more = "".join(f", {k} {v}" for k, v in list(each.items())[2:])
            print(f"  {similarity:+.3f}  {first}{more}")


def _parser() -> argparse.ArgumentParser:
    parser = commands.ArgumentParser(
        prog="medalign query",
        description="What recordings sound like: reports, your own words, or recordings.",
    )
    parser.add_argument("files", nargs="*", help="recordings, or folders of them")
    parser.add_argument("--manifest", help="table of recordings (audio_path) in place of files")
    parser.add_argument(
        "--checkpoint", required=True, help="workdir of an AcuLa run, or its export folder"
    )
    parser.add_argument(
        "--text", nargs="+", default=[], help="words to compare with, in place of training reports"
    )
    parser.add_argument("--index", help="table of `medalign embed`: find similar recordings in it")
    parser.add_argument("--teacher", help="where the language model is, if not where it was")
    parser.add_argument("--count", type=int, default=3, help="how many are shown (3)")
    parser.add_argument("--max_seconds", type=commands.seconds, help="read no more of a recording")
    parser.add_argument("--json", action="store_true", help="one JSON object per recording")
    return parser


if __name__ == "__main__":
    sys.exit(main())
