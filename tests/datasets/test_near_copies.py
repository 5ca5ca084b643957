"""Near-copies: planted ones are found whatever was done to them, and nothing else is."""

import csv
import io

import numpy as np
import pytest
import soundfile
import soxr

from medalign_jax.data.recordings.dataset import open_dataset
from medalign_jax.data.recordings.manifest import ManifestError
from medalign_jax.datasets.fingerprints import RATE, flattened, reduced
from medalign_jax.datasets.near_copies import NearCopies, check_no_copies, compare, near_copies
from medalign_jax.datasets.simulated.simulate import simulate

HZ = 8000


def noisy(x, pink):
    """Noise 20 dB below."""
    spectrum = np.fft.rfft(np.random.default_rng(len(x)).standard_normal(len(x)))
    if pink:
        spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
    noise = np.fft.irfft(spectrum, len(x))
    return x + 0.1 * noise * np.sqrt(np.mean(x**2) / np.mean(noise**2))


def mp3(x):
    file = io.BytesIO()
    x = x * (0.5 / np.abs(x).max())
    soundfile.write(file, x, HZ, format="MP3", subtype="MPEG_LAYER_III")
    file.seek(0)
    return soundfile.read(file)[0]


def resampled(x, rate):
    return soxr.resample(soxr.resample(x, HZ, rate), rate, HZ)


CHANGES = {
    "whole": lambda x: x,
    "cut": lambda x: x[5003:17003],
    "gain": lambda x: -0.03 * x,
    "4 kHz": lambda x: resampled(x, 4000),
    "44.1 kHz": lambda x: resampled(x, 44_100),
    "mp3": mp3,
    "white noise": lambda x: noisy(x, False),
    "pink noise": lambda x: noisy(x, True),
    "all": lambda x: mp3(noisy(resampled(0.1 * x[3007:15007], 4000), True)),
}


@pytest.fixture(scope="module")
def sounds():
    """Hearts and lungs of 24 subjects, and of one of them a second recording."""
    made = [simulate(("heart", "lung")[i % 2], i, seconds=7.0, subject=i) for i in range(24)]
    made.append(simulate("heart", 99, seconds=7.0, subject=0))
    return [soxr.resample(one.waveform, 16_000, HZ) for one in made]


def found(waveforms, rate=HZ):
    return near_copies(waveforms.__getitem__, len(waveforms), rate)


def test_different_recordings_are_not_copies(sounds):
    copies = found(sounds)
    assert copies.pairs.shape == (0, 2)
    np.testing.assert_array_equal(copies.groups, np.arange(25))


@pytest.mark.parametrize("change", CHANGES)
def test_planted_copies_are_found(sounds, change):
    parts = [CHANGES[change](x) for x in sounds[:10]]
    copies = found(sounds + parts)
    np.testing.assert_array_equal(copies.pairs, [(i, 25 + i) for i in range(10)])
    assert copies.similarity.min() > 0.95


def test_parts_that_have_one_and_a_half_seconds_in_common(sounds):
    ends = [x[: 4 * HZ] for x in sounds[:10]] + [x[round(2.5 * HZ) :] for x in sounds[:10]]
    copies = found(ends)
    np.testing.assert_array_equal(copies.pairs, [(i, 10 + i) for i in range(10)])
    np.testing.assert_allclose(copies.offset, 2.5, atol=2e-4)


def test_a_copy_at_another_place_has_its_offset_and_similarity(sounds):
    copies = found([sounds[2][3333:], sounds[2]])
    assert copies.pairs.tolist() == [[0, 1]]
    assert copies.offset[0] == pytest.approx(-3333 / HZ, abs=1e-4)
    noise = soxr.resample(np.random.default_rng(0).standard_normal(7 * 900), 900, HZ)
    copies = found([sounds[2], sounds[2] + 0.3 * sounds[2].std() / noise.std() * noise])
    x, y = (reduced(one, HZ).astype(float) for one in (sounds[2], sounds[2] + 0.3
            * sounds[2].std() / noise.std() * noise))  # fmt: skip
    expected = x @ y / np.sqrt((x @ x) * (y @ y))
    assert 0.93 < expected < 0.98
    assert copies.similarity == pytest.approx([expected], abs=2e-3)


