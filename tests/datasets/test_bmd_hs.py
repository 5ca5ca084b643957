"""BMD-HS: a small folder in its layout with all of its traps, and the published one where it is."""

import csv
import shutil

import numpy as np
import pytest
import soundfile

from medalign_jax.data.recordings.manifest import check, read_manifest
from medalign_jax.datasets.bmd_hs import LABELS, find_recordings, read_patients
from medalign_jax.datasets.convert import convert, main
from medalign_jax.datasets.published import LayoutError, Options
from medalign_jax.reports.templates import wordings

PLACES = [f"{p}_{v}" for p in ("sup", "sit") for v in ("Mit", "Tri", "Pul", "Aor")]
PATIENTS = {  # name: class in file names, labels, metadata
    "patient_001": ("MD", "1,0,1,0,0", "35,M,1,U"),
    "patient_002": ("N", "0,0,0,0,1", "19,F,0,R"),
    "patient_004": ("AR", "0,1,0,0,0", "52,F,0,U"),
}


def names_of(patient):
    kind, number = PATIENTS[patient][0], patient.split("_")[1]
    return [f"{kind}_{number}_{place}" for place in PLACES]


@pytest.fixture
def root(tmp_path):
    """Three patients; one recording is missing, two are copies of others."""
    folder = tmp_path / "published"
    (folder / "train").mkdir(parents=True)
    recordings = [f"recording_{i}" for i in range(1, 9)]
    table, about = [["patient_id", *LABELS, *recordings]], [
        ["patient_id", "Age", "Gender", "Smoker", "Lives"]
    ]  # fmt: skip
    for patient, (_, labels, metadata) in PATIENTS.items():
        table.append([patient, *labels.split(","), *names_of(patient)])
        about.append([patient, *metadata.split(",")])
        for number, name in enumerate(names_of(patient)):
            samples = np.random.default_rng([int(patient[-3:]), number]).normal(0, 0.1, 400)
            soundfile.write(folder / f"train/{name}.wav", samples, 4000, subtype="PCM_16")
    write(folder / "train.csv", table)
    write(folder / "additional_metadata.csv", about[:1] + about[:0:-1])  # in another order
    train = folder / "train"
    (train / "AR_004_sit_Tri.wav").unlink()
    shutil.copy(train / "MD_001_sup_Mit.wav", train / "MD_001_sup_Aor.wav")
    shutil.copy(train / "N_002_sup_Tri.wav", train / "N_002_sit_Pul.wav")
    return folder


def write(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def write_manifest(root, out, **options):
    return convert("bmd_hs", root, out, Options(**options)).notes


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def manifest(path):
    with open(path, encoding="utf-8") as file:
        return {row["audio_path"].rpartition("/")[2]: row for row in csv.DictReader(file)}


def test_one_row_per_recording_with_its_patients_labels(root, tmp_path):
    write_manifest(root, tmp_path / "metadata.csv", folds=3)
    rows = manifest(tmp_path / "metadata.csv")
    assert len(rows) == 24 - 3
    row = rows["MD_001_sit_Pul.wav"]
    assert row == {
        "audio_path": "published/train/MD_001_sit_Pul.wav", "subject_id": "patient_001",
        "AS": "1", "AR": "0", "MR": "1", "MS": "0", "N": "0", "age": "35", "sex": "male",
        "smoker": "1", "lives": "urban", "organ": "heart", "diagnosis": "AS+MR",
        "posture": "sitting", "valve_area": "PV", "report": "", "fold": row["fold"],
    }  # fmt: skip
    assert rows["N_002_sup_Aor.wav"]["diagnosis"] == "N"
    folds = {(row["subject_id"], row["fold"]) for row in rows.values()}
    assert len(folds) == 3 and {fold for _, fold in folds} == {"0", "1", "2"}


def test_missing_recordings_and_copies_are_told_and_their_places_not_believed(root, tmp_path):
    notes = write_manifest(root, tmp_path / "metadata.csv", folds=3)
    rows = manifest(tmp_path / "metadata.csv")
    told = {note.split(":")[0] for note in notes}
    assert told == {"AR_004_sit_Tri", "MD_001_sup_Aor", "N_002_sit_Pul"}
    assert not {f"{name}.wav" for name in told} & set(rows)
    places = {name: (row["posture"], row["valve_area"]) for name, row in rows.items()}
    assert places["MD_001_sup_Mit.wav"] == ("supine", "")
    assert places["N_002_sup_Tri.wav"] == ("", "")
    assert sum("" in place for place in places.values()) == 2


@pytest.mark.parametrize("reports", ["full", "no_diagnosis"])
def test_the_manifest_passes_every_check_and_says_what_it_should(root, tmp_path, reports):
    out = tmp_path / "elsewhere" / "metadata.csv"
    write_manifest(root, out, folds=3, reports=reports)
    rows, problems = read_manifest(out, targets=(*LABELS, "age", "fold"))
    checked = check(rows, problems, max_bad_fraction=0)
    assert len(checked.rows) == 21
    for row in checked.rows:
        texts = (row.report,) if row.report else wordings(row.metadata, 4, 0)
        for text in map(str.lower, texts):
            named = {
                name: name in text
                for name in ("aortic stenosis", "mitral regurgitation", "aortic regurgitation")
            }
            sick = reports == "full"
            patient = row.subject_id
            assert named["aortic stenosis"] == named["mitral regurgitation"]
            assert named["aortic stenosis"] == (sick and patient == "patient_001"), text
            assert named["aortic regurgitation"] == (sick and patient == "patient_004"), text
            assert ("normal" in text) == (sick and patient == "patient_002"), text
            assert "multi" not in text and "md" not in text


def test_the_class_in_a_file_name_is_not_read(root, tmp_path):
    write_manifest(root, tmp_path / "before.csv", folds=3)
    for path in (root / "train").iterdir():
        path.rename(path.with_name("XX_" + path.name.split("_", 1)[1]))
    text = (root / "train.csv").read_text(encoding="utf-8")
    for kind in ("MD", "N", "AR"):
        text = text.replace(f",{kind}_", ",XX_")
    (root / "train.csv").write_text(text, encoding="utf-8")
    write_manifest(root, tmp_path / "after.csv", folds=3)
    before, after = manifest(tmp_path / "before.csv"), manifest(tmp_path / "after.csv")
    for one, other in zip(before.values(), after.values(), strict=True):
        assert one["audio_path"] != other["audio_path"]
        assert one | {"audio_path": ""} == other | {"audio_path": ""}


def test_the_same_seed_writes_the_same_bytes(root, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 3)):
        arguments = [
            "--format=bmd_hs",
            f"--root={root}",
            f"--out={tmp_path / name}.csv",
            "--folds=2",
            f"--seed={seed}",
        ]
        assert main(arguments) == 0
    a, b, c = ((tmp_path / f"{name}.csv").read_bytes() for name in "abc")
    assert a == b != c
    assert not list(tmp_path.glob("*.part"))


