"""Requests to the simulator, and the data sets that it writes."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from medalign_jax.data.recordings.manifest import read_manifest
from medalign_jax.datasets.simulated.simulate import (
    LABELS,
    SAMPLE_RATE,
    SimulationError,
    main,
    simulate,
    write_dataset,
)
from medalign_jax.reports.templates import METADATA_COLUMNS, ReportError, wordings

# --- Requests ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LABELS)
def test_the_same_seed_gives_the_same_samples(kind):
    for label in LABELS[kind]:
        one, two = (simulate(kind, 11, label=label, seconds=4) for _ in range(2))
        assert one.waveform.dtype == np.float32 and one.waveform.shape == (4 * SAMPLE_RATE,)
        assert one.waveform.tobytes() == two.waveform.tobytes()
        assert one.metadata == two.metadata and one.truth == two.truth
        assert 0.1 < np.abs(one.waveform).max() < 0.75
        other = simulate(kind, 12, label=label, seconds=4)
        assert other.waveform.tobytes() != one.waveform.tobytes()
        organ = "lung" if kind == "lung" else "heart"
        assert one.metadata["label"] == label and one.metadata["organ"] == organ
        assert set(one.metadata) - {"label"} <= METADATA_COLUMNS
        assert len(wordings(one.metadata, 6, 0)) == 6


@pytest.mark.parametrize("kind", LABELS)
def test_nuisance_carries_no_label(kind):
    keys = ("device", "snr_db", "friction_times")
    for seed in range(5):
        made = [simulate(kind, seed, label=label, seconds=6).truth for label in LABELS[kind]]
        assert all([truth[key] for key in keys] == [made[0][key] for key in keys] for truth in made)


def test_recordings_of_a_subject_share_findings_and_rate():
    one, two = (simulate("heart", s, subject=7, label="systolic murmur") for s in (1, 2))
    assert one.waveform.tobytes() != two.waveform.tobytes()
    findings = [column for column in one.metadata if "murmur" in column or column == "outcome"]
    assert all(one.metadata[column] == two.metadata[column] for column in findings)
    assert one.truth["heart_rate"] == pytest.approx(two.truth["heart_rate"], rel=0.03)


def test_all_else_stays_when_one_value_is_set():
    plain = simulate("heart", 5, label="diastolic murmur", nuisance=False)
    pitch = "Low" if plain.metadata["diastolic_murmur_pitch"] == "High" else "High"
    given = {"diastolic_murmur_pitch": pitch}
    changed = simulate("heart", 5, metadata=given, nuisance=False)
    assert changed.metadata == plain.metadata | given
    assert changed.truth["s1_times"] == plain.truth["s1_times"]


def test_labels_that_metadata_make():
    both = {"crackles": "1", "wheezes": "yes"}
    assert simulate("lung", 0, metadata=both).metadata["label"] == "wheeze and crackle"
    murmur = simulate("heart", 0, metadata={"most_audible_location": "PV"}).metadata
    assert murmur["label"] == "systolic murmur" and murmur["murmur_locations"] == "PV"
    assert simulate("heart", 0, metadata={"murmur": "Absent"}).metadata["label"] == "normal"
    drawn = {simulate("heart", s, seconds=2).metadata["label"] for s in range(12)}
    assert drawn == set(LABELS["heart"])


@pytest.mark.parametrize(
    "kind, options, words",
    [
        ("liver", {}, "heart, lung"),
        ("heart", {"label": "wheeze"}, "systolic murmur"),
        ("heart", {"seconds": 0.5}, "2 to 600"),
        ("heart", {"seconds": float("nan")}, "2 to 600"),
        ("heart", {"metadata": {"crackles": "1"}}, "'crackles'"),
        ("heart", {"metadata": {"heart_rate": "250"}}, "40 to 160"),
        ("heart", {"metadata": {"murmur": "Unknown"}}, "Present or Absent"),
        ("heart", {"label": "normal", "metadata": {"systolic_murmur_pitch": "Low"}}, "contradicts"),
        ("lung", {"label": "wheeze", "metadata": {"wheezes": "0"}}, "contradicts"),
        ("lung", {"seconds": 2, "metadata": {"respiratory_rate": "6", "wheezes": "1"}}, "short"),
    ],
)
def test_what_cannot_be_simulated_is_refused(kind, options, words):
    with pytest.raises((SimulationError, ReportError), match=words):
        for seed in range(40):  # "too short" depends on where the clip falls
            simulate(kind, seed, **options)


def test_a_present_murmur_without_a_murmur_is_refused():
    with pytest.raises((SimulationError, ReportError)):
        simulate("heart", 0, label="normal", metadata={"murmur": "Present"})
    with pytest.raises((SimulationError, ReportError)):
        simulate("heart", 0, label="systolic murmur", metadata={"murmur": "Absent"})


def test_an_unknown_value_is_refused():
    with pytest.raises(ReportError, match="systolic_murmur_shape"):
        simulate("heart", 0, metadata={"systolic_murmur_shape": "Square"})


# --- Data sets ---------------------------------------------------------------------------------


def test_write_dataset(tmp_path):
    manifest = write_dataset(tmp_path / "one", 60, 3, seconds=4)
    with manifest.open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 60 and {row["organ"] for row in rows} == {"heart", "lung"}
    splits = {}
    for row in rows:
        splits.setdefault(row["subject_id"], set()).add(row["split"])
    assert len(splits) == 30 and all(len(names) == 1 for names in splits.values())
    for one, two in zip(rows[::2], rows[1::2], strict=True):
        assert one["subject_id"] == two["subject_id"]
        own = ("audio_path", "chest_location", "heart_rate", "respiratory_rate")
        assert all(one[column] == two[column] for column in one if column not in own)
        if one["organ"] == "heart":
            assert float(one["heart_rate"]) == pytest.approx(float(two["heart_rate"]), rel=0.05)
    for split in ("train", "valid", "test"):
        labels = {(row["organ"], row["label"]) for row in rows if row["split"] == split}
        assert labels == {(kind, label) for kind in ("heart", "lung") for label in LABELS[kind]}
    info = soundfile.info(manifest.parent / rows[0]["audio_path"])
    assert (info.samplerate, info.channels, info.subtype) == (16_000, 1, "PCM_16")
    assert info.frames == 64_000
    lines = (tmp_path / "one/truth.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["audio_path"] for line in lines] == [r["audio_path"] for r in rows]


def test_a_data_set_is_a_manifest_and_comes_out_the_same_again(tmp_path):
    one, two = (write_dataset(tmp_path / name, 6, 3, seconds=3) for name in ("one", "two"))
    names = sorted(p.relative_to(one.parent) for p in one.parent.rglob("*") if p.is_file())
    assert len(names) == 6 + 3
    assert all((one.parent / n).read_bytes() == (two.parent / n).read_bytes() for n in names)
    rows, problems = read_manifest(one, targets=("phase",))
    assert len(rows) == 6 and not problems
    other = write_dataset(tmp_path / "other", 6, 4, seconds=3)
    assert {r.subject_id for r in rows}.isdisjoint(r.subject_id for r in read_manifest(other)[0])


def test_a_data_set_is_kept_finished_or_refused(tmp_path):
    manifest = write_dataset(tmp_path, 2, 0, seconds=2, kinds=("heart",))
    whole = manifest.read_bytes()
    written = manifest.stat().st_mtime_ns
    assert write_dataset(tmp_path, 2, 0, seconds=2, kinds=("heart",)) == manifest
    assert manifest.stat().st_mtime_ns == written, "an existing data set was written again"
    manifest.unlink()  # as if killed before the end
    assert write_dataset(tmp_path, 2, 0, seconds=2, kinds=("heart",)).read_bytes() == whole
    with pytest.raises(SimulationError, match="new folder"):
        write_dataset(tmp_path, 2, 1, seconds=2, kinds=("heart",))


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / "simulation.json").write_bytes(b"\xff{")  # damaged: nobody knows whose
    with pytest.raises(SimulationError, match="other files"):
        write_dataset(tmp_path, 2, 0)
    with pytest.raises(SimulationError, match="count=0"):
        write_dataset(tmp_path / "new", 0, 0)


def test_command_line(tmp_path, capsys):
    out = tmp_path / "made"
    assert main([f"--out={out}", "--count=3", "--seed=1", "--seconds=2", "--kinds=heart"]) == 0
    assert "3 recordings of 2 subjects" in capsys.readouterr().out
    assert main([f"--out={out}", "--count=4", "--kinds=liver"]) == 1
    assert "unknown kind 'liver'" in capsys.readouterr().err


def test_the_module_runs_without_tensorflow_or_pytorch():
    code = (
        "import sys; from medalign_jax.datasets.simulated.simulate import simulate;"
        "simulate('heart', 0);"
        "assert not {'torch', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
