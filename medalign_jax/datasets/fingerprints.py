"""Which recordings may be near-copies of each other, in time that grows with their number.

A recording becomes a signal of 1 kHz with its spectrum partly flattened. Around each of its peaks
(of either sign, found between samples) two pieces of 0.6 s are cut, one mostly after the peak and
one mostly before it, so that a part of 1.5 s has some that lie whole inside. Pieces are hashed by
random hyperplanes (Charikar, STOC 2002): two pieces whose cosine is c agree in one bit with
probability 1 - arccos(c) / pi. Two recordings that share codes at one and the same time offset
are candidates. Nothing here decides: see `leaks`.
"""

from __future__ import annotations

import numpy as np
import scipy.fft
import scipy.ndimage
import soxr

RATE = 1000  # Hz; what noise, MP3 and other sample rates leave alone lies below half of it
_BAND = (5.0, 450.0)  # Hz
_FLOOR = 0.3  # of the largest spectral density: what lies far below it is not raised
_SMOOTH = 20.0  # Hz
_UP = 4  # peaks are placed to a quarter of a sample
_NEAR = 30  # samples around a peak without a higher one
_SHORT, _LONG = 50, 550  # samples of a piece on either side of its peak
_BITS, _TABLES = 20, 48
_PARTNERS = 32  # of a piece in one table, where very many share a code
_SAME_OFFSET = 3.0  # ms
_VOTES = 2


def reduced(waveform: np.ndarray, sample_rate: int) -> np.ndarray:
    """A waveform (samples,) at `RATE` between 5 and 450 Hz, (n,) float32 of unit power."""
    signal = np.asarray(waveform, np.float32)
    if sample_rate != RATE:
        signal = soxr.resample(signal, sample_rate, RATE, quality="HQ")
    if len(signal) < 2:
        return np.zeros(len(signal), np.float32)
    size = scipy.fft.next_fast_len(len(signal), real=True)
    hertz = scipy.fft.rfftfreq(size, 1 / RATE)
    low = np.maximum(hertz / _BAND[0], 1e-9) ** -8
    spectrum = scipy.fft.rfft(signal, size) * (1 / (1 + low)) * (hertz < _BAND[1])
    signal = scipy.fft.irfft(spectrum, size)[: len(signal)]
    power = np.sqrt(np.mean(np.square(signal, dtype=np.float64)))
    return (signal / max(power, 1e-20)).astype(np.float32)


def flattened(signal: np.ndarray) -> np.ndarray:
    """A reduced signal (n,) whose spectrum is divided by its own course, down to a floor."""
    if not np.any(signal):
        return signal
    size = scipy.fft.next_fast_len(len(signal), real=True)
    spectrum = scipy.fft.rfft(signal, size)
    width = 2 * max(1, int(_SMOOTH * size / RATE / 2)) + 1
    density = scipy.ndimage.uniform_filter1d(np.abs(spectrum) ** 2, width, mode="nearest")
    return scipy.fft.irfft(
        spectrum / np.sqrt(density + _FLOOR * density.max()), size
    )[: len(signal)].astype(np.float32)  # fmt: skip


def pieces(flat: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Times (m,) in ms and pieces (m, 600) of unit length: those after peaks, those before."""
    if len(flat) < 2:
        return [(np.zeros(0), np.zeros((0, _SHORT + _LONG), np.float32))] * 2
    size = scipy.fft.next_fast_len(len(flat), real=True)
    fine = scipy.fft.irfft(scipy.fft.rfft(flat, size), size * _UP)[: len(flat) * _UP]
    height = np.abs(fine)
    highest = scipy.ndimage.maximum_filter1d(height, 2 * _NEAR * _UP + 1, mode="constant")
    peaks = np.flatnonzero((height == highest) & (height > 0))
    return [_cut(fine, peaks, *sides) for sides in ((_SHORT, _LONG), (_LONG, _SHORT))]


def _cut(
    fine: np.ndarray, peaks: np.ndarray, before: int, after: int
) -> tuple[np.ndarray, np.ndarray]:
    peaks = peaks[(peaks >= before * _UP) & (peaks <= len(fine) - after * _UP)]
    cut = fine[peaks[:, None] + np.arange(-before, after) * _UP] * np.sign(fine[peaks])[:, None]
    norm = np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), 1e-20)
    return peaks / (_UP * RATE / 1000), (cut / norm).astype(np.float32)


class Fingerprints:
    """Codes of the recordings added so far; about 3 kB a second of sound."""

    def __init__(self):
        """An empty store; its hyperplanes are always the same."""
        rng = np.random.default_rng(20)
        shape = (2, _SHORT + _LONG, _TABLES * _BITS)
        self._planes = rng.standard_normal(shape, dtype=np.float32)
        self._codes: list[np.ndarray] = []
        self._times: list[np.ndarray] = []
        self._counts: list[int] = []

    def add(self, flat: np.ndarray) -> None:
        """The next recording, `flattened`."""
        counted = 0
        for side, (times, cut) in enumerate(pieces(flat)):
            bits = (cut @ self._planes[side] > 0).reshape(len(cut), _TABLES, _BITS)
            codes = bits @ (1 << np.arange(_BITS, dtype=np.int32)) + (side << _BITS)
            self._codes.append(codes.astype(np.int32))
            self._times.append(times)
            counted += len(cut)
        self._counts.append(counted)

    def candidates(self) -> np.ndarray:
        """(P, 2) pairs of recordings i < j that share two codes or more at one offset."""
        owner = np.repeat(np.arange(len(self._counts)), self._counts)
        if not owner.size:
            return np.zeros((0, 2), np.int64)
        codes, times = np.concatenate(self._codes), np.concatenate(self._times)
        rng = np.random.default_rng(0)
        found, votes = np.zeros(0, np.int64), np.zeros(0, np.int64)
        for table in range(_TABLES):
            keys = _shared(codes[:, table], owner, times, rng)
            found, where = np.unique(np.concatenate([found, keys]), return_inverse=True)
            weights = np.concatenate([votes, np.ones(len(keys), np.int64)])
            votes = np.bincount(where, weights, len(found)).astype(np.int64)
        pairs = np.unique(found[votes >= _VOTES] >> _OFFSET_BITS)
        return np.stack([pairs // _MOST, pairs % _MOST], axis=1)


_OFFSET_BITS = 22  # of the number of an offset in units of 3 ms: an hour
_MOST = 1 << 20  # recordings


def _shared(
    codes: np.ndarray, owner: np.ndarray, times: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Keys (recordings and offset) of the pieces that share a code, each with some others."""
    order = rng.permutation(len(codes))  # where a code is crowded, partners are drawn
    order = order[np.argsort(codes[order], kind="stable")]
    codes, owner, times = codes[order], owner[order], times[order]
    keys = []
    for step in range(1, min(_PARTNERS, len(codes) - 1) + 1):
        same = np.flatnonzero((codes[step:] == codes[:-step]) & (owner[step:] != owner[:-step]))
        i, j = owner[same], owner[same + step]
        offset = (times[same] - times[same + step]) * np.sign(j - i)
        number = np.rint(offset / _SAME_OFFSET).astype(np.int64) + (1 << (_OFFSET_BITS - 1))
        pair = np.minimum(i, j).astype(np.int64) * _MOST + np.maximum(i, j)
        keys.append((pair << _OFFSET_BITS) + number)
    return np.concatenate(keys) if keys else np.zeros(0, np.int64)
