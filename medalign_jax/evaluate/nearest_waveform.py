"""The training recording whose waveform is most like a given one: a baseline that learns nothing.

Likeness is the largest normalised cross-correlation over all shifts that leave at least a second
(or half of the shorter recording) in common. Where recordings of one person, or cut from one
session, stand on both sides of a split, this alone finds them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import soxr

from medalign_jax.core.rounding import power_of_two

RATE = 2000  # Hz; auscultation lies below half of it
SECONDS = 8.0  # of each recording, from its beginning
_BLOCK = 16  # training recordings compared at once


def nearest_waveform(
    waveform: Callable[[int], np.ndarray],
    train: Sequence[int],
    test: Sequence[int],
    sample_rate: int,
) -> tuple[np.ndarray, np.ndarray]:
    """For each test recording the nearest training recording.

    Every pair is compared: the time grows with their number (about 0.2 ms per pair on two cores).

    Args:
      waveform: of a recording's number: (samples,) float32.
      train: n numbers of training recordings.
      test: m numbers of test recordings.
      sample_rate: of all of them, Hz.

    Returns:
      (m,) numbers out of `train`, and (m,) their correlations, -1 to 1.

    Raises:
      ValueError: nothing to choose from.
    """
    if not len(train):
        raise ValueError("there is no training recording to be nearest")
    train, test = np.asarray(train), np.asarray(test)
    clips = {
        int(i): _clip(waveform(int(i)), sample_rate) for i in {*train.tolist(), *test.tolist()}
    }
    size = power_of_two(2 * max(map(len, clips.values())))
    blocks = [_block([clips[int(i)] for i in part], size) for part in _parts(train)]
    likeness = np.stack([_against(clips[int(i)], blocks, size)[: len(train)] for i in test])
    best = likeness.argmax(axis=1)
    return train[best], likeness[np.arange(len(test)), best]


def _parts(train: np.ndarray) -> list[np.ndarray]:
    return [train[i : i + _BLOCK] for i in range(0, len(train), _BLOCK)]


def _clip(waveform: np.ndarray, sample_rate: int) -> np.ndarray:
    """The beginning, at `RATE`, without its mean."""
    part = np.asarray(waveform, np.float32)[: int(SECONDS * sample_rate)]
    if sample_rate != RATE:
        part = soxr.resample(part, sample_rate, RATE, quality="HQ")
    return part - part.mean() if len(part) else np.zeros(1, np.float32)


def _block(clips: list[np.ndarray], size: int) -> tuple[jax.Array, jax.Array, np.ndarray]:
    """Spectra (B, F), running energies (B, size + 1) and lengths (B,) of up to B clips."""
    padded = np.zeros((_BLOCK, size), np.float32)
    for row, clip in enumerate(clips):
        padded[row, : len(clip)] = clip
    energy = np.zeros((_BLOCK, size + 1))
    np.cumsum(np.square(padded, dtype=np.float64), axis=1, out=energy[:, 1:])
    lengths = np.array([len(c) for c in clips] + [1] * (_BLOCK - len(clips)), np.int32)
    return jnp.fft.rfft(jnp.asarray(padded)), jnp.asarray(energy, jnp.float32), lengths


def _against(clip: np.ndarray, blocks, size: int) -> np.ndarray:
    """Likeness of one clip to those of all blocks."""
    own = _block([clip], size)
    spectrum, energy, length = own[0][0], own[1][0], own[2][0]
    found = [_likeness(spectrum, energy, length, *block, size=size) for block in blocks]
    return np.concatenate([np.asarray(part) for part in found])


@functools.partial(jax.jit, static_argnames="size")
def _likeness(spectrum, energy, length, spectra, energies, lengths, *, size):
    """(B,) largest normalised cross-correlation of a clip with B others.

    At shift s sample t of the clip meets sample t - s of the other one.
    """
    products = jnp.fft.irfft(spectrum[None] * jnp.conj(spectra), n=size)  # (B, size), by shift
    shift = jnp.arange(size)
    shift = jnp.where(shift >= size // 2, shift - size, shift)[None]
    first = jnp.maximum(0, shift)  # of the clip
    last = jnp.minimum(length, lengths[:, None] + shift)
    common = last - first
    inside = common >= jnp.minimum(RATE, jnp.minimum(length, lengths)[:, None] // 2)
    first, last = jnp.clip(first, 0, size), jnp.clip(last, 0, size)
    others = jnp.clip(last - shift, 0, size), jnp.clip(first - shift, 0, size)
    own = energy[last] - energy[first]
    other = jnp.take_along_axis(energies, others[0], 1) - jnp.take_along_axis(
        energies, others[1], 1
    )
    # Parts that hold next to nothing of a recording's energy do not count as alike.
    least = 0.05 * jnp.sqrt(energy[-1] * energies[:, -1:])
    norm = jnp.sqrt(jnp.maximum(own * other, 0.0))
    return jnp.where(inside & (norm > least), products / jnp.maximum(norm, 1e-20), -1.0).max(axis=1)
