"""What the converters of published data sets share: tables read strictly, a manifest written whole.

A converter reads a published layout and gives one row per recording; `write` makes the manifest of
them. What is wrong in the published files the converter mends and documents in its notes.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medalign_jax.core.errors import UserError
from medalign_jax.core.files import write_whole
from medalign_jax.data.tables import BadRecord, read_table
from medalign_jax.datasets.splits import deal_folds

REPORTS = ("full", "no_diagnosis")


class LayoutError(UserError):
    """A folder that is not a data set in its published layout."""


@dataclass(frozen=True)
class Options:
    """What may be chosen.

    Attributes:
      folds: for cross-validation, dealt by subject.
      seed: of folds and validation subjects.
      reports: "full", or "no_diagnosis" to leave out of the reports what the subject has.
    """

    folds: int = 5
    seed: int = 0
    reports: str = "full"

    def __post_init__(self) -> None:
        if self.reports not in REPORTS:
            raise LayoutError(f"reports {self.reports!r} is not one of {', '.join(REPORTS)}")


@dataclass(frozen=True)
class Converted:
    """A data set as rows of a manifest.

    Attributes:
      columns: of the manifest, in order; `audio_path` and `subject_id` are among them.
      rows: column -> value; `audio_path` is the file's path, "" stands for what is not known.
      notes: what is wrong with the published files and what was done about it.
    """

    columns: Sequence[str]
    rows: Sequence[Mapping[str, object]]
    notes: Sequence[str]


def write(converted: Converted, out: str | Path) -> None:
    """Writes the manifest, whole or not at all; files inside its folder are named relative to it.

    Raises:
      LayoutError: no recording is there.
    """
    out = Path(out)
    if not converted.rows:
        raise LayoutError(
            f"none of the recordings is there, so '{out}' is not written; --root is the folder "
            "that holds the published tables and recordings"
        )
    text = io.StringIO()
    writer = csv.DictWriter(text, converted.columns, lineterminator="\n", restval="")
    writer.writeheader()
    for row in converted.rows:
        writer.writerow(row | {"audio_path": _seen_from(Path(str(row["audio_path"])), out.parent)})
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, text.getvalue().encode())


def _seen_from(path: Path, folder: Path) -> str:
    """Relative to the manifest where the file lies inside its folder, else absolute."""
    path, folder = Path(os.path.abspath(path)), Path(os.path.abspath(folder))
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def read_rows(path: Path, key: str, columns: Sequence[str]) -> dict[str, dict[str, str]]:
    """A table with a header, key -> the named columns, stripped.

    Raises:
      LayoutError: no such file or column; a row that cannot be read, without key or with another
        row's; names the row.
    """
    if not path.exists():
        raise LayoutError(f"there is no '{path}'; --root is the folder that holds {path.name}")
    table = read_table(path, key, reads=set(columns).__contains__)
    if lacking := [name for name in columns if name not in table.columns]:
        raise LayoutError(f"'{path}' has no column {', '.join(lacking)}")
    rows: dict[str, dict[str, str]] = {}
    for number, record in enumerate(table.records, start=1):
        if isinstance(record, BadRecord):
            raise LayoutError(f"'{path}', row {number}: {record.reason}")
        row = {name: record.get(name, "").strip() for name in columns}
        if row[key] in rows or not row[key]:
            raise LayoutError(f"'{path}', row {number}: {key} {row[key]!r} is empty or there twice")
        rows[row[key]] = row
    return rows


def read_lines(path: Path, fields: int) -> list[list[str]]:
    """The lines of a text file without a header, in `fields` fields divided by white space.

    Raises:
      LayoutError: no such file, or a line of another number of fields; names it.
    """
    if not path.exists():
        raise LayoutError(f"there is no '{path}'; --root is the folder that holds {path.name}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise LayoutError(f"'{path}' is not text in UTF-8 ({error.reason})") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not (parts := line.split()):
            continue
        if len(parts) != fields:
            raise LayoutError(f"'{path}', line {number}: {len(parts)} fields in place of {fields}")
        found.append(parts)
    return found


def folds_of(classes: Mapping[str, str], options: Options) -> dict[str, int]:
    """subject -> fold, with like shares of every class in each; see `splits.deal_folds`.

    Args:
      classes: subject -> its class; "" has none.
    """
    names = sorted(set(classes.values()) - {""})
    labels = np.array([[value == name for name in names] for value in classes.values()])
    dealt = deal_folds(labels.reshape(len(classes), len(names)), options.folds, options.seed)
    return {subject: int(fold) for subject, fold in zip(classes, dealt, strict=True)}
