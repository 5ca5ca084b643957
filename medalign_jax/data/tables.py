"""Tables of text from CSV, JSONL and Parquet files that nobody has checked yet.

Every format becomes the same thing: column names, and records whose cells are text or a
`BadRecord` saying what is wrong with that one record. Only cells of columns that somebody reads are
judged. A file that cannot be read as a table at all raises `ManifestError`.
"""

import csv
import dataclasses
import io
import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from medalign_jax.core.errors import UserError
from medalign_jax.core.local_paths import local
from medalign_jax.core.words import did_you_mean, plain_name

SUFFIXES = {".csv": "csv", ".tsv": "csv", ".txt": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl",
            ".parquet": "parquet", ".pq": "parquet"}  # fmt: skip
DELIMITERS = (",", ";", "\t")
_DECLARED_DELIMITER = re.compile(r"sep=([,;\t])\r?\n", re.IGNORECASE)  # Excel's own first line
LONGEST_CELL = 1 << 20  # characters; a report is a few hundred
MOST_UNPACKED = 1 << 31  # bytes, of a Parquet file that packs them a hundred times smaller
_SURROGATE = re.compile("[\ud800-\udfff]")  # what surrogateescape makes of a byte that is not text


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
    """A record that is not a set of text cells.

    Attributes:
      reason: why.
      cells: what could be read of it.
      column: the first column that is not text; "" where the record as a whole is wrong.
    """

    reason: str
    cells: dict[str, str]
    column: str = ""


@dataclass(frozen=True)
class Table:
    """Column names in file order, and one entry per record (blank lines are not records)."""

    columns: tuple[str, ...]
    records: tuple[dict[str, str] | BadRecord, ...]


def read_table(
    path: str | Path,
    required: str,
    known: Sequence[str] = (),
    reads: Callable[[str], bool] = lambda name: True,
) -> Table:
    """Reads a manifest file by its suffix.

    Args:
      path: a `.csv`, `.tsv`, `.jsonl` or `.parquet` file; CSV with ``,`` ``;`` or tab.
      required: column that the table has to have; a CSV's separator is the one that shows it.
      known: further names that a column gets if its own differs in case and signs alone
        (`Subject_ID` and `subject ID` are ``subject_id``); `required` is one of them.
      reads: whether a column (by its own name) is read at all. Cells of other columns are never
        a reason to refuse a record; where they are not text they are "".

    Raises:
      ManifestError: no such file, unknown suffix, not readable as its suffix says, no
        `required` column, a column twice, no record, or none that can be read.
    """
    path = local(path)
    if not path.is_file():
        raise ManifestError(f"no manifest file at '{path}'; check the path")
    kind = SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise ManifestError(
            f"'{path}': a manifest ends in one of {', '.join(SUFFIXES)}, not '{path.suffix}'"
        )
    known = (required, *known)

    def is_read(name: str) -> bool:
        return plain_name(name) in known or reads(name)

    if kind == "parquet":
        table = _read_parquet(path, is_read)
    else:
        data = _bytes(path)
        csv_file = kind == "csv"
        table = _read_csv(path, data, required, is_read) if csv_file else _read_jsonl(data, is_read)
    if not table.records:
        raise ManifestError(f"'{path}' has no rows")
    if not table.columns and isinstance(first := table.records[0], BadRecord):
        raise ManifestError(
            f"'{path}': none of its {len(table.records)} rows can be read; the first is "
            f"{first.reason}"
        )
    table = renamed(path, table, known)
    if required not in table.columns:
        raise ManifestError(
            f"'{path}' has no column '{required}'{did_you_mean(required, table.columns)}; "
            f"its columns are {', '.join(table.columns)}"
        )
    return table


def renamed(path: Path, table: Table, known: Sequence[str]) -> Table:
    """The known columns under their known names.

    Raises:
      ManifestError: two columns that have one of these names.
    """
    names = {name: plain_name(name) for name in table.columns if plain_name(name) in known}
    for name in dict.fromkeys(names.values()):
        if len(same := [column for column, to in names.items() if to == name]) > 1:
            raise ManifestError(f"'{path}': the columns {', '.join(same)} all mean '{name}'; "
                                "keep one")  # fmt: skip
    if all(name == to for name, to in names.items()):
        return table

    def of(cells: dict[str, str]) -> dict[str, str]:
        return {names.get(name, name): cell for name, cell in cells.items()}

    records = (
        dataclasses.replace(record, cells=of(record.cells))
        if isinstance(record, BadRecord)
        else of(record)
        for record in table.records
    )
    return Table(tuple(names.get(name, name) for name in table.columns), tuple(records))


