"""Simulated lung sounds: breath noise, wheezes and crackles, each where the metadata says.

Vesicular noise falls off above some hundred hertz and is louder in inspiration; at the trachea it
reaches higher and expiration is as loud. Wheezes are tones with harmonics in expiration, longer
than 80 ms; fine crackles are short, high and late in inspiration, coarse ones longer, lower and
early (terms and durations after the CORSA guidelines, Sovijaervi et al. 2000).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from medalign_jax.datasets.simulated import synthesis as syn
from medalign_jax.datasets.simulated.synthesis import SimulationError

RATE = syn.SAMPLE_RATE
CHEST_CODES = ("Tc", "Al", "Ar", "Pl", "Pr", "Ll", "Lr")
FINE, COARSE = "fine", "coarse"


@dataclass(frozen=True)
class CrackleKind:
    """Ranges of one kind: seconds for the widths and the gap, the window as part of inspiration."""

    first_deflection: tuple[float, float]
    two_cycles: tuple[float, float]
    window: tuple[float, float]
    count: tuple[int, int]
    gap: float


CRACKLES = {
    FINE: CrackleKind((0.0005, 0.0007), (0.0034, 0.005), (0.5, 0.98), (6, 13), 0.022),
    COARSE: CrackleKind((0.0013, 0.002), (0.0095, 0.012), (0.05, 0.55), (3, 7), 0.045),
}


@dataclass(frozen=True)
class Lung:
    """What stays the same over the recordings of one subject."""

    inspiration: float  # part of the cycle
    corner: float  # hertz, of vesicular noise
    wheeze_hertz: float
    wheeze_loudness: float  # against the loudest breath noise, as RMS
    crackle_loudness: float


def draw_lung(subject: int) -> Lung:
    """The anatomy of a subject: what all of its recordings share."""
    rng = syn.stream(subject, "lung anatomy")
    return Lung(
        inspiration=rng.uniform(0.38, 0.46),
        corner=rng.uniform(250, 450),
        wheeze_hertz=float(np.exp(rng.uniform(np.log(150), np.log(800)))),
        wheeze_loudness=rng.uniform(0.7, 2.0),
        crackle_loudness=rng.uniform(5.0, 11.0),
    )


def draw_metadata(subject: int, label: str) -> dict[str, str]:
    """The findings of one subject, in the columns of ICBHI."""
    rng = syn.stream(subject, "lung findings")
    rate = rng.uniform(12, 26)
    kind = str(rng.choice((FINE, COARSE)))
    return {
        "crackles": kind if label == "crackle" else "0",
        "wheezes": "1" if label == "wheeze" else "0",
        "respiratory_rate": f"{rate:.1f}",
    }


def draw_location(seed: int) -> str:
    """ICBHI's code of the place of one recording."""
    return str(syn.stream(seed, "chest location").choice(CHEST_CODES))


