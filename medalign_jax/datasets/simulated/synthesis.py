"""What simulated heart and lung sounds share: noise, gates, and how a stethoscope colours them.

Everything here is numpy on the host, float64 inside, at `SAMPLE_RATE`; noise is shaped in the
frequency domain, which costs two FFTs whatever the filter.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from medalign_jax.core.errors import UserError

SAMPLE_RATE = 16_000
Response = Callable[[np.ndarray], np.ndarray]


class SimulationError(UserError):
    """A sound that the simulator cannot make."""


def stream(seed: int, name: str) -> np.random.Generator:
    """An own random stream for each use of a seed, so that one use does not shift another."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def shaped_noise(rng: np.random.Generator, samples: int, response: Response) -> np.ndarray:
    """Gaussian noise, (samples,), of unit RMS, with the amplitude spectrum `response(hertz)`."""
    frequencies = np.fft.rfftfreq(samples, 1 / SAMPLE_RATE)
    spectrum = rng.standard_normal((2, frequencies.size))
    spectrum *= response(frequencies)
    noise = np.fft.irfft(spectrum[0] + 1j * spectrum[1], n=samples)
    return noise / max(np.sqrt(np.mean(noise**2)), 1e-12)


def low_pass(corner: float, order: int) -> Response:
    """Butterworth amplitude response."""
    return lambda f: 1 / np.sqrt(1 + (f / corner) ** (2 * order))


def band_pass(low: float, high: float, order: int) -> Response:
    """Butterworth amplitude response between two corners, hertz."""
    upper = low_pass(high, order)
    return lambda f: upper(f) / np.sqrt(1 + (low / np.maximum(f, 1e-3)) ** (2 * order))


def log_bell(centre: float, octaves: float) -> Response:
    """A bell over log frequency, `octaves` its standard deviation."""
    return lambda f: np.exp(-0.5 * (np.log2(np.maximum(f, 1e-3) / centre) / octaves) ** 2)


def edges(length: int, taper: int) -> np.ndarray:
    """Ones, (length,), with raised-cosine edges of `taper` samples."""
    gate = np.ones(length)
    taper = min(taper, length // 2)
    ramp = 0.5 - 0.5 * np.cos(np.pi * (np.arange(taper) + 0.5) / max(taper, 1))
    gate[:taper] *= ramp
    gate[length - taper :] *= ramp[::-1]
    return gate


def add_at(signal: np.ndarray, piece: np.ndarray, start: int) -> None:
    """Add `piece` into `signal` from sample `start` on, in place; what hangs over is cut off."""
    first, last = max(start, 0), min(start + piece.size, signal.size)
    if first < last:
        signal[first:last] += piece[first - start : last - start]


def spaced_times(
    rng: np.random.Generator, start: float, end: float, count: int, gap: float
) -> np.ndarray:
    """Up to `count` sorted times in [start, end], seconds, no two closer than `gap`."""
    count = min(count, 1 + int((end - start) / gap))
    return (
        np.sort(rng.uniform(0, end - start - (count - 1) * gap, count))
        + start
        + gap * np.arange(count)
    )


@dataclass(frozen=True)
class Device:
    """A stethoscope: pass band in hertz, and one resonance with its gain in decibels."""

    name: str
    low: float
    high: float
    order: int
    resonance: float
    gain_db: float

    def response(self, frequencies: np.ndarray) -> np.ndarray:
        peak = 10 ** (self.gain_db / 20) - 1
        bump = 1 + peak * log_bell(self.resonance, 0.5)(frequencies)
        return bump * band_pass(self.low, self.high, self.order)(frequencies)


HEART_DEVICES = (
    Device("bell", 20, 900, 2, 120, 4),
    Device("diaphragm", 40, 1800, 2, 250, 4),
    Device("electronic", 20, 3000, 3, 500, 1),
)
LUNG_DEVICES = (
    Device("diaphragm", 60, 2200, 2, 250, 4),
    Device("electronic", 30, 3500, 3, 500, 1),
    Device("contact microphone", 50, 2800, 2, 700, 5),
)


def record(
    sound: np.ndarray, seed: int, devices: tuple[Device, ...]
) -> tuple[np.ndarray, dict[str, object]]:
    """The sound as a device records it in a room: nuisance that carries no label.

    Adds friction of the chest piece and ambient noise (signal-to-noise ratio 12 to 50 dB, of a tilt
    between that of pink and of brown noise), colours all by the device.

    Returns:
      The recording, (samples,), and the truth about it: `device`, `snr_db`, `friction_times`.
    """
    rng = stream(seed, "nuisance")
    device = devices[rng.integers(len(devices))]
    snr_db = rng.uniform(12, 50)
    rms = np.sqrt(np.mean(sound**2))
    tilt = rng.uniform(0.5, 1.0)
    ambient = shaped_noise(rng, sound.size, lambda f: np.maximum(f, 20) ** -tilt)
    out = sound + rms * 10 ** (-snr_db / 20) * ambient
    times = add_friction(rng, out, rms)
    out = np.fft.irfft(
        np.fft.rfft(out) * device.response(np.fft.rfftfreq(out.size, 1 / SAMPLE_RATE)), n=out.size
    )
    truth = {"device": device.name, "snr_db": float(snr_db), "friction_times": times}
    return out, truth


def add_friction(rng: np.random.Generator, sound: np.ndarray, rms: float) -> list[float]:
    """Up to two rubs of the chest piece, added in place; returns when, in seconds."""
    times = np.sort(rng.uniform(0, sound.size / SAMPLE_RATE, rng.integers(0, 3)))
    for time in times:
        length = int(rng.uniform(0.03, 0.15) * SAMPLE_RATE)
        rub = shaped_noise(rng, length, band_pass(rng.uniform(60, 150), rng.uniform(400, 1200), 2))
        add_at(sound, rms * rng.uniform(0.3, 1.0) * rub * edges(length, length // 3), _sample(time))
    return times.tolist()


def level(sound: np.ndarray, seed: int) -> np.ndarray:
    """Float32 with its peak at a random level of -18 to -3 dB of full scale."""
    peak = 10 ** (stream(seed, "level").uniform(-18, -3) / 20)
    return (sound * (peak / max(np.abs(sound).max(), 1e-12))).astype(np.float32)


def _sample(time: float) -> int:
    return round(time * SAMPLE_RATE)