def _bytes(path: Path) -> bytes:
    data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:4096]:
        raise ManifestError(f"'{path}' is not UTF-8 text (UTF-16 or binary?); save it as UTF-8")
    return data.removeprefix(b"\xef\xbb\xbf")


def _read_csv(path: Path, data: bytes, required: str, reads: Callable[[str], bool]) -> Table:
    # surrogateescape keeps bytes that are not UTF-8 in place, so that the parse goes on and
    # the very row and column can be named; no such byte is a quote, separator or line end.
    text = data.decode("utf-8", "surrogateescape")
    declared = _DECLARED_DELIMITER.match(text)
    if declared is not None:
        text = "\n" + text[declared.end() :]  # lines keep their numbers
    header_line = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = _delimiter(header_line, required) if declared is None else declared[1]
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
    read = frozenset(filter(reads, named))
    return Table(columns, tuple(_csv_record(columns, cells, read) for cells in lines))


def _delimiter(header: str, required: str) -> str:
    def score(delimiter: str) -> tuple[bool, int]:
        cells = [cell.strip() for cell in next(csv.reader([header], delimiter=delimiter), [])]
        return required in map(plain_name, cells), len(cells)

    return max(DELIMITERS, key=score)


def _csv_lines(path: Path, reader) -> Iterator[list[str]]:
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield cells
    except csv.Error as error:
        raise ManifestError(f"'{path}', line {reader.line_num}: not a CSV file ({error})") from None


def _csv_record(
    columns: tuple[str, ...], cells: list[str], read: frozenset[str]
) -> dict[str, str] | BadRecord:
    record = {name: cell for name, cell in zip(columns, cells, strict=False) if name}
    found = _text_record(record, read)
    if isinstance(found, dict) and len(cells) != len(columns):
        return BadRecord(f"has {len(cells)} cells where the header has {len(columns)}", found)
    return found


def _read_jsonl(data: bytes, reads: Callable[[str], bool]) -> Table:
    columns: dict[str, None] = {}
    read: dict[str, bool] = {}
    records = []
    for line in data.split(b"\n"):
        if not line.strip():
            continue
        found = _json_object(line)
        if isinstance(found, dict):
            for name in found.keys() - read.keys():
                read[name] = reads(name)
            columns.update(dict.fromkeys(found))
            found = _text_record(found, {name for name in found if read[name]})
        records.append(found)
    return Table(tuple(columns), tuple(records))


def _json_object(line: bytes) -> dict[str, object] | BadRecord:
    # A byte that is not text is kept, as in CSV: it counts only in a column that is read.
    text = line.decode("utf-8", "surrogateescape")
    try:
        # Numbers keep the spelling of the file: 1e3 and 007 are nobody's business here.
        found = json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
    except (ValueError, RecursionError) as error:
        return BadRecord(f"not a JSON object ({error})", {})
    if not isinstance(found, dict):
        return BadRecord(f"not a JSON object but {type(found).__name__}", {})
    if bad := next((name for name in found if _SURROGATE.search(name)), None):
        return BadRecord(f"its name {bad!r} is not UTF-8 text; save the file as UTF-8", {})
    return found


def _text_record(found: dict[str, object], read: Collection[str]) -> dict[str, str] | BadRecord:
    """The cells as text; of columns that are not read, those that are text."""
    record: dict[str, str] = {}
    bad: dict[str, str] = {}
    for name, value in found.items():
        text, wrong = _cell(value)
        if wrong and name in read:
            bad[name] = f"column '{name}' {wrong}"
        else:
            record[name] = text
    for name, reason in bad.items():
        return BadRecord(reason, record, name)
    return record


def _cell(value: object) -> tuple[str, str]:
    """A cell's text, and what is wrong with it ("" if nothing is; the text is "" if anything)."""
    if isinstance(value, bool):
        value = str(int(value))  # flags such as crackles are written 0 and 1 elsewhere
    if value is None:
        return "", ""
    if not isinstance(value, (str, int, float)):
        kind = value.kind if isinstance(value, _NoText) else type(value).__name__
        return "", f"holds a {kind}, not a text or number"
    text = str(value)
    if len(text) > LONGEST_CELL:
        return "", f"holds {len(text)} characters, more than {LONGEST_CELL}; shorten the text"
    if found := _SURROGATE.search(text):
        byte = f" (byte 0x{ord(found[0]) - 0xDC00:02x})" if ord(found[0]) >= 0xDC80 else ""
        return "", f"is not UTF-8 text{byte}; save the file as UTF-8"
    return text, ""