def test_samples_shared_by_two_patients_are_refused(root):
    shutil.copy(root / "train/AR_004_sup_Mit.wav", root / "train/MD_001_sup_Pul.wav")
    with pytest.raises(LayoutError, match=r"MD_001_sup_Pul.*AR_004_sup_Mit"):
        find_recordings(read_patients(root), root)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("train.csv", "patient_001,1,0", "patient_001,1,2", "patient_001 has labels 1, 2"),
        ("train.csv", "patient_002,0", "patient_002,1", "patient_002 is N"),
        ("train.csv", "patient_004,0,1", "patient_004,0,0", "patient_004 is N"),
        ("train.csv", "patient_004", "patient_001", "row 3: patient_id 'patient_001'"),
        ("train.csv", "AR_004_sit_Mit", "AR_004_sit_Apex", "AR_004_sit_Apex"),
        ("train.csv", "AR_004_sit_Mit", "MD_001_sit_Mit", "patient_004 and patient_001 both name"),
        ("train.csv", "MR,MS", "MR,XX", "no column MS"),
        ("additional_metadata.csv", "patient_002", "patient_003", "no row for patient_002"),
        ("additional_metadata.csv", "19,F", "19,X", "patient_002"),
        ("additional_metadata.csv", "19,F", "old,F", "patient_002"),
    ],
)
def test_a_table_that_is_wrong_is_refused_with_the_place(root, tmp_path, capsys, file, old, new, message):  # fmt: skip  # noqa: E501
    edit(root / file, old, new)
    arguments = ["--format=bmd_hs", f"--root={root}", f"--out={tmp_path / 'm.csv'}", "--folds=2"]
    assert main(arguments) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "m.csv").exists()


def test_a_folder_that_is_something_else_is_refused(tmp_path):
    with pytest.raises(LayoutError, match=r"train\.csv"):
        read_patients(tmp_path)


def test_the_published_folder(shared, tmp_path):
    root = shared / "data/bmd_hs"
    notes = write_manifest(root, tmp_path / "metadata.csv")
    rows = manifest(tmp_path / "metadata.csv")
    assert sorted(note.split(":")[0] for note in notes) == [
        "MD_001_sit_Pul", "MD_085_sit_Tri", "MS_012_sit_Tri", "MS_047_sit_Tri", "MS_062_sit_Pul",
    ]  # fmt: skip
    assert len(rows) == 643 and len({row["subject_id"] for row in rows.values()}) == 81
    patients = {row["subject_id"]: row for row in rows.values()}
    totals = {label: sum(int(row[label]) for row in patients.values()) for label in LABELS}
    assert totals == {"AS": 28, "AR": 33, "MR": 29, "MS": 28, "N": 15}
    for label in LABELS:
        counts = np.zeros(5, int)
        for row in patients.values():
            counts[int(row["fold"])] += int(row[label])
        assert np.ptp(counts) <= 2, (label, counts)
