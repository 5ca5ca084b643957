"""Long work on many records, resumable to the record: a file that grows by one line per record."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from medalign_jax.core.errors import UserError
from medalign_jax.core.files import encoded


class Journal:
    """Finished records by id, on disk as soon as `add` returns.

    The first line says of which run the file is; each further line is a record, ``{"id": ...}``
    and what else there is. A last line that a kill left half-written is cut off. While the file is
    open it is locked, so that no two processes write the same record.

    Args:
      path: of the file; made if need be.
      run: names what the records follow from (a digest of model, prompts and settings).

    Attributes:
      done: id -> record.

    Raises:
      UserError: the file belongs to another run, is open in another process, or is damaged.
    """

    def __init__(self, path: str | Path, run: str):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b")  # noqa: SIM115 - closed by `close`
        try:
            self._lock()
            self.done = self._read(run)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Writes records, each with an id that is not there yet, and waits for the disk.

        Raises:
          ValueError: an id that is there.
        """
        for record in records:
            if record["id"] in self.done:
                raise ValueError(f"the record '{record['id']}' is in {self.path} already")
            self.done[record["id"]] = record
        self._write(records)

    def close(self) -> None:
        """Ends the lock."""
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.path} is open in another process; wait for it to end, or choose another "
                "--workdir"
            ) from None

    def _read(self, run: str) -> dict[str, dict[str, Any]]:
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        self._file.truncate(whole)
        lines = data[:whole].split(b"\n")[:-1]
        if not lines:
            self._write([{"run": run}])
            return {}
        found: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(lines, start=1):
            record = self._parsed(line, number)
            if number == 1:
                if record.get("run") != run:
                    raise UserError(
                        f"{self.path} was begun with other data, weights or settings; take those, "
                        "or choose another --workdir"
                    )
            elif not isinstance(record.get("id"), str) or record["id"] in found:
                raise UserError(self._damaged(number))
            else:
                found[record["id"]] = record
        return found

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(self._damaged(number)) from error
        if not isinstance(record, dict):
            raise UserError(self._damaged(number))
        return record

    def _damaged(self, number: int) -> str:
        return (
            f"{self.path}, line {number}, is damaged or there twice; remove the line, or the file "
            "to begin anew"
        )

    def _write(self, records: Sequence[dict[str, Any]]) -> None:
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        self._file.write(encoded(text))
        self._file.flush()
        os.fsync(self._file.fileno())
