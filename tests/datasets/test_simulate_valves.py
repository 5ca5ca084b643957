"""Simulated valve disease: findings go together, and what is recorded around them tells nothing."""

import csv
import itertools
from collections import Counter

import numpy as np
import pytest

from medalign_jax.datasets.simulated import synthesis, valves
from medalign_jax.datasets.simulated.simulate import LABELS, SAMPLE_RATE, simulate, write_dataset
from medalign_jax.reports.templates import wordings

FEATURES = ("timing", "shape", "quality", "pitch")


def spectrum(x, seconds=4.0):
    power = np.abs(np.fft.rfft(x)) ** 2
    return np.fft.rfftfreq(round(seconds * SAMPLE_RATE), 1 / SAMPLE_RATE), power


@pytest.mark.parametrize("label", LABELS["valves"][1:])
def test_findings_are_those_of_one_lesion(label):
    phase, seen = label.split()[0], Counter()
    for subject in range(400):
        row = valves.draw_metadata(subject, label)
        values = {f: row[f"{phase}_murmur_{f}"] for f in FEATURES}
        values["best"] = row["most_audible_location"]
        fitting = [
            name
            for name, lesion in valves.LESIONS[label].items()
            if all(value in getattr(lesion, feature) for feature, value in values.items())
        ]
        assert len(fitting) == 1, "the findings tell the lesion"
        seen[fitting[0]] += 1
        assert row["most_audible_location"] in row["murmur_locations"].split("+")
        assert all(key.startswith(phase) for key in row if "_murmur_" in key)
    assert set(seen) == set(valves.LESIONS[label])
    assert min(seen.values()) > 400 / len(seen) * 0.7


def test_loudness_tells_nothing_and_pitch_not_all():
    drawn = {}
    for label in LABELS["valves"][1:]:
        phase = label.split()[0]
        rows = [valves.draw_metadata(subject, label) for subject in range(1500)]
        for feature in ("pitch", "grading"):
            counts = Counter(row[f"{phase}_murmur_{feature}"] for row in rows)
            drawn[phase, feature] = {value: n / 1500 for value, n in counts.items()}
    for phase in ("systolic", "diastolic"):
        assert drawn[phase, "grading"].keys() == {f"{value}/VI" for value in valves.GRADES}
        for value, share in valves.GRADES.items():
            assert drawn[phase, "grading"][f"{value}/VI"] == pytest.approx(share, abs=0.04)
    assert drawn["systolic", "pitch"]["High"] == pytest.approx(0.25, abs=0.04)
    assert drawn["diastolic", "pitch"]["High"] == pytest.approx(2 / 3, abs=0.04)


def test_a_normal_heart_says_no_more_than_its_rate():
    row = valves.draw_metadata(5, "normal")
    assert row.keys() == {"murmur", "heart_rate"} and row["murmur"] == "Absent"
    assert valves.RATES[0] <= float(row["heart_rate"]) <= valves.RATES[1]


def test_stethoscope_and_room_do_not_depend_on_the_label():
    made = [simulate("valves", 3, label=label, seconds=2, subject=8) for label in LABELS["valves"]]
    assert [m.metadata["label"] for m in made] == list(LABELS["valves"])
    assert len({(m.truth["device"], m.truth["snr_db"]) for m in made}) == 1
    assert made[0].metadata["organ"] == "heart"


def test_the_room_is_as_loud_as_its_levels_say():
    quiet, loud = (valves._room(synthesis.stream(4, "x"), 64_000, snr_db) for snr_db in (60.0, 0.0))
    assert 0.7 < np.mean(loud**2) < 1.6
    assert np.mean(quiet**2) < 0.3  # voices, rumble and hum, each 10 dB or more below the sound


def test_the_mains_hum_in_most_rooms():
    lines = []
    for seed in range(12):
        hertz, power = spectrum(valves._room(synthesis.stream(seed, "x"), 64_000, 60.0))
        around = np.median(power[(hertz > 40) & (hertz < 70)])
        lines.append([power[np.argmin(np.abs(hertz - f))] / around for f in (50, 60)])
    heard = np.array(lines) > 10
    assert heard.any(1).sum() >= 7 and heard.any(0).all() and not heard.all(1).any()


def test_recordings_of_one_sound_differ_in_colour():
    """Over many stethoscopes the bands move by more than the murmur of grade III does."""
    sound = simulate("valves", 0, label="normal", nuisance=False, seconds=4).waveform
    levels = []
    for seed in range(24):
        hertz, power = spectrum(valves.record(sound.astype(float), seed)[0])
        edges = (40, 80, 160, 320, 640, 1280)
        bands = [power[(hertz >= a) & (hertz < b)].sum() for a, b in itertools.pairwise(edges)]
        levels.append(10 * np.log10(bands))
    spread = np.std(np.array(levels) - np.mean(levels, 1, keepdims=True), axis=0)
    assert (spread > 1.5).all() and (spread < 15).all()


def test_a_data_set_of_valves_has_reports_that_say_more_than_the_label(tmp_path):
    manifest = write_dataset(tmp_path / "v", 24, 2, seconds=2, kinds=("valves",))
    with manifest.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert Counter(row["label"] for row in rows) == dict.fromkeys(LABELS["valves"], 8)
    assert {row["organ"] for row in rows} == {"heart"}
    for row in rows:
        if row["label"] == "normal":
            assert row["phase"] == ""
            continue
        phase = row["label"].split()[0]
        assert row["phase"] == phase
        text = wordings(row, 1, 0)[0].lower()
        assert row[f"{phase}_murmur_pitch"].lower() in text
        assert row[f"{phase}_murmur_quality"].lower() in text
        assert row["heart_rate"] in text
