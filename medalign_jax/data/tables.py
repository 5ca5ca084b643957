"""Tables of text from CSV, JSONL and Parquet files that nobody has checked yet.

Every format becomes the same thing: column names, and records whose cells are text or a
`BadRecord` saying what is wrong with that one record. A file that cannot be read as a table at
all raises `ManifestError`.
"""

import csv
import difflib
import io
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from medalign_jax.errors import UserError

SUFFIXES = {".csv": "csv", ".tsv": "csv", ".txt": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl",
            ".parquet": "parquet", ".pq": "parquet"}  # fmt: skip
DELIMITERS = (",", ";", "\t")
LONGEST_CELL = 1 << 20  # characters; a report is a few hundred
_SURROGATE = re.compile("[\ud800-\udfff]")  # what surrogateescape makes of a byte that is no text


class ManifestError(UserError):
    """A manifest, or too much of it, cannot be used.

    Attributes:
        problems: everything found wrong, whatever part of it the message shows.
    """

    def __init__(self, message: str, problems: tuple = ()):
        super().__init__(message)
        self.problems = tuple(problems)


@dataclass(frozen=True)
class BadRecord:
    """A record that is no set of text cells, the reason, and what could be read of it."""

    reason: str
    cells: dict[str, str]


@dataclass(frozen=True)
class Table:
    """Column names in file order, and one entry a record (blank lines are not records)."""

    columns: tuple[str, ...]
    records: tuple[dict[str, str] | BadRecord, ...]


def read_table(path: str | Path, required: str) -> Table:
    """Reads a manifest file by its suffix.

    Args:
        path: a `.csv`, `.tsv`, `.jsonl` or `.parquet` file; CSV with ``,`` ``;`` or tab.
        required: column that the table has to have; a CSV's separator is the one that shows it.

    Raises:
        ManifestError: no such file, unknown suffix, not readable as its suffix says, no
            `required` column, a column twice, no record.
    """
    path = Path(path)
    if not path.is_file():
        raise ManifestError(f"no manifest file at '{path}'; check the path")
    kind = SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise ManifestError(
            f"'{path}': a manifest ends in one of {', '.join(SUFFIXES)}, not '{path.suffix}'"
        )
    if kind == "parquet":
        table = _read_parquet(path)
    else:
        data = _bytes(path)
        table = _read_csv(path, data, required) if kind == "csv" else _read_jsonl(data)
    if not table.records:
        raise ManifestError(f"'{path}' has no rows")
    if required not in table.columns:
        raise ManifestError(
            f"'{path}' has no column '{required}'{did_you_mean(required, table.columns)}; "
            f"its columns are {', '.join(table.columns)}"
        )
    return table


def finite_number(text: str) -> float | None:
    """The number that a cell holds; None where it holds none, or one that is not finite."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` where a known name is near, else nothing."""
    near = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.75)
    return f" (did you mean '{near[0]}'?)" if near else ""


def _bytes(path: Path) -> bytes:
    data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:4096]:
        raise ManifestError(f"'{path}' is not UTF-8 text (UTF-16 or binary?); save it as UTF-8")
    return data.removeprefix(b"\xef\xbb\xbf")


def _read_csv(path: Path, data: bytes, required: str) -> Table:
    # surrogateescape keeps bytes that are not UTF-8 in place, so that the parse goes on and
    # the very row and column can be named; no such byte is a quote, separator or line end.
    text = data.decode("utf-8", "surrogateescape")
    header_line = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = _delimiter(header_line, required)
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    lines = _csv_lines(path, reader)
    columns = tuple(name.strip() for name in next(lines, []))
    named = [name for name in columns if name]
    twice = sorted({name for name in named if named.count(name) > 1})
    if twice:
        raise ManifestError(f"'{path}' has the column(s) {', '.join(twice)} more than once")
    if bad := [name for name in columns if _not_utf8(name)]:
        raise ManifestError(f"'{path}': the header is not UTF-8 text ({bad[0]!r}); save as UTF-8")
    return Table(columns, tuple(_csv_record(columns, cells) for cells in lines))


