"""Cases of a small world of hearts, and recordings of them: what `questions` asks about.

The medicine is that of any textbook of auscultation, simplified to single lesions heard at their
own site: blood that falls back through a leaking valve blows high, blood that is forced through a
narrow one rumbles low. It is a world for experiments, not advice.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import soundfile

from medalign_jax.core.errors import UserError
from medalign_jax.core.files import write_whole
from medalign_jax.datasets.simulated.simulate import SAMPLE_RATE, simulate
from medalign_jax.datasets.simulated.synthesis import band_pass, shaped_noise

VALVES = {"AV": "aortic", "PV": "pulmonary", "TV": "tricuspid", "MV": "mitral"}
PITCHES = ("low", "high")
NOISES = ("quiet", "hiss", "whistle", "clicks")
_OUTFLOW = ("aortic", "pulmonary")
_GRADES = {"faint": "III", "loud": "V"}
LOUDNESS = tuple(_GRADES)
_NOISE_LEVEL = 0.02  # RMS, against the heart, whose loudest sample is 1
_CLICKS = 6.0  # per second
_CASES = "cases.jsonl"


@dataclass(frozen=True)
class Case:
    """What is true of one recording.

    Attributes:
      site: where the stethoscope lay, a key of `VALVES`.
      pitch, loudness: of the murmur, of `PITCHES` and `LOUDNESS`, or "" without one.
      rate: heart beats per minute.
      noise: of the recorder, of `NOISES`.
    """

    site: str
    pitch: str = ""
    loudness: str = ""
    rate: int = 80
    noise: str = "quiet"

    @property
    def valve(self) -> str:
        """The valve that is heard best at the site."""
        return VALVES[self.site]

    @property
    def lesion(self) -> str:
        """Regurgitation where the murmur is high, stenosis where it is low; or ""."""
        return {"": "", "low": "stenosis", "high": "regurgitation"}[self.pitch]

    @property
    def phase(self) -> str:
        """Of the murmur: a narrow valve is heard while it is open, a leaking one while it is shut.

        The outflow valves, aortic and pulmonary, are open in systole.
        """
        if not self.pitch:
            return ""
        opened = "systolic" if self.valve in _OUTFLOW else "diastolic"
        shut = "diastolic" if self.valve in _OUTFLOW else "systolic"
        return opened if self.lesion == "stenosis" else shut

    @property
    def speed(self) -> str:
        """Of the heart, in a word."""
        return "slow" if self.rate < 65 else "fast" if self.rate > 95 else "steady"

    @property
    def diagnosis(self) -> str:
        """For example "aortic stenosis"; "normal heart" without a murmur."""
        return f"{self.valve} {self.lesion}" if self.pitch else "normal heart"


def random_cases(count: int, seed: int) -> list[Case]:
    """Cases with no, a low and a high murmur equally often; all else is drawn."""
    rng = np.random.default_rng((seed, 17))
    found = []
    for number in range(count):
        pitch = ("", *PITCHES)[number % 3]
        loudness = str(rng.choice(LOUDNESS))
        found.append(
            Case(
                site=str(rng.choice(tuple(VALVES))),
                pitch=pitch,
                loudness=loudness if pitch else "",
                rate=int(rng.integers(55, 110)),
                noise=str(rng.choice(NOISES)),
            )
        )
    return found


def sound(case: Case, seed: int, seconds: float) -> np.ndarray:
    """A recording of the case, the heart and the recorder's noise; (samples,) at 16 kHz."""
    findings = {"heart_rate": str(case.rate)}
    if case.pitch:
        findings |= {
            "most_audible_location": case.site,
            f"{case.phase}_murmur_timing": f"Holo{case.phase}",
            f"{case.phase}_murmur_pitch": case.pitch.capitalize(),
            f"{case.phase}_murmur_grading": f"{_GRADES[case.loudness]}/VI",
        }
    label = f"{case.phase} murmur" if case.pitch else "normal"
    heart = simulate(
        "heart", seed, label=label, metadata=findings, seconds=seconds, nuisance=False
    ).waveform
    noise = _noise(case.noise, len(heart), np.random.default_rng((seed, 31)))
    both = heart / np.abs(heart).max() + _NOISE_LEVEL * noise
    return (0.5 * both / np.abs(both).max()).astype(np.float32)


def _noise(kind: str, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Noise of unit RMS above the heart's frequencies; nothing where it is quiet."""
    if kind == "quiet":
        return np.zeros(samples)
    if kind == "hiss":
        noise = shaped_noise(rng, samples, band_pass(1500, 5000, 3))
    elif kind == "whistle":
        hertz = rng.uniform(1500, 3000)
        noise = np.sin(2 * np.pi * hertz * np.arange(samples) / SAMPLE_RATE)
    else:
        clicks = rng.random(samples) < _CLICKS / SAMPLE_RATE
        clicks[rng.integers(samples)] = True
        noise = shaped_noise(rng, samples, band_pass(800, 5000, 3))
        noise *= np.convolve(clicks, np.exp(-np.arange(160) / 32.0))[:samples]
    return noise / np.sqrt(np.mean(noise**2))


def write_cases(folder: str | os.PathLike, count: int, seed: int, seconds: float) -> Path:
    """Writes recordings of random cases and their truth; a folder that is whole is left as it is.

    Returns:
      Path of ``cases.jsonl``: audio_path (relative to it) and the case, one line per recording.

    Raises:
      UserError: the folder holds another world, or anything else.
    """
    folder = Path(folder)
    listing, request = folder / _CASES, {"count": count, "seed": seed, "seconds": seconds}
    record = folder / "world.json"
    if record.is_file() and _object(record) != request:
        raise UserError(f"{folder} holds other recordings than {request}; give an empty folder")
    if not record.is_file() and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty, and not made here; give an empty folder")
    if listing.is_file():
        return listing
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(record, json.dumps(request).encode())  # first: it says whose folder this is
    (folder / "audio").mkdir(exist_ok=True)
    lines = []
    for number, case in enumerate(random_cases(count, seed)):
        path = f"audio/sim{seed}-{number:05d}.wav"
        one = int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0])
        soundfile.write(folder / path, sound(case, one, seconds), SAMPLE_RATE, subtype="PCM_16")
        lines.append(json.dumps({"audio_path": path} | asdict(case)))
    write_whole(listing, ("\n".join(lines) + "\n").encode())
    return listing


def _object(record: Path) -> object:
    """What a file of JSON holds; None where it is damaged."""
    try:
        return json.loads(record.read_bytes())
    except ValueError:
        return None


def read_cases(listing: str | os.PathLike) -> list[tuple[Case, str]]:
    """(case, path of its recording) of every line that `write_cases` wrote.

    Raises:
      UserError: a line is damaged; names it.
    """
    listing = Path(listing)
    found: list[tuple[Case, str]] = []
    for number, line in enumerate(listing.read_bytes().splitlines(), start=1):
        try:
            record = json.loads(line)
            path = str(listing.parent / record.pop("audio_path"))
            found.append((Case(**record), path))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{listing}, line {number} is damaged ({error}); remove the folder "
                f"{listing.parent}, and it is made again"
            ) from error
    return found
