"""Real recordings of several devices through reader and front end."""

import csv

import numpy as np
import pytest

from medalign_jax.audio import LogMel, check_waveform, clip, probe, read


@pytest.fixture(scope="module")
def icbhi(shared):
    paths = sorted((shared / "data" / "icbhi_sample" / "ICBHI_final_database").glob("*.wav"))
    if not paths:
        pytest.skip("the ICBHI sample (../shared/data/icbhi_sample) is not on this machine")
    return paths


def assert_usable(waveform, path):
    check_waveform(waveform, path)
    features = LogMel()(clip.crop_or_zero_pad(waveform, 131_000)[None])
    assert features.shape == (1, 256, 64) and features.dtype == np.float32
    assert np.isfinite(features).all()
    assert features.min() == 0 and features.max() == 1


def test_lung_recordings(icbhi):
    infos = [probe(path) for path in icbhi]
    assert len(icbhi) == 10
    assert {info.sample_rate for info in infos} == {4_000, 44_100}
    assert len({path.stem.split("_")[-1] for path in icbhi}) == 3
    for path, info in zip(icbhi, infos, strict=True):
        waveform = read(path)
        seconds = len(waveform) / 16_000
        last_cycle_end = float(path.with_suffix(".txt").read_text().split("\n")[-2].split("\t")[1])
        assert seconds == pytest.approx(info.seconds, abs=1e-3)
        # Annotators marked cycles up to the end of the recording, give or take an unfinished one.
        assert last_cycle_end - 1e-3 <= seconds <= last_cycle_end + 0.1
        assert_usable(waveform, path)


def test_four_kilohertz_leaves_the_upper_bands_empty(icbhi):
    path = next(path for path in icbhi if "Litt3200" in path.name)
    features = np.asarray(LogMel()(read(path, max_seconds=8)[None])[0])
    # 2 kHz is the Nyquist frequency of the recording; band 36 of 64 begins above 2.2 kHz.
    assert features[:, 36:].mean() < 0.02 < features[:, :24].mean()


def test_heart_recordings(shared):
    folder = shared / "data" / "heart_sounds"
    if not folder.is_dir():
        pytest.skip("the heart sounds (../shared/data/heart_sounds) are not on this machine")
    with (folder / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[::50]
    assert len(rows) >= 10
    for row in rows:
        path = folder / row["audio_path"]
        waveform = read(path)
        assert len(waveform) / 16_000 == pytest.approx(float(row["seconds"]), abs=1e-3)
        assert_usable(waveform, path)
