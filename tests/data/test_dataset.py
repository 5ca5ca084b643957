"""Opening manifests: waveforms, reports, selections, memory."""

import pickle
import shutil

import numpy as np
import pytest
import soundfile

from medalign_jax.audio import io as audio_io
from medalign_jax.data.recordings import dataset as dataset_room
from medalign_jax.data.recordings import sources
from medalign_jax.data.recordings.dataset import (
    AudioDataset,
    check_joined,
    concatenate,
    open_dataset,
)
from medalign_jax.data.recordings.manifest import ManifestError
from tests.data import manifests


@pytest.fixture
def manifest(tmp_path):
    return manifests.write_csv(tmp_path / "m.csv", manifests.rows_of(tmp_path, 10))


def test_16_bit_audio_at_its_own_rate_is_exact(manifest):
    data = open_dataset(manifest)
    assert (len(data), data.sample_rate) == (10, 16_000)
    for i in range(10):
        expected, _ = soundfile.read(data.rows[i].audio_path, dtype="float32")
        found = data.waveform(i)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)


def test_other_rates_are_resampled(tmp_path):
    manifests.write_wav(tmp_path / "a.wav", samples=8000, sample_rate=8000)
    path = manifests.write_csv(tmp_path / "m.csv", [{"audio_path": "a.wav", "report": "x"}])
    found = open_dataset(path).waveform(0)
    expected = audio_io.read(tmp_path / "a.wav", 16_000)
    assert found.shape == (16_000,)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2**-16)
    assert open_dataset(path, max_seconds=0.25).waveform(0).shape == (4000,)


@pytest.mark.parametrize("peak", [1e-4, 0.3, 32767 / 32768, 0.99999, 1.0, 1.7, 40_000.0])
def test_quantising_clips_nothing_and_loses_16_bits_at_most(peak):
    waveform = np.linspace(-peak, peak, 1001, dtype=np.float32)
    clip = sources.quantise(waveform)
    assert clip.samples.dtype == np.int16
    assert np.frexp(clip.scale)[0] == 0.5  # a power of two
    np.testing.assert_allclose(clip.waveform(), waveform, rtol=0, atol=peak * 2**-15)


def test_quantising_keeps_16_bit_extremes():
    waveform = np.array([-32768, -32767, 1, 32767], np.float32) / 32768
    np.testing.assert_array_equal(sources.quantise(waveform).waveform(), waveform)


def test_reports(tmp_path):
    manifests.write_wav(tmp_path / "a.wav", 1)
    manifests.write_wav(tmp_path / "b.wav", 2)
    rows = [{"audio_path": "a.wav", "report": "Clear lungs.", "murmur": "Present"},
            {"audio_path": "b.wav", "report": "", "murmur": "Absent"}]  # fmt: skip
    data = open_dataset(manifests.write_csv(tmp_path / "m.csv", rows))
    assert data.reports(0, 5, seed=1) == ("Clear lungs.",)
    several = data.reports(1, 5, seed=1)
    assert len(set(several)) == len(several) > 1
    assert several == data.reports(1, 5, seed=1)
    assert several != data.reports(1, 5, seed=2)


def test_reports_that_leave_something_out(tmp_path):
    told = [{"report": "Clear lungs.", "diagnosis": "", "posture": ""},
            {"report": "", "diagnosis": "asthma", "posture": "supine"},
            {"report": "", "diagnosis": "asthma", "posture": ""}]  # fmt: skip
    rows = [{"audio_path": manifests.write_wav(tmp_path / f"{i}.wav", i)} | row
            for i, row in enumerate(told)]  # fmt: skip
    data = open_dataset(manifests.write_csv(tmp_path / "m.csv", rows))
    whole, part = (data.reports(1, 20, 0, left) for left in ((), ("diagnosis",)))
    assert all("asthma" in text and "supine" in text for text in whole)
    assert part and all("asthma" not in text and "supine" in text for text in part)
    # Nothing else is known of the third: it stays, and is told as what all of them are.
    assert data.reports(2, 20, 0, ("diagnosis",)) == ("Recording of lung sounds.",)
    with pytest.raises(ManifestError, match=r"row 1 \(.*0.wav'\): .* of a written report"):
        data.reports(0, 1, 0, ("diagnosis",))


def test_selections_share_files_and_memory(manifest):
    data = open_dataset(manifest)
    train = data.split("train")
    assert len(train) == 8
    assert data.splits() == {"train": 8, "valid": 1, "test": 1}
    assert data.split("validation").rows == data.split("valid").rows == (data.rows[8],)
    some = data.select([4, 2])
    assert [row.row for row in some.rows] == [5, 3]
    np.testing.assert_array_equal(some.waveform(1), data.waveform(2))
    assert some.clip(0) is data.clip(4)
    labelled = train.select(lambda row: row.label == "b")
    assert [row.subject_id for row in labelled.rows] == ["s1", "s3", "s5", "s7"]


