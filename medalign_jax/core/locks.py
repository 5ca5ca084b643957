"""One process at a time for a run's folder or an output file.

    with held(Path("workdirs/demo")):
        ...

The lock is the operating system's (`flock`), so it ends with the process that holds it, however
that dies. The lock file says who holds it, for the one who comes second; it lies in the folder, or
beside the file, and goes when the lock does. Runs take it by `runs.workdir.alone`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from medalign_jax.core.errors import UserError

_MISSES = 100  # times that a folder may be taken away before its file could be opened
_UNSUPPORTED = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)


class LockedError(UserError):
    """Another process works there; says which."""


def lock_file(path: Path, folder: bool) -> Path:
    """Where the lock of a folder, or of a file, lies."""
    path = Path(path)
    return path / ".lock" if folder else path.with_name(f".{path.name}.lock")


@contextlib.contextmanager
def held(path: Path, *, folder: bool = True, advice: str = "choose another --workdir") -> Iterator:
    """Holds a folder (made if need be) or an output file for this process alone; never waits.

    Args:
      path: of the folder or the file.
      folder: which of the two.
      advice: what else to do than to wait.

    Raises:
      LockedError: another process (or thread) holds it: its id, host and since when.
    """
    file = lock_file(path, folder)
    made = not file.parent.exists()
    handle = _open(file, Path(path), advice)
    try:
        _write_holder(handle)
        yield
    finally:
        file.unlink(missing_ok=True)  # before it is free: what is unlinked is never anybody else's
        os.close(handle)
        if made:
            with contextlib.suppress(OSError):  # something lies in it
                file.parent.rmdir()


def _open(file: Path, path: Path, advice: str) -> int:
    """The lock file, opened and locked."""
    missed = 0
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:  # a holder has just taken its empty folder away
            missed += 1
            if missed > _MISSES:  # or nothing can be made in it: /proc, a link to nowhere
                raise
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(handle)
            os.close(handle)
            raise LockedError(
                f"{path} is in use by another process{holder}; wait until it ends, or {advice}"
            ) from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                os.close(handle)
                raise
            print(f"warning: {path} cannot be locked on this file system ({error.strerror}): see "
                  "that no other process works there", flush=True)  # fmt: skip
            return handle
        if _is_named(handle, file):
            return handle
        os.close(handle)  # its holder has just ended and taken the name away: once more


def _is_named(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(file))
    except FileNotFoundError:
        return False


def _write_holder(handle: int) -> None:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    holder = {"process": os.getpid(), "host": socket.gethostname(), "since": since}
    os.ftruncate(handle, 0)
    os.pwrite(handle, (json.dumps(holder) + "\n").encode(), 0)


def _holder(handle: int) -> str:
    """Who holds it, in words; "" in the moment before that is written."""
    try:
        found = json.loads(os.pread(handle, 4096, 0))
        return f" (process {found['process']} on {found['host']}, since {found['since']})"
    except (ValueError, KeyError, TypeError):
        return ""
