"""What the command is given to measure."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medalign_jax.core.errors import UserError
from medalign_jax.evaluate.context import check_metadata, context_columns, context_of
from medalign_jax.evaluate.embedding_table import read_table
from medalign_jax.evaluate.sources import joined, read_joinable, rows_of, sources_of
from tests.evaluate.evaluation_rows import row, rows


def test_forms_of_a_source(tmp_path):
    first, second, third, fourth = sources_of(
        [str(tmp_path), "whisper=openai/whisper-base",
         f"whisper={tmp_path}#pooling=mean_std,layer=3", str(tmp_path)]
    )  # fmt: skip
    assert (first.encoder, first.path) == (None, str(tmp_path))
    assert (second.name, second.encoder) == ("whisper-base", "whisper")
    assert third.options == {"pooling": "mean_std", "layer": 3}
    assert third.name.endswith("(mean_std, layer 3)")
    assert fourth.name == f"{first.name} 2"


def test_an_export_is_named_by_its_run(tmp_path):
    (tmp_path / "mine" / "export").mkdir(parents=True)
    table = tmp_path / "theirs.pq"
    table.touch()
    found = sources_of([str(tmp_path / "mine" / "export"), str(tmp_path / "mine"), str(table)])
    assert [source.name for source in found] == ["mine", "mine 2", "theirs"]


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (("p/w/export", "q/w/export", "w 2"), ("w", "w 3", "w 2")),
        (("w 2", "p/w/export", "q/w/export", "q/w"), ("w 2", "w", "w 3", "w 4")),
        (("w 2", "w 2", "p/w", "q/w"), ("w 2", "w 2 2", "w", "w 3")),
    ],
)
def test_no_two_sources_have_the_same_name(tmp_path, given, names):
    for folder in ("p/w/export", "q/w/export", "w 2"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    found = sources_of([str(tmp_path / path) for path in given])
    assert tuple(source.name for source in found) == names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("whsper=x/y", "did you mean 'whisper'"),
        ("./nothing/there", "nothing at './nothing/there'"),
        ("whisper=a/b#pool=mean", "unknown option 'pool'"),
        ("whisper=a/b#pooling=max", "unknown pooling 'max'"),
        ("whisper=a/b#layer=last", "layer is a number"),
    ],
)
def test_a_source_that_is_none_is_refused_at_once(text, message):
    with pytest.raises(UserError, match=message):
        sources_of([text])


def _table(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def join(path, found):
    return joined(str(path), read_joinable(str(path)), found)


def test_a_table_is_joined_by_path_or_by_name(tmp_path):
    found = rows(3)
    vectors = [[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    path = _table(
        tmp_path / "x.parquet", audio_path=["other/2.wav", "other/0.wav", "other/1.wav"],
        embedding=vectors,
    )  # fmt: skip
    np.testing.assert_array_equal(join(path, found), np.float32(vectors)[[1, 2, 0]])
    with pytest.raises(UserError, match=r"no embedding of '3\.wav' \(row 4"):
        join(path, rows(4))


def test_two_embeddings_of_one_recording_are_refused_by_row(tmp_path):
    path = _table(
        tmp_path / "x.parquet", audio_path=["0.wav", "1.wav", "./0.wav"],
        embedding=[[1.0], [2.0], [3.0]],
    )  # fmt: skip
    with pytest.raises(UserError, match=r"two embeddings of '\./0\.wav' \(its rows 1 and 3\)"):
        join(path, rows(2))


def test_a_name_that_two_recordings_have_joins_neither(tmp_path):
    path = _table(
        tmp_path / "x.parquet", audio_path=["a/1.wav", "a/2.wav"], embedding=[[1.0], [2.0]]
    )
    found = [row(0, audio_path="a/1.wav"), row(1, audio_path="b/1.wav")]
    with pytest.raises(UserError, match=r"a file named '1\.wav', and the manifest's rows 1 and 2"):
        join(path, found)
    both = [row(0, audio_path="a/1.wav"), row(1, audio_path="c/2.wav")]
    np.testing.assert_array_equal(join(path, both), np.float32([[1], [2]]))


def test_a_table_brings_rows_of_its_own(tmp_path):
    path = _table(
        tmp_path / "x.parquet", audio_path=["", "b", "c"], embedding=[[1.0], None, [2.0]],
        **{"Subject ID": ["s1", "s2", ""]}, label=["x", "y", ""], split=["Train", "val", "Test"],
        age=[40, None, None],
    )  # fmt: skip
    (first, second), problems = rows_of(str(path), read_table(path), ["age"])
    assert (first.row, first.audio_path, first.names_subject) == (1, "row 1", True)
    assert (first.subject_id, first.label, first.targets["age"]) == ("s1", "x", "40")
    assert (second.row, second.label, second.split) == (3, None, "test")
    assert (first.split, second.subject_id, second.names_subject) == ("train", "c", False)
    assert "age" not in second.targets
    assert (2, "has no embedding") in [(p.row, p.reason) for p in problems]


def test_a_column_that_the_table_lacks_is_named(tmp_path):
    path = _table(tmp_path / "x.parquet", embedding=[[1.0]], label=["x"], device=["d"])
    with pytest.raises(UserError, match=r"no target column 'devise' \(did you mean 'device'"):
        rows_of(str(path), read_table(path), ["devise"])


def test_a_table_called_as_a_baseline_keeps_apart(tmp_path):
    names = ("metadata.parquet", "spectral statistics.pq", "a minus b.parquet",
             "w, random weights.pq")  # fmt: skip
    for name in names:
        (tmp_path / name).touch()
    found = [source.name for source in sources_of([str(tmp_path / name) for name in names])]
    expected = ["metadata (given)", "spectral statistics (given)", "a-minus-b"]
    assert found == [*expected, "w, random weights (given)"]


@pytest.mark.parametrize(
    ("column", "tasks", "message"),
    [
        ("label", ("age", "label"), "'label', which is asked for"),
        ("Heart Rate", ("heart_rate:regression",), "'Heart Rate', which is asked for"),
        ("age_group", ("label", "age"), "'age_group', which gives away the task 'age'"),
        ("weight", ("bmi",), "'weight', which gives away the task 'bmi'"),
    ],
)
def test_the_metadata_baseline_may_not_read_answers(column, tasks, message):
    with pytest.raises(UserError, match=message):
        check_metadata(("device", column), tasks)
    check_metadata((column,), ("murmur",))


def test_circumstances_are_read_and_findings_are_not():
    columns = ("audio_path", "label", "diagnosis", "murmur", "Age", "sex", "Recording location")
    assert context_columns(columns, ["sex"]) == ("Age", "Recording location")
    assert context_columns(columns, ["age:regression"]) == ("sex", "Recording location")
    derived = ("age_group", "weight", "height", "bmi", "Gender")
    assert context_columns(derived, ["age", "bmi", "Sex"]) == ()
    assert context_columns(derived, ["weight"]) == ("age_group", "height", "Gender")
    found = context_of(rows(2, Age=lambda i: 30 + i, site=lambda i: ""), ["Age", "site"])
    assert found == {"Age": ["30", "31"]}
