"""A frozen teacher's outputs at the response tokens, on disk: later epochs run no teacher.

Layout::

    FOLDER/
      teacher.json                       what made them (`Fingerprint`): one teacher per folder
      states-<digits>.array_record       some examples each

An example is known by the SHA-256 of its token ids and positions (`example_key`). Of each there are
the chosen layers' hidden states at the positions that predict its R response tokens, and either the
last hidden state or the k most probable next tokens:

    "states"      (layers, R, W) bfloat16
    "last"        (R, W) bfloat16            form "last"
    "ids"         (R, k) int32               form "top_k"
    "log_probs"   (R, k) float32             form "top_k"
    "rest"        (R,) float32               form "top_k": log-probability of all other tokens

Rounding to bfloat16 moves a number by at most 2^-8 of it; what is bfloat16 already, and the log
probabilities, come back bit for bit.

A file is written under a temporary name and renamed when it is whole, so a kill costs at most the
examples of one file. Its records are plain bytes, one per example (a header, then the arrays,
little endian), and last the table of the keys; array_record keeps a hash of each, so that damage is
noticed on reading.
"""

import contextlib
import fcntl
import functools
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from medalign_jax.core.files import write_whole
from medalign_jax.teachers.state_record import (
    KEY_BYTES,
    Fingerprint,
    StateCacheError,
    batch_keys,
    decode,
    encode,
    example_key,
    layout_of,
)
from medalign_jax.teachers.state_shards import (
    NewShard,
    damaged,
    find_examples,
    open_reader,
    read_record,
    shard_paths,
)

__all__ = [
    "Fingerprint",
    "StateCache",
    "StateCacheError",
    "StateCacheWriter",
    "batch_keys",
    "example_key",
    "open_state_cache",
]

SHARD_EXAMPLES = 128
OPEN_FILES = 256  # kept open for reading
_DESCRIPTION = "teacher.json"


def _check_fingerprint(folder: Path, fingerprint: Fingerprint) -> bool:
    """Whether the folder has a fingerprint, after seeing that it is this one."""
    path = folder / _DESCRIPTION
    if not path.exists():
        return False
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StateCacheError(f"{path} cannot be read ({error}); delete {folder}") from error
    asked = fingerprint.as_dict()
    there = found if isinstance(found, dict) else {}
    differing = [
        f"{name} is {there.get(name)!r} there and {asked.get(name)!r} now"
        for name in sorted(asked.keys() | there.keys())
        if asked.get(name) != there.get(name)
    ]
    if differing:
        raise StateCacheError(
            f"{folder} is a cache of another teacher: {'; '.join(differing)}. Name another folder, "
            "or delete it"
        )
    return True


class StateCache:
    """The examples of a folder, by key. Threads may share it; processes get it by pickling."""

    def __init__(self, folder: str | os.PathLike[str], fingerprint: Fingerprint):
        """See `open_state_cache`."""
        self.folder = Path(folder)
        self.fingerprint = fingerprint
        if not _check_fingerprint(self.folder, fingerprint):
            raise StateCacheError(
                f"{self.folder} is not a cache of teacher states (no {_DESCRIPTION} in it): let "
                "the teacher run over the data once with the same folder"
            )
        self._places = find_examples(self.folder)
        self._reader = functools.lru_cache(OPEN_FILES)(open_reader)

    def __reduce__(self) -> tuple[Any, ...]:
        return open_state_cache, (self.folder, self.fingerprint)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def missing(self, keys: Iterable[bytes | None]) -> list[bytes]:
        """The keys that are not there, each once, in order."""
        wanted = (key for key in keys if key is not None)
        return [key for key in dict.fromkeys(wanted) if key not in self._places]

    def read(self, key: bytes, length: int) -> dict[str, np.ndarray]:
        """The arrays of an example (see this module's head), positions padded with zeros.

        Args:
          key: from `example_key`.
          length: positions of the result, R or more.

        Raises:
          StateCacheError: no such example, more positions than `length`, or a damaged file.
        """
        return {name: array[0] for name, array in self.batch([key], length).items()}

    def batch(self, keys: Sequence[bytes | None], length: int) -> dict[str, np.ndarray]:
        """The arrays of several examples, with B in front; zeros in rows whose key is None.

        Raises:
          StateCacheError: as `read` does.
        """
        layout = layout_of(self.fingerprint, length)
        out = {name: np.zeros((len(keys), *s), dtype) for name, (s, dtype) in layout.items()}
        for row, key in enumerate(keys):
            if key is None:
                continue
            for name, array in self._arrays(key, length).items():
                before = (slice(None),) * (name == "states")  # where layers come first
                out[name][row][(*before, slice(array.shape[len(before)]))] = array
        return out

    def _arrays(self, key: bytes, length: int) -> dict[str, np.ndarray]:
        if key not in self._places:
            raise StateCacheError(
                f"example {key.hex()[:16]} is not in the teacher cache {self.folder}: let the "
                "teacher run over the data again; it computes what is missing"
            )
        path, number = self._places[key]
        record = read_record(self._reader(path), path, number)
        arrays = decode(record, self.fingerprint, key)
        if arrays is None:
            raise damaged(path, f"record {number} is not that of example {key.hex()[:16]}")
        found = arrays["states"].shape[1]
        if found > length:
            raise StateCacheError(
                f"example {key.hex()[:16]} has {found} response positions; {length} asked for"
            )
        return arrays


