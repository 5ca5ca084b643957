"""Files of the teacher cache: array_record, with a table of the keys as the last record.

A file is written under a temporary name and renamed when it is whole. array_record keeps a hash of
each record, so that damage is noticed on reading.
"""

import hashlib
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from medalign_jax.core.files import sync
from medalign_jax.teachers.state_record import KEY_BYTES, MAGIC, StateCacheError

_TABLE = struct.Struct("<4sI")  # magic, number of keys, which follow


def damaged(path: Path, reason: object) -> StateCacheError:
    """An error that names the file and what to do."""
    return StateCacheError(
        f"damaged teacher cache: {path} ({reason}); delete this file and start again: its examples "
        "will be computed anew"
    )


def open_reader(path: Path) -> Any:
    """A reader that threads may share; it closes its file when nothing refers to it any more.

    Raises:
      StateCacheError: not a whole file.
    """
    # Random access: what lies behind a record is not read ahead.
    options = {"options": "readahead_buffer_size:0", "file_reader_buffer_size": 2**15}
    try:
        reader = ArrayRecordReader(str(path), **options)
        if not reader.ok():
            reader.close()  # which says why
        return reader
    except RuntimeError as error:
        raise damaged(path, error) from error


def read_record(reader: Any, path: Path, number: int) -> bytes:
    """Record `number` of an opened file.

    Raises:
      StateCacheError: it is damaged.
    """
    try:
        return reader.read([number])[0]
    except (RuntimeError, IndexError, ValueError) as error:
        raise damaged(path, f"record {number}: {error}") from error


def shard_paths(folder: Path) -> list[Path]:
    """The whole files of a folder."""
    return sorted(folder.glob("states-*.array_record"))


def find_examples(folder: Path) -> dict[bytes, tuple[Path, int]]:
    """File and record number of each example of a folder, by key.

    Raises:
      StateCacheError: a file is damaged, or two hold the same example.
    """
    places: dict[bytes, tuple[Path, int]] = {}
    for path in shard_paths(folder):
        for number, key in enumerate(_read_keys(path)):
            if key in places:
                raise StateCacheError(
                    f"teacher cache: example {key.hex()[:16]} is in {places[key][0]} and in "
                    f"{path}; delete one of the files"
                )
            places[key] = (path, number)
    return places


def _read_keys(path: Path) -> list[bytes]:
    reader = open_reader(path)
    count = reader.num_records() - 1
    record = read_record(reader, path, count) if count >= 0 else b""
    head = record[: _TABLE.size]
    if len(head) < _TABLE.size or _TABLE.unpack(head) != (MAGIC, count):
        raise damaged(path, "no table of keys at its end")
    if len(record) != _TABLE.size + KEY_BYTES * count:
        raise damaged(path, "a table of keys of a wrong size")
    return [record[i : i + KEY_BYTES] for i in range(_TABLE.size, len(record), KEY_BYTES)]


class NewShard:
    """A file that is being written, under a temporary name until it is whole."""

    def __init__(self, temporary: Path):
        self._temporary = temporary
        self.keys: list[bytes] = []
        # Hidden states hardly shrink; one group per record is what random access needs.
        self._file = self._tried(
            lambda: ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        )

    def add(self, key: bytes, record: bytes) -> None:
        """Appends a record."""
        self._tried(lambda: self._file.write(record))
        self.keys.append(key)

    def finish(self) -> None:
        """Appends the table of keys and gives the file its name, which comes from the keys."""
        keys = b"".join(self.keys)
        self._tried(lambda: self._file.write(_TABLE.pack(MAGIC, len(self.keys)) + keys))
        self._tried(lambda: self._file.close())
        digits = hashlib.sha256(keys).hexdigest()[:16]
        target = self._temporary.with_name(f"states-{digits}.array_record")
        self._tried(lambda: replace(self._temporary, target))

    def _tried(self, step: Callable[[], Any]) -> Any:
        try:
            return step()
        except (RuntimeError, OSError) as error:
            self._temporary.unlink(missing_ok=True)
            raise StateCacheError(
                f"teacher cache: {self._temporary} cannot be written ({error}); see to room on the "
                "disk and to permissions, and start again"
            ) from error


def replace(temporary: Path, target: Path) -> None:
    """Gives a file its name once it is on the disk."""
    sync(temporary)
    os.replace(temporary, target)
    sync(target.parent)
