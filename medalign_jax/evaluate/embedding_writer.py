"""Writes tables of embeddings row by row: Parquet, CSV or NumPy. `evaluate` reads all three."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from medalign_jax.core.errors import UserError
from medalign_jax.core.files import writing_whole

OWN_COLUMNS = ("audio_path", "seconds", "embedding", "problem")
_ROW_GROUP = 512  # rows written at a time

_Row = Mapping[str, Any]


class _Format(Protocol):
    """One kind of file."""

    def __init__(self, path: Path, width: int, beside: Sequence[str]) -> None: ...

    def write(self, rows: Sequence[_Row]) -> None: ...

    def close(self) -> None: ...


class TableWriter:
    """A table that appears under its name when it is whole; an error on the way leaves nothing.

    Args:
      path: its file. ``.csv`` gives one column per number ("embedding_0", ...), which are empty
        where there is no embedding; ``.parquet`` a list of float32, or null; ``.npz`` an array
        (N, D) with NaN, and one of texts per column, all of it in memory until the end.
      width: numbers of an embedding.
      beside: further columns, of texts.
    """

    def __init__(self, path: Path, width: int, beside: Sequence[str]):
        self.check(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._width, self._beside = path, width, tuple(beside)
        self._whole = contextlib.ExitStack()
        self._rows: list[_Row] = []

    @staticmethod
    def check(path: Path) -> None:
        """Raises `UserError` for a file of a kind that is not written, or a folder."""
        if path.suffix.lower() not in _FORMATS:
            raise UserError(f"{path}: a table of embeddings ends in .parquet, .csv or .npz")
        if path.is_dir():
            raise UserError(f"{path} is a folder; name a file in it, ending in .parquet or .csv")

    def __enter__(self) -> TableWriter:
        temporary = self._whole.enter_context(writing_whole(self._path))
        kind = _FORMATS[self._path.suffix.lower()]
        self._file: _Format = kind(temporary, self._width, self._beside)
        return self

    def add(self, row: _Row) -> None:
        """One recording: audio_path, seconds, embedding ((D,) or None), problem, and the others."""
        self._rows.append(dict(row))
        if len(self._rows) >= _ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        self._file.write(self._rows)
        self._rows = []

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            try:
                if kind is None:
                    self._flush()
            finally:
                self._file.close()
        except BaseException as failed:
            self._whole.__exit__(type(failed), failed, failed.__traceback__)
            raise
        self._whole.__exit__(kind, error, trace)


class _Parquet:
    def __init__(self, path: Path, width: int, beside: Sequence[str]) -> None:
        texts = [(name, pa.string()) for name in beside]
        vector = ("embedding", pa.list_(pa.float32()))
        self._schema = pa.schema([("audio_path", pa.string()), ("seconds", pa.float64()), *texts,
                                  vector, ("problem", pa.string())])  # fmt: skip
        self._file = pq.ParquetWriter(path, self._schema)

    def write(self, rows: Sequence[_Row]) -> None:
        if rows:
            self._file.write_table(pa.Table.from_pylist(list(rows), self._schema))

    def close(self) -> None:
        self._file.close()


class _Csv:
    def __init__(self, path: Path, width: int, beside: Sequence[str]) -> None:
        self._width, self._beside = width, beside
        self._file = open(path, "w", newline="", encoding="utf-8")  # noqa: SIM115 - see close
        names = [f"embedding_{n}" for n in range(width)]
        csv.writer(self._file).writerow(["audio_path", "seconds", *beside, *names, "problem"])

    def write(self, rows: Sequence[_Row]) -> None:
        csv.writer(self._file).writerows(map(self._cells, rows))

    def _cells(self, row: _Row) -> list[Any]:
        """A line of CSV; float32 in as few digits as give the same number again."""
        vector = row["embedding"]
        numbers = [""] * self._width if vector is None else list(map(str, vector))
        beside = [row.get(name, "") for name in self._beside]
        return [row["audio_path"], row["seconds"], *beside, *numbers, row["problem"] or ""]

    def close(self) -> None:
        self._file.close()


class _Npz:
    def __init__(self, path: Path, width: int, beside: Sequence[str]) -> None:
        self._path, self._width = path, width
        self._texts: dict[str, list[str]] = {n: [] for n in ("audio_path", *beside, "problem")}
        self._seconds: list[float] = []
        self._vectors: list[np.ndarray] = []

    def write(self, rows: Sequence[_Row]) -> None:
        for row in rows:
            for name, cells in self._texts.items():
                cells.append(row.get(name) or "")
            self._seconds.append(row["seconds"])
            vector = row["embedding"]
            missing = np.full(self._width, np.nan, np.float32)
            self._vectors.append(missing if vector is None else np.asarray(vector, np.float32))

    def close(self) -> None:
        arrays = {name: np.array(cells, np.str_) for name, cells in self._texts.items()}
        arrays["seconds"] = np.array(self._seconds, np.float64)
        vectors = np.array(self._vectors, np.float32).reshape(-1, self._width)
        with open(self._path, "wb") as file:  # given a name, savez would add an ending
            np.savez(file, embedding=vectors, **arrays)


_FORMATS: dict[str, type[_Format]] = {
    "": _Parquet, ".parquet": _Parquet, ".pq": _Parquet, ".csv": _Csv, ".npz": _Npz,
}  # fmt: skip
