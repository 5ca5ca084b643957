"""Steps that front ends share: framing, windows, power spectra, mel filter banks, decibels.

Everything works on batches, is pure, and has static shapes. Where the platforms want different
code it is chosen when a program is lowered for one. CPUs run a fast Fourier transform on a few
frames at a time, so that intermediate arrays stay in cache (on 16 clips of 8 s three times faster
than the whole batch at once, and than multiplying with the matrix of the transform). Accelerators
multiply with that matrix in full float32: it is 8 GFLOP for those 16 clips, little beside an
encoder, and XLA keeps a product split over devices, where it gathers the batch for an FFT.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medalign_jax.core.errors import UserError

_FRAMES_IN_CACHE = 512  # 512 frames of 1024 samples: 2 MB of input and as much of spectrum


def check_settings(label: str, config: Any, above_zero: Sequence[str]) -> None:
    """Refuses numbers that make no mel front end.

    Args:
      label: what errors call it.
      config: has sample_rate, f_min, f_max, dft and the fields named next.
      above_zero: fields that have to be.

    Raises:
      UserError: what is wrong.
    """
    c = config
    if not 0 <= c.f_min < c.f_max <= c.sample_rate / 2:
        raise UserError(
            f"{label}: need 0 <= f_min < f_max <= sample_rate / 2, got f_min={c.f_min}, "
            f"f_max={c.f_max}, sample_rate={c.sample_rate}"
        )
    for name in above_zero:
        if not getattr(c, name) > 0:
            raise UserError(f"{label}: {name} must be above 0, got {getattr(c, name)}")
    if c.dft not in ("auto", "fft", "matmul"):
        raise UserError(f"{label}: dft must be auto, fft or matmul, got {c.dft!r}")


def check_filters(label: str, config: Any, filter_bank: np.ndarray) -> None:
    """Refuses filters (n_mels, bins) of which some hold no bin of the transform.

    Raises:
      UserError: too many filters for the transform, and what to do.
    """
    if not filter_bank.any(axis=1).all():
        raise UserError(
            f"{label}: {config.n_mels} filters are too many for n_fft={config.n_fft} between "
            f"{config.f_min} and {config.f_max} Hz (some hold no bin); take fewer or a larger n_fft"
        )


def frame_count(samples: int, length: int, hop: int) -> int:
    """Number of whole frames in `samples` samples."""
    return 0 if samples < length else 1 + (samples - length) // hop


def frame(waveforms: jax.Array, length: int, hop: int) -> jax.Array:
    """Cuts (B, samples) into overlapping frames, (B, frames, length).

    A frame is a run of neighbouring blocks of `hop` samples, so no gather is needed.
    """
    count = frame_count(waveforms.shape[-1], length, hop)
    return _join(_blocks(waveforms, count, length, hop), count, length)


def map_frames(
    function: Callable[[jax.Array], jax.Array], waveforms: jax.Array, length: int, hop: int
) -> jax.Array:
    """`function(frame(waveforms, length, hop))`, in the order that suits the platform.

    Args:
      function: (B, n, length) to (B, n, features); frames must not depend on each other.
      waveforms: (B, samples).
      length: samples in a frame.
      hop: samples from one frame to the next.

    Returns:
      (B, frames, features).
    """
    batch, samples = waveforms.shape
    count = frame_count(samples, length, hop)
    chunks = -(-batch * count // _FRAMES_IN_CACHE)

    def whole(waveforms):
        return function(frame(waveforms, length, hop))

    def in_chunks(waveforms):
        size = -(-count // chunks)
        overlap = -(-length // hop) - 1
        blocks = _blocks(waveforms, count, length, hop)
        # The loop runs over time: the batch axis may be sharded over devices.
        blocks = jnp.pad(blocks, ((0, 0), (0, chunks * size - count), (0, 0)))

        def chunk(start):
            part = jax.lax.dynamic_slice_in_dim(blocks, start, size + overlap, axis=1)
            return function(_join(part, size, length))

        parts = jax.lax.map(chunk, jnp.arange(chunks) * size)
        return jnp.moveaxis(parts, 0, 1).reshape(batch, chunks * size, -1)[:, :count]

    if chunks <= 1:
        return whole(waveforms)
    return jax.lax.platform_dependent(waveforms, cpu=in_chunks, default=whole)


@functools.cache
def hann(length: int) -> np.ndarray:
    """Periodic Hann window, (length,) float32."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)
    return _constant(window)


