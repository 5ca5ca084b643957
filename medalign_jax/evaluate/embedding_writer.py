"""Writes tables of embeddings row by row: Parquet or CSV. `evaluate` reads both."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from medalign_jax.core.errors import UserError
from medalign_jax.core.files import writing_whole

OWN_COLUMNS = ("audio_path", "seconds", "embedding", "problem")
_PARQUET, _CSV = ("", ".parquet", ".pq"), (".csv",)
_ROW_GROUP = 512  # rows written at a time


class TableWriter:
    """A table that appears under its name when it is whole; an error on the way leaves nothing.

    Args:
      path: its file. ``.csv`` gives one column per number ("embedding_0", ...), which are empty
        where there is no embedding; ``.parquet`` a list of float32, or null.
      width: numbers of an embedding.
      beside: further columns, of texts.
    """

    def __init__(self, path: Path, width: int, beside: Sequence[str]):
        self.check(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._width, self._beside = path, width, tuple(beside)
        self._whole = contextlib.ExitStack()
        self._rows: list[dict[str, Any]] = []
        self._csv = path.suffix.lower() in _CSV
        texts = [(name, pa.string()) for name in self._beside]
        self._schema = pa.schema(
            [
                ("audio_path", pa.string()),
                ("seconds", pa.float64()),
                *texts,
                ("embedding", pa.list_(pa.float32())),
                ("problem", pa.string()),
            ]
        )

    @staticmethod
    def check(path: Path) -> None:
        """Raises `UserError` for a file of a kind that is not written, or a folder."""
        if path.suffix.lower() not in _PARQUET + _CSV:
            raise UserError(f"{path}: a table of embeddings ends in .parquet or .csv")
        if path.is_dir():
            raise UserError(f"{path} is a folder; name a file in it, ending in .parquet or .csv")

    def __enter__(self) -> TableWriter:
        temporary = self._whole.enter_context(writing_whole(self._path))
        if self._csv:
            self._file = open(temporary, "w", newline="", encoding="utf-8")
            names = [f"embedding_{n}" for n in range(self._width)]
            csv.writer(self._file).writerow(
                ["audio_path", "seconds", *self._beside, *names, "problem"]
            )
        else:
            self._file = pq.ParquetWriter(temporary, self._schema)
        return self

    def add(self, row: Mapping[str, Any]) -> None:
        """One recording: audio_path, seconds, embedding ((D,) or None), problem, and the others."""
        self._rows.append(dict(row))
        if len(self._rows) >= _ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._csv:
            csv.writer(self._file).writerows(map(self._cells, self._rows))
        elif self._rows:
            self._file.write_table(pa.Table.from_pylist(self._rows, self._schema))
        self._rows = []

    def _cells(self, row: Mapping[str, Any]) -> list[Any]:
        """A line of CSV; float32 in as few digits as give the same number again."""
        vector = row["embedding"]
        numbers = [""] * self._width if vector is None else list(map(str, vector))
        beside = [row.get(name, "") for name in self._beside]
        return [row["audio_path"], row["seconds"], *beside, *numbers, row["problem"] or ""]

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