def test_no_row_left_after_filtering(manifest):
    data = open_dataset(manifest)
    with pytest.raises(ManifestError, match=r"no row is left in split 'valid'.*train: 8"):
        data.split("train").split("valid")
    with pytest.raises(ManifestError, match="no row is left of 10"):
        data.select(lambda row: row.label == "c")
    with pytest.raises(ManifestError):
        AudioDataset([], [])


def test_concatenate(manifest, tmp_path):
    folder = tmp_path / "other"
    rows = manifests.rows_of(folder, 2, samples=5000)
    for row in rows:
        row["subject_id"] = "o" + row["subject_id"]
    other = open_dataset(manifests.write_csv(folder / "m.csv", rows))
    data = open_dataset(manifest)
    both = concatenate([data, other])
    assert both.rows == data.rows + other.rows
    np.testing.assert_array_equal(both.waveform(11), other.waveform(1))
    for row in rows:  # no subjects: "audio/0.wav" here and there are two recordings
        row |= {"subject_id": "", "split": "test"}
    nameless = manifests.write_csv(folder / "nameless.csv", rows)
    assert len(concatenate([data, open_dataset(nameless)])) == 12
    with pytest.raises(ManifestError, match="sample rates"):
        concatenate([data, open_dataset(folder / "m.csv", sample_rate=8000)])
    rows[1] |= {"subject_id": "s0", "split": "test"}
    clash = open_dataset(manifests.write_csv(folder / "m.csv", rows))
    with pytest.raises(ManifestError, match="subject 's0' is in split 'train' of one"):
        concatenate([data, clash])


def count_reads(monkeypatch):
    reads = []
    read = audio_io.read

    def counted(path, *args, **kwargs):
        reads.append(path)
        return read(path, *args, **kwargs)

    monkeypatch.setattr(audio_io, "read", counted)
    return reads


def test_each_file_is_decoded_once(manifest, monkeypatch):
    reads = count_reads(monkeypatch)
    data = open_dataset(manifest)
    for _ in range(3):
        for i in range(10):
            data.split("train").waveform(i % 8)
    assert len(reads) == len(set(reads)) == 10


def test_memory_has_its_limit_and_changes_nothing(manifest, monkeypatch):
    reads = count_reads(monkeypatch)
    kept, small, none = (open_dataset(manifest, cache_bytes=b) for b in (1 << 30, 20_000, 0))
    del reads[:]
    for data, decoded in ((kept, 0), (small, 8), (none, 10)):  # two clips of 8 kB fit in 20 kB
        for i in range(10):
            np.testing.assert_array_equal(data.waveform(i), kept.waveform(i))
        assert len(reads) == decoded
        del reads[:]


def test_pickles_without_the_waveforms(manifest):
    data = open_dataset(manifest)
    pickled = pickle.dumps(data)
    assert len(pickled) < 10_000
    np.testing.assert_array_equal(pickle.loads(pickled).waveform(3), data.waveform(3))


def test_a_file_lost_after_the_check_is_named(manifest, tmp_path):
    data = open_dataset(manifest, cache_bytes=0)
    (tmp_path / "audio/3.wav").unlink()
    with pytest.raises(audio_io.AudioError, match=r"3\.wav: no such file"):
        data.waveform(3)


def test_left_out_rows_are_handed_on(tmp_path):
    rows = manifests.rows_of(tmp_path, 10)
    (tmp_path / "audio/4.wav").write_bytes(b"")
    path = manifests.write_csv(tmp_path / "m.csv", rows)
    with pytest.raises(ManifestError, match="1 of 10 rows"):
        open_dataset(path)
    data = open_dataset(path, max_bad_fraction=0.1)
    assert [row.row for row in data.rows] == [1, 2, 3, 4, 6, 7, 8, 9, 10]
    np.testing.assert_array_equal(
        data.waveform(4), soundfile.read(tmp_path / "audio/5.wav", dtype="float32")[0]
    )
    assert [(p.row, p.fatal) for p in data.problems] == [(5, True)]


def test_a_folder_that_is_not_a_data_set(tmp_path):
    with pytest.raises(ManifestError, match="not a prepared data set"):
        open_dataset(tmp_path)


