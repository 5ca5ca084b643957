"""CirCor: a small folder in its layout with its traps."""

import csv

import numpy as np
import pytest
import soundfile

from medalign_jax.data.recordings.manifest import check, read_manifest
from medalign_jax.datasets.convert import convert, main
from medalign_jax.datasets.published import LayoutError, Options
from medalign_jax.reports.templates import wordings

HEADER = (
    "Patient ID,Recording locations:,Age,Sex,Height,Weight,Pregnancy status,Murmur,"
    "Murmur locations,Most audible location,Systolic murmur timing,Systolic murmur shape,"
    "Systolic murmur grading,Systolic murmur pitch,Systolic murmur quality,"
    "Diastolic murmur timing,Diastolic murmur shape,Diastolic murmur grading,"
    "Diastolic murmur pitch,Diastolic murmur quality,Outcome,Campaign,Additional ID"
)
NONE = "nan,nan,nan,nan,nan"
ROWS = [
    f"2530,AV+PV,Child,Female,98.0,15.9,False,Absent,nan,nan,{NONE},{NONE},Abnormal,CC2015,nan",
    "9979,AV+PV+MV,Child,Female,103.0,13.1,False,Present,AV+MV+AV,MV,"
    f"Holosystolic,Diamond,III/VI,High,Harsh,{NONE},Abnormal,CC2014,nan",
    f"13918,MV,nan,Male,nan,nan,False,Unknown,nan,nan,{NONE},{NONE},Normal,CC2014,2530.0",
    f"14241,Phc,Infant,Male,87.0,11.2,False,Absent,nan,nan,{NONE},{NONE},Normal,CC2015,nan",
]
FILES = ("2530_AV", "2530_PV", "9979_AV", "9979_MV_1", "9979_MV_2", "9979_PV", "13918_MV")


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "published"
    (folder / "training_data").mkdir(parents=True)
    (folder / "training_data.csv").write_text("\n".join([HEADER, *ROWS]) + "\n")
    for number, name in enumerate(FILES):
        samples = np.random.default_rng(number).normal(0, 0.1, 4000)
        soundfile.write(folder / f"training_data/{name}.wav", samples, 4000, subtype="PCM_16")
    return folder


def read(path):
    with open(path, encoding="utf-8") as file:
        return {row["audio_path"].rpartition("/")[2]: row for row in csv.DictReader(file)}


def test_one_row_per_recording(root, tmp_path):
    notes = convert("circor", root, tmp_path / "m.csv", Options(folds=2)).notes
    rows = read(tmp_path / "m.csv")
    assert set(rows) == {f"{name}.wav" for name in FILES}
    row = rows["9979_MV_2.wav"]
    expected = {
        "subject_id": "9979", "split": "train", "age_group": "Child", "sex": "Female",
        "height": "103.0", "weight": "13.1", "organ": "heart", "valve_area": "MV",
        "murmur": "Present", "murmur_at_site": "Present", "murmur_locations": "AV+MV+AV",
        "systolic_murmur_grading": "III/VI", "diastolic_murmur_pitch": "", "outcome": "Abnormal",
    }  # fmt: skip
    assert {name: row[name] for name in expected} == expected
    assert rows["9979_PV.wav"]["murmur_at_site"] == "Absent"
    assert rows["2530_AV.wav"]["murmur_at_site"] == "Absent"
    assert rows["13918_MV.wav"]["murmur_at_site"] == "" and rows["13918_MV.wav"]["height"] == ""
    assert notes == [
        "1 patient ids are of a child that has another one; both count as one subject",
        "1 of 4 patients have no recording in the folder, e.g. 14241",
    ]


def test_a_child_with_two_ids_is_one_subject_in_one_fold(root, tmp_path):
    convert("circor", root, tmp_path / "m.csv", Options(folds=2))
    rows = read(tmp_path / "m.csv")
    one, other = rows["2530_AV.wav"], rows["13918_MV.wav"]
    assert one["subject_id"] == other["subject_id"] == "2530" and one["fold"] == other["fold"]


def test_the_manifest_passes_every_check(root, tmp_path):
    convert("circor", root, tmp_path / "m.csv", Options(folds=2))
    rows, problems = read_manifest(tmp_path / "m.csv", targets=("murmur_at_site", "age_group"))
    rows = check(rows, problems, max_bad_fraction=0).rows
    assert len(rows) == len(FILES)
    texts = {str(row.audio_path).rpartition("/")[2]: wordings(row.metadata, 1, 0)[0].lower()
             for row in rows}  # fmt: skip
    assert "holosystolic" in texts["9979_AV.wav"] and "holosystolic" not in texts["2530_AV.wav"]


def test_reports_without_the_diagnosis_keep_what_is_heard(root, tmp_path):
    convert("circor", root, tmp_path / "m.csv", Options(folds=2, reports="no_diagnosis"))
    rows = read(tmp_path / "m.csv")
    assert {row["outcome"] for row in rows.values()} == {""}
    assert rows["9979_AV.wav"]["systolic_murmur_timing"] == "Holosystolic"


def test_further_parts_are_splits_and_one_person_is_in_one_of_them(root, tmp_path):
    (root / "test_data").mkdir()
    (root / "training_data/9979_PV.wav").rename(root / "test_data/555_PV.wav")
    row = ROWS[1].replace("9979", "555")
    (root / "test_data.csv").write_text(f"{HEADER}\n{row}\n")
    convert("circor", root, tmp_path / "m.csv", Options(folds=2))
    assert read(tmp_path / "m.csv")["555_PV.wav"]["split"] == "test"
    (root / "test_data.csv").write_text(f"{HEADER}\n{row.removesuffix('nan')}9979\n")
    with pytest.raises(LayoutError, match="person 555 is in two splits"):
        convert("circor", root, tmp_path / "m.csv", Options(folds=2))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (",Outcome,", ",Result,", "no column Outcome"),
        ("9979,", "2530,", "'2530' is empty or there twice"),
        ("9979,", "9978,", "no table has patient 9979"),
    ],
)
def test_what_is_wrong_is_one_line(root, tmp_path, capsys, old, new, message):
    table = root / "training_data.csv"
    table.write_text(table.read_text().replace(old, new, 1))
    out = tmp_path / "m.csv"
    assert main(["--format=circor", f"--root={root}", f"--out={out}", "--folds=2"]) == 1
    assert message in capsys.readouterr().err and not out.exists()


def test_a_folder_that_is_something_else_is_refused(tmp_path, capsys):
    out = f"--out={tmp_path / 'm.csv'}"
    assert main(["--format=circor", f"--root={tmp_path}", out]) == 1
    assert "training_data.csv" in capsys.readouterr().err
    assert main(["--format=circor", f"--root={tmp_path / 'nowhere'}", out]) == 1
    assert "there is no folder" in capsys.readouterr().err
