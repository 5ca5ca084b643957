"""Manifests: what each row says, and everything that is wrong with it.

A manifest is a CSV, JSONL or Parquet file. It has the column `audio_path` (relative to the
manifest's folder, or absolute) and, for each row, either a `report` or the metadata columns of
`medalign_jax.reports.templates`; optional are `subject_id`, `split`, `label` and any column that
the user names as a target. Headers are read whatever their case (`Subject ID` is `subject_id`), and
cells of other columns are not looked at. `read_manifest` looks at the text, `check` at the
recordings and at the manifest as a whole.
"""

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from medalign_jax.audio import io as audio_io
from medalign_jax.core.files import encoded, write_whole
from medalign_jax.core.local_paths import ADVICE, is_remote, place_of
from medalign_jax.core.words import did_you_mean, is_missing, is_none_in_words, plain_name
from medalign_jax.data.recordings.subjects import alike_subjects, in_two_splits
from medalign_jax.data.tables import BadRecord, ManifestError, Table, read_table
from medalign_jax.reports import templates as reports
from medalign_jax.reports.vocabulary import says_nothing

SPLITS = ("train", "valid", "test")
SPLIT_ALIASES = {"training": "train", "validation": "valid", "val": "valid", "dev": "valid",
                 "testing": "test"}  # fmt: skip
COLUMNS = ("audio_path", "report", "subject_id", "split", "label")
COPIES_OF = "near-copies "  # begins the id that near-copies without a subject share
LINES_IN_MESSAGE = 40

