"""Reads embeddings that were made elsewhere: Parquet with a column of vectors, CSV with one column
per number ("embedding_0", "embedding_1", ...), or NumPy's .npz with an array (N, D), as
``python -m medalign_jax.embed`` writes them.
"""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from medalign_jax.core.errors import UserError
from medalign_jax.core.files import DAMAGED_ZIP
from medalign_jax.core.words import did_you_mean, finite_number, is_missing, is_none_in_words
from medalign_jax.data import tables
from medalign_jax.data.recordings.manifest import Problem
from medalign_jax.data.tables import check_unpacked

SUFFIXES = (".parquet", ".pq", ".csv", ".npz")

_PROBLEM = "problem"


@dataclass(frozen=True)
class EmbeddingTable:
    """Rows with an embedding.

    Attributes:
      embeddings: (N, D) float32.
      columns: N texts each, by name: paths, subjects, splits, labels, whatever there is; missing
        values are "".
      numbers: N rows of the file that these are, counted from 1.
      problems: rows that were left out, and why.
    """

    embeddings: np.ndarray
    columns: dict[str, tuple[str, ...]]
    numbers: tuple[int, ...]
    problems: tuple[Problem, ...]


def read_table(path: str | Path, column: str = "embedding") -> EmbeddingTable:
    """Reads a table such as ``python -m medalign_jax.embed`` writes, with further columns if any.

    Rows without an embedding (a file that could not be read: column "problem" says why) are left
    out and named in `problems`.

    Args:
      path: Parquet or, by its ending, CSV or .npz.
      column: that of the vectors, lists of numbers; in CSV the beginning of their columns' names.

    Raises:
      UserError: no such file or column, vectors of different lengths or with NaN, cells that are
        not numbers, no row left.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no table of embeddings at {path}; check the path")
    read = {".csv": _read_csv, ".npz": _read_npz}.get(path.suffix.lower(), _read_parquet)
    vectors, texts = read(path, column)
    reasons = texts.pop(_PROBLEM, [""] * len(vectors))
    paths = texts.get("audio_path", [""] * len(vectors))
    problems = tuple(
        Problem(row + 1, paths[row], reasons[row] or "has no embedding", fatal=True)
        for row, vector in enumerate(vectors)
        if vector is None or reasons[row]
    )
    bad = {problem.row - 1 for problem in problems}
    kept = [row for row in range(len(vectors)) if row not in bad]
    if not kept:
        raise UserError(f"{path} holds no embedding: {len(bad)} rows without one")
    return EmbeddingTable(
        _stacked(path, [(row, vectors[row]) for row in kept]),
        {name: tuple(cells[row] for row in kept) for name, cells in texts.items()},
        tuple(row + 1 for row in kept),
        problems,
    )


_Columns = tuple[list[np.ndarray | None], dict[str, list[str]]]


def _read_csv(path: Path, column: str) -> _Columns:
    """Vectors and texts of a table, one column per number; a row without numbers has no vector."""
    table = tables.read_table(path, f"{column}_0")
    places = [(re.fullmatch(rf"{re.escape(column)}_(\d+)", name), name) for name in table.columns]
    numbered = {int(found[1]): name for found, name in places if found}
    if lacking := sorted(set(range(max(numbered, default=0) + 1)) - set(numbered)):
        raise UserError(f"{path} has no column {f'{column}_{lacking[0]}'!r} between the others")
    names = [numbered[n] for n in range(len(numbered))]
    others = [name for name in table.columns if name not in names]
    vectors, texts = [], {name: [] for name in others}
    for row, record in enumerate(table.records, start=1):
        if isinstance(record, tables.BadRecord):
            raise UserError(f"{path}: row {row}: {record.reason}")
        vectors.append(_vector(path, row, {name: record.get(name, "") for name in names}))
        for name in others:
            texts[name].append(_text(record.get(name)))
    return vectors, texts


def _vector(path: Path, row: int, cells: dict[str, str]) -> np.ndarray | None:
    if not any(cell.strip() for cell in cells.values()):
        return None
    numbers = {name: finite_number(cell) for name, cell in cells.items()}
    for name, number in numbers.items():
        if number is None:
            raise UserError(
                f"{path}: row {row}: {cells[name]!r} in column {name!r} is not a number"
            )
    return np.array(list(numbers.values()), np.float32)


def _read_npz(path: Path, column: str) -> _Columns:
    """An array of vectors, rows of NaN where there is none, and arrays of as many texts."""
    try:
        with zipfile.ZipFile(path) as archive:  # what is stored as it is cannot be a bomb
            if any(each.compress_type != zipfile.ZIP_STORED for each in archive.infolist()):
                raise UserError(f"{path} is compressed; write it with numpy.savez")
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (*DAMAGED_ZIP, SyntaxError) as error:
        raise UserError(f"{path} cannot be read as .npz ({error})") from error
    if odd := [name for name, array in found.items() if not isinstance(array, np.ndarray)]:
        raise UserError(f"{path}: what is called {odd[0]!r} is not an array")
    vectors = found.pop(column, None)
    if vectors is None or vectors.ndim != 2 or vectors.dtype.kind not in "fiu":
        near = did_you_mean(column, found)
        raise UserError(f"{path} has no array {column!r} (N, D) of numbers{near}")
    for name, cells in found.items():
        if cells.shape != (len(vectors),):
            raise UserError(f"{path}: array {name!r} is {cells.shape}, not ({len(vectors)},)")
    texts = {name: [_text(cell) for cell in cells.tolist()] for name, cells in found.items()}
    rows = vectors.astype(np.float32)
    return [None if np.isnan(row).all() else row for row in rows], texts


def _read_parquet(path: Path, column: str) -> _Columns:
    table = _parquet(path)
    if column not in table.column_names:
        near = did_you_mean(column, table.column_names)
        raise UserError(
            f"{path} has no column {column!r}{near}; its columns are "
            + ", ".join(table.column_names)
        )
    texts = {n: _texts(table.column(n)) for n in table.column_names if n != column}
    return _vectors(path, table.column(column)), texts


def _parquet(path: Path) -> pa.Table:
    try:
        with open(path, "rb") as file:
            check_unpacked(path, pq.ParquetFile(file).metadata)
            table = pq.read_table(file)
            table.validate(full=True)
            _ = table.column_names  # names that are not text are found when they are asked for
            return table
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as Parquet ({error})") from error


def _vectors(path: Path, column: pa.ChunkedArray) -> list[np.ndarray | None]:
    kind = column.type
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    number = any(is_list(kind) for is_list in lists) and (
        pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)
    )
    if not number:
        raise UserError(f"{path}: embeddings are of type {kind}; they have to be lists of floats")
    cells = (cell.values if cell.is_valid else None for cell in column)
    # An element that is missing becomes NaN, which is refused later.
    return [
        None if cell is None else cell.to_numpy(zero_copy_only=False).astype(np.float32)
        for cell in cells
    ]


def _stacked(path: Path, rows: list[tuple[int, np.ndarray]]) -> np.ndarray:
    """(N, D) of vectors that are all finite and of one length."""
    first, like = rows[0]
    for row, vector in rows:
        if len(vector) != len(like) or not len(vector):
            raise UserError(
                f"{path}: row {row + 1} has {len(vector)} numbers and row {first + 1} {len(like)}; "
                "embeddings of different encoders belong in different tables"
            )
        if not np.isfinite(vector).all():
            raise UserError(f"{path}: the embedding of row {row + 1} holds NaN or infinite numbers")
    return np.stack([vector for _, vector in rows])


def _texts(column: pa.ChunkedArray) -> list[str]:
    return [_text(value) for value in column.to_pylist()]


def _text(value: object) -> str:
    """As manifests write it: flags are 0 and 1, whole numbers have no point."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    text = str(value).strip()
    return "" if is_missing(text) and not is_none_in_words(text) else text
