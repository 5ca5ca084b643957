"""What the command `evaluate` is given to measure: encoders, and embeddings made elsewhere.

workdirs/mine                              a run's workdir, or its export
whisper=openai/whisper-base                published weights, with the encoder's name
whisper=DIR#pooling=mean_std,layer=3       the same read otherwise, see `models.layers.pooling`
theirs.parquet, theirs.csv                 embeddings, joined to the manifest by audio_path
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from medalign_jax.core.errors import UserError
from medalign_jax.core.words import did_you_mean
from medalign_jax.data.recordings.manifest import COLUMNS, Problem, Row, rows_of_table
from medalign_jax.data.tables import Table, renamed
from medalign_jax.encoder import Encoder, check_encoder, load_encoder
from medalign_jax.evaluate.embedding_table import SUFFIXES, EmbeddingTable, read_table
from medalign_jax.evaluate.stages import BASELINE_STAGES, MINUS, RANDOM
from medalign_jax.models import ENCODERS
from medalign_jax.models.layers.pooling import POOLINGS

_OPTIONS = ("pooling", "layer")


@dataclasses.dataclass(frozen=True)
class Source:
    """One thing to measure.

    Attributes:
      name: of its stage.
      path: weights, or a table of embeddings.
      encoder: name in `models.ENCODERS`; None where the weights say it.
      options: of `load_encoder`.
    """

    name: str
    path: str
    encoder: str | None
    options: Mapping[str, str | int]

    @property
    def is_table(self) -> bool:
        """Whether these are embeddings and not an encoder."""
        return self.path.lower().endswith(SUFFIXES)

    def check(self) -> None:
        """Refuses what `load` would refuse, from settings, names and shapes.

        Raises:
          UserError: naming the source.
        """
        try:
            check_encoder(self.encoder, self.path, **self.options)
        except UserError as error:
            raise UserError(f"--encoder {self.path}: {error}") from error

    def load(self, mesh: Mesh | None) -> Encoder:
        """The encoder."""
        return load_encoder(self.encoder, self.path, mesh, **self.options)


def sources_of(texts: Sequence[str]) -> tuple[Source, ...]:
    """Reads the arguments; of those with the same name the second and further ones get a number,
    one that makes no other's name of it.

    Raises:
      UserError: an unknown encoder or option, or a path that is not there.
    """
    given = [_source(text) for text in texts]
    own, taken, found = {source.name for source in given}, set(), []
    for source in given:
        name = source.name
        if name in taken:
            numbered = (f"{source.name} {number}" for number in itertools.count(2))
            name = next(n for n in numbered if n not in own | taken)
        taken.add(name)
        found.append(dataclasses.replace(source, name=name))
    return tuple(found)


def _source(text: str) -> Source:
    text, _, options = text.partition("#")
    encoder, equals, path = text.partition("=")
    if not equals or encoder not in ENCODERS:
        if equals and not Path(text).exists():
            near = did_you_mean(encoder, ENCODERS)
            raise UserError(
                f"--encoder {text}: unknown encoder {encoder!r}{near}; there are "
                f"{', '.join(ENCODERS)}"
            )
        encoder, path = None, text
    local = path.startswith((".", "/", "~")) or path.count("/") != 1
    if not path or (local and not Path(path.partition(":")[0]).expanduser().exists()):
        raise UserError(f"--encoder {text}: there is nothing at '{path}'; check the path")
    parsed = _options(text, options)
    name = stage_name(Path(path))
    shown = ", ".join(str(value) if key == "pooling" else f"layer {value}"
                     for key, value in parsed.items())  # fmt: skip
    return Source(f"{name} ({shown})" if shown else name, path, encoder, parsed)


def stage_name(path: Path) -> str:
    """Of a stage: a run's export is named by its run; a name that means something else is not
    taken."""
    if path.suffix.lower() in SUFFIXES:
        name = path.stem
    else:
        name = path.resolve().parent.name if path.name == "export" else path.name
    name = name.replace(MINUS, "-minus-")
    taken = name in BASELINE_STAGES or name.endswith(RANDOM)
    return f"{name} (given)" if taken else name


def _options(text: str, options: str) -> dict[str, str | int]:
    found: dict[str, str | int] = {}
    for part in filter(None, options.split(",")):
        key, _, value = part.partition("=")
        if key not in _OPTIONS:
            near = did_you_mean(key, _OPTIONS)
            raise UserError(f"--encoder {text}#{options}: unknown option {key!r}{near}")
        if key == "layer" and not value.lstrip("-").isdigit():
            raise UserError(f"--encoder {text}#{options}: layer is a number, not {value!r}")
        if key == "pooling" and value not in POOLINGS:
            near = did_you_mean(value, POOLINGS)
            raise UserError(
                f"--encoder {text}#{options}: unknown pooling {value!r}{near}; there are "
                f"{', '.join(POOLINGS)}"
            )
        found[key] = int(value) if key == "layer" else value
    return found


def read_joinable(path: str) -> EmbeddingTable:
    """A table that can be joined to a manifest.

    Raises:
      UserError: it names no recordings, or one twice.
    """
    table = read_table(path)
    paths = table.columns.get("audio_path")
    if paths is None:
        raise UserError(f"{path} has no column audio_path to join it to the manifest by")
    if (twice := _first_twice(_resolved(paths))) is not None:
        first, second = twice
        raise UserError(
            f"{path} has two embeddings of '{paths[second]}' (its rows {table.numbers[first]} and "
            f"{table.numbers[second]}); keep one"
        )
    return table


def joined(path: str, table: EmbeddingTable, rows: Sequence[Row]) -> np.ndarray:
    """(N, D): a table's embeddings in the order of the manifest's rows.

    Files are matched by path, else by their names where these are unique on both sides.

    Args:
      path: of the table, for messages.
      table: from `read_joinable`.
      rows: of the manifest.

    Raises:
      UserError: a recording without an embedding, or one whose file name another has, by row.
    """
    paths = table.columns["audio_path"]
    places = {p: i for i, p in enumerate(_resolved(paths))}
    order = [places.get(p) for p in _resolved([row.audio_path for row in rows])]
    order = _by_name(path, paths, rows, order)
    for row, place in zip(rows, order, strict=True):
        if place is None:
            raise UserError(
                f"{path} has no embedding of '{row.audio_path}' (row {row.row} of the manifest)"
            )
    return table.embeddings[order]


def _resolved(paths: Sequence[str]) -> list[str]:
    return [str(Path(p).resolve()) for p in paths]


def _by_name(path: str, paths: Sequence[str], rows: Sequence[Row], order: Sequence[int | None]):
    """The order with what has no path in the table found by the file's name."""
    missing = [i for i, place in enumerate(order) if place is None]
    names = [Path(p).name for p in paths]
    if not missing or _first_twice(names) is not None:
        return order
    files = [Path(row.audio_path).name for row in rows]
    rows_of_name: dict[str, list[int]] = {}
    for i, name in enumerate(files):
        rows_of_name.setdefault(name, []).append(i)
    places, found = {name: i for i, name in enumerate(names)}, list(order)
    for i in missing:
        same = rows_of_name[files[i]]
        if files[i] in places and len(same) > 1:
            numbers = " and ".join(str(rows[k].row) for k in same[:2])
            raise UserError(
                f"{path} has one embedding of a file named '{files[i]}', and the manifest's rows "
                f"{numbers} both have that name; write the paths of the manifest into the table's "
                "column audio_path"
            )
        found[i] = places.get(files[i])
    return found