def test_short_recordings_are_found_if_equal():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, HZ // 2)).astype(np.float32)
    copies = found([a, b, a.copy(), np.zeros(HZ // 2), np.zeros(HZ // 2), a[:1], a[:0]])
    assert copies.pairs.tolist() == [[0, 2]]
    assert copies.similarity.tolist() == [1.0] and copies.offset.tolist() == [0.0]


def test_silence_a_click_and_a_hum_in_common_are_not_copies():
    time = np.arange(4 * HZ) / HZ
    rng = np.random.default_rng(0)
    noise = 0.02 * rng.standard_normal((6, len(time)))
    click = np.exp(-((time - 2.0) ** 2) / 2e-6)
    hum = np.sin(2 * np.pi * 50 * time)
    sounds = [click + noise[0], click + noise[1], hum + noise[2], hum + noise[3]]
    silent = [np.where(time < 2.0, noise[4], 0.0), np.where(time < 2.0, noise[5], 0.0)]
    assert not len(found(sounds + silent).pairs)


def test_flattening_takes_the_course_of_another_sound(sounds):
    whole = reduced(sounds[0], HZ)
    np.testing.assert_array_equal(flattened(whole), flattened(whole, whole))
    spectrum = np.abs(np.fft.rfft(flattened(whole, whole[:3000])))
    assert np.all(np.isfinite(spectrum))
    part = compare(whole, whole[1000:3000])
    assert part == (pytest.approx(1.0, abs=1e-6), pytest.approx(1.0, abs=1e-6))
    assert compare(whole, whole[: RATE - 1]) is None


def copies_of(*pairs, count):
    ends = [pair[:2] for pair in pairs]
    similarity = [pair[2] for pair in pairs]
    return NearCopies(
        count, np.array(ends).reshape(-1, 2), np.array(similarity), np.zeros(len(ends))
    )


def test_groups_are_those_of_single_linkage():
    copies = copies_of((2, 4, 0.9), (0, 4, 0.95), (1, 5, 1.0), count=7)
    assert copies.groups.tolist() == [0, 1, 0, 2, 0, 1, 3]
    assert copies_of(count=3).groups.tolist() == [0, 1, 2]


def test_leaks_in_words():
    copies = copies_of((0, 3, 0.93), (1, 3, 0.984), (1, 4, 0.9), (2, 5, 0.9), (0, 1, 1), count=7)
    splits = ["train", "train", "valid", "test", "test", "test", ""]
    assert copies.across(splits).tolist() == [0, 1, 2, 3]
    assert copies.leaks_between(splits, [f"{i}.wav" for i in range(7)]) == [
        "2 of 3 test recordings have a near-copy in train, e.g. row 4 '3.wav' ~ row 2 '1.wav' "
        "(0.98)",
        "1 of 3 test recordings has a near-copy in valid, e.g. row 6 '5.wav' ~ row 3 '2.wav' "
        "(0.90)",
    ]
    assert copies.leaks_between(["train"] * 7) == []
    with pytest.raises(ValueError, match="2 splits for 7"):
        copies.leaks_between(["train", "test"])


def manifest(folder, sounds, split):
    folder.mkdir()
    lines = ["audio_path,report,subject_id,split"]
    for i, x in enumerate(sounds):
        soundfile.write(folder / f"{i}.wav", x / np.abs(x).max() * 0.9, HZ, subtype="PCM_16")
        lines.append(f"{i}.wav,x,{folder.name}{i},{split}")
    (folder / "m.csv").write_text("\n".join(lines))
    return folder / "m.csv"


def test_near_copies_may_not_join(sounds, tmp_path):
    base = open_dataset(manifest(tmp_path / "base", sounds[:6], "test"), sample_rate=HZ)
    others = open_dataset(manifest(tmp_path / "others", sounds[6:10], "train"), sample_rate=HZ)
    check_no_copies(base, others)
    parts = [*sounds[6:9], mp3(sounds[2][9000:30_000]), noisy(sounds[4], False)]
    path = manifest(tmp_path / "added", parts, "train")
    with pytest.raises(ManifestError, match=r"(?s)2 of 5 .*row 4 .*3\.wav' ~ row 3 .*'test'"):
        check_no_copies(base, open_dataset(path, sample_rate=HZ))
    with pytest.raises(ManifestError, match="8000 and 16000 Hz"):
        check_no_copies(base, open_dataset(path, sample_rate=16_000))


def read(path):
    x, rate = soundfile.read(path)
    return soxr.resample(x, rate, HZ) if rate != HZ else x


def test_planted_copies_of_real_sounds(shared):
    data = shared / "data"
    paths = [
        *sorted((data / "heart_sounds/audio").glob("*.wav"))[::60],
        *sorted((data / "bmd_hs/train").glob("*.wav"))[::80],
        *sorted((data / "emodb/audio").glob("*.flac"))[::50],
        *sorted((data / "icbhi_sample").rglob("*.wav")),
    ]
    real = [read(path) for path in paths]
    assert not len(found(real).pairs)
    kinds = list(CHANGES.values())[2:8]
    size = round(1.5 * HZ)
    parts = [kinds[i % len(kinds)](x[(len(x) - size) // 3 :][:size]) for i, x in enumerate(real)]
    copies = found(real + parts)
    expected = [(i, len(real) + i) for i in range(len(real))]
    np.testing.assert_array_equal(copies.pairs, expected)


def test_recordings_of_one_patient_at_several_valves_are_different(shared):
    paths = sorted((shared / "data/bmd_hs/train").glob("*.wav"))
    paths = [path for path in paths if path.stem.split("_")[1] in ("001", "012", "047", "062")]
    names = [path.stem for path in paths]
    copies = found([read(path) for path in paths])
    assert len(names) == 32
    assert [(names[i], names[j]) for i, j in copies.pairs] == [
        ("MD_001_sit_Pul", "MD_001_sit_Tri"),
        ("MS_012_sit_Tri", "MS_012_sup_Aor"),
        ("MS_047_sit_Mit", "MS_047_sit_Tri"),
        ("MS_062_sit_Pul", "MS_062_sup_Tri"),
    ]  # sample for sample, as published


def test_groups_of_the_heart_sounds(shared):
    """`subject_id` names groups of near-copies that were found by other means."""
    folder = shared / "data/heart_sounds"
    with open(folder / "metadata.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["label"] in ("N", "MR")]
    copies = found([read(folder / row["audio_path"]) for row in rows[::2]])
    subject = [row["subject_id"] for row in rows[::2]]
    label = [row["label"] for row in rows[::2]]
    together = np.mean([subject[i] == subject[j] for i, j in copies.pairs])
    assert together > 0.98
    assert len(set(copies.groups[np.array(label) == "N"])) == 6
