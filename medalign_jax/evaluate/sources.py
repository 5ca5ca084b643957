"""What the command `evaluate` is given to measure: encoders, and embeddings made elsewhere.

workdirs/mine                              a run's workdir, or its export
whisper=openai/whisper-base                published weights, with the encoder's name
whisper=DIR#pooling=mean_std,layer=3       the same read otherwise, see `models.pooling`
theirs.parquet                             embeddings, joined to the manifest by audio_path
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from medalign_jax.data.manifest import Row
from medalign_jax.data.tables import did_you_mean
from medalign_jax.encoder import Encoder, load_encoder
from medalign_jax.errors import UserError
from medalign_jax.evaluate.embedding_table import EmbeddingTable, read_table
from medalign_jax.models import ENCODERS
from medalign_jax.models.pooling import POOLINGS

_OPTIONS = ("pooling", "layer")


@dataclasses.dataclass(frozen=True)
class Source:
    """One thing to measure.

    Attributes:
      name: Of its stage.
      path: Weights, or a table of embeddings.
      encoder: Name in `models.ENCODERS`; None where the weights say it.
      options: Of `load_encoder`.
    """

    name: str
    path: str
    encoder: str | None
    options: Mapping[str, str | int]

    @property
    def is_table(self) -> bool:
        """Whether these are embeddings and not an encoder."""
        return self.path.endswith((".parquet", ".pq"))

    def load(self, mesh: Mesh | None) -> Encoder:
        """The encoder."""
        return load_encoder(self.encoder, self.path, mesh, **self.options)


def sources_of(texts: Sequence[str]) -> tuple[Source, ...]:
    """Reads the arguments; what is given twice gets a number.

    Raises:
      UserError: an unknown encoder or option, or a path that is not there.
    """
    found, names = [], {}
    for text in texts:
        source = _source(text)
        names[source.name] = count = names.get(source.name, 0) + 1
        found.append(
            source if count == 1 else dataclasses.replace(source, name=f"{source.name} {count}")
        )
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
    name = _name(Path(path))
    told = ", ".join(str(value) if key == "pooling" else f"layer {value}"
                     for key, value in parsed.items())  # fmt: skip
    return Source(f"{name} ({told})" if told else name, path, encoder, parsed)


def _name(path: Path) -> str:
    """Of the stage: a run's export is named by its run."""
    if path.suffix in (".parquet", ".pq"):
        return path.stem
    return path.resolve().parent.name if path.name == "export" else path.name


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


def joined(path: str, rows: Sequence[Row]) -> np.ndarray:
    """(N, D): the table's embeddings in the order of the manifest's rows.

    Files are matched by path, else by their names where these are unique.

    Raises:
      UserError: a recording without an embedding, by row.
    """
    table = read_table(path)
    paths = table.columns.get("audio_path")
    if paths is None:
        raise UserError(f"{path} has no column audio_path to join it to the manifest by")
    places = {str(Path(p).resolve()): i for i, p in enumerate(paths)}
    names = {Path(p).name: i for i, p in enumerate(paths)}
    unique = len(names) == len(paths)
    order = []
    for row in rows:
        place = places.get(str(Path(row.audio_path).resolve()))
        if place is None and unique:
            place = names.get(Path(row.audio_path).name)
        if place is None:
            raise UserError(
                f"{path} has no embedding of '{row.audio_path}' (row {row.row} of the manifest)"
            )
        order.append(place)
    return table.embeddings[order]


def rows_of(table: EmbeddingTable, columns: Sequence[str]) -> list[Row]:
    """Rows as a manifest would have them, from the columns beside the embeddings."""
    count = len(table.embeddings)
    empty = ("",) * count

    def column(name: str) -> tuple[str, ...]:
        return table.columns.get(name, empty)

    targets = [name for name in columns if name in table.columns]
    return [
        Row(
            row=i + 1,
            audio_path=column("audio_path")[i],
            subject_id=column("subject_id")[i] or column("audio_path")[i] or f"row {i + 1}",
            split=column("split")[i] or "train",
            label=column("label")[i] or None,
            targets={name: table.columns[name][i] for name in targets if table.columns[name][i]},
            metadata={},
            report=None,
        )
        for i in range(count)
    ]
