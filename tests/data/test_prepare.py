"""Prepared folders: same content as the manifest, whole or not there."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from medalign_jax.core import seals
from medalign_jax.core.errors import UserError
from medalign_jax.data import open_dataset
from medalign_jax.data.recordings import prepare, records
from medalign_jax.data.recordings.manifest import ManifestError
from tests.data import manifests


@pytest.fixture
def manifest(tmp_path):
    rows = manifests.rows_of(tmp_path, 20, age="41")
    for i, row in enumerate(rows):  # metadata of different rows differ in what they have
        row |= {"report": "" if i % 2 else "Écouté.", "murmur": "Present" if i % 2 else ""}
    rows = rows[::-1]  # so that the order of splits is not the order of rows
    return manifests.write_csv(tmp_path / "m.csv", rows)


def run(manifest, out, *flags):
    return prepare.main([f"--manifest={manifest}", f"--out={out}", *flags])


def same(a, b):
    return len(a) == len(b) and all(
        np.array_equal(a.waveform(i), b.waveform(i)) for i in range(len(a))
    )


def test_gives_what_the_manifest_gives(manifest, tmp_path, capsys):
    out = tmp_path / "sets" / "prepared"
    assert run(manifest, out, "--targets=age") == 0
    printed = capsys.readouterr().out
    assert "all        16       2       2      20" in printed
    assert "20 recordings written" in printed
    direct, prepared = open_dataset(manifest, targets=["age"]), open_dataset(out)
    assert same(direct, prepared)
    for a, b in zip(direct.rows, prepared.rows, strict=True):
        assert a.audio_path == str(tmp_path / b.audio_path)
        assert vars(a) | {"audio_path": ""} == vars(b) | {"audio_path": ""}
    assert direct.reports(0, 4, 7) == prepared.reports(0, 4, 7)
    assert prepared.rows[1].targets == {"age": "41"}
    assert [p.name for p in out.parent.iterdir()] == ["prepared"]


def test_a_folder_whose_name_is_not_utf8(tmp_path):
    (tmp_path / "plain").mkdir()
    rows = manifests.rows_of(tmp_path / "plain", 10)
    folder = (tmp_path / "plain").rename(tmp_path / os.fsdecode(b"souffl\xe9"))
    manifest = manifests.write_csv(folder / "m.csv", rows)
    assert run(manifest, tmp_path / "p") == 0
    assert same(open_dataset(manifest), open_dataset(tmp_path / "p"))
    (tmp_path / "p").rename(folder / "p")
    with pytest.raises(UserError, match=r"souffl.xe9/p'.*not UTF-8"):
        open_dataset(folder / "p")
    assert run(manifest, folder / "q") == 1 and not (folder / "q").exists()
    outside = [row | {"audio_path": os.path.join("..", folder.name, row["audio_path"])}
               for row in rows]  # fmt: skip
    (tmp_path / "here").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in outside)
    (tmp_path / "here" / "m.jsonl").write_text(lines)
    with pytest.raises(ManifestError, match="not UTF-8 text"):
        open_dataset(tmp_path / "here" / "m.jsonl")


def test_opens_without_the_audio_files_and_cuts(manifest, tmp_path):
    assert run(manifest, tmp_path / "p") == 0
    direct = open_dataset(manifest)
    before = [direct.waveform(i) for i in range(len(direct))]
    for file in (tmp_path / "audio").iterdir():
        file.unlink()
    prepared = open_dataset(tmp_path / "p", max_seconds=0.1)
    for i, waveform in enumerate(before):
        np.testing.assert_array_equal(prepared.waveform(i), waveform[:1600])


def test_tfds_opens_it_and_no_tensorflow_is_imported(manifest, tmp_path):
    assert run(manifest, tmp_path / "p") == 0
    import tensorflow_datasets as tfds

    found = tfds.builder_from_directory(str(tmp_path / "p")).as_data_source()
    assert {split: len(source) for split, source in found.items()} == {
        "train": 16, "valid": 2, "test": 2}  # fmt: skip
    data = open_dataset(tmp_path / "p").split("test")
    for i, example in enumerate(found["test"]):
        waveform = example["audio"].astype(np.float32) * example["scale"]
        np.testing.assert_array_equal(waveform, data.waveform(i))
        assert example["report"].decode() == (data.rows[i].report or "")
        assert example["subject_id"].decode() == data.rows[i].subject_id
        assert example["metadata"]["murmur"].decode() == data.rows[i].metadata.get("murmur", "")
    assert "tensorflow" not in sys.modules


def test_again_is_nothing_and_other_content_is_refused(manifest, tmp_path, capsys):
    out = tmp_path / "p"
    assert run(manifest, out) == 0
    inode = out.stat().st_ino
    assert run(manifest, out) == 0
    assert "holds this data set already" in capsys.readouterr().out
    assert out.stat().st_ino == inode
    assert run(manifest, out, "--max_seconds=5") == 1
    assert "max_seconds is 120.0 there and 5.0 now" in capsys.readouterr().err
    manifests.write_wav(tmp_path / "audio/3.wav", seed=99)
    assert run(manifest, out) == 1
    assert "was prepared from other rows or recordings" in capsys.readouterr().err
    other = tmp_path / "holiday"
    other.mkdir()
    (other / "photo.jpg").write_bytes(b"x")
    assert run(manifest, other) == 1
    assert "exists and is not a prepared data set" in capsys.readouterr().err
    assert (other / "photo.jpg").exists()


def test_rows_without_report_and_odd_target_names(tmp_path):
    rows = manifests.rows_of(tmp_path, 3, report="", **{"FEV1/FVC (%)": "71"})
    manifest = manifests.write_csv(tmp_path / "m.csv", rows)
    assert run(manifest, tmp_path / "p", "--targets=FEV1/FVC (%)") == 1
    assert run(manifest, tmp_path / "p", "--targets=FEV1/FVC (%)", "--allow_no_report") == 0
    data = open_dataset(tmp_path / "p")
    assert [row.targets for row in data.rows] == [{"FEV1/FVC (%)": "71"}] * 3
    assert data.rows[0].report is None


def test_several_shards_keep_the_order(manifest, tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    write = tfds.core.GeneratorBasedBuilder.download_and_prepare
    config = tfds.download.DownloadConfig(num_shards=2)
    monkeypatch.setattr(
        tfds.core.GeneratorBasedBuilder,
        "download_and_prepare",
        lambda self: write(self, download_config=config),
    )
    assert run(manifest, tmp_path / "p") == 0
    assert len(list((tmp_path / "p").glob("*-of-00002"))) == 6
    assert same(open_dataset(manifest), open_dataset(tmp_path / "p"))


def test_an_unusable_manifest_writes_nothing(manifest, tmp_path, capsys):
    (tmp_path / "audio/3.wav").unlink()
    out = tmp_path / "p"
    assert run(manifest, out) == 1
    error = capsys.readouterr().err
    assert "1 of 20 rows (5.0%)" in error and "no such file" in error and " 17  " in error
    assert not out.exists()
    assert run(manifest, out, "--max_bad_fraction=0.05") == 0
    assert "no such file" in capsys.readouterr().out
    assert len(open_dataset(out)) == 19


def test_a_long_list_of_problems_goes_to_a_file(tmp_path, capsys):
    rows = [{"audio_path": f"{i}.wav", "report": "x"} for i in range(60)]
    path = manifests.write_csv(tmp_path / "m.csv", rows)
    assert run(path, tmp_path / "p") == 1
    assert "... and 20 more" in capsys.readouterr().err
    assert len((tmp_path / "p.unusable_rows.jsonl").read_text().splitlines()) == 62  # two notes


def test_stopped_at_any_write_leaves_nothing(manifest, tmp_path, monkeypatch):
    out = tmp_path / "p"
    for name in ("_write_tfds", "_write_rows", "_write_description"):
        with monkeypatch.context() as patch:

            def stop(*_, name=name):
                raise KeyboardInterrupt(name)

            patch.setattr(prepare, name, stop)
            assert run(manifest, out) == 130
        assert not out.exists()
    assert run(manifest, out) == 0
    assert same(open_dataset(manifest), open_dataset(out))


KILLED_WHILE_WRITING = """
import os, signal, sys, time
from medalign_jax.data.recordings import prepare
from medalign_jax.data.recordings.dataset import AudioDataset
clip, given = AudioDataset.clip, []
def slow(self, index):
    given.append(index)
    if len(given) > 7:
        print("writing", flush=True)
        time.sleep(60)
    return clip(self, index)