def render(
    facts: Mapping[str, str], lung: Lung, seconds: float, seed: int
) -> tuple[np.ndarray, dict[str, object]]:
    """Clean lung sounds, (samples,) float64, breath noise at its loudest of RMS about 1.

    Args:
      facts: canonical metadata (`vocabulary.read_metadata`) with `respiratory_rate`.
      lung: the subject.
      seconds: length.
      seed: of this recording (its breaths and their sounds).

    Returns:
      The sound and its truth: `breath_times` (onsets of inspiration, seconds, inside the clip),
      `inspirations` and `expirations` (onset, offset), `respiratory_rate` (a minute, of these very
      breaths), `wheezes` (onset, offset, fundamental in hertz), `crackle_times`, `crackle_kind`.

    Raises:
      SimulationError: the clip is too short for a stated wheeze or crackle to fall into it.
    """
    samples = round(seconds * RATE)
    for attempt in range(20):  # where the clip cuts into the breathing, until it holds the events
        breaths = _breaths(float(facts["respiratory_rate"]), lung, seconds, seed, attempt)
        wheezes = _wheeze_intervals(breaths, seed) if facts.get("wheezes") == "1" else []
        kind = _crackle_kind(facts, seed)
        crackles = _crackle_times(breaths, kind, seed) if kind else np.zeros(0)
        crackles = crackles[(crackles >= 0) & (crackles < seconds - 0.02)]
        wheezes = [(a, b) for a, b in wheezes if min(b, seconds) - max(a, 0) >= 0.08]
        if (wheezes or facts.get("wheezes") != "1") and (crackles.size >= 3 or not kind):
            break
    else:
        raise SimulationError(
            f"{seconds:g} s at {facts['respiratory_rate']} breaths per minute are too short for "
            "the stated wheezes or crackles to be heard; ask for more seconds"
        )
    trachea = facts.get("chest_location") == "trachea"
    sound = _breath_noise(breaths, lung, samples, seed, trachea)
    tones, heard = _wheezes(wheezes, lung, samples, seed)
    sound += tones
    if kind:
        _add_crackles(sound, crackles, CRACKLES[kind], lung, seed)
    onsets, inspired, expired = breaths
    truth = {
        "breath_times": onsets[(onsets >= 0) & (onsets < seconds)].tolist(),
        "inspirations": _spans(onsets, inspired, seconds),
        "expirations": _spans(inspired, expired, seconds),
        "respiratory_rate": float(60 / np.mean(np.diff(onsets))),
        "wheezes": heard,
        "crackle_times": crackles.tolist(),
        "crackle_kind": kind or "none",
    }
    return sound, truth


Breaths = tuple[np.ndarray, np.ndarray, np.ndarray]  # start, end of inspiration, of expiration; s


def _breaths(rate: float, lung: Lung, seconds: float, seed: int, attempt: int) -> Breaths:
    rng = syn.stream(seed, f"breaths {attempt}")
    mean = 60 / rate
    intervals = mean * (1 + 0.03 * rng.standard_normal(int(seconds / mean * 1.3) + 4))
    onsets = np.cumsum(intervals) - intervals[0] - rng.uniform(0, 1) * mean
    last = np.searchsorted(onsets, seconds) + 1
    lengths, onsets = intervals[1 : last + 1], onsets[:last]
    inspired = onsets + lung.inspiration * lengths
    return onsets, inspired, inspired + 0.8 * (1 - lung.inspiration) * lengths


def _spans(starts: np.ndarray, ends: np.ndarray, seconds: float) -> list[tuple[float, float]]:
    spans = zip(starts.tolist(), ends.tolist(), strict=True)
    return [(a, b) for a, b in spans if b > 0 and a < seconds]


def _breath_noise(
    breaths: Breaths, lung: Lung, samples: int, seed: int, trachea: bool
) -> np.ndarray:
    rng = syn.stream(seed, "breath noise")
    onsets, inspired, expired = breaths
    loud_out = 0.95 if trachea else 0.4
    corners = (900, 800) if trachea else (lung.corner, 0.75 * lung.corner)
    sound = np.zeros(samples)
    # Airflow rises and falls evenly in inspiration; expiration is loudest at its beginning.
    phases = (
        (onsets, inspired, corners[0], 1.0, 0.8, 1.0),
        (inspired, expired, corners[1], loud_out, 0.6, 1.0 if trachea else 2.2),
    )
    for starts, ends, corner, gain, rise, fall in phases:
        noise = syn.shaped_noise(rng, samples, syn.band_pass(60, corner, 3))
        gate = np.zeros(samples)
        for start, end in zip(starts, ends, strict=True):
            u = (np.arange(int((end - start) * RATE)) + 0.5) / max(int((end - start) * RATE), 1)
            outline = np.sin(np.pi * u**rise) * (1 - u) ** (fall - 1)
            syn.add_at(gate, rng.uniform(0.85, 1.15) * outline, int(start * RATE))
        sound += gain * gate * noise
    return sound


