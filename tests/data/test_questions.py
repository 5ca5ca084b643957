"""Questions: formats, and every bad row named with its reason."""

import json
import re
from dataclasses import replace

import pytest
import soundfile

from medalign_jax.data.questions.question import (
    Checks,
    Question,
    QuestionsError,
    leave_one_out,
)
from medalign_jax.data.questions.readers import (
    read_cota,
    read_mmau,
    read_questions,
    write_questions,
)
from medalign_jax.text.reasoning import Stages, format_response
from tests.data import manifests

UNHEARD = Checks(require_audio=False, max_bad_fraction=1.0)
LENIENT = Checks(max_bad_fraction=1.0)
STAGES = Stages("Plan it.", "A man speaks.", "His voice is low.", "He is sad.")
RESPONSE = format_response(STAGES, "The man is sad. The answer is B.")
ROW = {"id": "1", "audio": "a.wav", "question": "Which?", "answer": "sad",
       "choices": ["angry", "sad"]}  # fmt: skip


def write(path, rows):
    """A file of rows; a row may be bytes."""
    lines = [r if isinstance(r, bytes) else json.dumps(r, ensure_ascii=False).encode()
             for r in rows]  # fmt: skip
    if path.suffix == ".json":
        path.write_bytes(b"[" + b",\n".join(lines) + b"]")
    else:
        path.write_bytes(b"\n\n".join(lines) + b"\n")
    return path


def fatal(loaded):
    return {p.row: p.reason for p in loaded.problems if p.fatal}


def notes(loaded):
    return [p.reason for p in loaded.problems if not p.fatal]


@pytest.fixture
def folder(tmp_path):
    for n, name in enumerate(("a", "b", "c")):
        manifests.write_wav(tmp_path / f"{name}.wav", n)
    return tmp_path


# -------------------------------------------------------------------------------- our own


def test_written_and_read_back(folder, tmp_path_factory):
    questions = [
        Question(id="1", audio=(str(folder / "a.wav"), str(folder / "b.wav")), question="Whô?",
                 choices=("x", "y"), answer="y", reasoning=STAGES, description="Two men.",
                 task="speech", category="c", sub_category="s", difficulty="hard",
                 subject_id="7", split="train", extra={"response": "It is y."}),
        Question(id="2", audio=(str(folder / "c.wav"),), question="Why?", choices=(),
                 answer="So.", reasoning="As it is."),
    ]  # fmt: skip
    path = folder / "q.jsonl"
    write_questions(path, questions)
    assert json.loads(path.read_text("utf-8").split("\n")[0])["audio"] == ["a.wav", "b.wav"]
    loaded = read_questions(path, Checks(max_bad_fraction=0))
    assert loaded.questions == tuple(questions)
    assert loaded.problems == ()
    elsewhere = tmp_path_factory.mktemp("x") / "deep" / "q.jsonl"
    write_questions(elsewhere, loaded.questions)
    assert read_questions(elsewhere).questions == tuple(questions)
    assert not list(elsewhere.parent.glob("*.part"))


def test_every_bad_row_is_named(folder):
    (folder / "broken.wav").write_bytes(b"RIFF no audio")
    manifests.write_wav(folder / "long.wav", 5, samples=48_000)
    rows = [
        ROW,
        ROW | {"id": "2", "audio": "none.wav"},
        ROW | {"id": "3", "audio": "broken.wav"},
        ROW | {"id": "4", "audio": "long.wav"},
        ROW | {"id": "5", "question": " "},
        ROW | {"id": "6", "answer": ""},
        ROW | {"id": "7", "answer": "happy"},
        ROW | {"id": "1", "question": "Again?"},
        json.dumps(ROW | {"id": "9"}).encode().replace(b"Which?", b"Wh\xe9ch"),
        b"{not json",
        ["a list"],
        ROW | {"id": "12", "audio": []},
        ROW | {"id": "13", "choices": ["sad", {"b": 1}]},
        ROW | {"id": "14", "reasoning": {"planning": "x"}},
        ROW | {"id": "15", "reasoning": vars(STAGES) | {"summary": ""}},
        ROW | {"id": "16", "audio": "a\0.wav"},
        ROW | {"id": "17", "extra": "text"},
        ROW | {"id": True},
        ROW | {"id": "19", "choices": ["sad", " "]},
        ROW | {"id": "20", "answer": "SAD"},
    ]
    loaded = read_questions(write(folder / "q.jsonl", rows), replace(LENIENT, max_seconds=2.0))
    expected = {
        2: "no such file",
        3: "is not audio|truncated",
        4: "lasts 3.0 s, longer than the 2 s that the model takes",
        5: "no question",
        6: "no answer",
        7: "the answer 'happy' is not among the options",
        8: "the id '1' is that of row 1",
        9: r"'question' is not UTF-8 text \(byte 0xe9\)",
        10: "not a JSON object",
        11: "not a JSON object but list",
        12: "no audio path",
        13: "'choices' holds a dict, not a text",
        14: "'reasoning' has the stages planning, not",
        15: "the stage SUMMARY is empty",
        16: "NUL",
        17: "'extra' is not an object",
        18: "'id' holds a bool",
        19: "'choices' holds an empty text",
    }
    found = fatal(loaded)
    assert found.keys() == expected.keys()
    for row, words in expected.items():
        assert re.search(words, found[row]), (row, found[row])
    assert [q.id for q in loaded.questions] == ["1", "20"]
    assert loaded.questions[1].answer == "sad"  # as the option writes it
    with pytest.raises(QuestionsError, match=r"18 of 20 rows \(90.0%\) cannot be used") as caught:
        read_questions(folder / "q.jsonl", Checks(max_seconds=2.0, max_bad_fraction=0.5))
    assert {p.row for p in caught.value.problems if p.fatal} == set(expected)
    for reason in ("happy", "none.wav", "0xe9"):
        assert reason in str(caught.value)


