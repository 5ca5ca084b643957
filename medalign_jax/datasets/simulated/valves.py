"""Simulated patients with valve disease: findings that go together, heard with many stethoscopes.

`simulate_heart` draws every finding on its own, so that each can be asked about. Here they come as
lesions do: aortic stenosis is harsh and diamond-shaped in mid-systole, mitral stenosis a low rumble
in mid-diastole (as textbooks describe them, e.g. Chizner 2008, "Cardiac auscultation: rediscovering
the lost art"). So pitch and quality give part of the label, as they do in patients; a high blowing
murmur of either phase is known by timing alone. Stethoscope and room are drawn without regard to
the findings, from ranges wide enough to colour a recording more than a murmur does.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from medalign_jax.datasets.simulated import heart as simulate_heart
from medalign_jax.datasets.simulated import synthesis as syn
from medalign_jax.datasets.simulated.heart import SITES

RATES = (55.0, 90.0)  # adults at rest, whose diastole is longer than their systole
GRADES = {"II": 0.2, "III": 0.35, "IV": 0.3, "V": 0.15}  # share; grade I is found by few


@dataclass(frozen=True)
class Lesion:
    """What a lesion sounds like; where several values stand, one of them is drawn.

    Attributes:
      timing, shape, quality, pitch: values of CirCor's columns of that name.
      best: the site where it is loudest.
    """

    timing: tuple[str, ...]
    shape: tuple[str, ...]
    quality: tuple[str, ...]
    pitch: tuple[str, ...]
    best: tuple[str, ...]


LESIONS: Mapping[str, Mapping[str, Lesion]] = {
    "systolic murmur": {
        "aortic stenosis": Lesion(
            ("Mid-systolic",), ("Diamond",), ("Harsh",), ("Medium",), ("AV",)
        ),
        "mitral regurgitation": Lesion(
            ("Holosystolic",), ("Plateau",), ("Blowing",), ("Medium", "High"), ("MV",)
        ),
        "pulmonary stenosis": Lesion(
            ("Mid-systolic",), ("Diamond",), ("Harsh",), ("Medium",), ("PV",)
        ),
        "ventricular septal defect": Lesion(
            ("Holosystolic",), ("Plateau",), ("Harsh",), ("Medium", "High"), ("TV",)
        ),
    },
    "diastolic murmur": {
        "aortic regurgitation": Lesion(
            ("Early-diastolic", "Holodiastolic"),
            ("Decrescendo",),
            ("Blowing",),
            ("High",),
            ("AV", "TV"),
        ),
        "mitral stenosis": Lesion(
            ("Mid-diastolic",), ("Plateau", "Crescendo"), ("Harsh",), ("Low",), ("MV",)
        ),
        "pulmonary regurgitation": Lesion(
            ("Early-diastolic", "Holodiastolic"),
            ("Decrescendo",),
            ("Blowing",),
            ("High",),
            ("PV",),
        ),
    },
}


def draw_heart(subject: int) -> simulate_heart.Heart:
    """A subject of `simulate_heart` with a dull first and a crisp second sound, as in adults."""
    rng = syn.stream(subject, "adult heart")
    return replace(
        simulate_heart.draw_heart(subject),
        s1_hertz=np.array([rng.uniform(28, 38), rng.uniform(50, 65), rng.uniform(75, 95)]),
        s2_hertz=np.array([rng.uniform(60, 80), rng.uniform(110, 140), rng.uniform(170, 220)]),
        split=rng.uniform(0.005, 0.02),
    )


def draw_metadata(subject: int, label: str) -> dict[str, str]:
    """The findings of one subject, in the columns of CirCor."""
    rng = syn.stream(subject, "valves")
    row = {"murmur": "Absent", "heart_rate": f"{rng.uniform(*RATES):.1f}"}
    if label == "normal":
        return row
    names = tuple(LESIONS[label])
    lesion = LESIONS[label][names[rng.integers(len(names))]]
    phase = label.removesuffix(" murmur")
    best = str(rng.choice(lesion.best))
    also = [site for site in SITES if site != best and rng.random() < 0.4]
    row["murmur"] = "Present"
    row["murmur_locations"] = "+".join(s for s in SITES if s == best or s in also)
    row["most_audible_location"] = best
    for feature in ("timing", "shape", "quality", "pitch"):
        row[f"{phase}_murmur_{feature}"] = str(rng.choice(getattr(lesion, feature)))
    row[f"{phase}_murmur_grading"] = f"{rng.choice(tuple(GRADES), p=tuple(GRADES.values()))}/VI"
    return row


def record(sound: np.ndarray, seed: int) -> tuple[np.ndarray, dict[str, object]]:
    """The sound as one of many stethoscopes records it in one of many rooms.

    What `synthesis.record` draws from three devices is drawn from ranges here: the pass band, a
    resonance, a tilt; and the room adds hum of the mains, voices and rumble to the noise, each at
    a level of its own.

    Returns:
      The recording, (samples,), and the truth about it: `device` (its numbers in words), `snr_db`,
      `friction_times`.
    """
    rng = syn.stream(seed, "clinic")
    device = syn.Device(
        "any",
        low=_log_uniform(rng, 15, 70),
        high=_log_uniform(rng, 500, 2500),
        order=2,
        resonance=_log_uniform(rng, 80, 700),
        gain_db=rng.uniform(-5, 9),
    )
    tilt = rng.uniform(-3, 3)  # decibels per octave about 200 Hz
    snr_db = rng.uniform(15, 40)
    rms = np.sqrt(np.mean(sound**2))
    out = sound + rms * _room(rng, sound.size, snr_db)
    times = syn.add_friction(rng, out, rms)
    hertz = np.fft.rfftfreq(out.size, 1 / syn.SAMPLE_RATE)
    octaves = np.log2(np.clip(hertz, 20, 4000) / 200)
    response = device.response(hertz) * 10 ** (tilt * octaves / 20)
    out = np.fft.irfft(np.fft.rfft(out) * response, n=out.size)
    truth = {
        "device": f"{device.low:.0f} to {device.high:.0f} Hz, {device.gain_db:+.1f} dB at "
        f"{device.resonance:.0f} Hz, {tilt:+.1f} dB per octave",
        "snr_db": float(snr_db),
        "friction_times": times,
    }
    return out, truth


def _room(rng: np.random.Generator, samples: int, snr_db: float) -> np.ndarray:
    """Noise against a sound of RMS 1: ambient, voices, rumble, hum."""
    slope = rng.uniform(0.5, 1.0)
    voice, rumble = _log_uniform(rng, 250, 700), rng.uniform(25, 60)
    levels = 10 ** (-np.array([snr_db, *rng.uniform((14, 10, 14), (45, 40, 50))]) / 20)

    def spectrum(hertz: np.ndarray) -> np.ndarray:
        parts = (
            np.maximum(hertz, 20) ** -slope,
            syn.log_bell(voice, 0.5)(hertz),
            syn.log_bell(rumble, 0.4)(hertz),
        )
        powers = (part**2 / np.mean(part**2) for part in parts)
        return np.sqrt(sum(a**2 * p for a, p in zip(levels[:3], powers, strict=True)))

    noise = syn.shaped_noise(rng, samples, spectrum) * np.sqrt(np.sum(levels[:3] ** 2))
    mains = rng.choice((50.0, 60.0))
    time = np.arange(samples) / syn.SAMPLE_RATE
    start = rng.uniform(0, 2 * np.pi, 3)
    strength = (1.0, *rng.uniform(0.1, 0.7, 2))
    hum = sum(
        a * np.sin(2 * np.pi * mains * n * time + s)
        for n, a, s in zip((1, 2, 3), strength, start, strict=True)
    )
    return noise + np.sqrt(2) * levels[3] * hum


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))
