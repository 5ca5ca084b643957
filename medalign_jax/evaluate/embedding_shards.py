"""Files of the store of embeddings: safetensors whose names are the hashes of their content.

Layout::

    FOLDER/<identity of the encoder, 16 digits>/
      encoder.json                       its settings, for people
      <sha256 of the content>.safetensors    "recordings" (n, 32) uint8, "embeddings" (n, D) float32

A file is written whole under a temporary name and then renamed. So a process that is killed leaves
at most a temporary file, processes that write at the same time do not meet, and damage is noticed
on reading.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as parse_safetensors
from safetensors.numpy import save as to_safetensors

from medalign_jax.core.errors import UserError
from medalign_jax.core.files import write_whole

KEY_BYTES = 32
_DIGITS = 16  # of an identity, in the name of a folder


class Shards:
    """Embeddings of one encoder: those of earlier runs, and new ones as they come.

    Attributes:
      known: embedding (D,) of each recording's key.
      damaged: files that were found damaged and removed, with the reason.
    """

    def __init__(
        self, folder: Path | None, identity: str, settings: dict[str, Any], width: int,
        recordings: int, seconds: float,
    ):  # fmt: skip
        """Of `folder` (None: nothing is kept); a file holds so many, or what so long has given."""
        self._folder = None if folder is None else folder / identity[:_DIGITS]
        self._settings, self._width = settings | {"identity": identity}, width
        self._most, self._seconds = recordings, seconds
        self.known: dict[bytes, np.ndarray] = {}
        self.damaged: list[str] = []
        self._waiting: list[bytes] = []
        self._last = time.monotonic()

    def read(self, wanted: Container[bytes]) -> None:
        """Takes the wanted embeddings of the folder into `known`.

        A damaged file is removed, so that its embeddings are made again, and named in `damaged`.

        Raises:
          UserError: a file that cannot be read or removed.
        """
        paths = [] if self._folder is None else sorted(self._folder.glob("*.safetensors"))
        for path in paths:
            try:
                keys, vectors = _parse(path, path.read_bytes(), self._width)
            except _Damaged as error:
                self.damaged.append(f"{path} is damaged ({error})")
                _tried(path, "removed; delete it by hand", lambda p=path: p.unlink(missing_ok=True))
                continue
            except OSError as error:
                raise UserError(f"{path} cannot be read ({error}); see to its rights") from error
            found = ((key.tobytes(), vector) for key, vector in zip(keys, vectors, strict=True))
            self.known.update((key, vector) for key, vector in found if key in wanted)

    def start(self) -> None:
        """Begins the time after which a file is written."""
        self._last = time.monotonic()

    def add(self, key: bytes, vector: np.ndarray) -> None:
        """Keeps an embedding, on disk as soon as a file is full or due."""
        self.known[key] = vector
        self._waiting.append(key)
        if len(self._waiting) >= self._most or time.monotonic() - self._last >= self._seconds:
            self.flush()

    def flush(self) -> None:
        """Writes what waits.

        Raises:
          UserError: the folder cannot be written to.
        """
        keys, self._waiting, self._last = self._waiting, [], time.monotonic()
        if not keys or self._folder is None:
            return
        recordings = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), KEY_BYTES)
        vectors = np.stack([self.known[key] for key in keys])
        content = to_safetensors({"recordings": recordings, "embeddings": vectors})
        target = self._folder / f"{hashlib.sha256(content).hexdigest()}.safetensors"
        _tried(self._folder, "written to; see to room on the disk and rights",
               lambda: self._write(target, content))  # fmt: skip

    def _write(self, target: Path, content: bytes) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        description = self._folder / "encoder.json"
        if not description.exists():
            text = json.dumps(self._settings, indent=1) + "\n"
            write_whole(description, text.encode())
        write_whole(target, content)


class _Damaged(Exception):
    """Why a file is not a shard."""


def _parse(path: Path, content: bytes, width: int) -> tuple[np.ndarray, np.ndarray]:
    if hashlib.sha256(content).hexdigest() != path.stem:
        raise _Damaged("it does not match its checksum")
    try:
        tensors = parse_safetensors(content)
        keys, vectors = tensors["recordings"], tensors["embeddings"]
    except (SafetensorError, KeyError) as error:
        raise _Damaged(f"it is not a file of embeddings: {error}") from error
    if keys.shape != (len(vectors), KEY_BYTES) or vectors.shape != (len(keys), width):
        raise _Damaged(
            f"it holds keys {keys.shape} and embeddings {vectors.shape}, not (n, {KEY_BYTES}) and "
            f"(n, {width})"
        )
    return keys, vectors


def _tried(path: Path, what: str, step: Any) -> None:
    try:
        step()
    except OSError as error:
        raise UserError(f"{path} cannot be {what} ({error})") from error