def _first_twice(values: Sequence[str]) -> tuple[int, int] | None:
    """Positions of the first value that comes again."""
    first: dict[str, int] = {}
    for i, value in enumerate(values):
        if first.setdefault(value, i) != i:
            return first[value], i
    return None


def rows_of(
    path: str, table: EmbeddingTable, targets: Sequence[str]
) -> tuple[list[Row], list[Problem]]:
    """Rows as a manifest would have them, from the columns beside the embeddings.

    Args:
      path: of the table, for messages.
      table: what it holds; without a column of paths its rows are called by their numbers.
      targets: columns to keep.

    Returns:
      Rows, numbered as in the file, and what is wrong with the others, those without an embedding
      among them.

    Raises:
      ManifestError: as `data.manifest.read_manifest`.
    """
    cells = tuple(
        {name: values[i] for name, values in table.columns.items()}
        for i in range(len(table.numbers))
    )
    known = renamed(Path(path), Table(tuple(table.columns), cells), COLUMNS)
    columns = tuple(dict.fromkeys(("audio_path", *known.columns)))
    records = tuple(
        record | {"audio_path": record.get("audio_path") or f"row {number}"}
        for number, record in zip(table.numbers, known.records, strict=True)
    )
    read = Table(columns, records)
    rows, problems = rows_of_table(Path(path), read, targets, numbers=table.numbers)
    return rows, [*table.problems, *problems]
