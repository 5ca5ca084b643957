"""Simulated sounds: what the truth says is measured back from the waveform."""

import itertools

import numpy as np
import pytest

from medalign_jax.datasets.simulated import heart as simulate_heart
from medalign_jax.datasets.simulated import lung as simulate_lung
from medalign_jax.datasets.simulated.simulate import LABELS, SAMPLE_RATE, simulate

MURMUR = {
    "systolic_murmur_timing": "Holosystolic",
    "systolic_murmur_shape": "Plateau",
    "systolic_murmur_grading": "IV/VI",
    "systolic_murmur_pitch": "Medium",
    "systolic_murmur_quality": "Blowing",
    "murmur_locations": "MV",
}


def band(x, low, high):
    spectrum = np.fft.rfft(x.astype(np.float64))
    frequencies = np.fft.rfftfreq(x.size, 1 / SAMPLE_RATE)
    return np.fft.irfft(spectrum * ((frequencies >= low) & (frequencies < high)), n=x.size)


def smooth(x, seconds):
    window = np.hanning(int(seconds * SAMPLE_RATE))
    size = x.size + window.size - 1
    full = np.fft.irfft(np.fft.rfft(x, size) * np.fft.rfft(window / window.sum(), size), size)
    return full[window.size // 2 :][: x.size]


def period(envelope, low, high):
    """Lag in seconds, from `low` to `high`, where the envelope is most like itself."""
    x = envelope[::40] - envelope.mean()
    spectrum = np.fft.rfft(x, n=2 * x.size)
    correlation = np.fft.irfft(np.abs(spectrum) ** 2)[: x.size] / np.arange(x.size, 0, -1)
    rate = SAMPLE_RATE / 40
    first = int(low * rate)
    return (first + np.argmax(correlation[first : int(high * rate)])) / rate


def cycle_positions(sound):
    """Place of each sample in the cycle, from S1 and S2: 0..1 in systole, 1..2 in diastole."""
    s1, s2 = (np.array(sound.truth[key]) for key in ("s1_times", "s2_times"))
    knots = sorted([(t, 0) for t in s1] + [(t, 1) for t in s2])
    place = np.full(sound.waveform.size, np.nan)
    for (start, which), (end, _) in itertools.pairwise(knots):
        a, b = int(start * SAMPLE_RATE), int(end * SAMPLE_RATE)
        place[a:b] = which + np.arange(b - a) / (b - a)
    return place


def energy_profile(sound, bins=20, low=250, high=900):
    """Mean energy over systole and diastole, (2, bins), from 0 to 1 in each."""
    place = cycle_positions(sound)
    energy = band(sound.waveform, low, high) ** 2
    known = ~np.isnan(place)
    index = (place[known] * bins).astype(int)
    total = np.bincount(index, energy[known], minlength=2 * bins)
    return (total / np.maximum(np.bincount(index, minlength=2 * bins), 1)).reshape(2, bins)


# --- Heart -------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", LABELS["heart"])
@pytest.mark.parametrize("seed", range(6))
def test_heart_rate_is_that_of_the_sound(label, seed):
    sound = simulate("heart", seed, label=label, seconds=12)
    envelope = smooth(np.abs(band(sound.waveform, 25, 160)), 0.06)
    rate = 60 / period(envelope, 0.5, 1.15)
    assert rate == pytest.approx(sound.truth["heart_rate"], rel=0.03)
    assert float(sound.metadata["heart_rate"]) == pytest.approx(rate, rel=0.04)


def test_s1_and_s2_are_where_the_truth_says_and_low():
    sound = simulate("heart", 1, label="normal", nuisance=False)
    envelope = smooth(np.abs(sound.waveform), 0.03)
    for time in sound.truth["s1_times"][1:-1] + sound.truth["s2_times"][1:-1]:
        at = int(time * SAMPLE_RATE)
        before, after = envelope[at - 1200 : at - 300], envelope[at : at + 1200]
        assert after.max() > 5 * before.mean()
    total = np.sum(sound.waveform**2)
    assert np.sum(band(sound.waveform, 25, 170) ** 2) > 0.9 * total


@pytest.mark.parametrize("rate", [40, 60, 90, 120, 160])
def test_systole_is_physiological(rate):
    truth = simulate("heart", 2, metadata={"heart_rate": str(rate)}, nuisance=False).truth
    s1, s2 = np.array(truth["s1_times"]), np.array(truth["s2_times"])
    systole = np.array([s2[s2 > start].min() - start for start in s1 if start < s2.max()])
    share = systole.mean() * truth["heart_rate"] / 60
    assert systole.min() > 0.1 and systole.max() < 0.48 and 0.2 < share < 0.52
    assert truth["heart_rate"] == pytest.approx(rate, rel=0.03)


def test_loudness_of_s1_against_s2_depends_on_the_site():
    ratio = {}
    for site in simulate_heart.SITES:
        given = MURMUR | {"systolic_murmur_grading": "I/VI", "murmur_locations": site}
        sound = simulate("heart", 3, metadata=given, nuisance=False)
        assert sound.truth["site"] == site
        peak = {
            key: np.mean([peak_after(sound.waveform, t) for t in sound.truth[key][:-1]])
            for key in ("s1_times", "s2_times")
        }
        ratio[site] = peak["s1_times"] / peak["s2_times"]
    assert ratio["MV"] > 1.2 > 0.9 > ratio["AV"]


def peak_after(x, time):
    return np.abs(x[int(time * SAMPLE_RATE) :][:960]).max()  # murmurs begin after 70 ms


@pytest.mark.parametrize("nuisance", [False, True])
@pytest.mark.parametrize(
    "timing, low, high",
    [("Early", 0.2, 0.5), ("Mid", 0.45, 0.75), ("Late", 0.7, 0.95), ("Holo", 0.45, 0.7)],
)
def test_a_systolic_murmur_lies_in_its_part_of_systole(timing, low, high, nuisance):
    name = "Holosystolic" if timing == "Holo" else f"{timing}-systolic"
    given = MURMUR | {"systolic_murmur_timing": name, "systolic_murmur_pitch": "High"}
    given |= {"systolic_murmur_grading": "V/VI"}
    for seed in range(3):
        profile = energy_profile(simulate("heart", seed, metadata=given, nuisance=nuisance))
        assert profile[0].sum() > 0.85 * profile.sum()
        centre = np.sum(profile[0] * (np.arange(20) + 0.5) / 20) / profile[0].sum()
        assert low < centre < high
        loud = np.mean(profile[0] > 0.25 * profile[0].max())
        assert loud > 0.6 if timing == "Holo" else loud < 0.6


@pytest.mark.parametrize("timing, low, high", [("Early", 0, 0.4), ("Mid", 0.35, 0.65)])
def test_a_diastolic_murmur_lies_in_its_part_of_diastole(timing, low, high):
    given = {
        "diastolic_murmur_timing": f"{timing}-diastolic",
        "diastolic_murmur_shape": "Plateau",
        "diastolic_murmur_grading": "IV/IV",
        "diastolic_murmur_pitch": "High",
        "diastolic_murmur_quality": "Blowing",
    }
    for seed in range(3):
        profile = energy_profile(simulate("heart", seed, metadata=given, nuisance=False))
        assert profile[1].sum() > 0.85 * profile.sum()
        centre = np.sum(profile[1] * (np.arange(20) + 0.5) / 20) / profile[1].sum()
        assert low < centre < high


def test_shapes():
    halves, edge = {}, {}
    for shape in ("Plateau", "Diamond", "Crescendo", "Decrescendo"):
        given = MURMUR | {"systolic_murmur_shape": shape, "systolic_murmur_pitch": "High"}
        given |= {"systolic_murmur_grading": "VI/VI"}
        sound = simulate("heart", 2, metadata=given, nuisance=False, seconds=20)
        envelope = np.zeros(10)
        for _, start, end in sound.truth["murmurs"][1:-2]:
            part = band(sound.waveform, 250, 900)[int(start * 16_000) : int(end * 16_000)] ** 2
            envelope += [piece.mean() for piece in np.array_split(part, 10)]
        halves[shape] = envelope[5:].sum() / envelope[:5].sum()
        edge[shape] = (envelope[1] + envelope[8]) / envelope[4:6].sum()
    assert halves["Crescendo"] > 3 and halves["Decrescendo"] < 1 / 3
    assert 0.5 < halves["Plateau"] < 2 and 0.5 < halves["Diamond"] < 2
    assert edge["Diamond"] < 0.4 and edge["Plateau"] > 0.6


def murmur_of(seed, **features):
    """Waveform of one simulated recording's murmurs alone, cut out of systole."""
    given = MURMUR | {f"systolic_murmur_{k}": v for k, v in features.items()}
    sound = simulate("heart", seed, metadata=given, nuisance=False)
    spans = [(a, b) for _, a, b in sound.truth["murmurs"] if a > 0 and b < 8]
    cut = [(int((a + 0.05) * SAMPLE_RATE), int((b - 0.01) * SAMPLE_RATE)) for a, b in spans]
    loudest = np.median([peak_after(sound.waveform, t) for t in sound.truth["s1_times"][:-1]])
    return np.concatenate([sound.waveform[a:b] for a, b in cut]) / loudest


def spectrum_of(x):
    power = np.abs(np.fft.rfft(x)) ** 2
    hertz = np.fft.rfftfreq(x.size, 1 / SAMPLE_RATE)
    keep = (hertz > 60) & (hertz < 2000)
    return hertz[keep], power[keep] / power[keep].sum()


@pytest.mark.parametrize("quality", ["Blowing", "Harsh", "Musical"])
@pytest.mark.parametrize("seed", range(3))
def test_pitch_orders_the_spectral_centroid(quality, seed):
    centroids = []
    for pitch in ("Low", "Medium", "High"):
        hertz, power = spectrum_of(murmur_of(seed, pitch=pitch, quality=quality))
        centroids.append(np.sum(hertz * power))
    assert centroids[0] < 0.8 * centroids[1] and centroids[1] < 0.8 * centroids[2]


@pytest.mark.parametrize("seed", range(3))
def test_grade_orders_the_energy(seed):
    grades = [f"{grade}/VI" for grade in ("I", "II", "III", "IV", "V", "VI")]
    rms = [np.sqrt(np.mean(band(murmur_of(seed, grading=g), 150, 2000) ** 2)) for g in grades]
    assert np.all(np.diff(20 * np.log10(rms)) > 1)
    assert 20 * np.log10(rms[-1] / rms[0]) > 15


@pytest.mark.parametrize("seed", range(3))
def test_quality_shows_in_the_width_of_the_spectrum(seed):
    width = {}
    for quality in ("Blowing", "Harsh", "Musical"):
        hertz, power = spectrum_of(murmur_of(seed, pitch="High", quality=quality, grading="VI/VI"))
        spread = np.log2(hertz) - np.sum(np.log2(hertz) * power)
        width[quality] = np.sqrt(np.sum(spread**2 * power))
        if quality == "Musical":
            peak = hertz[np.argmax(power)]
            assert np.sum(power[np.abs(hertz / peak - 1) < 0.08]) > 0.6
    assert width["Harsh"] > 1.2 * width["Blowing"]


# --- Lung --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_respiratory_rate_is_that_of_the_sound(seed):
    sound = simulate("lung", seed, label="normal", seconds=40, metadata={"chest_location": "Pl"})
    envelope = smooth(np.abs(band(sound.waveform, 200, 1000)), 0.4)
    rate = 60 / period(envelope, 2.0, 6.0)
    assert rate == pytest.approx(sound.truth["respiratory_rate"], rel=0.05)


def test_breath_noise_at_the_chest_and_at_the_trachea():
    loudness, centre = {}, {}
    for place in ("Tc", "Pl"):
        given = {"chest_location": place, "wheezes": "0", "crackles": "0"}
        sound = simulate("lung", 3, seconds=20, metadata=given, nuisance=False)
        parts = [
            np.concatenate(
                [sound.waveform[int(max(a, 0) * SAMPLE_RATE) : int(b * SAMPLE_RATE)] for a, b in s]
            )
            for s in (sound.truth["inspirations"], sound.truth["expirations"])
        ]
        loudness[place] = np.std(parts[1]) / np.std(parts[0])
        hertz, power = spectrum_of(parts[0])
        centre[place] = np.sum(hertz * power)
    assert loudness["Pl"] < 0.5 < 0.7 < loudness["Tc"]
    assert centre["Tc"] > 1.5 * centre["Pl"]


@pytest.mark.parametrize("seed", range(6))
def test_wheezes_have_their_frequency_in_their_interval(seed):
    sound = simulate("lung", seed, label="wheeze", seconds=12)
    assert sound.truth["wheezes"]
    for start, end, hertz in sound.truth["wheezes"]:
        assert end - start > 0.08 and 100 < hertz < 1000
        part = sound.waveform[max(int(start * SAMPLE_RATE), 0) : int(end * SAMPLE_RATE)]
        if part.size < 0.08 * SAMPLE_RATE:
            continue
        power = np.abs(np.fft.rfft(part * np.hanning(part.size), n=SAMPLE_RATE)) ** 2
        power[:100] = 0
        assert np.argmax(power) == pytest.approx(hertz, rel=0.05)


def detected_crackles(x, kind):
    """Times where a matched filter stands far above its own median around there."""
    crackle = simulate_lung.CRACKLES[kind]
    wave = simulate_lung.crackle_wave(
        np.mean(crackle.first_deflection), np.mean(crackle.two_cycles)
    )
    low = {"fine": 400, "coarse": 100}[kind]
    match = np.abs(np.convolve(band(x, low, 4000), wave[::-1])[wave.size - 1 :])
    blocks = np.median(match[: match.size // 1600 * 1600].reshape(-1, 1600), axis=1)
    floor = np.interp(np.arange(match.size), 1600 * np.arange(blocks.size) + 800, blocks)
    floor = np.maximum(floor, np.median(blocks))
    times, loud = [], np.flatnonzero(match > 5 * floor / 0.6745)
    while loud.size:
        group = loud[loud < loud[0] + 0.015 * SAMPLE_RATE]
        times.append(group[np.argmax(match[group])] / SAMPLE_RATE)
        loud = loud[loud >= loud[0] + 0.015 * SAMPLE_RATE]
    return np.array(times)


@pytest.mark.parametrize("kind, low, high", [("fine", 0.5, 1.0), ("coarse", 0.05, 0.56)])
@pytest.mark.parametrize("seed", range(4))
def test_crackles_are_counted_and_lie_in_their_part_of_inspiration(kind, low, high, seed):
    given = {"crackles": kind, "wheezes": "0", "chest_location": "Pl"}
    sound = simulate("lung", seed, metadata=given, nuisance=False, seconds=15)
    truth = np.array(sound.truth["crackle_times"])
    found = detected_crackles(sound.waveform, kind)
    near = np.abs(found[:, None] - truth[None, :])
    assert np.mean(near.min(axis=0) < 0.012) > 0.9, "crackles missed"
    assert np.mean(near.min(axis=1) < 0.012) > 0.9, "crackles found where none are"
    assert len(found) == pytest.approx(len(truth), rel=0.1)
    for time in truth:
        start, end = next(s for s in sound.truth["inspirations"] if s[0] <= time <= s[1])
        assert low <= (time - start) / (end - start) <= high


@pytest.mark.parametrize("kind", ["fine", "coarse"])
def test_no_crackle_is_detected_in_a_normal_lung(kind):
    given = {"crackles": "0", "wheezes": "0", "chest_location": "Pl"}
    sound = simulate("lung", 2, metadata=given, nuisance=False, seconds=15)
    assert len(detected_crackles(sound.waveform, kind)) <= 2


def test_fine_crackles_are_shorter_and_higher_than_coarse_ones():
    peaks = {}
    for kind, crackle in simulate_lung.CRACKLES.items():
        first, total = np.mean(crackle.first_deflection), np.mean(crackle.two_cycles)
        wave = simulate_lung.crackle_wave(first, total)
        assert wave.size == pytest.approx(total * SAMPLE_RATE, abs=1)
        assert np.abs(wave).max() == 1 and abs(wave[0]) < 0.05 and abs(wave[-1]) < 0.05
        turns = np.flatnonzero(np.diff(np.sign(wave[1:])))
        assert (turns[0] + 1.5) / SAMPLE_RATE == pytest.approx(first, abs=1e-4)
        peaks[kind] = np.argmax(np.abs(np.fft.rfft(wave, n=SAMPLE_RATE)))
    assert peaks["fine"] > 1.5 * peaks["coarse"] and 400 < peaks["fine"] < 1200
