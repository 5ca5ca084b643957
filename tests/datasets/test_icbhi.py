"""ICBHI: a small folder in its layout with its traps, and the published files where they are."""

import csv

import numpy as np
import pytest
import soundfile

from medalign_jax.data.recordings.manifest import check, read_manifest
from medalign_jax.datasets.convert import convert
from medalign_jax.datasets.published import LayoutError, Options
from medalign_jax.reports.templates import wordings

DIAGNOSES = {"101": "COPD", "102": "Healthy", "103": "URTI", "104": "COPD", "105": "Healthy",
             "106": "COPD", "107": "Healthy", "108": "COPD"}  # fmt: skip
OFFICIAL = {
    "101_1b1_Al_sc_Meditron": "train",
    "101_1b2_Al_sc_Meditron": "train",
    "101_1b3_Pr_sc_Meditron": "test",  # this patient is on both sides
    "102_1b1_Tc_mc_LittC2SE": "test",
    "103_1b1_Lr_mc_AKGC417L": "test",
    **{f"{patient}_1b1_Ar_sc_Litt3200": "train" for patient in ("104", "105", "106", "107", "108")},
}


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "published"
    audio = folder / "ICBHI_final_database"
    audio.mkdir(parents=True)
    lines = "\n".join
    (folder / "ICBHI_Challenge_diagnosis.txt").write_text(
        lines(f"{patient}\t{name}" for patient, name in DIAGNOSES.items())
    )
    about = [f"{patient} 70 M 28.4 NA NA" for patient in DIAGNOSES if patient != "102"]
    (folder / "ICBHI_Challenge_demographic_information.txt").write_text(
        lines([*about, "102\t0.75\tF\tNA\t9.8\t73", ""])
    )
    (folder / "ICBHI_challenge_train_test.txt").write_text(
        lines(f"{name}\t{part}" for name, part in OFFICIAL.items())
    )
    for number, name in enumerate(OFFICIAL):
        if name.startswith("108"):
            continue  # named in the split, not in the folder
        samples = np.random.default_rng(number).normal(0, 0.1, 4000)
        soundfile.write(audio / f"{name}.wav", samples, 4000, subtype="PCM_16")
        crackle = int(name.startswith("101"))
        (audio / f"{name}.txt").write_text(f"0.0\t0.5\t0\t0\n0.5\t0.9\t{crackle}\t0\n")
    return folder


def read(path):
    with open(path, encoding="utf-8") as file:
        return {row["audio_path"].rpartition("/")[2]: row for row in csv.DictReader(file)}


def test_one_row_per_recording(root, tmp_path):
    convert("icbhi", root, tmp_path / "m.csv", Options(folds=2))
    rows = read(tmp_path / "m.csv")
    assert len(rows) == 9
    row = rows["102_1b1_Tc_mc_LittC2SE.wav"]
    assert row == {
        "audio_path": "published/ICBHI_final_database/102_1b1_Tc_mc_LittC2SE.wav",
        "subject_id": "102", "split": "test", "official_split": "test", "fold": row["fold"],
        "label": "Healthy", "copd": "0", "crackles": "0", "wheezes": "0", "cycles": "2",
        "chest_location": "Tc", "acquisition_mode": "mc", "device": "LittC2SE",
        "age": "0.75", "sex": "female", "bmi": "", "weight": "9.8", "height": "73",
        "organ": "lung", "diagnosis": "Healthy",
    }  # fmt: skip
    assert rows["101_1b1_Al_sc_Meditron.wav"]["crackles"] == "1"
    assert rows["103_1b1_Lr_mc_AKGC417L.wav"]["copd"] == ""


def test_no_patient_is_in_two_splits_and_the_official_one_is_kept(root, tmp_path):
    notes = convert("icbhi", root, tmp_path / "m.csv", Options(folds=2, seed=1)).notes
    rows = read(tmp_path / "m.csv")
    of_101 = [row for row in rows.values() if row["subject_id"] == "101"]
    assert len({row["split"] for row in of_101}) == 1
    assert [row["official_split"] for row in of_101] == ["train", "train", "test"]
    assert {row["split"] for row in rows.values()} == {"train", "valid", "test"}
    assert any("patient 101: 2 recordings in train and 1 in test" in note for note in notes)
    assert any("1 of 10 recordings of the official split are not in" in note for note in notes)


@pytest.mark.parametrize("reports", ["full", "no_diagnosis"])
def test_reports_name_the_disease_or_not(root, tmp_path, reports):
    convert("icbhi", root, tmp_path / "m.csv", Options(folds=2, reports=reports))
    rows, problems = read_manifest(tmp_path / "m.csv", targets=("copd", "device", "age"))
    rows = check(rows, problems, max_bad_fraction=0).rows
    assert len(rows) == 9
    texts = " ".join(wordings(row.metadata, 4, 0)[0] for row in rows)
    assert ("obstructive" in texts or "COPD" in texts) == (reports == "full")


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("ICBHI_Challenge_diagnosis.txt", "103\tURTI", "103", "line 3: 1 fields"),
        ("ICBHI_Challenge_diagnosis.txt", "103\tURTI\n", "", "patient 103 has no diagnosis"),
        ("ICBHI_challenge_train_test.txt", "\ttest", "\tdev", "'dev'"),
        ("ICBHI_Challenge_demographic_information.txt", "70 M", "70 X", "sex 'X'"),
        ("ICBHI_final_database/102_1b1_Tc_mc_LittC2SE.txt", "0\t0\n", "2\t0\n", "crackles and"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_written(root, tmp_path, file, old, new, message):
    text = (root / file).read_text()
    assert old in text
    (root / file).write_text(text.replace(old, new, 1))
    with pytest.raises(LayoutError, match=message):
        convert("icbhi", root, tmp_path / "m.csv", Options(folds=2))
    assert not (tmp_path / "m.csv").exists()


def test_an_odd_name_or_no_recording_is_refused(root, tmp_path):
    audio = root / "ICBHI_final_database"
    (audio / "101_1b1_Al_sc_Meditron.wav").rename(audio / "101.wav")
    with pytest.raises(LayoutError, match="is not named <patient>"):
        convert("icbhi", root, tmp_path / "m.csv", Options(folds=2))
    for path in audio.iterdir():
        path.unlink()
    with pytest.raises(LayoutError, match="none of the recordings is there"):
        convert("icbhi", root, tmp_path / "m.csv", Options(folds=2))


def test_the_published_files(shared, tmp_path):
    root = shared / "data/icbhi_sample"
    notes = convert("icbhi", root, tmp_path / "m.csv", Options()).notes
    assert [note[:11] for note in notes[1:]] == ["patient 156", "patient 218"]
    rows = read(tmp_path / "m.csv")
    assert len(rows) == 10 and len({row["subject_id"] for row in rows.values()}) == 4
    assert rows["101_1b1_Al_sc_Meditron.wav"]["cycles"] == "12"
