"""Search by example: of many embedded recordings those that are most like one.

    index = EmbeddingIndex.read("embeddings.parquet")     # as `medalign embed` writes it
    index.similar(encoder.embed(waveforms, 16_000), count=5)

The search is exact: for each query one product with all vectors (0.02 s on 2 cores for 100,000 of
width 768). Embeddings are compared by the cosine of their differences from the mean of the index:
those of an encoder tend to share a large common part, which says nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from medalign_jax.core.errors import UserError
from medalign_jax.evaluate.embedding_table import read_table

_AT_A_TIME = 1024  # queries


class SearchError(UserError):
    """An index that cannot answer."""


@dataclasses.dataclass(frozen=True)
class Hit:
    """A recording of the index.

    Attributes:
      row: its place in the index, from 0.
      path: its file, "" where the table names none.
      similarity: centred cosine, -1 to 1.
      columns: what else the table says of it.
    """

    row: int
    path: str
    similarity: float
    columns: Mapping[str, str]


class EmbeddingIndex:
    """N embeddings with what is known of their recordings."""

    def __init__(self, embeddings: np.ndarray, columns: Mapping[str, Sequence[str]] | None = None):
        """Args:
          embeddings: (N, D) finite numbers.
          columns: N texts each; "audio_path" is the file.

        Raises:
          SearchError: no embedding, or shapes that do not fit.
        """
        vectors = np.asarray(embeddings, np.float32)
        if vectors.ndim != 2 or not vectors.size or not np.isfinite(vectors).all():
            raise SearchError(f"an index takes finite embeddings (N, D); got {vectors.shape}")
        self._columns = {name: tuple(cells) for name, cells in (columns or {}).items()}
        for name, cells in self._columns.items():
            if len(cells) != len(vectors):
                raise SearchError(f"column {name!r} has {len(cells)} of {len(vectors)} rows")
        self._mean = vectors.mean(axis=0)
        self._unit = _unit(vectors - self._mean)

    @classmethod
    def read(cls, path: str | Path) -> EmbeddingIndex:
        """Of a table that `medalign embed` has written; rows without embedding are left out.

        Raises:
          UserError: see `evaluate.embedding_table.read_table`.
        """
        table = read_table(path)
        return cls(table.embeddings, table.columns)

    def __len__(self) -> int:
        return len(self._unit)

    def similar(self, embeddings: np.ndarray, count: int = 5) -> list[tuple[Hit, ...]]:
        """For each query the most similar recordings, best first.

        Args:
          embeddings: (M, D) of the encoder that the index is of.
          count: how many; all there are where there are fewer.

        Raises:
          SearchError: another width, numbers that are not finite, or no count.
        """
        queries = np.atleast_2d(np.asarray(embeddings, np.float32))
        if queries.shape[1] != self._unit.shape[1]:
            raise SearchError(
                f"the index holds embeddings of {self._unit.shape[1]} numbers, asked for was one "
                f"of {queries.shape[1]}: embed with the encoder that the index was made with"
            )
        if not np.isfinite(queries).all() or count < 1:
            raise SearchError("a search takes finite embeddings, and a count of 1 or more")
        found = []
        for start in range(0, len(queries), _AT_A_TIME):
            part = _unit(queries[start : start + _AT_A_TIME] - self._mean)
            found += [self._best(row, min(count, len(self))) for row in part @ self._unit.T]
        return found

    def _best(self, cosines: np.ndarray, count: int) -> tuple[Hit, ...]:
        some = np.argpartition(-cosines, count - 1)[:count]
        order = some[np.lexsort((some, -cosines[some]))]  # ties in the order of the index
        return tuple(self._hit(int(row), float(cosines[row])) for row in order)

    def _hit(self, row: int, similarity: float) -> Hit:
        cells = {name: column[row] for name, column in self._columns.items()}
        return Hit(row, cells.pop("audio_path", ""), similarity, cells)


def _unit(x: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(norm > 0, norm, 1)