def _delimiter(header: str, required: str) -> str:
    def score(delimiter: str) -> tuple[bool, int]:
        cells = [cell.strip() for cell in next(csv.reader([header], delimiter=delimiter), [])]
        return required in cells, len(cells)

    return max(DELIMITERS, key=score)


def _csv_lines(path: Path, reader) -> Iterator[list[str]]:
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield cells
    except csv.Error as error:
        raise ManifestError(f"'{path}', line {reader.line_num}: not a CSV file ({error})") from None


def _csv_record(columns: tuple[str, ...], cells: list[str]) -> dict[str, str] | BadRecord:
    record = {name: cell for name, cell in zip(columns, cells, strict=False) if name}
    for name, cell in record.items():
        if found := _not_utf8(cell):
            readable = {k: v for k, v in record.items() if not _not_utf8(v)}
            return BadRecord(
                f"column '{name}' is not UTF-8 text (byte 0x{found}); save the file as UTF-8",
                readable,
            )
    if len(cells) != len(columns):
        return BadRecord(f"has {len(cells)} cells where the header has {len(columns)}", record)
    return record


def _not_utf8(text: str) -> str:
    """The first escaped byte of a text as two hex digits, or nothing."""
    found = _SURROGATE.search(text)
    return f"{ord(found[0]) - 0xDC00:02x}" if found else ""


def _read_jsonl(data: bytes) -> Table:
    columns: dict[str, None] = {}
    records = []
    for line in data.split(b"\n"):
        if line.strip():
            records.append(_json_record(line))
            cells = records[-1].cells if isinstance(records[-1], BadRecord) else records[-1]
            columns.update(dict.fromkeys(cells))
    return Table(tuple(columns), tuple(records))


def _json_record(line: bytes) -> dict[str, str] | BadRecord:
    try:
        # Numbers keep the spelling of the file: 1e3 and 007 are nobody's business here.
        found = json.loads(line.decode("utf-8"), parse_int=str, parse_float=str, parse_constant=str)
    except UnicodeDecodeError as error:
        byte = f"byte 0x{line[error.start]:02x}"
        return BadRecord(f"not UTF-8 text ({byte}); save the file as UTF-8", {})
    except (ValueError, RecursionError) as error:
        return BadRecord(f"not a JSON object ({error})", {})
    if not isinstance(found, dict):
        return BadRecord(f"not a JSON object but {type(found).__name__}", {})
    return _text_record(found)


def _text_record(found: dict[str, object]) -> dict[str, str] | BadRecord:
    record, bad = {}, ""
    for name, value in found.items():
        if isinstance(value, bool):
            value = str(int(value))  # flags such as crackles are written 0 and 1 elsewhere
        if value is None or isinstance(value, (str, int, float)):
            record[str(name)] = "" if value is None else str(value)
        else:
            bad = bad or f"column '{name}' holds a {type(value).__name__}, not a text or number"
    readable = {name: text for name, text in record.items() if not _SURROGATE.search(text)}
    for name in record.keys() - readable.keys():
        bad = bad or f"column '{name}' is not UTF-8 text; save the file as UTF-8"
    return BadRecord(bad, readable) if bad else record


def _read_parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        # Opened here, so that the name is never taken for a URL or a glob.
        with open(path, "rb") as file:
            table = pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise ManifestError(f"'{path}' cannot be read as Parquet ({error})") from None
    names = tuple(table.column_names)
    if len(set(names)) != len(names):
        raise ManifestError(f"'{path}' has a column more than once")
    columns = [_parquet_column(table.column(name)) for name in names]
    records = []
    for values in zip(*columns, strict=True):
        record = _text_record(dict(zip(names, values, strict=True)))
        records.append(record)
    return Table(names, tuple(records))


def _parquet_column(column) -> list[object]:
    import pyarrow

    kind = column.type
    if pyarrow.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = column.type
    if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
        raw = column.cast(pyarrow.large_binary()).to_pylist()
        # As in CSV: a byte that is not UTF-8 must not hide the other rows.
        return [None if v is None else v.decode("utf-8", "surrogateescape") for v in raw]
    return column.to_pylist()
