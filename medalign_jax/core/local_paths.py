"""Places like ``gs://bucket/folder`` are refused: files are read and written on mounted disks only.

Taken as a path, such a place would become a local folder ``gs:``, and a run would report success
with nothing in the bucket.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from medalign_jax.core.errors import UserError

_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_FOLDED = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # as pathlib writes it
ADVICE = (
    "mount it (gcsfuse, Mountpoint for S3, NFS) and name the mounted folder, or copy it to a disk "
    "of this machine"
)


def is_remote(place: str | PurePath) -> bool:
    """Whether a place has a scheme, as gs://, s3:// or https:// are."""
    if isinstance(place, PurePath):
        return bool(_FOLDED.match(str(place)))
    return bool(_REMOTE.match(place))


def check_local(given: Any, name: str = "") -> None:
    """Refuses places that are not on this machine's disks, wherever they stand.

    Args:
      given: a text or path, or a mapping, list or tuple of such; other values are passed over.
      name: what the user calls it; "config" for a config with keys such as config.data.manifest.

    Raises:
      UserError: names each of them, and what to do.
    """
    found = [f"{which} is {place}" if which else place for which, place in _remote(given, name)]
    if found:
        raise UserError(f"{' and '.join(found)}, which is not a local path: {ADVICE}")


def local(place: str | PurePath) -> Path:
    """The path that a user has named.

    Raises:
      UserError: it is not a local one.
    """
    check_local(place)
    return Path(place)


def place_of(folder: str | PurePath, name: str) -> str:
    """The file that a table names, relative to a folder; ``~/`` is the user's home."""
    return os.path.normpath(os.path.join(folder, os.path.expanduser(name)))


def _remote(given: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(given, Mapping):
        for key, inner in given.items():
            yield from _remote(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(given, list | tuple):
        for inner in given:
            yield from _remote(inner, name)
    elif isinstance(given, str | PurePath) and is_remote(given):
        yield name, str(given)
