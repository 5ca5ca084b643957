"""Simulated heart sounds: S1, S2 and murmurs, each where the metadata says.

Physiology: the S1-S2 interval shortens with heart rate as Weissler's regression of
electromechanical systole does (546 - 2.1 x rate, ms; less the 55 ms from Q to S1); S1 is loudest at
the apex, S2 at the base; inspiration widens the split of S2 and quickens the heart.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from medalign_jax.datasets.simulated import synthesis as syn
from medalign_jax.reports.vocabulary import PHASES

RATE = syn.SAMPLE_RATE
SITES = ("AV", "PV", "TV", "MV")
SITE_GAINS = {"AV": (0.65, 0.95), "PV": (0.7, 1.0), "TV": (0.95, 0.75), "MV": (1.0, 0.65)}
GRADES = ("I", "II", "III", "IV", "V", "VI")
GRADE_DB = dict(zip(GRADES, (-28, -23, -18, -13, -8, -3), strict=True))  # RMS against S1's peak
PITCH_HZ = {"Low": 110.0, "Medium": 220.0, "High": 420.0}
# timing -> part of systole or diastole, as fractions of the interval between the sounds
WINDOWS = {"Early": (0.0, 0.45), "Mid": (0.27, 0.73), "Late": (0.55, 1.0), "Holo": (0.0, 1.0)}
S1_SECONDS, S2_SECONDS = 0.07, 0.06  # a murmur is heard from here after the onset of the sound


@dataclass(frozen=True)
class Heart:
    """What stays the same over the recordings of one subject."""

    systole_scale: float
    s1_hertz: np.ndarray
    s2_hertz: np.ndarray
    split: float  # seconds from A2 to P2
    breaths: float  # per minute
    pitch_scale: float


def draw_heart(subject: int) -> Heart:
    """The anatomy of a subject: what all of its recordings share."""
    rng = syn.stream(subject, "heart anatomy")
    return Heart(
        systole_scale=rng.uniform(0.94, 1.06),
        s1_hertz=np.array([rng.uniform(32, 50), rng.uniform(60, 85), rng.uniform(100, 130)]),
        s2_hertz=np.array([rng.uniform(45, 65), rng.uniform(80, 110), rng.uniform(125, 160)]),
        split=rng.uniform(0.01, 0.035),
        breaths=rng.uniform(12, 20),
        pitch_scale=2 ** rng.uniform(-0.2, 0.2),
    )


def draw_metadata(subject: int, label: str) -> dict[str, str]:
    """The findings of one subject, in the columns of CirCor.

    `outcome` is defined by the murmur here (Normal without one), which patients' outcomes are not.
    """
    rng = syn.stream(subject, "heart findings")
    rate = rng.uniform(55, 110)
    row = {"murmur": "Absent", "outcome": "Normal", "heart_rate": f"{rate:.1f}"}
    best = str(rng.choice(SITES))
    others = [site for site in SITES if site != best and rng.random() < 0.4]
    timings = {
        "systolic": ("Early-systolic", "Mid-systolic", "Late-systolic", "Holosystolic"),
        "diastolic": ("Early-diastolic", "Mid-diastolic", "Holodiastolic"),
    }
    drawn = {}
    for phase in PHASES:
        drawn[phase] = {
            "timing": rng.choice(timings[phase]),
            "shape": rng.choice(("Plateau", "Diamond", "Decrescendo", "Crescendo")),
            "grading": rng.choice(GRADES, p=(0.05, 0.2, 0.3, 0.25, 0.12, 0.08)) + "/VI",
            "pitch": rng.choice(tuple(PITCH_HZ)),
            "quality": rng.choice(("Blowing", "Harsh", "Musical"), p=(0.45, 0.4, 0.15)),
        }
    if label != "normal":
        phase = label.removesuffix(" murmur")
        row |= {"murmur": "Present", "outcome": "Abnormal"}
        row["murmur_locations"] = "+".join(s for s in SITES if s == best or s in others)
        row["most_audible_location"] = best
        row |= {f"{phase}_murmur_{k}": str(v) for k, v in drawn[phase].items()}
    return row


def beats(heart: Heart, rate: float, seconds: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Onsets of S1 and S2, seconds, of every beat that reaches into the clip, and one more."""
    rng = syn.stream(seed, "beats")
    mean = 60 / rate
    count = int(seconds / mean * 1.2) + 4
    phase = rng.uniform(0, 2 * np.pi)
    breathing = 2 * np.pi * heart.breaths / 60 * mean * np.arange(count)
    intervals = mean * (1 + 0.02 * np.sin(breathing + phase) + 0.01 * rng.standard_normal(count))
    s1 = np.cumsum(intervals) - intervals[0] - rng.uniform(0.5, 1.5) * mean
    systole = (0.546 - 0.0021 * 60 / intervals - 0.055) * heart.systole_scale
    keep = np.searchsorted(s1, seconds) + 2
    return s1[:keep], (s1 + systole)[:keep]


