"""Spectral statistics against plain numpy, and on sounds whose numbers are known."""

import itertools

import numpy as np
import pytest
import scipy.signal

from medalign_jax.audio.spectral_statistics import (
    BANDS,
    CORNER,
    RHYTHM_BANDS,
    STATISTICS,
    least_samples,
    spectral_statistics,
)

RATE = 8_000
SAMPLES = 3 * RATE


def statistics(waveform, rate=RATE, samples=SAMPLES, fill=0.0) -> dict[str, float]:
    """The numbers of one waveform by name; two rows, so that shapes compile once."""
    padded = np.full((2, samples), fill, np.float32)
    padded[:, : len(waveform)] = waveform
    lengths = np.array([len(waveform), samples])
    return dict(
        zip(STATISTICS, np.asarray(spectral_statistics(padded, lengths, rate))[0], strict=True)
    )


def beats(seconds: float, noise: int = 0) -> np.ndarray:
    """Short bursts of noise every so many seconds."""
    time = np.arange(SAMPLES) / RATE
    sound = np.random.default_rng(noise).standard_normal(SAMPLES)
    return (sound * (0.02 + np.exp(-(((time % seconds) - 0.1) ** 2) / 0.03**2))).astype(np.float32)


@pytest.fixture(scope="module")
def sound():
    rng = np.random.default_rng(0)
    tone = np.sin(2 * np.pi * 300 * np.arange(2 * RATE) / RATE)
    steps = np.repeat(rng.uniform(0.2, 1.0, 20), RATE // 10)
    return (steps * (tone + 0.3 * rng.standard_normal(2 * RATE))).astype(np.float32)


def test_names_are_distinct_and_about_150():
    assert len(set(STATISTICS)) == len(STATISTICS) == 149


def oracle(x: np.ndarray, rate: int) -> dict[str, float]:
    """The same numbers of one waveform in float64, one after another."""
    x = x.astype(np.float64) - x.astype(np.float64).mean()
    x /= np.sqrt(np.mean(x**2))
    length, hop = round(0.064 * rate), round(0.016 * rate)
    window = scipy.signal.get_window("hann", length)
    frames = [x[i : i + length] for i in range(0, len(x) - length + 1, hop)]
    power = np.array([np.abs(np.fft.rfft(f * window))[1:] ** 2 for f in frames])
    power *= 2 / (length * np.sum(window**2))
    hz = np.fft.rfftfreq(length, 1 / rate)[1:]
    scale = np.log1p(np.array([25.0, min(8000, rate / 2)]) / CORNER)
    edges = CORNER * np.expm1(np.linspace(*scale, BANDS + 2))
    found = {}
    for k in range(BANDS):
        weights = np.interp(hz, edges[k : k + 3], [0, 1, 0])
        level = 10 * np.log10(np.maximum(power @ weights, 1e-9))
        found[f"band{k:02d} mean"], found[f"band{k:02d} std"] = level.mean(), level.std()
        found[f"band{k:02d} range"] = np.subtract(*np.percentile(level, [95, 5]))
        found[f"band{k:02d} change"] = np.abs(np.diff(level)).mean()
    power = power + 1e-9 / len(hz)
    octaves = np.log2(hz / 1000)
    share = power / power.sum(1, keepdims=True)
    centroid = share @ octaves
    found["centroid mean"], found["centroid std"] = centroid.mean(), centroid.std()
    spread = np.sqrt(np.sum(share * (octaves - centroid[:, None]) ** 2, 1))
    found["bandwidth mean"], found["bandwidth std"] = spread.mean(), spread.std()
    flat = 10 * np.log10(np.exp(np.log(power).mean(1)) / power.mean(1))
    found["flatness mean"], found["flatness std"] = flat.mean(), flat.std()
    return found | _oracle_of_time(x, hop, rate)


def _oracle_of_time(x: np.ndarray, hop: int, rate: int) -> dict[str, float]:
    blocks = x[: len(x) // hop * hop].reshape(-1, hop)
    crossings = np.mean(np.diff(np.sign(blocks), axis=1) != 0, axis=1)
    e = np.sqrt(np.mean(blocks**2, axis=1))
    z = (e - e.mean()) / e.std()
    found = {
        "zero crossings mean": crossings.mean(), "zero crossings std": crossings.std(),
        "crest": 20 * np.log10(np.abs(x).max()), "envelope variation": e.std() / e.mean(),
        "envelope skewness": np.mean(z**3), "envelope kurtosis": np.mean(z**4),
    }  # fmt: skip
    n, seconds = len(z), hop / rate
    r = [np.mean(z[: n - lag] * z[lag:]) for lag in range(n // 2 + 1)]
    lags = [lag for lag in range(round(0.25 / seconds), round(2 / seconds) + 1) if 2 * lag <= n]
    best = max(lags, key=lambda lag: r[lag])
    found |= {"beat strength": r[best], "beat lag": best * seconds,
              "half beat strength": r[best // 2]}  # fmt: skip
    # A fine sum over frequencies stands for the integral.
    fine = np.fft.rfftfreq(1 << 18, seconds)
    power = np.abs(np.fft.rfft(z, 1 << 18)) ** 2
    whole = power[1:-1].sum() + (power[0] + power[-1]) / 2
    for low, high in itertools.pairwise(RHYTHM_BANDS):
        inside = (fine >= low) & (fine < high)
        found[f"rhythm {low:g}-{high:g} Hz"] = power[inside].sum() / whole
    return found


@pytest.mark.parametrize("rate", [RATE, 16_000])
def test_numbers_equal_numpy(sound, rate):
    found, expected = statistics(sound, rate), oracle(sound, rate)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-3, abs=2e-3), name


def test_neither_padding_nor_gain_nor_offset_matters(sound):
    plain = statistics(sound)
    for other in (
        statistics(sound, fill=5.0),
        statistics(1e-4 * sound),
        statistics(sound + 0.5),
    ):
        for name, value in plain.items():
            assert other[name] == pytest.approx(value, rel=1e-3, abs=1e-3), name


def test_neither_does_the_length_of_the_array(sound):
    longer = statistics(sound, samples=5 * RATE)
    for name, value in statistics(sound).items():
        assert longer[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name


@pytest.mark.parametrize("seconds", [0.4, 0.8])
def test_the_beat_is_found(seconds):
    found = statistics(beats(seconds))
    assert found["beat strength"] > 0.9
    # Every second beat is as good a period as every one.
    periods = found["beat lag"] / seconds
    assert periods == pytest.approx(round(periods), abs=0.05)


def test_noise_has_no_beat_and_a_flat_spectrum():
    noise = statistics(np.random.default_rng(1).standard_normal(SAMPLES))
    assert noise["beat strength"] < 0.4 and noise["flatness mean"] > -4
    assert noise["zero crossings mean"] == pytest.approx(0.5, abs=0.02)


def test_a_tone_sounds_in_its_band():
    tone = np.sin(2 * np.pi * 1000 * np.arange(SAMPLES) / RATE)
    found = statistics(tone)
    levels = [found[f"band{k:02d} mean"] for k in range(BANDS)]
    edges = np.linspace(np.log1p(25 / CORNER), np.log1p(4000 / CORNER), BANDS + 2)
    assert np.argmax(levels) == np.argmin(np.abs(edges[1:-1] - np.log1p(1000 / CORNER)))
    assert max(levels) == pytest.approx(0, abs=1.5)  # all of its power
    assert found["centroid mean"] == pytest.approx(0, abs=0.02)  # octaves above 1 kHz
    assert found["crest"] == pytest.approx(3.01, abs=0.02)
    assert found["zero crossings mean"] == pytest.approx(2 * 1000 / RATE, abs=0.01)


@pytest.mark.parametrize("samples", [1, 2, 100, 700])
def test_silence_and_the_shortest_recordings_are_finite(samples):
    assert np.isfinite(list(statistics(np.zeros(samples)).values())).all()
    assert np.isfinite(list(statistics(np.ones(samples)).values())).all()
    short = np.random.default_rng(0).standard_normal(samples)
    assert np.isfinite(list(statistics(short).values())).all()


def test_arrays_that_are_too_short_are_refused():
    with pytest.raises(ValueError, match=str(least_samples(RATE))):
        spectral_statistics(np.zeros((1, 100), np.float32), np.array([100]), RATE)
