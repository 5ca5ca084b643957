"""Checksums of the files of a folder, kept in it as ``sha256sum -c medalign.sha256`` reads them.

    seal(folder)           when all of it is written
    check_seal(folder)     before any of it is trusted

A folder without the file (of an older version, or one that was killed just before it was sealed)
cannot be checked; `check_seal` says so and whoever reads decides. SHA-256 takes about a second for
1.5 GB where the processor has instructions for it; several files are hashed at once.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from medalign_jax.core.errors import UserError
from medalign_jax.core.files import write_whole

NAME = "medalign.sha256"  # no name that a published folder of weights may use otherwise
LOOSE = ("README.md", "reports.parquet")  # for people to edit, or to leave behind
_LINE = re.compile(r"([0-9a-f]{64})  ([^\n]+)")


class DamagedError(UserError):
    """Files are not what they were when their folder was sealed; names them."""


def seal(folder: Path, but: Container[str] = ()) -> None:
    """Writes the checksums of a folder's files, all but `LOOSE` and some names (relative to it)."""
    folder = Path(folder)
    names = [name for name in _names(folder) if name not in but and name not in LOOSE]
    digests = _digests(folder, names)
    lines = (f"{digest}  {name}\n" for name, digest in zip(names, digests, strict=True))
    write_whole(folder / NAME, "".join(lines).encode())


def check_seal(folder: Path, under: str = "", share: tuple[int, int] = (0, 1)) -> bool:
    """Reads every sealed file and compares it; gives False for a folder without checksums.

    Args:
      folder: as it was given to `seal`.
      under: only files whose names begin so.
      share: (i, n): each n-th file from the i-th, where n processes share the work.

    Raises:
      DamagedError: files that are missing or have other bytes, or a list of checksums that is
        none.
    """
    folder = Path(folder)
    try:
        text = (folder / NAME).read_bytes().decode()
    except FileNotFoundError:
        return False
    except UnicodeDecodeError:
        text = "damaged"
    matches = [_LINE.fullmatch(line) for line in text.removesuffix("\n").split("\n")]
    if not text.endswith("\n") or not all(matches):
        raise DamagedError(f"{folder / NAME} is damaged: it is not a list of checksums")
    expected = {match[2]: match[1] for match in matches}
    names = [name for name in expected if name.startswith(under)][share[0] :: share[1]]
    found = dict(zip(names, _digests(folder, names), strict=True))
    wrong = [name for name in names if found[name] != expected[name]]
    if wrong:
        what = [name + (" (missing)" if found[name] is None else "") for name in wrong[:5]]
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise DamagedError(
            f"{folder} is damaged: {', '.join(what)}{more} not as when written (SHA-256)"
        )
    return True


def check_seal_once(folder: Path) -> bool:
    """`check_seal`, which reads again only what has changed since this process read it."""
    folder = Path(folder).absolute()
    if not (folder / NAME).is_file():
        return False
    states = ((name, (folder / name).stat()) for name in [NAME, *_names(folder)])
    return _checked(folder, tuple((name, s.st_mtime_ns, s.st_size) for name, s in states))


@functools.lru_cache(maxsize=64)
def _checked(folder: Path, states: tuple) -> bool:
    del states
    try:
        return check_seal(folder)
    except DamagedError as error:
        raise DamagedError(
            f"{error}; copy or export it again, or, where it was changed on purpose, delete "
            f"{folder / NAME}"
        ) from error


def _names(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    names = (path.relative_to(folder).as_posix() for path in files)
    return sorted(name for name in names if name != NAME and not name.startswith(".writing-"))


def _digests(folder: Path, names: Sequence[str]) -> list[str | None]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda name: _sha256(folder / name), names))


def _sha256(path: Path) -> str | None:
    """Of a file, in hex; None of one that is not there, or whose name no file can have."""
    if not os.path.isfile(path):
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