AudioDataset.clip = slow
prepare.main(sys.argv[1:])
"""


def test_killed_while_writing(manifest, tmp_path, capsys):
    out = tmp_path / "p"
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, f"--manifest={manifest}", f"--out={out}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    stage = tmp_path / "p.incomplete"
    try:
        assert any("label" in line for line in process.stdout)  # the summary; then it writes
        end = time.monotonic() + 60
        while not any(stage.rglob("*")) and time.monotonic() < end:
            time.sleep(0.05)
        # While it lives nobody else may write there.
        assert run(manifest, out) == 1
        said = capsys.readouterr().err
        assert f"{out} is in use by another process (process {process.pid} on " in said
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert stage.is_dir() and not out.exists()
    for folder in (out, stage):
        with pytest.raises(ManifestError):
            open_dataset(folder)
    assert run(manifest, out) == 0
    assert not stage.exists()
    assert same(open_dataset(manifest), open_dataset(out))


@pytest.mark.parametrize("name", ["rows", "shard", "cut", "changed", "description", "format"])
def test_damage_is_named(manifest, tmp_path, name):
    out = tmp_path / "p"
    assert run(manifest, out) == 0
    shard = next(out.glob("*train.array_record*"))
    description = out / records.DESCRIPTION
    found = json.loads(description.read_text())
    if name == "rows":
        text = (out / records.ROWS).read_text()
        (out / records.ROWS).write_text(text.replace("s1", "s2"))  # same size
    elif name == "shard":
        shard.unlink()
    elif name == "cut":
        os.truncate(shard, shard.stat().st_size // 2)
    elif name == "changed":  # of the same size; a shard has checksums of its own
        shard.write_bytes(shard.read_bytes()[: -1 << 16] + bytes(1 << 16))
    elif name == "description":
        description.write_text(description.read_text()[:-20])
    else:
        description.write_text(json.dumps(found | {"format": 99}))
    words = {"rows": "damaged.*rows.jsonl", "shard": f"damaged.*{shard.name}",
             "cut": f"damaged.*{shard.name}", "changed": "damaged: a file cannot be read",
             "description": "not a prepared data set",
             "format": "not of format"}  # fmt: skip
    with pytest.raises(ManifestError, match=words[name]):
        open_dataset(out)


@pytest.mark.parametrize(
    ("key", "value"),
    [("record", [3]), ("label", 5), ("split", "trian"), ("targets", {"age": 1}), ("row", True)],
)
def test_a_row_of_other_kinds_is_damage(manifest, tmp_path, key, value):
    """Behind checksums that were made to fit."""
    out = tmp_path / "p"
    assert run(manifest, out, "--targets=age") == 0
    lines = [json.loads(line) for line in (out / records.ROWS).read_text().splitlines()]
    lines[3][key] = value
    (out / records.ROWS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    description = json.loads((out / records.DESCRIPTION).read_text())
    description["files"][records.ROWS] = (out / records.ROWS).stat().st_size
    description["rows_sha256"] = records.sha256(out / records.ROWS)
    (out / records.DESCRIPTION).write_text(json.dumps(description))
    (out / seals.NAME).unlink()
    with pytest.raises(ManifestError, match=r"is damaged.*prepare the data set again"):
        open_dataset(out)


def test_what_was_not_prepared_is_said(manifest, tmp_path):
    out = tmp_path / "p"
    assert run(manifest, out, "--targets=age", "--max_seconds=0.2") == 0
    with pytest.raises(ManifestError, match="prepared at 16000 Hz, not 8000"):
        open_dataset(out, sample_rate=8000)
    with pytest.raises(ManifestError, match="without the target 'weight'"):
        open_dataset(out, targets=["weight"])
    data = open_dataset(out)
    assert [p.reason for p in data.problems] == [
        "20 recordings were cut to their first 0.2 s when they were prepared"
    ]
    assert len(data.waveform(0)) == 3200
    assert open_dataset(out, max_seconds=0.2).problems == ()
