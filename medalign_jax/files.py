"""The one way in which a file is written whole or not at all, and its name in words."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Writes beside `path`, then renames: a reader sees the old file or the whole new one."""
    handle, temporary = tempfile.mkstemp(prefix=".writing-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's are for its maker alone
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def printable(path: str | os.PathLike) -> str:
    """A file's name as text that can be printed and stored: bytes that are no UTF-8 are escaped.

    Other names are as they were; "souffl\\xe9.wav" stands for a name in Latin-1.
    """
    return os.fspath(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
