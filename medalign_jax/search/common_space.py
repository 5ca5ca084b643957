"""Where sounds and words meet: an aligned encoder, and what else it takes to compare the two.

    space = load_space("workdirs/acula_demo")
    space.nearest_reports(waveforms, 16_000, count=3)
    space.compare(waveforms, 16_000, ["a systolic murmur", "no murmur"])

An AcuLa run exports beside the encoder its projection heads and whitening, if any, the map that was
fitted on its training pairs (`evaluate.retrieval.fit_map`), and the training reports with their
vectors: the nearest of these are found without the language model, which is loaded when it is first
asked for other words. `REPORTS_FILE` holds the reports themselves: leave it behind where they must
not go; then the nearest of them cannot be found.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jax.sharding import Mesh
from safetensors.numpy import save as packed

from medalign_jax.core.errors import UserError
from medalign_jax.core.files import write_text, write_whole
from medalign_jax.core.seals import seal
from medalign_jax.encoder import Encoder, load_encoder, open_encoder
from medalign_jax.evaluate.embedding_table import read_table
from medalign_jax.evaluate.retrieval import MAPS, Map
from medalign_jax.models.layers.heads import ProjectionHead
from medalign_jax.teachers import Teacher, load_teacher
from medalign_jax.teachers.whitening import Whitening
from medalign_jax.weights.load import load
from medalign_jax.weights.source import resolve
from medalign_jax.weights.tables import heads as heads_table

HEADS_FILE = "heads.safetensors"
ARRAYS_FILE = "space.safetensors"
SETTINGS_FILE = "space.json"
REPORTS_FILE = "reports.parquet"
FILES = (ARRAYS_FILE, SETTINGS_FILE, REPORTS_FILE)

AUDIO, TEXT = "audio_last", "text"  # sides of the heads


class SpaceError(UserError):
    """Sounds and words that cannot be compared."""


@dataclasses.dataclass(frozen=True)
class Heads:
    """Projection heads by side; a side that is not there stays as it is.

    Attributes:
      hidden, out: widths.
      params: side -> parameters of a `ProjectionHead`.
    """

    hidden: int
    out: int
    params: Mapping[str, Any]

    def __call__(self, side: str, x: np.ndarray) -> np.ndarray:
        """(..., D) -> (..., out) float32, or x where the side has no head."""
        if side not in self.params:
            return x
        head = ProjectionHead(self.hidden, self.out, 0.0)
        flat = head.apply({"params": self.params[side]}, x.reshape(-1, x.shape[-1]))
        return np.asarray(flat).reshape(*x.shape[:-1], -1)


@dataclasses.dataclass(frozen=True)
class Nearest:
    """A text near a recording, with the cosine of differences from the training means."""

    text: str
    similarity: float


@dataclasses.dataclass(frozen=True)
class Meeting:
    """What is exported: all that takes embeddings of sounds and of texts into one space.

    Attributes:
      map: fitted on training pairs.
      heads: trained with the encoder, or none.
      whitening: of the language model's vectors, or None.
      reports: U distinct training reports.
      vectors: (U, D) of the reports, in the common space.
      teacher: arguments of `load_teacher`, and "fingerprint" of what they loaded.
      teacher_width: H, of its vectors.
      pairs: how many the map was fitted on.
    """

    map: Map
    heads: Heads
    whitening: Whitening | None
    reports: tuple[str, ...]
    vectors: np.ndarray
    teacher: Mapping[str, Any]
    teacher_width: int
    pairs: int

    def sounds(self, embeddings: np.ndarray) -> np.ndarray:
        """(N, D_a) of the encoder -> (N, D) unit vectors."""
        return _unit(self.map.audio(self.heads(AUDIO, np.asarray(embeddings, np.float32))))

    def texts(self, vectors: np.ndarray) -> np.ndarray:
        """(M, H) of the language model -> (M, D) unit vectors."""
        vectors = np.asarray(vectors, np.float32)
        if self.whitening is not None:
            vectors = self.whitening(vectors)
        return _unit(self.map.text(self.heads(TEXT, vectors)))

    def save(self, folder: Path) -> None:
        """`ARRAYS_FILE`, `SETTINGS_FILE` and `REPORTS_FILE`; the heads have a file of their own."""
        arrays = {
            "map.audio_mean": self.map.audio_mean,
            "map.text_mean": self.map.text_mean,
            "map.matrix": self.map.matrix,
        }
        if self.whitening is not None:
            arrays |= {
                "whitening.mean": self.whitening.mean,
                "whitening.matrix": self.whitening.matrix,
            }
        whole = {k: np.ascontiguousarray(v, np.float32) for k, v in arrays.items()}
        write_whole(folder / ARRAYS_FILE, packed(whole))
        rows = pa.array(list(self.vectors.astype(np.float32)), pa.list_(pa.float32()))
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"report": list(self.reports), "embedding": rows}), sink)
        content = sink.getvalue().to_pybytes()
        write_whole(folder / REPORTS_FILE, content)
        settings = {
            "map": self.map.kind,
            "pairs": self.pairs,
            "heads": {"hidden": self.heads.hidden, "out": self.heads.out},
            "teacher": dict(self.teacher),
            "teacher_width": self.teacher_width,
            "reports_sha256": hashlib.sha256(content).hexdigest(),  # may be left out
        }
        write_text(folder / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")


def remove_space(folder: Path) -> None:
    """What an earlier run of other settings may have left there."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    seal(folder)


