"""Some 150 plain numbers of a recording: what an encoder has to beat.

Levels of frequency bands and how they move, the shape of the spectrum, and the rhythm of the
envelope. Nothing is learnt. On heart sounds by patient a linear probe on such numbers goes further
than on many a pre-trained encoder, so they stand beside encoders in tables.

Shapes: B recordings, S samples, F frames, K bands.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from medalign_jax.audio import spectrum

BANDS = 32
LOWEST, CORNER = 25.0, 200.0  # Hz; bands are of equal width below the corner, then of equal ratio
FRAME_SECONDS, HOP_SECONDS = 0.064, 0.016
FLOOR_DB = -90.0  # of a band's level, below the mean power of the recording
LAGS = (0.25, 2.0)  # seconds; 30 to 240 beats per minute
RHYTHM_BANDS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # Hz, edges
VERSION = 1  # raised when the numbers change

_SHAPES = ("centroid", "bandwidth", "flatness")
STATISTICS: tuple[str, ...] = (
    *(f"band{k:02d} {what}" for what in ("mean", "std", "range", "change") for k in range(BANDS)),
    *(f"{shape} {what}" for what in ("mean", "std") for shape in _SHAPES),
    "zero crossings mean", "zero crossings std",
    "crest", "envelope variation", "envelope skewness", "envelope kurtosis",
    "beat strength", "beat lag", "half beat strength",
    *(f"rhythm {low:g}-{high:g} Hz" for low, high in itertools.pairwise(RHYTHM_BANDS)),
)  # fmt: skip


@functools.partial(jax.jit, static_argnums=2)
def spectral_statistics(waveforms: jax.Array, lengths: jax.Array, sample_rate: int) -> jax.Array:
    """The numbers `STATISTICS` of recordings.

    They do not change with the gain of a recording (levels are relative to its mean power) or a
    constant offset, nor with what is filled up behind `lengths`. Nothing lies above half the sample
    rate, where the highest band ends if that is below 8 kHz. Digital silence gives finite numbers.

    Args:
      waveforms: (B, S) float32; S at least two frames of 64 ms (`least_samples`).
      lengths: (B,) integers, samples that are real, at least 1.
      sample_rate: Hz.

    Returns:
      (B, len(STATISTICS)) float32. Of each band: mean, standard deviation and 5 % to 95 % range
      over time of its level in dB, and the mean absolute change from frame to frame. Centroid
      (octaves above 1 kHz), bandwidth (octaves) and flatness (dB) of the spectrum. Rate of zero
      crossings. Crest factor (dB) and moments of the envelope. The highest value of the
      envelope's autocorrelation between 0.25 and 2 s, its lag in seconds, and the value at half
      that lag. Shares of the envelope's power in bands.

    Raises:
      ValueError: a shape, or too few samples.
    """
    if waveforms.ndim != 2 or waveforms.shape[1] < least_samples(sample_rate):
        raise ValueError(
            f"waveforms must be (B, S) with S at least {least_samples(sample_rate)} at "
            f"{sample_rate} Hz, got {waveforms.shape}"
        )
    real = jnp.arange(waveforms.shape[1]) < lengths[:, None]
    x = jnp.where(real, waveforms, 0.0).astype(jnp.float32)
    x = jnp.where(real, x - x.sum(axis=1, keepdims=True) / lengths[:, None], 0.0)
    # To mean power 1; a peak of 1 first, so that squares of tiny samples do not vanish.
    x = x / jnp.maximum(jnp.abs(x).max(axis=1, keepdims=True), 1e-30)
    power = jnp.square(x).sum(axis=1, keepdims=True) / lengths[:, None]
    x = x / jnp.sqrt(jnp.maximum(power, 1e-12))
    parts = (_spectral(x, lengths, sample_rate), _temporal(x, lengths, sample_rate))
    return jnp.concatenate(parts, axis=1)


def least_samples(sample_rate: int) -> int:
    """Shortest array that `spectral_statistics` takes."""
    return 2 * _sizes(sample_rate)[0]


def _sizes(sample_rate: int) -> tuple[int, int]:
    """Samples of a frame, and from one to the next."""
    return round(FRAME_SECONDS * sample_rate), round(HOP_SECONDS * sample_rate)


def _spectral(x: jax.Array, lengths: jax.Array, sample_rate: int) -> jax.Array:
    """(B, S) -> (B, 4 K + 6): levels of bands, then shapes of the spectrum."""
    length, hop = _sizes(sample_rate)
    filters, frequencies = _filters(sample_rate, length)
    window = spectrum.hann(length)

    def measure(frames):
        power = spectrum.power_spectrum(frames, window, length)[..., 1:]
        # Parseval: so the bins of a frame add up to its mean power.
        power = power * (2.0 / (length * float(np.square(window).sum())))
        full = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        return jnp.concatenate([full(power, filters), _shapes(power, frequencies)], axis=-1)

    measured = spectrum.map_frames(measure, x, length, hop)
    count = jnp.maximum(1 + (lengths - length) // hop, 1)
    valid = jnp.arange(measured.shape[1]) < count[:, None]
    levels = 10 * jnp.log10(jnp.maximum(measured[..., :BANDS], 10 ** (FLOOR_DB / 10)))
    mean, deviation = _moments(levels, valid)
    low, high = (_quantile(levels, valid, count, q) for q in (0.05, 0.95))
    steps = jnp.where(valid[:, 1:, None], jnp.abs(jnp.diff(levels, axis=1)), 0.0)
    change = steps.sum(axis=1) / jnp.maximum(count - 1, 1)[:, None]
    shapes = _moments(measured[..., BANDS:], valid)
    return jnp.concatenate([mean, deviation, high - low, change, *shapes], axis=1)


def _shapes(power: jax.Array, octaves: np.ndarray) -> jax.Array:
    """(B, F, bins) power -> (B, F, 3), see `_SHAPES`; a silent frame has a flat spectrum."""
    power = power + 10 ** (FLOOR_DB / 10) / power.shape[-1]
    share = power / power.sum(axis=-1, keepdims=True)
    centroid = (share * octaves).sum(axis=-1)
    bandwidth = jnp.sqrt((share * jnp.square(octaves - centroid[..., None])).sum(axis=-1))
    flatness = 10 * (jnp.log10(power).mean(axis=-1) - jnp.log10(power.mean(axis=-1)))
    return jnp.stack([centroid, bandwidth, flatness], axis=-1)


def _temporal(x: jax.Array, lengths: jax.Array, sample_rate: int) -> jax.Array:
    """(B, S) -> (B, 15): zero crossings, envelope, rhythm, from blocks of 16 ms."""
    hop = _sizes(sample_rate)[1]
    blocks = x.shape[1] // hop
    cut = x[:, : blocks * hop].reshape(len(x), blocks, hop)
    count = jnp.maximum(lengths // hop, 1)
    valid = jnp.arange(blocks) < count[:, None]
    crossings = (jnp.signbit(cut[..., 1:]) != jnp.signbit(cut[..., :-1])).mean(axis=-1)
    envelope = jnp.sqrt(jnp.square(cut).mean(axis=-1))
    mean, deviation = _moments(envelope[..., None], valid)
    centred = jnp.where(valid, envelope - mean, 0.0)
    scaled = centred / jnp.maximum(deviation, 1e-6)
    numbers = [
        *_moments(crossings[..., None], valid),
        20 * jnp.log10(jnp.maximum(jnp.abs(x).max(axis=1, keepdims=True), 1e-6)),
        deviation / jnp.maximum(mean, 1e-6),
        *(((scaled**n).sum(axis=1) / count)[:, None] for n in (3, 4)),
        _rhythm(centred, count, hop / sample_rate),
    ]
    return jnp.concatenate(numbers, axis=1)


def _rhythm(centred: jax.Array, count: jax.Array, seconds: float) -> jax.Array:
    """(B, F) envelope without its mean, 0 beyond `count` -> (B, 9): beat, then shares of power."""
    size = 2 * centred.shape[1]
    power = jnp.square(jnp.abs(jnp.fft.rfft(centred, size)))
    products = jnp.fft.irfft(power, size)[:, : centred.shape[1]]  # sum over t of x(t) x(t + lag)
    whole = jnp.maximum(products[:, :1], 1e-6)
    lags = np.arange(centred.shape[1])
    pairs = jnp.maximum(count[:, None] - lags, 1)
    correlation = products / whole * (count[:, None] / pairs)
    low, high = (round(lag / seconds) for lag in LAGS)
    # A lag counts where half of the recording overlaps with the other half.
    usable = (lags >= low) & (lags <= high) & (2 * lags <= count[:, None])
    best = jnp.argmax(jnp.where(usable, correlation, -jnp.inf), axis=1)[:, None]
    found = usable.any(axis=1, keepdims=True)
    strength, half = (jnp.take_along_axis(correlation, at, axis=1) for at in (best, best // 2))
    beat = jnp.concatenate([strength, best * seconds, half], axis=1)
    full = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    shares = full(products / whole, _band_integrals(centred.shape[1], seconds))
    return jnp.concatenate([jnp.where(found, beat, 0.0), shares], axis=1)


@functools.cache
def _band_integrals(lags: int, seconds: float) -> np.ndarray:
    """(lags, bands): from an autocorrelation to the power between two frequencies.

    The integral of the spectrum, a sum of cosines over lags, done by hand: unlike a sum over bins
    it does not depend on how long the array is.
    """
    turns = np.arange(1, lags)[:, None] * np.array(RHYTHM_BANDS) * seconds
    waves = np.sin(2 * np.pi * turns) / (np.pi * np.arange(1, lags)[:, None])
    first = np.array(RHYTHM_BANDS)[None] * seconds
    table = 2 * np.diff(np.concatenate([first, waves]), axis=1)
    return table.astype(np.float32)


@functools.cache
def _filters(sample_rate: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Triangles over the bins without the first, (bins, K), and the bins' octaves (bins,)."""
    bins = np.arange(1, length // 2 + 1) * sample_rate / length
    high = min(8000.0, sample_rate / 2)
    edges = np.log1p(np.array([LOWEST, high]) / CORNER)
    edges = CORNER * np.expm1(np.linspace(*edges, BANDS + 2))
    rise = (bins[:, None] - edges[:-2]) / np.diff(edges)[:-1]
    fall = (edges[2:] - bins[:, None]) / np.diff(edges)[1:]
    filters = np.maximum(0.0, np.minimum(rise, fall)).astype(np.float32)
    return filters, np.log2(bins / 1000.0).astype(np.float32)


def _moments(values: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and deviation over the valid of (B, F, n), each (B, n)."""
    weight = valid[..., None].astype(jnp.float32)
    count = weight.sum(axis=1)
    mean = jnp.where(valid[..., None], values, 0.0).sum(axis=1) / count
    away = jnp.where(valid[..., None], values - mean[:, None], 0.0)
    return mean, jnp.sqrt(jnp.square(away).sum(axis=1) / count)


def _quantile(values: jax.Array, valid: jax.Array, count: jax.Array, q: float) -> jax.Array:
    """Quantile over the valid of (B, F, n) by linear interpolation, (B, n)."""
    ordered = jnp.sort(jnp.where(valid[..., None], values, jnp.inf), axis=1)
    place = q * (count - 1).astype(jnp.float32)
    below = jnp.floor(place).astype(jnp.int32)
    above = jnp.minimum(below + 1, count - 1)
    low, high = (
        jnp.take_along_axis(ordered, at[:, None, None], axis=1)[:, 0] for at in (below, above)
    )
    return low + (high - low) * (place - below)[:, None]
