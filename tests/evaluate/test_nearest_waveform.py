"""The nearest waveform, against a plain loop over shifts and on planted copies."""

import csv

import numpy as np
import pytest
import soundfile
import soxr

from medalign_jax.evaluate.nearest_waveform import RATE, nearest_waveform


def noises(count, seconds=3.0, rate=RATE):
    rng = np.random.default_rng(0)
    low = rng.standard_normal((count, int(seconds * 500))).astype(np.float32)
    return [soxr.resample(x, 500, rate) for x in low]


def test_values_equal_a_loop_over_shifts():
    a, b = noises(2, 2.0)
    b = (b + 0.8 * np.roll(a, 700))[:-300]
    a, b = a - a.mean(), b - b.mean()
    best = -1.0
    for shift in range(-len(b) + RATE, len(a) - RATE + 1):
        x = a[max(0, shift) : min(len(a), len(b) + shift)]
        y = b[max(0, -shift) : max(0, -shift) + len(x)]
        best = max(best, float(x @ y / np.sqrt((x @ x) * (y @ y))))
    _, value = nearest_waveform([b, a].__getitem__, [0], [1], RATE)
    assert value[0] == pytest.approx(best, abs=1e-4)


def test_a_part_played_louder_and_with_noise_is_found():
    sounds = noises(20)
    rng = np.random.default_rng(1)
    part = 7.0 * sounds[13][1500:5000]
    part = part + 0.1 * part.std() * rng.standard_normal(len(part)).astype(np.float32)
    index, value = nearest_waveform([*sounds, part].__getitem__, list(range(20)), [20], RATE)
    assert index[0] == 13 and value[0] > 0.98
    others = [i for i in range(20) if i != 13]
    assert nearest_waveform([*sounds, part].__getitem__, others, [20], RATE)[1][0] < 0.5


def test_other_rates_are_resampled():
    sounds = noises(5, rate=8000)
    index, value = nearest_waveform([*sounds, sounds[3][8000:]].__getitem__, range(5), [5], 8000)
    assert index[0] == 3 and value[0] > 0.99


def test_nothing_to_choose_from_is_refused():
    with pytest.raises(ValueError, match="no training recording"):
        nearest_waveform(noises(1).__getitem__, [], [0], RATE)


def test_near_copies_of_the_heart_sounds_are_found(shared):
    """Near-copies stand on both sides of the published-by-recording split: memory is enough."""
    folder = shared / "data" / "heart_sounds"
    with open(folder / "metadata.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    rng = np.random.default_rng(0)
    train = [i for i, r in enumerate(rows) if r["split_by_recording"] == "train"]
    test = [i for i, r in enumerate(rows) if r["split_by_recording"] == "test"]
    test = rng.permutation(test)[:12].tolist()
    sounds = {i: soundfile.read(folder / rows[i]["audio_path"])[0] for i in [*train, *test]}
    index, _ = nearest_waveform(sounds.__getitem__, train, test, 8000)
    right = [rows[i]["label"] == rows[j]["label"] for i, j in zip(test, index, strict=True)]
    assert np.mean(right) >= 0.9