class CommonSpace:
    """An encoder whose sounds can be compared with words.

    Attributes:
      encoder: what embeds recordings.
      meeting: what takes them to the words.
    """

    def __init__(self, encoder: Encoder, meeting: Meeting, teacher: Any, mesh: Mesh | None):
        self.encoder, self.meeting = encoder, meeting
        self._source, self._mesh = teacher, mesh

    def __repr__(self) -> str:
        reports = f"{len(self.meeting.reports)} training reports"
        return (
            f"CommonSpace of {self.encoder!r}\nand {self.meeting.teacher['source']}: a "
            f"{self.meeting.map.kind} map fitted on {self.meeting.pairs} pairs, {reports}"
        )

    @functools.cached_property
    def teacher(self) -> Teacher:
        """The language model that the encoder was aligned with, loaded when it is first needed.

        Raises:
          SpaceError: it is another one than that.
        """
        settings = dict(self.meeting.teacher)
        known, source = settings.pop("fingerprint"), settings.pop("source")
        source = source if self._source is None else self._source
        try:
            found = load_teacher(source, self._mesh, **settings)
        except UserError as error:
            raise SpaceError(
                f"the language model that the encoder was aligned with, {source}: {error}; give "
                "its place (teacher=, --teacher)"
            ) from error
        if found.fingerprint != known:
            raise SpaceError(
                f"{source} is not the language model that the encoder was aligned with: weights, "
                "tokeniser or settings differ"
            )
        return found

    def embed(self, waveforms: Sequence[np.ndarray], sample_rate: int) -> np.ndarray:
        """(N, D) unit vectors of recordings; arguments as of `Encoder.embed`."""
        return self.meeting.sounds(self.encoder.embed(waveforms, sample_rate))

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """(M, D) unit vectors of texts, in the same space."""
        return self.meeting.texts(self.teacher.embed(list(texts)))

    def compare(
        self, waveforms: Sequence[np.ndarray], sample_rate: int, texts: Sequence[str]
    ) -> np.ndarray:
        """(N, M) cosines of recordings and texts, of differences from the training means."""
        return self.embed(waveforms, sample_rate) @ self.embed_texts(texts).T

    def nearest_reports(
        self, waveforms: Sequence[np.ndarray], sample_rate: int, count: int = 3
    ) -> list[tuple[Nearest, ...]]:
        """For each recording the nearest training reports, best first; needs no language model."""
        return self.nearest(self.embed(waveforms, sample_rate), count)

    def nearest(self, sounds: np.ndarray, count: int = 3) -> list[tuple[Nearest, ...]]:
        """As `nearest_reports`, of sounds (N, D) that `embed` has brought into the space."""
        if count < 1:
            raise SpaceError(f"count is {count}; ask for at least one report")
        if not self.meeting.reports:
            raise SpaceError(
                f"the training reports ({REPORTS_FILE}) were left out of this export: compare with "
                "texts of your own (compare, --text)"
            )
        cosines = sounds @ _unit(self.meeting.vectors).T
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
        return [
            tuple(Nearest(self.meeting.reports[u], float(row[u])) for u in best)
            for row, best in zip(cosines, order, strict=True)
        ]


