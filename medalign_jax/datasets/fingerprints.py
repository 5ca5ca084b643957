"""Which recordings may be near-copies of each other, in time that grows with their number.

A recording becomes a signal of 1 kHz with its spectrum partly flattened. Around each of its peaks
(of either sign, found between samples) two pieces of 0.6 s are cut, one mostly after the peak and
one mostly before it, so that a part of 1.5 s has some that lie whole inside. Random hyperplanes
(Charikar, STOC 2002) make 192 bits of a piece: two pieces whose cosine is c agree in a bit with
probability 1 - arccos(c) / pi. The bits come in 16 words; pieces that share any two words meet,
and if they agree in most bits their recordings are candidates. Nothing here decides: see
`near_copies`.
"""

from __future__ import annotations

import itertools

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
_BITS, _WORDS = 12, 16
_AGREE = 0.79  # of the bits
_PARTNERS = 32  # of a piece for one pair of words, where very many share it


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


def flattened(signal: np.ndarray, like: np.ndarray | None = None) -> np.ndarray:
    """A reduced signal (n,) whose spectrum is divided by its own course, down to a floor.

    Args:
      signal: (n,) float32.
      like: another one whose course is taken in place of the signal's own.
    """
    like = signal if like is None else like
    if not np.any(signal) or not np.any(like):
        return signal
    course = _course(like)
    size = scipy.fft.next_fast_len(len(signal), real=True)
    spectrum = scipy.fft.rfft(signal, size)
    if len(course) != len(spectrum):
        places = np.linspace(0, len(course) - 1, len(spectrum))
        course = np.interp(places, np.arange(len(course)), course)
    return scipy.fft.irfft(spectrum / course, size)[: len(signal)].astype(np.float32)


def _course(signal: np.ndarray) -> np.ndarray:
    """Amplitude over frequency, smoothed, from 0 to half of `RATE`."""
    size = scipy.fft.next_fast_len(len(signal), real=True)
    density = np.abs(scipy.fft.rfft(signal, size)) ** 2
    width = 2 * max(1, int(_SMOOTH * size / RATE / 2)) + 1
    density = scipy.ndimage.uniform_filter1d(density, width, mode="nearest")
    return np.sqrt(density + _FLOOR * density.max())


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
    """Bits of the recordings added so far; about half a kilobyte per second of sound."""

    def __init__(self):
        """An empty store; its hyperplanes are always the same."""
        rng = np.random.default_rng(20)
        shape = (2, _SHORT + _LONG, _WORDS * _BITS)
        self._planes = rng.standard_normal(shape, dtype=np.float32)
        self._words: list[np.ndarray] = []
        self._times: list[np.ndarray] = []
        self._counts: list[int] = []

    def add(self, flat: np.ndarray) -> None:
        """The next recording, `flattened`."""
        counted = 0
        for side, (times, cut) in enumerate(pieces(flat)):
            bits = (cut @ self._planes[side] > 0).reshape(len(cut), _WORDS, _BITS)
            values = (1 << np.arange(_BITS)).astype(np.uint16)
            # The side goes into every word: pieces after and before a peak never meet.
            self._words.append((bits @ values) | np.uint16(side << _BITS))
            self._times.append(times)
            counted += len(cut)
        self._counts.append(counted)

    def candidates(self) -> np.ndarray:
        """(P, 3) recordings i < j and the samples at `RATE` by which j seems to begin later."""
        owner = np.repeat(np.arange(len(self._counts)), self._counts)
        if not owner.size:
            return np.zeros((0, 3), np.int64)
        words, times = np.concatenate(self._words), np.concatenate(self._times)
        whole = np.ascontiguousarray(words).view(np.uint64)
        order = np.random.default_rng(0)
        found = np.zeros(0, np.int64)
        for one, other in itertools.combinations(range(_WORDS), 2):
            codes = words[:, one].astype(np.int32) << 16 | words[:, other]
            a, b = _meeting(codes, owner, order)
            differ = np.bitwise_count(whole[a] ^ whole[b]).sum(axis=1, dtype=np.int32)
            alike = differ <= (1 - _AGREE) * _WORDS * _BITS
            found = np.union1d(found, _keys(owner, times, a[alike], b[alike]))
        pairs, lag = found >> _LAG_BITS, (found & ((1 << _LAG_BITS) - 1)) - (1 << (_LAG_BITS - 1))
        return np.stack([pairs // _MOST, pairs % _MOST, lag], axis=1)


_LAG_BITS = 24  # hours
_MOST = 1 << 19  # recordings


def _meeting(
    codes: np.ndarray, owner: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Pieces of different recordings with the same code, each with up to `_PARTNERS` others."""
    order = rng.permutation(len(codes))  # where a code is crowded, partners are drawn
    order = order[np.argsort(codes[order], kind="stable")]
    codes, owner = codes[order], owner[order]
    ones, others = [order[:0]], [order[:0]]
    for step in range(1, _PARTNERS + 1):
        same = np.flatnonzero(codes[step:] == codes[:-step])
        if not same.size:
            break
        same = same[owner[same] != owner[same + step]]
        ones.append(order[same])
        others.append(order[same + step])
    return np.concatenate(ones), np.concatenate(others)


def _keys(owner: np.ndarray, times: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A number for the two recordings of pieces a and b and their offset, each once."""
    swap = owner[a] > owner[b]
    a, b = np.where(swap, b, a), np.where(swap, a, b)
    lag = np.rint((times[a] - times[b]) * (RATE / 1000)).astype(np.int64)
    return np.unique((owner[a] * _MOST + owner[b] << _LAG_BITS) + lag + (1 << (_LAG_BITS - 1)))
