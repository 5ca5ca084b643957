"""Descriptions that exist already find their questions, and every row that does not is named."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from medalign_jax.data.questions import descriptions as textualised
from medalign_jax.data.questions.descriptions import join_descriptions
from medalign_jax.data.questions.question import Checks, Question, QuestionsError
from medalign_jax.data.questions.readers import read_questions, write_questions

UNHEARD = Checks(require_audio=False)


@pytest.fixture
def questions(tmp_path):
    def ask(id, *audio):
        paths = tuple(str(tmp_path / name) for name in audio)
        return Question(id, paths, "Which?", ("x", "y"), "x", reasoning="Because.")

    return [ask("q1", "a.wav"), ask("q2", "a.wav"), ask("q3", "sub/b.wav"),
            ask("q4", "a.wav", "c.wav")]  # fmt: skip


def write(path, rows):
    """A table in the format of its suffix."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        columns = list(rows[0])
        lines = [",".join(columns), *(",".join(row[c] for c in columns) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    return path


def described(joined):
    return {question.id: question.description for question in joined.questions}


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_by_id(tmp_path, questions, suffix):
    rows = [{"id": q.id, "description": f"Text of {q.id}."} for q in reversed(questions)]
    joined = join_descriptions(questions, write(tmp_path / f"d.{suffix}", rows))
    assert described(joined) == {q.id: f"Text of {q.id}." for q in questions}
    assert [q.id for q in joined.questions] == [q.id for q in questions] and not joined.problems


@pytest.mark.parametrize("column", ["audio", "audio_path"])
def test_by_recording_all_questions_about_it_alone(tmp_path, questions, column):
    rows = [{column: "./a.wav", "description": "A."}, {column: "sub/b.wav", "description": "B."}]
    joined = join_descriptions(questions, write(tmp_path / "d.csv", rows))
    assert described(joined) == {"q1": "A.", "q2": "A.", "q3": "B."}
    assert [p.reason for p in joined.problems] == ["question 'q4' has no description"]


def test_recordings_may_lie_elsewhere(tmp_path, questions):
    (tmp_path / "tables").mkdir()
    table = write(tmp_path / "tables" / "d.csv", [{"audio": "a.wav", "description": "A."}])
    with pytest.raises(QuestionsError, match="no question is about this recording"):
        join_descriptions(questions, table)
    assert described(join_descriptions(questions, table, tmp_path)) == {"q1": "A.", "q2": "A."}


def test_every_bad_row_is_named(tmp_path, questions):
    rows = [
        {"id": "q1", "description": "A."},
        {"id": "q2", "description": "N/A"},
        {"id": "q33", "description": "C."},
        {"id": "", "audio": "", "description": "D."},
        {"id": "q1", "description": "Another."},
        {"id": "q1", "description": "A."},
        {"id": "", "audio": "c.wav", "description": "E."},
        {"id": "q3", "description": ["F."]},
    ]
    joined = join_descriptions(questions, write(tmp_path / "d.jsonl", rows), max_bad_fraction=1)
    assert described(joined) == {"q1": "A."}
    reasons = {problem.row: problem.reason for problem in joined.problems if problem.row}
    assert reasons == {
        2: "no description",
        3: "no question has the id 'q33' (did you mean 'q3'?)",
        4: "neither an id nor an audio path",
        5: "question 'q1' has another description in row 1",
        7: "no question is about this recording alone",
        8: "column 'description' holds a list, not a text or number",
    }
    with pytest.raises(QuestionsError, match="6 of 8 rows") as error:
        join_descriptions(questions, tmp_path / "d.jsonl", max_bad_fraction=0.7)
    assert len(error.value.problems) == 6 + 3


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"id": "q1", "caption": "A."}], "no column 'description'"),
        ([{"name": "q1", "description": "A."}], "neither a column 'id' nor 'audio_path'"),
    ],
)
def test_a_table_without_the_columns_is_refused(tmp_path, questions, rows, words):
    with pytest.raises(QuestionsError, match=words):
        join_descriptions(questions, write(tmp_path / "d.csv", rows))


def test_the_command_writes_questions(tmp_path, questions, capsys):
    write_questions(tmp_path / "q.jsonl", questions)
    rows = [{"id": q.id, "description": "A."} for q in questions[:3]]
    write(tmp_path / "d.csv", rows)
    out = tmp_path / "out" / "t.jsonl"
    arguments = [f"--questions={tmp_path / 'q.jsonl'}", f"--descriptions={tmp_path / 'd.csv'}"]
    assert textualised.main([*arguments, f"--out={out}"]) == 0
    said = capsys.readouterr().out
    assert "3 of 4 questions" in said and "question 'q4' has no description" in said
    found = read_questions(out, UNHEARD).questions
    assert [q.id for q in found] == ["q1", "q2", "q3"]
    assert found[2].audio == questions[2].audio and found[2].reasoning == "Because."
    assert {q.description for q in found} == {"A."}


def test_the_command_says_in_a_line_what_is_wrong(tmp_path, questions, capsys):
    write_questions(tmp_path / "q.jsonl", questions)
    many = [{"id": f"z{n}", "description": "A."} for n in range(50)]
    write(tmp_path / "d.csv", many)
    arguments = [f"--questions={tmp_path / 'q.jsonl'}", f"--descriptions={tmp_path / 'd.csv'}"]
    assert textualised.main([*arguments, f"--out={tmp_path / 't.jsonl'}"]) == 1
    said = capsys.readouterr().err
    assert "error: " in said and "50 of 50 rows" in said and "Traceback" not in said
    listing = tmp_path / "t.jsonl.unusable_rows.jsonl"
    assert len(listing.read_text().splitlines()) == 54 and not (tmp_path / "t.jsonl").exists()