def power_spectrum(
    frames: jax.Array, window: np.ndarray, n_fft: int, bins: slice = slice(None), dft: str = "auto"
) -> jax.Array:
    """Squared magnitude of the windowed real discrete Fourier transform.

    Args:
      frames: (..., length), length at most n_fft (zeros follow).
      window: (length,).
      n_fft: size of the transform.
      bins: which of the n_fft // 2 + 1 bins are wanted.
      dft: 'fft', 'matmul', or 'auto': fft on CPU, matmul elsewhere.

    Returns:
      (..., bins) float32.
    """

    def by_fft(frames):
        spectrum = jnp.fft.rfft(frames * window, n_fft)[..., bins]
        return jnp.square(spectrum.real) + jnp.square(spectrum.imag)

    def by_matmul(frames):
        cosine, sine = _dft_matrix(len(window), n_fft, bins.start, bins.stop)
        full = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        frames = frames * window
        return jnp.square(full(frames, cosine)) + jnp.square(full(frames, sine))

    if dft == "auto":
        return jax.lax.platform_dependent(frames, cpu=by_fft, default=by_matmul)
    return {"fft": by_fft, "matmul": by_matmul}[dft](frames)


@functools.cache
def slaney_mel_filter_bank(
    sample_rate: int, n_fft: int, n_mels: int, f_min: float, f_max: float
) -> np.ndarray:
    """Triangular filters on Slaney's mel scale, each of unit area (Slaney's norm).

    Slaney, Auditory Toolbox, 1998: linear up to 1 kHz (15 mel), from there 27 steps for each
    factor of 6.4.

    Returns:
      (n_mels, n_fft // 2 + 1) float32.
    """
    low, high = (_hz_to_slaney_mel(f) for f in (f_min, f_max))
    edges = _slaney_mel_to_hz(np.linspace(low, high, n_mels + 2))
    bins = np.arange(n_fft // 2 + 1) * (sample_rate / n_fft)
    rise = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    fall = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    triangles = np.maximum(0.0, np.minimum(rise, fall))
    return _constant(triangles * (2.0 / (edges[2:] - edges[:-2]))[:, None])


def used_bins(filter_bank: np.ndarray) -> slice:
    """The run of bins outside which every filter is zero."""
    used = np.flatnonzero(filter_bank.any(axis=0))
    return slice(int(used[0]), int(used[-1]) + 1)


def relative_decibels(power: jax.Array, top_db: float, amin: float) -> jax.Array:
    """Decibels below the largest value of each example, scaled to 0 (floor) .. 1 (largest).

    The floor is the example's smallest value, `amin` or `-top_db`, whichever is highest. An
    example of equal values (digital silence) becomes all zeros.

    Args:
      power: (B, frames, features), at least 0.
      top_db: largest distance from the maximum, dB.
      amin: lower bound of the power before the logarithm.

    Returns:
      Array like `power`.
    """
    power = jnp.maximum(power, amin)
    # Extremes before the logarithm, so that it is taken once for each element.
    reference = _decibels(power.max(axis=(1, 2), keepdims=True))
    floor = _decibels(power.min(axis=(1, 2), keepdims=True)) - reference
    floor = jnp.maximum(floor, -top_db)
    relative = jnp.clip(_decibels(power) - reference, floor, 0.0)
    varied = floor < 0
    return jnp.where(varied, (relative - floor) / jnp.where(varied, -floor, 1.0), 0.0)


def _decibels(power: jax.Array) -> jax.Array:
    return 10.0 * jnp.log10(power)


def _blocks(waveforms: jax.Array, count: int, length: int, hop: int) -> jax.Array:
    """(B, samples) to the (B, count + overlap, hop) blocks of which `count` frames are made."""
    blocks = count + -(-length // hop) - 1
    waveforms = waveforms[:, : blocks * hop]
    short = blocks * hop - waveforms.shape[1]
    waveforms = jnp.pad(waveforms, ((0, 0), (0, short)))
    return waveforms.reshape(waveforms.shape[0], blocks, hop)


def _join(blocks: jax.Array, count: int, length: int) -> jax.Array:
    """(B, count + overlap, hop) to (B, count, length): each frame from its run of blocks."""
    run = blocks.shape[1] - count + 1
    joined = jnp.concatenate([blocks[:, i : i + count] for i in range(run)], axis=-1)
    return joined[..., :length]


@functools.cache
def _dft_matrix(
    length: int, n_fft: int, start: int | None, stop: int | None
) -> tuple[np.ndarray, np.ndarray]:
    bins = np.arange(n_fft // 2 + 1)[start:stop]
    # The product is reduced before it becomes an angle, so that no digit is lost.
    turns = (np.arange(length)[:, None] * bins % n_fft) / n_fft
    return _constant(np.cos(2 * np.pi * turns)), _constant(np.sin(2 * np.pi * turns))


def _hz_to_slaney_mel(frequency: float) -> float:
    if frequency < 1000:
        return 3 * frequency / 200
    return 15 + 27 * np.log(frequency / 1000) / np.log(6.4)


def _slaney_mel_to_hz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, 200 * mel / 3, 1000 * 6.4 ** ((mel - 15) / 27))


def _constant(array: np.ndarray) -> np.ndarray:
    array = array.astype(np.float32)
    array.setflags(write=False)
    return array
