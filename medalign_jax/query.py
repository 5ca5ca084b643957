"""``medalign query --checkpoint=WORKDIR FILES...``: what recordings sound like, in words.

Prints for each recording the nearest training reports, or with --text how near words of your own
are; with --index the recordings of a table of embeddings that are most like it. Several recordings
are ordered by each text as well: search by words over a folder. Numbers are cosines, to be compared
with each other and not across models; they are not a diagnosis.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from medalign_jax.core import commands
from medalign_jax.core.errors import UserError
from medalign_jax.core.files import printable
from medalign_jax.encoder import Encoder, load_encoder
from medalign_jax.search.common_space import CommonSpace, load_space
from medalign_jax.search.files import Embedded, Item, embedded, named_items
from medalign_jax.search.index import EmbeddingIndex, Hit


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 1 if any file could not be embedded."""
    arguments = _parser().parse_args(argv)
    return commands.ended(lambda: _run(arguments), given=arguments)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.count < 1:
        raise UserError(f"--count is {arguments.count}; ask for 1 or more")
    if arguments.index and (arguments.text or arguments.teacher):
        raise UserError("--index compares recordings with recordings: leave out --text, --teacher")
    if arguments.encoder and not arguments.index:
        raise UserError("--encoder goes with --index; the export of a run says which it is")
    items = named_items(arguments.files, arguments.manifest)
    return (_by_example if arguments.index else _in_words)(arguments, items)


def _by_example(arguments: argparse.Namespace, items: Sequence[Item]) -> int:
    index = EmbeddingIndex.read(arguments.index)
    encoder = load_encoder(arguments.encoder, arguments.checkpoint)
    heard = _heard(encoder, items, arguments.max_seconds)
    if heard:
        _show(arguments, _similar(index, heard, arguments.count))
    return int(len(heard) < len(items))


def _in_words(arguments: argparse.Namespace, items: Sequence[Item]) -> int:
    space = load_space(arguments.checkpoint, teacher=arguments.teacher)
    texts = space.embed_texts(arguments.text) if arguments.text else None  # fails before files
    heard = _heard(space.encoder, items, arguments.max_seconds)
    if heard:
        sounds = space.meeting.sounds(np.stack([each.vector for each in heard]))
        if texts is None:
            _show(arguments, _reports(space, heard, sounds, arguments.count))
        else:
            _show(arguments, _compared(heard, sounds @ texts.T, arguments.text))
            _order(arguments, heard, sounds @ texts.T)
    return int(len(heard) < len(items))


def _heard(encoder: Encoder, items: Sequence[Item], max_seconds: float | None) -> list[Embedded]:
    """The recordings that could be embedded; of the others the reason is printed."""
    heard = []
    for each in embedded(encoder, items, max_seconds):
        if each.problem is None:
            heard.append(each)
        else:
            print(f"error: {each.problem}", file=sys.stderr)
    return heard


@dataclasses.dataclass(frozen=True)
class _Near:
    """What is near: a report, a text or a recording (`kind`), and what else is known of it."""

    similarity: float
    kind: str
    what: str
    more: Mapping[str, str] = dataclasses.field(default_factory=dict)


_Rows = list[tuple[Embedded, list[_Near]]]  # best first


def _similar(index: EmbeddingIndex, heard: Sequence[Embedded], count: int) -> _Rows:
    hits = index.similar(np.stack([each.vector for each in heard]), count)
    return [
        (each, [_Near(hit.similarity, "recording", hit.path, _told(hit)) for hit in best])
        for each, best in zip(heard, hits, strict=True)
    ]


def _told(hit: Hit) -> dict[str, str]:
    return {name: cell for name, cell in hit.columns.items() if cell and name != "seconds"}


def _reports(
    space: CommonSpace, heard: Sequence[Embedded], sounds: np.ndarray, count: int
) -> _Rows:
    return [
        (each, [_Near(near.similarity, "report", near.text) for near in nearest])
        for each, nearest in zip(heard, space.nearest(sounds, count), strict=True)
    ]


def _compared(heard: Sequence[Embedded], cosines: np.ndarray, texts: Sequence[str]) -> _Rows:
    return [
        (each, [_Near(float(row[m]), "text", texts[m]) for m in np.argsort(-row, kind="stable")])
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


def _show(arguments: argparse.Namespace, rows: _Rows) -> None:
    for each, nearest in rows:
        name = printable(each.item.path)
        if arguments.json:
            near = [{"similarity": n.similarity, n.kind: n.what, **n.more} for n in nearest]
            print(json.dumps({"recording": name, "near": near}, ensure_ascii=False))
            continue
        print(name)
        for n in nearest:
            more = "".join(f", {column} {cell}" for column, cell in n.more.items())
            print(f"  {n.similarity:+.3f}  {n.what}{more}")


def _parser() -> argparse.ArgumentParser:
    parser = commands.ArgumentParser(
        prog="medalign query",
        description="What recordings sound like: reports, your own words, or recordings.",
    )
    parser.add_argument("files", nargs="*", help="recordings, or folders of them")
    parser.add_argument("--manifest", help="table of recordings (audio_path) in place of files")
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="workdir or export of an AcuLa run; weights, with --index",
    )
    parser.add_argument("--encoder", help="its name, with --index, where weights do not say it")
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