def _wheeze_intervals(breaths: Breaths, seed: int) -> list[tuple[float, float]]:
    """In most expirations, from its first third on."""
    rng = syn.stream(seed, "wheeze intervals")
    _, inspired, expired = breaths
    spans = []
    for start, end in zip(inspired, expired, strict=True):
        onset, length = rng.uniform(0.02, 0.3), rng.uniform(0.3, 0.65)
        if rng.random() < 0.85:
            onset = start + onset * (end - start)
            spans.append((float(onset), float(onset + max(0.12, length * (end - start)))))
    return spans


def _wheezes(
    spans: list[tuple[float, float]], lung: Lung, samples: int, seed: int
) -> tuple[np.ndarray, list[tuple[float, float, float]]]:
    """Tones with harmonics, their pitch sliding by a few per cent."""
    rng = syn.stream(seed, "wheezes")
    sound = np.zeros(samples)
    heard = []
    for start, end in spans:
        length = int((end - start) * RATE)
        u = np.arange(length) / length
        hertz = lung.wheeze_hertz * rng.uniform(0.96, 1.04)
        slide = rng.uniform(-0.06, 0.06) * (u - 0.5) + 0.01 * np.sin(2 * np.pi * 2 * u)
        phase = 2 * np.pi * np.cumsum(hertz * (1 + slide)) / RATE
        tone = sum(a * np.sin(n * phase) for n, a in ((1, 1.0), (2, 0.3), (3, 0.12)))
        gain = np.sqrt(2) * lung.wheeze_loudness * rng.uniform(0.8, 1.2)
        syn.add_at(sound, gain * tone * syn.edges(length, length // 4), int(start * RATE))
        heard.append((start, end, float(hertz)))
    return sound, heard


def _crackle_kind(facts: Mapping[str, str], seed: int) -> str | None:
    """ICBHI's plain 1 leaves the kind open, so that it is drawn."""
    value = facts.get("crackles", "0")
    if value == "1":
        return str(syn.stream(seed, "crackle kind").choice((FINE, COARSE)))
    return None if value == "0" else value


def _crackle_times(breaths: Breaths, kind: str, seed: int) -> np.ndarray:
    rng = syn.stream(seed, "crackle times")
    onsets, inspired, _ = breaths
    crackle = CRACKLES[kind]
    times = []
    for start, end in zip(onsets, inspired, strict=True):
        low, high = (start + part * (end - start) for part in crackle.window)
        times.append(syn.spaced_times(rng, low, high, rng.integers(*crackle.count), crackle.gap))
    return np.concatenate(times)


def _add_crackles(
    sound: np.ndarray, times: np.ndarray, kind: CrackleKind, lung: Lung, seed: int
) -> None:
    rng = syn.stream(seed, "crackle shapes")
    for time in times:
        gain = lung.crackle_loudness * rng.uniform(0.7, 1.3)
        wave = crackle_wave(rng.uniform(*kind.first_deflection), rng.uniform(*kind.two_cycles))
        syn.add_at(sound, gain * wave, int(time * RATE))


def crackle_wave(first_deflection: float, two_cycles: float) -> np.ndarray:
    """A crackle of unit peak: two cycles that widen as they die away.

    The waveform is that of Kiyokawa et al. (Chest 119, 2001): sin(4 pi t^a) under a skewed
    raised cosine, t from 0 to 1 over `two_cycles`, with a such that the first zero crossing comes
    after `first_deflection` (both in seconds).
    """
    t = np.arange(int(two_cycles * RATE)) / (two_cycles * RATE)
    exponent = np.log(0.25) / np.log(first_deflection / two_cycles)
    wave = np.sin(4 * np.pi * t**exponent) * 0.5 * (1 + np.cos(2 * np.pi * (np.sqrt(t) - 0.5)))
    return wave / np.abs(wave).max()
