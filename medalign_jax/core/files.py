"""The one way in which a file is written whole or not at all, and its name in words."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import socket
import struct
import uuid
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from medalign_jax.core.errors import UserError

# The host and the process that writes: what the dead have left can be told from work in progress.
_TEMPORARY = re.compile(r"\.writing-(?P<host>.+)-(?P<process>\d+)-[0-9a-f]{12}")

# What `zipfile` raises of damaged files: names that are not text and headers that are cut, too.
DAMAGED_ZIP = (
    zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError, ValueError, EOFError,
    struct.error, zlib.error,
)  # fmt: skip


@contextlib.contextmanager
def writing_whole(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to write a file to; it gets its name when the block ends.

    A reader sees the old file or the whole new one, several writers do not meet, and where the
    block raises there is nothing new. What killed processes have left in the folder is removed.
    """
    path = Path(path)
    _clear_once(path.parent.absolute())
    name = f".writing-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:12]}"
    temporary = path.parent / name
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_whole(path: Path, content: bytes) -> None:
    """Writes beside `path`, then renames: a reader sees the old file or the whole new one."""
    with writing_whole(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | os.PathLike, text: str) -> None:
    """UTF-8 text by `write_whole`; creates the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, encoded(text))


def clear_remains(folder: Path) -> None:
    """Removes what `writing_whole` of processes of this host that are dead has left there."""
    for entry in Path(folder).glob(".writing-*"):
        match = _TEMPORARY.fullmatch(entry.name)
        if match and match["host"] == socket.gethostname() and not is_running(match["process"]):
            entry.unlink(missing_ok=True)


_clear_once = functools.lru_cache(maxsize=None)(clear_remains)


def is_running(process: int | str) -> bool:
    """Whether this host has a process of that number."""
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        return True
    return True


def sync(path: Path) -> None:
    """Returns when a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def encoded(text: str) -> bytes:
    """UTF-8, also where a file name holds bytes that are not UTF-8 (`os.fsdecode` keeps them).

    They are written as \\udcXX, which in JSON is their escape: they are read back as they were.
    """
    return text.encode("utf-8", "backslashreplace")


def check_no_folders(folder: str | os.PathLike, names: Iterable[str]) -> None:
    """Refuses a folder in which something stands in the way of files that will be written.

    Raises:
      UserError: one of the names is a folder's; names it.
    """
    for path in (Path(folder) / name for name in names):
        if path.is_dir():
            raise UserError(
                f"{path} is a folder, and a file of that name will be written: move it away, or "
                "choose another place"
            )


def check_name(folder: str | os.PathLike) -> None:
    """Refuses a folder for what libraries write (checkpoints, records): they take UTF-8 alone.

    Raises:
      UserError: some bytes of its name are not UTF-8; names it.
    """
    if printable(folder) != os.fspath(folder):
        raise UserError(
            f"'{printable(folder)}': the name of this folder is not UTF-8 text, and the libraries "
            "that read and write there take no other; rename it, or choose another"
        )


def printable(path: str | os.PathLike) -> str:
    """A file's name as text that can be printed and stored: bytes that are not UTF-8 are escaped.

    Other names are as they were; "souffl\\xe9.wav" stands for a name in Latin-1.
    """
    return os.fspath(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