def test_several_reasons_of_a_row_are_all_named(folder):
    row = {"id": "1", "audio": "a.wav", "choices": ["x"]}
    with pytest.raises(QuestionsError, match="no row is left: 1 of 1") as caught:
        read_questions(write(folder / "q.jsonl", [row]), LENIENT)
    assert [p.reason for p in caught.value.problems] == ["no question", "no answer"]


def test_truncated_audio_is_found_only_by_decoding(folder):
    soundfile.write(folder / "t.flac", manifests.tone(3, 40_000), 16_000)
    data = (folder / "t.flac").read_bytes()
    (folder / "t.flac").write_bytes(data[: len(data) // 2])
    path = write(folder / "q.jsonl", [ROW, ROW | {"id": "2", "audio": "t.flac"}])
    assert "truncated" in fatal(read_questions(path, LENIENT))[2]
    assert fatal(read_questions(path, replace(LENIENT, decode=False))) == {}


def test_a_missing_subject_is_nobody_in_particular(folder):
    """Two questions of which none says who was recorded, in two splits."""
    row = ROW | {"subject_id": "NA", "split": "train", "difficulty": "<NA>"}
    path = write(folder / "q.jsonl", [row, row | {"id": "2", "subject_id": "n/a", "split": "val"}])
    assert [(q.subject_id, q.difficulty) for q in read_questions(path).questions] == [("", "")] * 2


def test_whole_file_problems(folder):
    row = ROW | {"subject_id": "s", "split": "train"}
    path = write(folder / "q.jsonl", [row, row | {"id": "2", "split": "val"}])
    with pytest.raises(QuestionsError, match=r"'s' is in more than one split: train \(row 1\), va"):
        read_questions(path)
    with pytest.raises(QuestionsError, match="no file of questions"):
        read_questions(folder / "none.jsonl")
    (folder / "e.jsonl").write_text("\n")
    with pytest.raises(QuestionsError, match="no row is left: 0 of 0"):
        read_questions(folder / "e.jsonl")
    (folder / "u.jsonl").write_text("x", encoding="utf-16")
    with pytest.raises(QuestionsError, match="UTF-16"):
        read_questions(folder / "u.jsonl")
    for content, words in (("{}", "holds a dict, not an array"), ("[", "is not JSON")):
        (folder / "x.json").write_text(content)
        with pytest.raises(QuestionsError, match=words):
            read_mmau(folder / "x.json")
    for changes in ({"max_bad_fraction": 2}, {"max_seconds": 0}):
        with pytest.raises(QuestionsError, match=next(iter(changes))):
            Checks(**changes)


def test_notes_stop_nothing(folder):
    rows = [ROW | {"difficulti": "x", "choices": ["sad", "sad", "angry"]}]
    loaded = read_questions(write(folder / "q.jsonl", rows), Checks(max_bad_fraction=0))
    assert len(loaded.questions) == 1
    assert notes(loaded) == [
        "field 'difficulti' (first in row 1) is not used (did you mean 'difficulty'?)",
        "an option is there twice",
    ]


def test_a_description_stands_for_a_recording(folder):
    row = {k: v for k, v in ROW.items() if k != "audio"} | {"description": "A man."}
    path = write(folder / "q.jsonl", [row])
    (question,) = read_questions(path, UNHEARD).questions
    assert question.audio == ()
    with pytest.raises(QuestionsError, match="no audio path"):
        read_questions(path, LENIENT)


# ---------------------------------------------------------------------------------- CoTA


def test_cota_in_the_forms_it_comes_in(folder):
    rows = [
        {"audio": "a.wav", "question": "Which? (a) angry (b) sad", "response": RESPONSE},
        {"id": "x", "audio_path": "b.wav", "query": "<audio>Which?", "output": RESPONSE,
         "choices": ["angry", "sad"], "subject_id": 7, "split": "dev"},
        {"audios": ["a.wav", "c.wav"], "response": RESPONSE, "answer": "sad",
         "choices": ["angry", "sad"], "instruction": "Which?"},
        {"audio": "c.wav", "messages": [{"role": "system", "content": "Think."},
                                        {"role": "user", "content": "<audio>Which?"},
                                        {"role": "assistant", "content": RESPONSE}]},
    ]  # fmt: skip
    for name in ("q.jsonl", "q.json"):
        loaded = read_cota(write(folder / name, rows), checks=Checks(max_bad_fraction=0))
        one, two, three, four = loaded.questions
        assert (one.id, one.choices, one.reasoning) == ("q/1", (), STAGES)
        assert one.question == "Which? (a) angry (b) sad"
        assert one.answer == one.extra["response"] == "The man is sad. The answer is B."
        assert (two.id, two.question, two.answer, two.subject_id, two.split) == (
            "x", "Which?", "sad", "7", "valid")  # fmt: skip
        assert [a[-5:] for a in three.audio] == ["a.wav", "c.wav"]
        assert (three.answer, four.question) == ("sad", "Which?")
    write_questions(folder / "converted.jsonl", loaded.questions)
    assert read_questions(folder / "converted.jsonl").questions == loaded.questions


def test_cota_problems(folder):
    good = {"audio": "a.wav", "question": "Which?", "response": RESPONSE}
    turn = {"role": "user", "content": "x"}
    rows = [
        good,
        good | {"response": RESPONSE.replace("<SUMMARY>", "")},
        good | {"response": None},
        good | {"choices": ["angry"]},
        good | {"choices": ["angry", "sad"], "answer": "happy"},
        good | {"messages": [turn]},
        good | {"messages": [turn, turn]},
        good | {"messages": "x"},
    ]
    found = fatal(read_cota(write(folder / "q.jsonl", rows), checks=LENIENT))
    assert [found[row].split(":")[0] for row in range(2, 9)] == [
        "its response cannot be taken apart",
        "no response with the four stages",
        "<RESPONSE> names none of the options",
        "the answer 'happy' is not among the options",
        "'messages' lacks a turn of the user or of the assistant",
        "'messages' has more than one turn of the user",
        "'messages' is not a list of {role, content} with texts",
    ]
    assert "<SUMMARY> is missing" in found[2]


def test_cota_takes_the_options_text_before_a_letter(folder):
    """Four keys, of which the fourth is E minor: "D major" is not the option (D)."""
    keys = {"choices": ["G major", "D major", "A major", "E minor"]}

    def row(said):
        response = format_response(STAGES, said)
        return {"audio": "a.wav", "question": "Which key?", "response": response} | keys

    rows = [row("The answer is D major."), row("The answer is A or B.")]
    loaded = read_cota(write(folder / "q.jsonl", rows), checks=LENIENT)
    assert [q.answer for q in loaded.questions] == ["D major"]
    assert (
        fatal(loaded)[2] == "<RESPONSE> could name 'G major' or 'D major': 'The answer is A or B.'"
    )


# ---------------------------------------------------------------------------------- MMAU


def test_mmau_is_read_whole(shared):
    path = shared / "data/mmau/mmau-test-mini.json"
    loaded = read_mmau(path, checks=replace(UNHEARD, max_bad_fraction=0))
    assert len(loaded.questions) == 1000
    truth = json.loads(path.read_text("utf-8"))
    for question, record in zip(loaded.questions, truth, strict=True):
        assert question.id == record["id"]
        assert question.choices == tuple(choice.strip() for choice in record["choices"])
        assert question.answer == record["answer"].strip()
        assert question.sub_category == record["sub-category"]
        assert question.category in (record["category"], ", ".join(record["category"]))
        assert question.extra == {"dataset": record["dataset"]}
        assert question.audio[0].endswith(f"test-mini-audios/{record['id']}.wav")
    assert notes(loaded) == ["an option is there twice"] * 27
    with pytest.raises(QuestionsError, match="no row is left: 1000 of 1000"):
        read_mmau(path)


def test_mmau_needs_options(folder):
    row = {"id": "1", "audio_id": "a.wav", "question": "Q", "answer": "x", "choices": []}
    rows = [row, row | {"id": "2", "choices": ["x"], "category": ["One", "Two"]}]
    loaded = read_mmau(write(folder / "m.json", rows), checks=LENIENT)
    assert loaded.questions[0].category == "One, Two"
    assert (fatal(loaded), len(loaded.questions)) == ({1: "no choices"}, 1)


def test_folds_that_would_leak():
    def question(id, subject, session):
        return Question(id, ("a.wav",), "Q", (), "A", subject_id=subject, extra={"s": session})

    def group(question):
        return question.extra["s"]

    with pytest.raises(QuestionsError, match="subject 'x' is in the groups '1' and '2'"):
        leave_one_out([question("a", "x", "1"), question("b", "x", "2")], group)
    with pytest.raises(QuestionsError, match="'b' belongs to no group"):
        leave_one_out([question("a", "x", "1"), question("b", "y", "")], group)
    with pytest.raises(QuestionsError, match=r"1 group\(s\)"):
        leave_one_out([question("a", "x", "1")], group)
