"""Where waveforms come from: audio files, or the records of a prepared data set.

Both give the same thing, a clip as 16-bit integers times a power of two, so that a manifest and
the data set prepared from it, a first epoch and one from memory, agree bit for bit.
"""

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from medalign_jax.audio import io as audio_io

CACHE_BYTES = 2 << 30


@dataclass(frozen=True)
class Clip:
    """Samples (n,) int16; the waveform is `samples * scale`, scale a power of two."""

    samples: np.ndarray
    scale: float

    def waveform(self) -> np.ndarray:
        """The waveform (n,) float32."""
        return self.samples.astype(np.float32) * np.float32(self.scale)

    def digest(self) -> bytes:
        """Of the samples, however loud: 16 bytes."""
        return hashlib.sha256(self.samples.tobytes()).digest()[:16]

    def sound(self, digest: bytes | None = None) -> str:
        """A digest of the sound: equal for equal waveforms. `digest` where it is known."""
        return f"{(digest or self.digest()).hex()}:{self.scale!r}"


def quantise(waveform: np.ndarray) -> Clip:
    """16 bits with the smallest power-of-two step that clips nothing.

    16-bit audio read at its own rate comes back exactly; otherwise the error is at most half a
    step, 2**-16 of the peak rounded up to a power of two (-96 dB). Resampled peaks above full
    scale and very quiet recordings keep their shape.

    Args:
      waveform: (n,) float32, finite, not empty.
    """
    low, high = float(waveform.min()), float(waveform.max())
    peak = max(-low, high, 2.0**-100)
    scale = 2.0 ** (int(np.frexp(peak)[1]) - 16)
    while np.rint(high / scale) > 32767 or np.rint(low / scale) < -32768:
        scale *= 2
    return Clip(np.rint(waveform / np.float32(scale)).astype(np.int16), scale)


class Source(Protocol):
    """Clips by position; safe to call from several threads, and picklable."""

    sample_rate: int

    def clip(self, position: int) -> Clip:
        """Raises `AudioError` where the clip cannot be read."""
        ...


class CachedSource:
    """Keeps clips in memory, first come first kept, until a number of bytes is used.

    A pickled copy (one goes to each worker process) starts empty.
    """

    def __init__(self, source: Source, cache_bytes: int = CACHE_BYTES):
        self.source = source
        self.cache_bytes = cache_bytes
        self._clear()

    @property
    def sample_rate(self) -> int:
        return self.source.sample_rate

    def _clear(self) -> None:
        self._kept: dict[int, Clip] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        return {"source": self.source, "cache_bytes": self.cache_bytes}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._clear()

    def clip(self, position: int) -> Clip:
        kept = self._kept.get(position)
        if kept is not None:
            return kept
        clip = self.source.clip(position)
        with self._lock:
            if position not in self._kept and self._bytes + clip.samples.nbytes <= self.cache_bytes:
                self._kept[position] = clip
                self._bytes += clip.samples.nbytes
        return clip


class FileSource:
    """Audio files, decoded, mixed to mono and resampled when asked for."""

    def __init__(self, paths: Sequence[str], sample_rate: int, max_seconds: float | None):
        self.paths = tuple(paths)
        self.sample_rate = sample_rate
        self.max_seconds = max_seconds

    def clip(self, position: int) -> Clip:
        path = self.paths[position]
        waveform = audio_io.read(path, self.sample_rate, self.max_seconds)
        audio_io.check_waveform(waveform, path)
        return quantise(waveform)