def _not_utf8(text: str) -> bool:
    return bool(_SURROGATE.search(text))


@dataclass(frozen=True)
class _NoText:
    """Stands for a cell of a type that is not text, whose value nobody needs."""

    kind: str


def _read_parquet(path: Path, reads: Callable[[str], bool]) -> Table:
    from pyarrow import ArrowException, parquet

    try:
        # Opened here, so that the name is never taken for a URL or a glob.
        with open(path, "rb") as file:
            opened = parquet.ParquetFile(file)
            names = tuple(opened.schema_arrow.names)
            if len(set(names)) != len(names):
                raise ManifestError(f"'{path}' has a column more than once")
            read = [name for name in names if reads(name)]
            _check_sizes(path, opened.metadata, read)
            # As dictionaries, texts that repeat are one object, as they are in the file.
            opened = parquet.ParquetFile(file, read_dictionary=_texts_of(opened.schema_arrow))
            columns = [_parquet_column(opened.read([name]).column(0)) for name in read]
            count = opened.metadata.num_rows
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"'{path}' cannot be read as Parquet ({error})") from None
    for name, column in zip(read, columns, strict=True):
        if len(column) != count:
            raise ManifestError(
                f"'{path}' is damaged: column '{name}' holds {len(column)} cells in {count} rows; "
                "copy it again"
            )
    unread = dict.fromkeys(names, "")
    cells = zip(*columns, strict=True) if read else [()] * count
    records = (unread | dict(zip(read, values, strict=True)) for values in cells)
    return Table(names, tuple(_text_record(record, read) for record in records))


def _check_sizes(path: Path, metadata, read: Sequence[str]) -> None:
    """Refuses, before it is unpacked, a column that has to hold a cell longer than `LONGEST_CELL`.

    Raises:
      ManifestError: such a column, or a file as of `check_unpacked`.
    """
    check_unpacked(path, metadata)
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        most = 4 * LONGEST_CELL * max(1, group.num_rows)  # a character has at most 4 bytes
        if group.total_byte_size <= most:
            continue  # also because pyarrow ends the process over a damaged column's statistics
        for part in map(group.column, range(group.num_columns)):
            name = part.path_in_schema.split(".")[0]
            if name in read and part.total_uncompressed_size > most:
                raise ManifestError(
                    f"'{path}': column '{name}' holds {part.total_uncompressed_size} bytes in "
                    f"{group.num_rows} rows; a cell has at most {LONGEST_CELL} characters: shorten "
                    "its texts"
                )


def check_unpacked(path: Path, metadata) -> None:
    """Refuses a small Parquet file that would fill the memory once it is unpacked.

    Args:
      path: of the file.
      metadata: pyarrow's, of the file.

    Raises:
      ManifestError: more than `MOST_UNPACKED` bytes, and more than a hundred times the file's.
    """
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    unpacked = sum(group.total_byte_size for group in groups)
    if unpacked > max(MOST_UNPACKED, 100 * path.stat().st_size):
        raise ManifestError(
            f"'{path}' would unpack to {unpacked} bytes from {path.stat().st_size}; if that is "
            "meant, write it again without compression"
        )


def _texts_of(schema) -> list[str]:
    """Names of the columns of texts."""
    from pyarrow import types

    return [
        field.name
        for field in schema
        if types.is_string(field.type) or types.is_large_string(field.type)
    ]


def _parquet_column(column) -> list[object]:
    from pyarrow import types

    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    if types.is_string(kind) or types.is_large_string(kind):
        return [cell for chunk in column.chunks for cell in _dictionary_cells(chunk)]
    plain = (types.is_boolean, types.is_integer, types.is_floating, types.is_null)
    if any(is_plain(kind) for is_plain in plain):
        return column.to_pylist()
    return [_NoText(str(kind)) if valid else None for valid in column.is_valid().to_pylist()]


def _dictionary_cells(chunk) -> list[str | None]:
    """Texts of a dictionary array; as in CSV, a byte that is not UTF-8 must not hide other rows."""
    import pyarrow

    raw = chunk.dictionary.cast(pyarrow.large_binary()).to_pylist()
    texts = [None if value is None else value.decode("utf-8", "surrogateescape") for value in raw]
    places = chunk.indices.to_pylist()
    if wrong := [place for place in places if place is not None and not 0 <= place < len(texts)]:
        raise pyarrow.ArrowInvalid(f"a cell names text {wrong[0]} of {len(texts)}")
    return [None if place is None else texts[place] for place in places]