def open_state_cache(folder: str | os.PathLike[str], fingerprint: Fingerprint) -> StateCache:
    """Opens a folder that `StateCacheWriter` has filled; reads the tables of keys only.

    Raises:
      StateCacheError: no such folder, one of another teacher (names what differs), or a file that
        is damaged (names it).
    """
    return StateCache(folder, fingerprint)


class StateCacheWriter:
    """Fills a folder; what is there already stays, and need not be computed again.

    Several processes may fill one folder, each as a `writer` of its own number and with examples of
    its own. Used as a context manager, or closed at the end: the last examples are written then.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        fingerprint: Fingerprint,
        *,
        shard_examples: int = SHARD_EXAMPLES,
        writer: int = 0,
    ):
        """Opens or makes the folder.

        Args:
          folder: one per teacher.
          fingerprint: what the states depend on.
          shard_examples: examples per file: what a kill can cost.
          writer: number of this process among those that write.

        Raises:
          StateCacheError: a folder of another teacher (names what differs), a damaged file (names
            it), or another process that writes under the same number.
        """
        if shard_examples < 1:
            raise StateCacheError(f"shard_examples must be 1 or more, not {shard_examples}")
        self.folder = Path(folder)
        self.fingerprint = fingerprint
        self._shard_examples = shard_examples
        self._temporary = f".writing-{writer}-"
        self._file: NewShard | None = None
        self._lock: int | None = self._take_lock(writer)
        try:
            for left in self.folder.glob(f"{self._temporary}*"):  # by a run that was killed
                left.unlink()
            self._describe()
            self._known = set(find_examples(self.folder))
        except BaseException:
            self._release()
            raise

    def _take_lock(self, writer: int) -> int:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / f".writer-{writer}", os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise StateCacheError(
                f"teacher cache: {self.folder} cannot be written to ({error})"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise StateCacheError(
                f"another process writes to the teacher cache {self.folder} as writer {writer}; "
                "wait until it ends, or give each process a number of its own"
            ) from None
        return lock

    def _describe(self) -> None:
        if _check_fingerprint(self.folder, self.fingerprint):
            return
        if shard_paths(self.folder):
            raise StateCacheError(
                f"{self.folder} has teacher states but no {_DESCRIPTION} that says whose; name "
                "another folder, or delete it"
            )
        text = json.dumps(self.fingerprint.as_dict(), indent=1)
        write_whole(self.folder / _DESCRIPTION, text.encode())

    def __contains__(self, key: bytes) -> bool:
        return key in self._known

    def __len__(self) -> int:
        return len(self._known)

    def missing(self, keys: Iterable[bytes | None]) -> list[bytes]:
        """The keys that still have to be computed, each once, in order."""
        wanted = (key for key in keys if key is not None)
        return [key for key in dict.fromkeys(wanted) if key not in self._known]

    def add(self, key: bytes, arrays: Mapping[str, Any]) -> bool:
        """Takes an example: the arrays of this module's head, of its own R positions.

        States may be of any floating dtype; they are rounded to bfloat16.

        Returns:
          Whether it was taken: an example that is there already is not written twice.

        Raises:
          StateCacheError: arrays of a wrong name, shape or type, numbers that are not finite, or a
            file that cannot be written.
        """
        if self._lock is None:
            raise StateCacheError(f"the writer of the teacher cache {self.folder} is closed")
        if len(key) != KEY_BYTES:
            raise StateCacheError(f"a key has {KEY_BYTES} bytes, not {len(key)}: see example_key")
        if key in self._known:
            return False
        record = encode(self.fingerprint, key, arrays)
        with self._dropped_on_error():
            if self._file is None:
                self._file = NewShard(self.folder / f"{self._temporary}{uuid.uuid4().hex}")
            self._file.add(key, record)
        self._known.add(key)
        if len(self._file.keys) >= self._shard_examples:
            self.flush()
        return True

    def flush(self) -> None:
        """Puts the examples taken since the last file into one of their own."""
        if self._file is not None:
            with self._dropped_on_error():
                self._file.finish()
            self._file = None

    @contextlib.contextmanager
    def _dropped_on_error(self) -> Iterator[None]:
        """A file that cannot be written is given up, with its examples."""
        try:
            yield
        except StateCacheError:
            if self._file is not None:
                self._known.difference_update(self._file.keys)
                self._file = None
            raise

    def close(self) -> None:
        """Writes the last examples and lets other processes write; may be called twice."""
        try:
            self.flush()
        finally:
            self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "StateCacheWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # What was computed before an error is good, and is kept.
        self.close()
