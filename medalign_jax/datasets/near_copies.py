"""Near-copies: recordings that are, in whole or in part, one and the same sound.

Two recordings of a set may be one in another loudness, sample rate, file format or cut, or with
noise on it. On both sides of a split they turn a measure of generalisation into one of memory.
`fingerprints` finds candidates; the normalised cross-correlation of their waveforms decides.

    copies = near_copies(dataset.waveform, len(dataset), dataset.sample_rate)
    copies.groups                      # can serve as subjects where none are named
    copies.leaks_between(splits)       # what crosses splits, in words
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.fft
import scipy.sparse
import scipy.sparse.csgraph

from medalign_jax.data.recordings.dataset import AudioDataset
from medalign_jax.data.recordings.manifest import SPLITS, ManifestError
from medalign_jax.datasets.fingerprints import RATE, Fingerprints, flattened, reduced

SIMILARITY = 0.9  # of the waveforms
FLAT_SIMILARITY = 0.8  # of the same with flattened spectra: a shared hum or rumble is not a copy
COMMON_SECONDS = 1.0
_VARIETY = 2.2
_PROMISING = 0.4
_PEAKS, _TAPS = 32, 18
_NAMED = 5  # in an error


@dataclass(frozen=True)
class NearCopies:
    """Pairs of recordings that are near-copies.

    Attributes:
      count: recordings looked at, n.
      pairs: (P, 2) int, i < j, in order.
      similarity: (P,) normalised cross-correlation, without its sign, over what they share.
      offset: (P,) seconds of recording i that come before the beginning of recording j;
        negative where j begins earlier.
    """

    count: int
    pairs: np.ndarray
    similarity: np.ndarray
    offset: np.ndarray

    @functools.cached_property
    def groups(self) -> np.ndarray:
        """(n,) group numbers from 0, by single linkage, in the order of their first recording."""
        edges = (np.ones(len(self.pairs)), (self.pairs[:, 0], self.pairs[:, 1]))
        graph = scipy.sparse.coo_matrix(edges, shape=(self.count, self.count))
        _, found = scipy.sparse.csgraph.connected_components(graph, directed=False)
        _, first, group = np.unique(found, return_index=True, return_inverse=True)
        return np.argsort(np.argsort(first))[group]

    def across(self, splits: Sequence[str]) -> np.ndarray:
        """Numbers of the pairs whose recordings are in different splits; "" is in none."""
        splits = np.asarray(splits)
        if len(splits) != self.count:
            raise ValueError(f"{len(splits)} splits for {self.count} recordings")
        one, other = splits[self.pairs[:, 0]], splits[self.pairs[:, 1]]
        return np.flatnonzero((one != other) & (one != "") & (other != ""))

    def leaks_between(self, splits: Sequence[str], names: Sequence[str] | None = None) -> list[str]:
        """What crosses splits, one sentence for two splits, for a note beside the results.

        Args:
          splits: n names of splits.
          names: n names of recordings, such as paths; rows are counted from 1.
        """
        crossing = self.across(splits)
        order = {name: i for i, name in enumerate(SPLITS)}
        by_splits: dict[tuple[str, str], list[tuple[float, int, int]]] = {}
        for pair in crossing:
            ends = sorted(self.pairs[pair], key=lambda i: order.get(splits[i], len(order)))
            earlier, later = (int(i) for i in ends)
            there = by_splits.setdefault((splits[later], splits[earlier]), [])
            there.append((float(self.similarity[pair]), later, earlier))
        return [
            _sentence(later, earlier, found, sum(s == later for s in splits), names)
            for (later, earlier), found in sorted(by_splits.items())
        ]


def _sentence(later, earlier, found, total, names) -> str:
    similarity, i, j = max(found, key=lambda pair: (pair[0], -pair[1], -pair[2]))
    rows = [f"row {k + 1}" + (f" '{names[k]}'" if names is not None else "") for k in (i, j)]
    leaking = len({pair[1] for pair in found})
    return (
        f"{leaking} of {total} {later} recordings {'has' if leaking == 1 else 'have'} a near-copy "
        f"in {earlier}, e.g. {rows[0]} ~ {rows[1]} ({similarity:.2f})"
    )


def near_copies(
    waveform: Callable[[int], np.ndarray],
    count: int,
    sample_rate: int,
    *,
    similarity: float = SIMILARITY,
    progress: Callable[[int, int], None] | None = None,
) -> NearCopies:
    """Finds recordings that share at least a second of sound (to be found: 1.5 s).

    Gain, also a negative one, other sample rates and formats, cuts and noise 20 dB below do not
    hide a copy; of a sound without power below 450 Hz (see `fingerprints`) such noise does, as
    nothing else is left there. Recordings shorter than a second are found only if they agree sample
    for sample. Reduced signals (2 bytes per sample at 1 kHz) and codes are held, 3 kB per second.

    Args:
      waveform: of a recording's number: (samples,) float32. Called once for each.
      count: number of recordings, n.
      sample_rate: of all of them, Hz.
      similarity: least normalised cross-correlation of a pair, 0 to 1.
      progress: called with (recordings read, recordings in all).
    """
    signals: list[tuple[np.ndarray, float]] = []
    prints = Fingerprints()
    same: dict[bytes, int] = {}
    found: dict[tuple[int, int], tuple[float, float]] = {}
    for i in range(count):
        samples = np.ascontiguousarray(waveform(i), np.float32)
        earlier = same.setdefault(hashlib.blake2b(samples.tobytes(), digest_size=16).digest(), i)
        if earlier != i and np.any(samples):
            found[earlier, i] = (1.0, 0.0)
        signal = reduced(samples, sample_rate)
        scale = max(float(np.abs(signal).max(initial=0.0)), 1e-20) / 32767
        signals.append((np.rint(signal / scale).astype(np.int16), scale))
        prints.add(flattened(signal))
        if progress is not None:
            progress(i + 1, count)

    @functools.lru_cache(maxsize=256)
    def both(i: int) -> tuple[np.ndarray, np.ndarray]:
        signal = signals[i][0] * np.float32(signals[i][1])
        return signal, flattened(signal)

    for (i, j), group in itertools.groupby(prints.candidates().tolist(), key=lambda c: c[:2]):
        if (i, j) in found or not _promising(both(i)[1], both(j)[1], [lag for *_, lag in group]):
            continue
        if (pair := compare(both(i)[0], both(j)[0], similarity)) is not None:
            found[i, j] = pair
    pairs = sorted(found)
    values = np.array([found[pair] for pair in pairs]).reshape(-1, 2)
    return NearCopies(count, np.array(pairs, np.int64).reshape(-1, 2), values[:, 0], values[:, 1])


def compare(
    a: np.ndarray, b: np.ndarray, similarity: float = SIMILARITY
) -> tuple[float, float] | None:
    """Similarity and offset in seconds of two recordings, or None if they are not near-copies.

    With flattened spectra (both by the course of the shorter one's) they say where one lies on the
    other; there both these and the signals themselves have to agree, and what is shared must be
    more than a click or a hum.

    Args:
      a, b: (n,), (m,) float32, `fingerprints.reduced`.
      similarity: least normalised cross-correlation of the signals.
    """
    least = round(COMMON_SECONDS * RATE)
    shorter = a if len(a) < len(b) else b
    if len(shorter) < least:
        return None
    flat, lag, fraction = _best(flattened(a, shorter), flattened(b, shorter), least)
    if flat < FLAT_SIMILARITY:
        return None
    x, y = _common(a, b, lag)
    if min(_variety(x), _variety(y)) < _VARIETY:
        return None
    norm = max(float(np.linalg.norm(x) * np.linalg.norm(y)), 1e-20)
    value = min(abs(float(x @ _shift(y, fraction))) / norm, 1.0)
    return (value, (lag + fraction) / RATE) if value >= similarity else None


def _promising(a: np.ndarray, b: np.ndarray, lags: Sequence[int]) -> bool:
    """Whether two flattened signals correlate at all where they seem to be the same.

    Lags are whole samples: where the correlation swings fast its largest value lies beside them,
    the next ones of either sign within two.
    """
    for lag in dict.fromkeys(lag + step for lag in lags for step in (0, -1, 1, -2, 2)):
        x, y = _common(a, b, lag)
        if len(x) and abs(float(x @ y)) >= _PROMISING * float(
            np.linalg.norm(x) * np.linalg.norm(y)
        ):
            return True
    return False


def _best(a: np.ndarray, b: np.ndarray, least: int) -> tuple[float, int, float]:
    """Largest |normalised cross-correlation|; b begins `lag + fraction` samples after a."""
    size = scipy.fft.next_fast_len(len(a) + len(b) + 2 * _TAPS, real=True)
    spectrum = scipy.fft.rfft(a, size) * np.conj(scipy.fft.rfft(b, size))
    products = scipy.fft.irfft(spectrum, size)
    lags = np.arange(least - len(b), len(a) - least + 1)
    first, last = np.maximum(lags, 0), np.minimum(len(a), lags + len(b))
    energy_a, energy_b = (np.append(0.0, np.cumsum(np.square(x, dtype=float))) for x in (a, b))
    energy = (energy_a[last] - energy_a[first]) * (energy_b[last - lags] - energy_b[first - lags])
    # A stretch of silence in common does not count as alike.
    norm = np.sqrt(np.maximum(energy, 1e-8 * energy_a[-1] * energy_b[-1]) + 1e-30)
    likeness = np.abs(products[lags]) / norm
    padded = np.pad(likeness, 1)
    peaks = np.flatnonzero((likeness >= padded[:-2]) & (likeness >= padded[2:]))
    peaks = peaks[np.argsort(-likeness[peaks])[:_PEAKS]]
    # Between samples: the correlation has no higher frequencies than the signals. Where it swings
    # fast, its largest value may lie two samples from the largest that was sampled.
    fractions = np.arange(-16, 17) / 8
    taps = np.arange(-_TAPS, _TAPS + 1)
    away = fractions[:, None] - taps
    kernel = np.sinc(away) * np.cos(np.pi * away / (2 * _TAPS + 3)) ** 2
    fine = np.abs(products[lags[peaks][:, None] + taps] @ kernel.T) / norm[peaks][:, None]
    peak, fraction = np.unravel_index(fine.argmax(), fine.shape)
    return float(fine[peak, fraction]), int(lags[peaks[peak]]), float(fractions[fraction])


def _common(a: np.ndarray, b: np.ndarray, lag: int) -> tuple[np.ndarray, np.ndarray]:
    """What two signals share where b begins `lag` samples after a."""
    first, last = max(lag, 0), min(len(a), lag + len(b))
    return a[first:last], b[first - lag : last - lag]


def _shift(signal: np.ndarray, fraction: float) -> np.ndarray:
    """The signal later by a fraction of a sample."""
    size = scipy.fft.next_fast_len(len(signal) + 2 * _TAPS, real=True)
    turn = np.exp(-2j * np.pi * scipy.fft.rfftfreq(size) * fraction)
    return scipy.fft.irfft(scipy.fft.rfft(signal, size) * turn, size)[: len(signal)]


def _variety(signal: np.ndarray) -> float:
    """How many stretches of 20 ms, or frequencies if fewer, carry the power (their
    participation ratio): 1 for a click or a tone."""
    frames = signal[: len(signal) // 20 * 20].reshape(-1, 20)
    in_time = np.sum(np.square(frames, dtype=float), axis=1)
    in_frequency = np.abs(scipy.fft.rfft(signal * np.hanning(len(signal)))) ** 2
    return min(float(p.sum() ** 2 / max(np.sum(p**2), 1e-30)) for p in (in_time, in_frequency))


def check_no_copies(base: AudioDataset, added: AudioDataset) -> None:
    """Refuses recordings to be trained on that are near-copies of a data set's.

    Args:
      base: all recordings of a data set, whatever their split.
      added: what is to join its training split.

    Raises:
      ManifestError: different sample rates, or near-copies; names the first few.
    """
    if base.sample_rate != added.sample_rate:
        raise ManifestError(
            f"recordings at {base.sample_rate} and {added.sample_rate} Hz; open both at one rate"
        )
    held = len(base)

    def waveform(i: int) -> np.ndarray:
        return base.waveform(i) if i < held else added.waveform(i - held)

    copies = near_copies(waveform, held + len(added), base.sample_rate)
    crossing = copies.across(["base"] * held + ["added"] * len(added))
    if not len(crossing):
        return
    lines = []
    for pair in crossing[:_NAMED]:
        ours, theirs = base.rows[copies.pairs[pair, 0]], added.rows[copies.pairs[pair, 1] - held]
        lines.append(
            f"  row {theirs.row} '{theirs.audio_path}' ~ row {ours.row} '{ours.audio_path}' of "
            f"split '{ours.split}' ({copies.similarity[pair]:.2f})"
        )
    rows = len({int(copies.pairs[pair, 1]) for pair in crossing})
    raise ManifestError(
        f"{rows} of {len(added)} recordings cannot be added: they are near-copies of recordings "
        "that are there already; leave them out:\n" + "\n".join(lines)
    )