def load_space(source: str | Path, *, teacher: Any = None, mesh: Mesh | None = None) -> CommonSpace:
    """The common space that an AcuLa run has exported.

    Args:
      source: workdir of the run, its export folder, or a Hub repository that it was pushed to.
      teacher: where the language model is, if not where it was; as `load_teacher` takes it.
      mesh: to lay parameters out over.

    Raises:
      SpaceError: there is none, or its files do not fit together.
      UserError: what `load_encoder` refuses.
    """
    weights, settings = open_encoder(source)
    there = {name: weights.beside(name) for name in (*FILES, HEADS_FILE)}  # fetched from the Hub
    if not settings or there[SETTINGS_FILE] is None:
        raise SpaceError(
            f"{source} cannot compare sounds with words ({SETTINGS_FILE} is not there): take the "
            "workdir of an AcuLa run that was evaluated (evaluate.enabled=True), without "
            "candidates among its arms and standardised heads"
        )
    encoder = load_encoder(None, source, mesh)
    return CommonSpace(encoder, _read(there[SETTINGS_FILE].parent, encoder.width), teacher, mesh)


def _read(folder: Path, width: int) -> Meeting:
    path = folder / SETTINGS_FILE
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        hidden, out = (int(settings["heads"][name]) for name in ("hidden", "out"))
        kind, pairs, teacher = settings["map"], int(settings["pairs"]), dict(settings["teacher"])
        text_width = int(settings["teacher_width"])
        if kind not in MAPS or not {"source", "fingerprint"} <= teacher.keys():
            raise ValueError(f"map {kind!r}, teacher {teacher}")
    except (ValueError, KeyError, TypeError) as error:
        raise SpaceError(f"{path} does not say how to compare ({error!r}); run again") from error
    arrays = resolve(folder / ARRAYS_FILE)
    needed = {"map.audio_mean", "map.text_mean", "map.matrix"}
    if not needed <= arrays.keys():
        raise SpaceError(f"{folder / ARRAYS_FILE} lacks {sorted(needed - arrays.keys())}")
    arrays = {name: tensor.read() for name, tensor in arrays.items()}
    whitening = None
    if "whitening.matrix" in arrays:
        whitening = Whitening(arrays["whitening.mean"], arrays["whitening.matrix"])
        text_width = whitening.width
    mapping = Map(kind, *(arrays[f"map.{n}"] for n in ("audio_mean", "text_mean", "matrix")))
    heads = Heads(hidden, out, _read_heads(folder, hidden, out, {AUDIO: width, TEXT: text_width}))
    reports, vectors = _read_reports(folder / REPORTS_FILE, str(settings.get("reports_sha256")))
    return Meeting(
        mapping, heads, whitening, reports, vectors, teacher,
        int(settings["teacher_width"]), pairs,
    )  # fmt: skip


def _read_reports(path: Path, digest: str) -> tuple[tuple[str, ...], np.ndarray]:
    """None where the file was left out."""
    if not path.is_file():
        return (), np.zeros((0, 0), np.float32)
    if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        raise SpaceError(f"{path} is damaged: not as when written (SHA-256); copy it again")
    table = read_table(path)
    return table.columns["report"], table.embeddings


def _read_heads(folder: Path, hidden: int, out: int, widths: Mapping[str, int]) -> dict[str, Any]:
    path = folder / HEADS_FILE
    if not path.is_file():
        return {}
    source = resolve(path)
    there = {name.partition(".")[0] for name in source}

    def shape(width: int) -> Any:
        x = jax.ShapeDtypeStruct((1, width), jnp.float32)
        return jax.eval_shape(ProjectionHead(hidden, out).init, jax.random.key(0), x)["params"]

    abstract = {side: shape(width) for side, width in widths.items() if side in there}
    return load(source, heads_table.TABLE, abstract) if abstract else {}


def _unit(x: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    return (x / np.where(norm > 0, norm, 1)).astype(np.float32)