def render(
    facts: Mapping[str, str], heart: Heart, seconds: float, seed: int
) -> tuple[np.ndarray, dict[str, object]]:
    """Clean heart sounds, (samples,) float64, S1 at the apex peaking at about 1.

    Args:
      facts: canonical metadata (`vocabulary.read_metadata`) with `heart_rate`.
      heart: the subject.
      seconds: length.
      seed: of this recording (its beats and its site).

    Returns:
      The sound and its truth: `s1_times`, `s2_times` (onsets, seconds, inside the clip),
      `murmurs` (phase, onset, offset), `heart_rate` (a minute, of these very beats), `site`.
    """
    samples = round(seconds * RATE)
    rng = syn.stream(seed, "heart sounds")
    heard_at = facts.get("murmur_locations", "+".join(SITES)).split("+")
    site = str(rng.choice([s for s in heard_at if s in SITES] or SITES))
    s1, s2 = beats(heart, float(facts["heart_rate"]), seconds, seed)
    sound = np.zeros(samples)
    s1_gain, s2_gain = SITE_GAINS[site]
    for onset in s1:
        gain = s1_gain * rng.uniform(0.88, 1.12)
        syn.add_at(sound, gain * _thump(rng, heart.s1_hertz, 0.028, 0.022), int(onset * RATE))
    for onset in s2:
        breath = 1 + 0.6 * np.sin(2 * np.pi * heart.breaths / 60 * onset)
        thump = _thump(rng, heart.s2_hertz, 0.018, heart.split * breath)
        syn.add_at(sound, s2_gain * rng.uniform(0.88, 1.12) * thump, int(onset * RATE))
    truth: dict[str, object] = {
        "s1_times": _inside(s1, seconds),
        "s2_times": _inside(s2, seconds),
        "heart_rate": float(60 / np.mean(np.diff(s1))),
        "site": site,
        "murmurs": [],
    }
    for phase in PHASES:
        if f"{phase}_murmur_timing" in facts:
            intervals = murmur_intervals(phase, facts[f"{phase}_murmur_timing"], s1, s2)
            sound += _murmur(facts, phase, heart, intervals, samples, seed, site)
            truth["murmurs"] += [(phase, a, b) for a, b in intervals if b > 0 and a < seconds]
    return sound, truth


def murmur_intervals(
    phase: str, timing: str, s1: np.ndarray, s2: np.ndarray
) -> list[tuple[float, float]]:
    """Onset and offset, seconds, of the murmur in every beat."""
    if phase == "systolic":
        starts, ends = s1 + S1_SECONDS, s2
    else:
        starts, ends = s2[:-1] + S2_SECONDS, s1[1:] - 0.01
    low, high = next(window for word, window in WINDOWS.items() if timing.startswith(word))
    length = ends - starts
    return list(
        zip((starts + low * length).tolist(), (starts + high * length).tolist(), strict=True)
    )


def envelope(shape: str, length: int) -> np.ndarray:
    """Loudness over one murmur, (length,), of unit RMS so that the grade alone sets the energy."""
    u = (np.arange(length) + 0.5) / length
    outline = {
        "Plateau": np.ones(length),
        "Diamond": 1 - np.abs(2 * u - 1),
        "Crescendo": u,
        "Decrescendo": 1 - u,
    }[shape] * syn.edges(length, length // 10)
    return outline / np.sqrt(np.mean(outline**2))


def _murmur(
    facts: Mapping[str, str],
    phase: str,
    heart: Heart,
    intervals: list[tuple[float, float]],
    samples: int,
    seed: int,
    site: str,
) -> np.ndarray:
    rng = syn.stream(seed, f"{phase} murmur")
    grade = facts[f"{phase}_murmur_grading"].split("/")[0]
    loudness = 10 ** (GRADE_DB[grade] / 20)
    away = 10 ** (-rng.uniform(2, 4) / 20)
    loudness *= away if site != facts.get("most_audible_location", site) else 1
    gate = np.zeros(samples)
    for onset, offset in intervals:
        outline = envelope(facts[f"{phase}_murmur_shape"], int((offset - onset) * RATE))
        syn.add_at(gate, rng.uniform(0.9, 1.1) * outline, int(onset * RATE))
    centre = PITCH_HZ[facts[f"{phase}_murmur_pitch"]] * heart.pitch_scale
    return loudness * gate * _carrier(rng, facts[f"{phase}_murmur_quality"], centre, samples)


def _carrier(rng: np.random.Generator, quality: str, centre: float, samples: int) -> np.ndarray:
    """Unit-RMS sound that the murmur's envelope is laid over."""
    if quality == "Blowing":
        return syn.shaped_noise(rng, samples, syn.log_bell(centre, 0.45))
    if quality == "Harsh":
        rough = 1 + 0.7 * syn.shaped_noise(rng, samples, syn.band_pass(20, 60, 2))
        harsh = syn.shaped_noise(rng, samples, syn.log_bell(centre, 0.75)) * rough
        return harsh / np.sqrt(np.mean(harsh**2))
    wander = syn.shaped_noise(rng, samples, syn.low_pass(6, 2))
    phase = 2 * np.pi * np.cumsum(centre * (1 + 0.015 * wander)) / RATE
    tone = sum(a * np.sin(n * phase) for n, a in ((1, 1.0), (2, 0.35), (3, 0.12)))
    return tone / np.sqrt(np.mean(tone**2))


def _thump(rng: np.random.Generator, hertz: np.ndarray, decay: float, split: float) -> np.ndarray:
    """One heart sound: two valves `split` seconds apart, each a sum of damped oscillations.

    A short broadband snap goes with it, without which the spectrum ends far too low.
    """
    time = np.arange(int((8 * decay + split) * RATE)) / RATE
    snap = syn.shaped_noise(rng, time.size, syn.low_pass(220, 2))
    sound = 0.25 * snap * np.exp(-time / (0.7 * decay)) * (1 - np.exp(-time / 0.004))
    for delay, gain in ((0.0, 1.0), (split, 0.6)):
        late = np.maximum(time - delay, 0)
        attack = 1 - np.exp(-late / 0.006)
        rings = (
            a * np.exp(-late / (decay * d)) * np.sin(2 * np.pi * f * late)
            for f, a, d in zip(hertz, (1.0, 0.7, 0.35), (1.0, 0.8, 0.6), strict=True)
        )
        sound += gain * attack * sum(rings)
    return sound / np.abs(sound).max()


def _inside(times: np.ndarray, seconds: float) -> list[float]:
    return times[(times >= 0) & (times < seconds)].tolist()
