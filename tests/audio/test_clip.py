"""Trimming, cutting and padding against the published rules."""

import json

import librosa
import numpy as np
import pytest

from medalign_jax.audio import clip

LENGTHS = (1, 3, 50, 199, 399, 400, 401, 600, 799, 800, 801, 1000, 1199, 1200, 1201, 1999, 2000)
LENGTHS = (*LENGTHS, 2400)


@pytest.fixture(scope="module")
def expected(shared):
    return np.load(shared / "fixtures" / "logmel.npz", allow_pickle=False)


@pytest.fixture(scope="module")
def facts(shared):
    return json.loads((shared / "fixtures" / "logmel.json").read_text())


def ramp(n):
    return np.arange(1, n + 1, dtype=np.int16)


@pytest.mark.parametrize("n", LENGTHS)
def test_ramps(expected, facts, n):
    """Every sample stands where the published code puts it."""
    np.testing.assert_array_equal(
        clip.split_windows(ramp(n), 800, "repeat"), expected[f"pad_repeat_n{n}"]
    )
    np.testing.assert_array_equal(
        clip.split_windows(ramp(n), 800, "tile"), expected[f"pad_zero_n{n}"]
    )
    chunks = facts["ramp_chunks"][str(n)]
    shorter = clip.split_windows(ramp(n), 800, "repeat", trim_tail=True)
    assert len(shorter) == chunks["repeat"] - chunks["droplast"]
    np.testing.assert_array_equal(shorter, expected[f"pad_repeat_n{n}"][: len(shorter)])


def test_all_ramps_of_the_fixture_are_tried(expected):
    assert {f"pad_repeat_n{n}" for n in LENGTHS} == {
        name for name in expected if name.startswith("pad_repeat")
    }


@pytest.mark.parametrize("n", [n for n in LENGTHS if n <= 800])
def test_fit_pads_by_the_same_rules(expected, n):
    np.testing.assert_array_equal(clip.fit(ramp(n), 800, "repeat"), expected[f"pad_repeat_n{n}"][0])
    np.testing.assert_array_equal(clip.fit(ramp(n), 800, "tile"), expected[f"pad_zero_n{n}"][0])
    zero = clip.fit(ramp(n), 800, "zero")
    assert (zero[:n] == ramp(n)).all() and not zero[n:].any() and len(zero) == 800


def test_trim(facts):
    burst = (0.2 * np.random.default_rng(7).standard_normal(20_800)).astype(np.float32)
    noise = (0.1 * np.random.default_rng(42).standard_normal(128_000)).astype(np.float32)
    click = np.zeros(128_000, np.float32)
    click[64_000] = 1
    quiet = [np.float32(0.02) * noise[:16_000], 2 * np.float32(10**-3.5) * noise[:16_000]]
    gated = np.concatenate([np.zeros(16_000, np.float32), burst, *quiet])
    for name, waveform in (("burst", burst), ("noise", noise), ("click", click), ("gated", gated)):
        start, end = facts["facts_per_signal"][name]["trim"]
        np.testing.assert_array_equal(clip.trim_silence(waveform), waveform[start:end])


@pytest.mark.parametrize("seed", range(8))
def test_trim_equals_librosa(seed):
    rng = np.random.default_rng(seed)
    envelope = 10.0 ** np.repeat(rng.uniform(-6, 0, 25), 997)
    waveform = (envelope * rng.standard_normal(envelope.size)).astype(np.float32)
    for top_db in (20, 60):
        wanted, _ = librosa.effects.trim(waveform, top_db=top_db, frame_length=1600, hop_length=800)
        np.testing.assert_array_equal(clip.trim_silence(waveform, top_db), wanted)


def test_trim_keeps_silence_whole():
    assert clip.trim_silence(np.zeros(5_000, np.float32)).shape == (5_000,)


def test_acula_rule():
    assert clip.crop_or_zero_pad(ramp(5), 3).tolist() == [1, 2, 3]
    assert clip.crop_or_zero_pad(ramp(3), 5).tolist() == [1, 2, 3, 0, 0]


def test_fit_cuts_where_told():
    assert clip.fit(ramp(10), 4, start=6).tolist() == [7, 8, 9, 10]
    with pytest.raises(ValueError, match="choose 0 to 6"):
        clip.fit(ramp(10), 4, start=7)
    with pytest.raises(ValueError, match="nothing to cut"):
        clip.fit(ramp(3), 4, start=1)
    with pytest.raises(ValueError, match="choose from"):
        clip.fit(ramp(3), 4, "mirror")


def test_nothing_to_pad_is_refused():
    for function in (clip.repeat_pad, clip.tile_pad, clip.crop_or_zero_pad, clip.split_windows):
        with pytest.raises(ValueError, match="at least one sample"):
            function(np.zeros(0, np.float32), 8)
    with pytest.raises(ValueError, match="do not fit"):
        clip.tile_pad(ramp(9), 8)
