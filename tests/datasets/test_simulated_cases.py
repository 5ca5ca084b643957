"""Simulated cases: textbook lesions, recordings that sound as they say, folders left alone."""

import dataclasses

import numpy as np
import pytest
import soundfile

from medalign_jax.core.errors import UserError
from medalign_jax.datasets.simulated.cases import (
    NOISES,
    Case,
    random_cases,
    read_cases,
    sound,
    write_cases,
)


def band_energy(waveform, low, high):
    power = np.abs(np.fft.rfft(waveform)) ** 2
    hertz = np.fft.rfftfreq(len(waveform), 1 / 16_000)
    return power[(hertz >= low) & (hertz < high)].sum() / power.sum()


@pytest.mark.parametrize(
    ("site", "pitch", "phase", "diagnosis"),
    [
        ("AV", "low", "systolic", "aortic stenosis"),
        ("AV", "high", "diastolic", "aortic regurgitation"),
        ("PV", "low", "systolic", "pulmonary stenosis"),
        ("PV", "high", "diastolic", "pulmonary regurgitation"),
        ("MV", "high", "systolic", "mitral regurgitation"),
        ("MV", "low", "diastolic", "mitral stenosis"),
        ("TV", "high", "systolic", "tricuspid regurgitation"),
        ("TV", "low", "diastolic", "tricuspid stenosis"),
        ("TV", "", "", "normal heart"),
    ],
)
def test_diagnoses_and_phases_are_those_of_the_textbook(site, pitch, phase, diagnosis):
    case = Case(site, pitch, "loud" if pitch else "")
    assert (case.phase, case.diagnosis) == (phase, diagnosis)


def test_a_recording_sounds_as_its_case_says():
    quiet = Case("AV", "", "", 80, "quiet")
    heart = sound(quiet, 5, 2.0)
    assert heart.shape == (32_000,) and np.abs(heart).max() <= 0.5
    assert np.array_equal(heart, sound(quiet, 5, 2.0))
    high, low = (sound(Case("AV", p, "loud", 80), 5, 2.0) for p in ("high", "low"))
    assert band_energy(high, 300, 600) > 3 * band_energy(low, 300, 600)
    noisy = {n: sound(dataclasses.replace(quiet, noise=n), 5, 2.0) for n in NOISES}
    above = {name: band_energy(waveform, 1_000, 8_000) for name, waveform in noisy.items()}
    assert all(above[name] > 10 * above["quiet"] for name in NOISES if name != "quiet")
    extra = {name: np.abs(noisy[name] - heart) for name in NOISES}
    peaks = {name: extra[name].max() / extra[name].std() for name in NOISES if name != "quiet"}
    assert peaks["clicks"] > 2 * max(peaks["hiss"], peaks["whistle"])


def test_random_cases_are_balanced_and_repeatable():
    cases = random_cases(300, 1)
    assert [sum(c.pitch == p for c in cases) for p in ("", "low", "high")] == [100] * 3
    assert {c.noise for c in cases} == set(NOISES)
    assert cases == random_cases(300, 1) != random_cases(300, 2)


def test_a_folder_is_written_once_and_belongs_to_one_world(tmp_path):
    listing = write_cases(tmp_path, 3, 7, 2.0)
    written = listing.stat().st_mtime_ns
    assert write_cases(tmp_path, 3, 7, 2.0) == listing and listing.stat().st_mtime_ns == written
    found = read_cases(listing)
    assert [case for case, _ in found] == random_cases(3, 7)
    assert all(len(soundfile.read(path)[0]) == 32_000 for _, path in found)
    with pytest.raises(UserError, match="holds other recordings"):
        write_cases(tmp_path, 4, 7, 2.0)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "cases.jsonl").write_text("mine\n")
    with pytest.raises(UserError, match="not empty, and not made here"):
        write_cases(tmp_path, 3, 7, 2.0)
    assert [path.name for path in tmp_path.iterdir()] == ["cases.jsonl"]


def test_a_damaged_world_is_named(tmp_path):
    listing = write_cases(tmp_path, 2, 7, 2.0)
    listing.write_bytes(listing.read_bytes() + b'{"audio_path": "\xff"}\n')
    with pytest.raises(UserError, match=r"line 3 is damaged .* remove the folder"):
        read_cases(listing)
    (tmp_path / "world.json").write_bytes(b'{"count": \xff')
    with pytest.raises(UserError, match="holds other recordings"):
        write_cases(tmp_path, 2, 7, 2.0)