def test_heart_sounds(shared):
    data = dataset_room.open_dataset(shared / "data/heart_sounds/metadata.csv")
    assert len(data) == 592
    assert data.splits() == {"train": 354, "valid": 87, "test": 151}
    assert not any(problem.fatal for problem in data.problems)
    assert any("'seconds' is not used" in problem.reason for problem in data.problems)
    assert audio_io.probe(data.rows[0].audio_path).sample_rate == 8000
    seconds = [len(data.waveform(i)) / 16_000 for i in range(592)]
    assert min(seconds) > 1.1 and max(seconds) < 4.1
    train = data.split("train")
    assert {row.label for row in train.rows} == {"N", "MR", "MS", "MVP"}
    texts = {train.reports(i, 1, seed=i)[0] for i in range(len(train))}
    assert len(texts) > 8  # of four diagnoses: the wording varies


def test_lung_recordings_of_several_rates(shared, tmp_path):
    files = sorted((shared / "data/icbhi_sample").rglob("*.wav"))
    rows = [{"audio_path": str(file), "report": "x", "subject_id": file.stem.split("_")[0]}
            for file in files]  # fmt: skip
    data = open_dataset(manifests.write_csv(tmp_path / "m.csv", rows))
    rates = {audio_io.probe(row.audio_path).sample_rate for row in data.rows}
    assert (len(data), rates) == (10, {4000, 44_100})
    for i, row in enumerate(data.rows):
        seconds = audio_io.probe(row.audio_path).seconds
        assert abs(len(data.waveform(i)) / 16_000 - seconds) < 1e-3


def test_recordings_that_must_not_be_trained_on_cannot_join(tmp_path):
    """By subject, whatever they sound like, and by sound, whatever they are called."""
    for folder in ("base", "others"):
        (tmp_path / folder).mkdir()
    rows = manifests.rows_of(tmp_path / "base", 6)
    for i, row in enumerate(rows):
        row |= {"subject_id": f"s{i}", "split": ("train", "test")[i % 2]}
    base = open_dataset(manifests.write_csv(tmp_path / "base" / "m.csv", rows))
    manifests.write_wav(tmp_path / "others" / "new.wav", samples=9000, sample_rate=16_000)
    new = {"audio_path": "new.wav", "report": "x", "subject_id": "other"}

    def others(*found):
        return open_dataset(manifests.write_csv(tmp_path / "others" / "m.csv", list(found)))

    check_joined(base, others(new))
    with pytest.raises(ManifestError, match=r"subject 's3' is in split 'test'"):
        check_joined(base, others(new | {"subject_id": "s3"}))
    with pytest.raises(ManifestError, match=r"'S 03' is in split 'test' as 's3'"):
        check_joined(base, others(new | {"subject_id": "S 03"}))
    check_joined(base, others(new | {"subject_id": "s2"}))  # one of training may have more
    (tmp_path / "others" / "copy.wav").write_bytes(
        (tmp_path / "base" / rows[2]["audio_path"]).read_bytes()
    )
    with pytest.raises(ManifestError, match=r"copy\.wav' cannot be added.*sample for sample"):
        check_joined(base, others(new, new | {"audio_path": "copy.wav"}))


def test_recordings_that_are_their_own_subjects_may_share_a_name(tmp_path):
    made = []
    for seed, (folder, split) in enumerate((("base", "test"), ("others", "train"))):
        manifests.write_wav(tmp_path / folder / "audio" / "1.wav", seed)
        row = {"audio_path": "audio/1.wav", "split": split, "report": "x"}
        made.append(open_dataset(manifests.write_csv(tmp_path / folder / "m.csv", [row])))
    check_joined(*made)


def test_sounds_are_equal_for_equal_waveforms_wherever_they_come_from(tmp_path):
    samples = (manifests.tone(1) * 8000).astype(np.int16)
    for name, content in (("a", samples), ("b", samples // 2), ("c", samples[:-1])):
        soundfile.write(tmp_path / f"{name}.wav", content, 16_000)
    rows = [{"audio_path": f"{n}.wav", "subject_id": n, "report": "r"} for n in "abc"]
    data = open_dataset(manifests.write_csv(tmp_path / "m.csv", rows))
    assert len(set(data.sounds)) == 3
    assert data.sounds == tuple(data.clip(i).sound() for i in range(3))
    assert data.select([2, 0]).sounds == (data.sounds[2], data.sounds[0])
    assert data.with_subjects(["x", "y", "z"]).with_splits(["train"] * 3).sounds == data.sounds
    shutil.copyfile(tmp_path / "a.wav", tmp_path / "moved.wav")
    again = [{"audio_path": "moved.wav", "report": "r"}]
    moved = open_dataset(manifests.write_csv(tmp_path / "again.csv", again))
    assert moved.sounds == data.sounds[:1]