__all__ = ["SPLITS", "Checked", "ManifestError", "Problem", "Row", "check", "problem_table",
           "read_manifest", "write_problems"]  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One recording.

    Attributes:
      row: its place in the manifest, counted from 1; header and blank lines do not count.
      audio_path: the file, relative paths already joined to the manifest's folder.
      subject_id: the subject, or the manifest's audio path where no subject is given, so
        that no two recordings are ever taken for one subject by having none.
      split: "train", "valid" or "test".
      label: class name, or None. "none" in words stays: a task of several labels reads it.
      targets: the columns named as targets, without missing values; "none" as in `label`.
      metadata: the known metadata columns, without missing values.
      report: the manifest's own report, or None.
    """

    row: int
    audio_path: str
    subject_id: str
    split: str
    label: str | None
    targets: dict[str, str]
    metadata: dict[str, str]
    report: str | None

    @property
    def names_subject(self) -> bool:
        """Whether the manifest says who was recorded."""
        own_path = self.audio_path.endswith(os.path.normpath(self.subject_id))
        return bool(self.subject_id) and not own_path and not self.subject_id.startswith(COPIES_OF)

    @property
    def named_subject(self) -> str | None:
        """The subject, where the manifest says who was recorded."""
        return self.subject_id if self.names_subject else None


@dataclass(frozen=True)
class Problem:
    """Something wrong: with a row (`row` counted from 1), or with the manifest (`row` None).

    Fatal: the row cannot be used, or with no row, the manifest cannot. Otherwise a note.
    """

    row: int | None
    audio_path: str
    reason: str
    fatal: bool


@dataclass(frozen=True)
class Checked:
    """The rows that can be used, and every problem of the others (and notes)."""

    rows: tuple[Row, ...]
    problems: tuple[Problem, ...]


def read_manifest(
    path: str | Path, targets: Sequence[str] = (), *, reports_required: bool = True
) -> tuple[list[Row], list[Problem]]:
    """Reads a manifest's text; no recording is opened.

    Args:
      path: the manifest file.
      targets: further columns to keep for probes.
      reports_required: whether a row has to have a report or metadata to make one from.

    Returns:
      The rows whose text is usable and the problems of the others, with notes on unused
      columns and on what is taken for granted.

    Raises:
      ManifestError: the file is not a table, has no `audio_path`, or lacks a named target.
    """
    path = Path(path)

    def is_read(name: str) -> bool:
        return name in targets or reports.normalise_column(name) in reports.METADATA_COLUMNS

    table = read_table(path, "audio_path", COLUMNS, is_read)
    return rows_of_table(
        path, table, targets, folder=path.parent, reports_required=reports_required
    )


def rows_of_table(
    path: Path,
    table: Table,
    targets: Sequence[str] = (),
    *,
    folder: str | Path = "",
    reports_required: bool = False,
    numbers: Sequence[int] | None = None,
) -> tuple[list[Row], list[Problem]]:
    """Rows of a table that was read, whatever it was read from; see `read_manifest`.

    Args:
      path: of the table, for messages.
      table: its columns under their known names, `audio_path` among them.
      targets: further columns to keep for probes.
      folder: that paths of recordings are relative to; "" leaves them as they are written.
      reports_required: whether a row has to have a report or metadata to make one from.
      numbers: of the records in their file, counted from 1; None for all of them in order.

    Raises:
      ManifestError: a named target is not a column.
    """
    places = {target: _place(target, table.columns) for target in targets}
    used, problems = _columns(path, table.columns, places)
    words: Counter[tuple[str, str]] = Counter()
    rows = []
    numbers = range(1, len(table.records) + 1) if numbers is None else numbers
    for number, record in zip(numbers, table.records, strict=True):
        if isinstance(record, BadRecord):
            audio_path = record.cells.get("audio_path", "")
            problems.append(Problem(number, audio_path, record.reason, fatal=True))
            continue
        cells = {name: record.get(name, "").strip() for name in table.columns}
        words.update(_words_for_nothing(cells, used, places))
        row, found = _row(number, cells, used, places, folder, reports_required)
        problems.extend(found)
        if row is not None:
            rows.append(row)
    notes = (
        f"column '{name}': '{word}' ({count} rows) counts as a missing value"
        for (name, word), count in words.items()
    )
    return rows, problems + [Problem(None, "", note, fatal=False) for note in notes]


def _place(target: str, columns: Sequence[str]) -> str:
    """The column of a target, whose header may be one that is read whatever its case."""
    return plain_name(target) if target not in columns and plain_name(target) in COLUMNS else target


def _value(name: str, text: str) -> str:
    """A cell of one of `COLUMNS` or of a target, "" where it is missing."""
    keeps = name not in ("audio_path", "report", "subject_id", "split") and is_none_in_words(text)
    return "" if is_missing(text) and not keeps else text


def _words_for_nothing(
    cells: dict[str, str], metadata_columns: dict[str, str], places: dict[str, str]
) -> list[tuple[str, str]]:
    """(column, word) of cells that are read as missing and may be meant; not the float "nan"."""
    found = []
    for name in {*COLUMNS, *metadata_columns, *places.values()} & cells.keys():
        text = cells[name]
        column = metadata_columns.get(name)
        nothing = says_nothing(column, text) if column else not _value(name, text)
        if text and nothing and text.casefold() != "nan":
            found.append((name, text))
    return found


def _columns(
    path: Path, columns: Sequence[str], places: dict[str, str]
) -> tuple[dict[str, str], list[Problem]]:
    """Metadata columns as {column of the file: its usual name}, and notes on the others."""
    for target, place in places.items():
        if place not in columns:
            raise ManifestError(
                f"'{path}' has no target column '{target}'{did_you_mean(target, columns)}; "
                f"its columns are {', '.join(columns)}"
            )
    usual = {name: reports.normalise_column(name) for name in columns if name not in COLUMNS}
    metadata = {name: to for name, to in usual.items() if to in reports.METADATA_COLUMNS}
    for name, count in Counter(metadata.values()).items():
        if count > 1:
            both = ", ".join(c for c, to in metadata.items() if to == name)
            raise ManifestError(f"'{path}': the columns {both} all mean '{name}'; keep one")
    notes = []
    known = (*COLUMNS, *sorted(reports.METADATA_COLUMNS))
    for name in columns:
        if name and name not in (*COLUMNS, *metadata, *places.values()):
            near = did_you_mean(name, known)
            notes.append(f"column '{name}' is not used{near}; name it in targets to use it")
    if "split" not in columns:
        notes.append("no column 'split': every row counts as train")
    if "subject_id" not in columns:
        notes.append("no column 'subject_id': every recording counts as a subject of its own")
    return metadata, [Problem(None, "", note, fatal=False) for note in notes]


def _row(
    number: int,
    cells: dict[str, str],
    metadata_columns: dict[str, str],
    places: dict[str, str],
    folder: str | Path,
    reports_required: bool,
) -> tuple[Row | None, list[Problem]]:
    record = {name: _value(name, cells[name]) for name in COLUMNS if name in cells}
    targets = {target: _value(target, cells[place]) for target, place in places.items()}
    name = record["audio_path"]
    wrong = []
    if not name:
        wrong.append("no audio_path")
    elif "\0" in name:
        wrong.append("audio_path holds a NUL character")
    elif is_remote(name):
        wrong.append(f"audio_path is not a local path: {ADVICE}")
    metadata = {
        to: cells[column]
        for column, to in metadata_columns.items()
        if not says_nothing(to, cells[column])
    }
    report = record.get("report") or None
    if report is None and reports_required:
        wrong.extend(_no_report(metadata))
    split = record.get("split", "train").lower()
    split = SPLIT_ALIASES.get(split, split)
    if not split:
        wrong.append("no split; write one of train, valid, test")
    elif split not in SPLITS:
        near = did_you_mean(split, (*SPLITS, *SPLIT_ALIASES))
        wrong.append(f"unknown split '{record['split']}'{near}; write one of train, valid, test")
    if wrong:
        return None, [Problem(number, name, reason, fatal=True) for reason in wrong]
    notes = []
    if "subject_id" in record and not record["subject_id"]:
        note = "no subject_id: counts as a subject of its own"
        notes.append(Problem(number, name, note, fatal=False))
    row = Row(
        row=number,
        audio_path=place_of(folder, name),
        subject_id=record.get("subject_id") or name,
        split=split,
        label=record.get("label") or None,
        targets={target: text for target, text in targets.items() if text},
        metadata=metadata,
        report=report,
    )
    return row, notes


def _no_report(metadata: dict[str, str]) -> list[str]:
    if not metadata:
        return ["no report, and no metadata to make one from"]
    try:
        reports.wordings(metadata, 1, 0)
    except reports.ReportError as error:
        return [f"no report, and none can be made from the metadata: {error}"]
    return []


def check(
    rows: Iterable[Row],
    problems: Iterable[Problem],
    *,
    check_audio: bool = True,
    max_bad_fraction: float = 0.01,
    max_seconds: float | None = None,
    digest_sound: Callable[[Row], bytes] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Checked:
    """Checks recordings and what holds between rows, and decides whether to go on.

    Args:
      rows, problems: from `read_manifest`.
      check_audio: decode every file (in threads); without it files only have to exist.
      max_bad_fraction: share of rows that may be unusable, 0 to 1.
      max_seconds: what is read of a recording; None reads all of it.
      digest_sound: decodes and checks a row's file and gives a digest of its samples, or raises
        `AudioError`; a caller that keeps them does not decode twice. By default read at 16 kHz,
        forgotten.
      progress: called with (files looked at, files in all).

    Raises:
      ManifestError: a subject in two splits, more unusable rows than allowed, or no row
        left. `.problems` has everything.
    """
    rows, problems = list(rows), list(problems)
    _check_fraction(max_bad_fraction)
    duplicates = _duplicates(rows)
    same = {problem.row for problem in duplicates}
    look = [row for row in rows if row.row not in same]
    sounds = _audio_problems(look, check_audio, max_seconds, digest_sound, progress)
    return check_rows(rows, [*problems, *duplicates, *sounds], max_bad_fraction)


def check_rows(
    rows: Iterable[Row], problems: Iterable[Problem], max_bad_fraction: float = 0.01
) -> Checked:
    """The part of `check` that opens no recording: what holds between rows, and whether to go on.

    Raises:
      ManifestError: as `check`.
    """
    rows, problems = list(rows), list(problems)
    _check_fraction(max_bad_fraction)
    unusable = {problem.row for problem in problems if problem.fatal}
    total = len(rows) + len(unusable - {None} - {row.row for row in rows})
    by_subject = in_two_splits((row.row, row.subject_id, row.split) for row in rows)
    problems += [Problem(None, "", reason, fatal=True) for reason in by_subject]
    problems += _alike_subjects_in_two_splits(rows)
    problems.sort(key=lambda p: (not p.fatal, p.row is not None, p.row or 0))
    bad = {problem.row for problem in problems if problem.fatal}
    kept = tuple(row for row in rows if row.row not in bad)
    _stop_if_unusable(kept, problems, len(bad - {None}), total, max_bad_fraction)
    return Checked(kept, tuple(problems))


def _check_fraction(max_bad_fraction: float) -> None:
    if not 0 <= max_bad_fraction <= 1:
        raise ManifestError(f"max_bad_fraction is {max_bad_fraction}; it has to be 0 to 1")


def _stop_if_unusable(
    kept: Sequence[Row], problems: list[Problem], bad: int, total: int, max_bad_fraction: float
) -> None:
    whole = [problem.reason for problem in problems if problem.fatal and problem.row is None]
    if whole:
        why = f"the manifest cannot be used: {len(whole)} problem(s) of the whole"
    elif not kept:
        why = f"no row is left: {bad} of {total} rows cannot be used"
    elif bad > max_bad_fraction * total:
        why = (
            f"{bad} of {total} rows ({bad / total:.1%}) cannot be used, more than the "
            f"{max_bad_fraction:.1%} that max_bad_fraction allows"
        )
    else:
        return
    fatal = [problem for problem in problems if problem.fatal]
    table = problem_table(fatal, limit=LINES_IN_MESSAGE)
    raise ManifestError(f"{why}. Mend or remove the rows:\n{table}", tuple(problems))


def _alike_subjects_in_two_splits(rows: Sequence[Row]) -> list[Problem]:
    """Notes on subjects of different splits whose names differ as spellings of one name do."""
    found = []
    for places in alike_subjects([row.named_subject for row in rows]):
        first = {subject: rows[place] for subject, place in places.items()}
        if len({row.split for row in first.values()}) > 1:
            where = ", ".join(f"'{s}' in {r.split} (row {r.row})" for s, r in first.items())
            reason = f"subjects that may be one, in different splits: {where}"
            found.append(Problem(None, "", reason, fatal=False))
    return found


def _duplicates(rows: Sequence[Row]) -> list[Problem]:
    """Files that an earlier row names already, whatever the spelling (links included)."""
    first: dict[object, Row] = {}
    found = []
    for row in rows:
        try:
            status = os.stat(row.audio_path)
            key: object = (status.st_dev, status.st_ino) if status.st_ino else None
        except OSError:
            key = None
        key = key or os.path.realpath(row.audio_path)
        if key in first:
            earlier = first[key]
            reason = f"the same file as row {earlier.row} ('{earlier.audio_path}')"
            found.append(Problem(row.row, row.audio_path, reason, fatal=True))
        else:
            first[key] = row
    return found


def _audio_problems(
    rows: Sequence[Row],
    decode: bool,
    max_seconds: float | None,
    digest_sound: Callable[[Row], bytes] | None,
    progress: Callable[[int, int], None] | None,
) -> list[Problem]:
    def read_and_forget(row: Row) -> bytes:
        waveform = audio_io.read(row.audio_path, max_seconds=max_seconds)
        audio_io.check_waveform(waveform, row.audio_path)
        return hashlib.blake2b(waveform.tobytes(), digest_size=16).digest()

    digest_sound = digest_sound or read_and_forget

    def look(row: Row) -> tuple[list[Problem], bytes | None]:
        """What is wrong with a recording, and a digest of its samples."""
        digest, problems = None, []
        try:
            info = audio_io.probe(row.audio_path)
            if info.frames == 1:  # said here: resampled upwards it would be more than one
                raise audio_io.AudioError(row.audio_path, "holds a single sample; remove the row")
            if decode:
                digest = digest_sound(row)
        except audio_io.AudioError as error:
            return [Problem(row.row, row.audio_path, error.reason, fatal=True)], None
        if max_seconds is not None and info.seconds > max_seconds:
            reason = f"lasts {info.seconds:.1f} s: only the first {max_seconds:g} s are read"
            problems.append(Problem(row.row, row.audio_path, reason, fatal=False))
        return problems, digest

    found: list[Problem] = []
    first: dict[bytes, Row] = {}
    with ThreadPoolExecutor(max_workers=min(16, (os.cpu_count() or 1) + 2)) as pool:
        for done, (problems, digest) in enumerate(pool.map(look, rows), start=1):
            found.extend(problems)
            row = rows[done - 1]
            same = first.setdefault(digest, row) if digest else row
            if same is not row:
                reason = f"sample for sample the recording of row {same.row} ('{same.audio_path}')"
                found.append(Problem(row.row, row.audio_path, reason, fatal=True))
            if progress is not None:
                progress(done, len(rows))
    return found


def problem_table(problems: Iterable[Problem], limit: int | None = None) -> str:
    """What, why and which row as lines of text; `limit` lines, the rest counted."""
    problems = list(problems)
    shown = problems if limit is None else problems[:limit]
    cells = [("row", "what", "why")]
    for problem in shown:
        row = "-" if problem.row is None else str(problem.row)
        what = problem.audio_path or ("manifest" if problem.row is None else "(no path)")
        why = problem.reason if problem.fatal else f"note: {problem.reason}"
        cells.append((row, what, why))
    wide = [min(60, max(len(line[i]) for line in cells)) for i in range(2)]
    lines = [f"{row:>{wide[0]}}  {what:<{wide[1]}}  {why}" for row, what, why in cells]
    if len(shown) < len(problems):
        lines.append(f"... and {len(problems) - len(shown)} more")
    return "\n".join(lines)


def list_problems(problems: Sequence[Problem], out: str) -> None:
    """All problems in a file beside `out`, where they are more than a screen shows."""
    if len(problems) > LINES_IN_MESSAGE:
        listing = Path(out + ".unusable_rows.jsonl")
        listing.parent.mkdir(parents=True, exist_ok=True)
        write_problems(problems, listing)
        print(f"all {len(problems)} problems: '{listing}'", file=sys.stderr)


def write_problems(problems: Iterable[Problem], path: str | Path) -> None:
    """Writes one JSON object per problem; the file appears whole or not at all."""
    lines = (json.dumps(asdict(problem), ensure_ascii=False) + "\n" for problem in problems)
    write_whole(Path(path), encoded("".join(lines)))


def without_folder(row: Row, folder: str | Path) -> Row:
    """The row with its path as seen from the folder, if the file lies inside it."""
    relative = os.path.relpath(row.audio_path, folder)
    return row if relative.startswith(os.pardir) else replace(row, audio_path=relative)
