"""What the command is given to measure."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medalign_jax.errors import UserError
from medalign_jax.evaluate.context import context_columns, context_of
from medalign_jax.evaluate.embedding_table import read_table
from medalign_jax.evaluate.sources import joined, rows_of, sources_of
from tests.evaluate.evaluation_rows import rows


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


def test_a_table_is_joined_by_path_or_by_name(tmp_path):
    found = rows(3)
    vectors = [[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    path = _table(
        tmp_path / "x.parquet", audio_path=["other/2.wav", "other/0.wav", "other/1.wav"],
        embedding=vectors,
    )  # fmt: skip
    np.testing.assert_array_equal(joined(str(path), found), np.float32(vectors)[[1, 2, 0]])
    with pytest.raises(UserError, match=r"no embedding of '3\.wav' \(row 4"):
        joined(str(path), rows(4))


def test_a_table_brings_rows_of_its_own(tmp_path):
    path = _table(
        tmp_path / "x.parquet", audio_path=["a", "b"], embedding=[[1.0], [2.0]],
        subject_id=["s1", ""], label=["x", ""], split=["train", "test"], age=[40, None],
    )  # fmt: skip
    table = read_table(path)
    first, second = rows_of(table, sorted(table.columns))
    assert (first.subject_id, first.label, first.targets["age"]) == ("s1", "x", "40")
    assert (second.subject_id, second.label, second.split) == ("b", None, "test")
    assert "age" not in second.targets


def test_circumstances_are_read_and_findings_are_not():
    columns = ("audio_path", "label", "diagnosis", "murmur", "Age", "sex", "Recording location")
    assert context_columns(columns, ["sex"]) == ("Age", "Recording location")
    found = context_of(rows(2, Age=lambda i: 30 + i, site=lambda i: ""), ["Age", "site"])
    assert found == {"Age": ["30", "31"]}
