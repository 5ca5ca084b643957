"""Speech emotion: EmoDB's table, IEMOCAP's folder, folds."""

import csv

import pytest

from medalign_jax.data.questions.question import Checks, QuestionsError, leave_one_out
from medalign_jax.datasets import emotions
from medalign_jax.datasets.emotions import read_emotions, read_iemocap
from tests.data import manifests

LENIENT = Checks(max_bad_fraction=1.0)


def fatal(loaded):
    return {p.row: p.reason for p in loaded.problems if p.fatal}


def notes(loaded):
    return [p.reason for p in loaded.problems if not p.fatal]


@pytest.fixture
def folder(tmp_path):
    for n, name in enumerate(("a", "b")):
        manifests.write_wav(tmp_path / f"{name}.wav", n)
    return tmp_path


def test_emodb(shared):
    path = shared / "data/emodb/metadata.csv"
    loaded = read_emotions(path, checks=Checks(decode=False, max_bad_fraction=0))
    with open(path, encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["emotion"] in emotions._EMOTION_NAMES]
    assert len(loaded.questions) == len(rows) == 266
    names = {"anger": "angry", "happiness": "happy", "sadness": "sad", "neutral": "neutral"}
    for question, row in zip(loaded.questions, rows, strict=True):
        assert question.answer == names[row["emotion"]]
        assert question.choices == emotions.EMOTIONS
        assert (question.subject_id, question.split) == (row["subject_id"], row["split"])
    assert notes(loaded) == [
        "142 rows of other emotions are left out (anxiety: 54, boredom: 58, disgust: 30)"
    ]
    folds = leave_one_out(loaded.questions, lambda q: q.subject_id)
    assert [fold.name for fold in folds] == sorted({row["subject_id"] for row in rows})
    tested = [q.id for fold in folds for q in fold.test]
    assert sorted(tested) == sorted(q.id for q in loaded.questions)
    for fold in folds:
        assert {q.subject_id for q in fold.test} == {fold.name}
        assert fold.name not in {q.subject_id for q in fold.train}
        assert len(fold.train) + len(fold.test) == 266


def test_emotions_need_their_columns_and_subjects(folder):
    rows = [{"audio_path": "a.wav", "subject_id": "", "emotion": "anger"},
            {"audio_path": "b.wav", "subject_id": "1", "emotion": "exc"}]  # fmt: skip
    path = manifests.write_csv(folder / "e.csv", rows)
    loaded = read_emotions(path, checks=LENIENT)
    assert fatal(loaded) == {1: "no subject_id: folds by speaker need one"}
    assert loaded.questions[0].answer == "happy"
    with pytest.raises(QuestionsError, match="no row is left"):
        read_emotions(path, merge_excited=False, checks=LENIENT)
    path = manifests.write_csv(folder / "e.csv", [{"audio_path": "a.wav", "emotion": "anger"}])
    with pytest.raises(QuestionsError, match="has no column subject_id"):
        read_emotions(path)


def iemocap(root, lines):
    """A release of two sessions; lines are (utterance, emotion) or a text."""
    for line in lines:
        name, emotion = line if isinstance(line, tuple) else (None, None)
        dialog = name.rsplit("_", 1)[0] if name else "Ses01F_impro01"
        session = root / f"Session{int(dialog[3:5])}"
        text = f"[6.2901 - 8.2357]\t{name}\t{emotion}\t[2.5, 2.5, 2.5]" if name else line
        file = session / "dialog/EmoEvaluation" / f"{dialog}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        header = (
            "" if file.exists() else "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
        )
        with open(file, "a") as out:
            out.write(header + text + "\nC-E1:\tNeutral;\t()\n\n")
        if name:
            manifests.write_wav(session / f"sentences/wav/{dialog}/{name}.wav", int(name[-3:]))
    return root


def test_iemocap(tmp_path):
    root = iemocap(
        tmp_path / "IEMOCAP_full_release",
        [
            ("Ses01F_impro01_F000", "neu"), ("Ses01F_impro01_M001", "ang"),
            ("Ses01M_script01_1_F002", "exc"), ("Ses02F_impro03_F001", "sad"),
            ("Ses02F_impro03_M001", "hap"), ("Ses02F_impro03_M002", "xxx"),
            ("Ses02F_impro03_M003", "fru"),
        ],
    )  # fmt: skip
    hidden = root / "Session1/dialog/EmoEvaluation/._Ses01F_impro01.txt"
    hidden.write_bytes(b"[\0\xff resource fork")
    loaded = read_iemocap(root, checks=Checks(max_bad_fraction=0))
    found = {q.id: (q.answer, q.subject_id, q.category, q.extra["session"])
             for q in loaded.questions}  # fmt: skip
    assert found == {
        "Ses01F_impro01_F000": ("neutral", "Ses01F", "improvised", "Ses01"),
        "Ses01F_impro01_M001": ("angry", "Ses01M", "improvised", "Ses01"),
        "Ses01M_script01_1_F002": ("happy", "Ses01F", "scripted", "Ses01"),
        "Ses02F_impro03_F001": ("sad", "Ses02F", "improvised", "Ses02"),
        "Ses02F_impro03_M001": ("happy", "Ses02M", "improvised", "Ses02"),
    }
    assert notes(loaded) == ["2 rows of other emotions are left out (fru: 1, xxx: 1)"]
    one, two = leave_one_out(loaded.questions, lambda q: q.extra["session"])
    assert (one.name, len(one.test), len(one.train)) == ("Ses01", 3, 2)
    assert one.train == two.test
    apart = read_iemocap(root, merge_excited=False)
    assert len(apart.questions) == 4
    assert "exc: 1" in notes(apart)[0]


def test_iemocap_problems(tmp_path):
    with pytest.raises(QuestionsError, match="give the folder IEMOCAP_full_release"):
        read_iemocap(tmp_path)
    lines = [
        ("Ses01F_impro01_F000", "neu"),
        "[6.2901 - 8.2357] no tabs",
        ("Ses01F_impro01_M001", "ang"),
    ]
    root = iemocap(tmp_path / "I", lines)
    (root / "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_M001.wav").unlink()
    loaded = read_iemocap(root, checks=LENIENT)
    found = fatal(loaded)
    assert found[2].startswith("Ses01F_impro01.txt: not a line of an utterance")
    assert found[3].startswith("no such file")
    assert [q.id for q in loaded.questions] == ["Ses01F_impro01_F000"]
