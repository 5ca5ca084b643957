"""What is told beside the results: equal embeddings, subjects that may be one, unnamed subjects."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medalign_jax.evaluate.leaks import describe_equals, describe_subjects, rows_of_equals
from medalign_jax.evaluate.stages import Settings
from medalign_jax.evaluate.suite import Options, Suite
from medalign_jax.page.outline import limits_of
from medalign_jax.runs.evaluate import main
from tests.evaluate.evaluation_rows import row

COUNT = 48


def suite_of(found, folds=0):
    return Suite.of(found, Options(("label",), folds, settings=Settings(per_class=0)), "toy")


def halves(first, second):
    return [first if i < COUNT // 2 else second for i in range(COUNT)]


def split_rows(subject_of):
    """Rows of which the second half is tested."""
    return [
        row(
            i,
            subject_id=subject_of(i),
            split="train" if i < COUNT // 2 else "test",
            label="ab"[i % 2],
        )
        for i in range(COUNT)
    ]


def embeddings():
    return np.random.default_rng(0).standard_normal((COUNT, 5)).astype(np.float32)


@pytest.mark.parametrize("folds", [0, 4])
def test_subjects_in_two_spellings_across_a_test_are_told(folds):
    found = split_rows(lambda i: f"P 0{i}" if i < COUNT // 2 else f"p{i - COUNT // 2}.0")
    (told,) = describe_subjects(found, suite_of(found, folds))
    assert "in different " + ("folds" if folds else "splits") in told
    assert "'P 00' and 'p0.0'" in told or folds
    same = split_rows(lambda i: f"s{i}")
    assert describe_subjects(same, suite_of(same, folds)) == ()


def test_every_deal_of_the_folds_is_looked_at():
    """Two spellings that stand together in the first deal, and apart in a later one."""
    found = split_rows(lambda i: {0: "S 1", 1: "s1"}.get(i, f"p{i}"))

    def told(repeats, seed):
        settings = Settings(per_class=0)
        options = Options(("label",), 3, repeats, seed, settings=settings)
        return describe_subjects(found, Suite.of(found, options, "toy"))

    together = next(seed for seed in range(20) if not told(1, seed))
    assert told(5, together)


def test_equal_embeddings_across_a_test_are_told():
    found, vectors = split_rows(lambda i: f"s{i}"), embeddings()
    assert (
        describe_equals(found, vectors, suite_of(found))[1]
        == "No two of the 48 embeddings are equal."
    )
    vectors[-6:] = vectors[:6]
    nobody, repeated, told = describe_equals(found, vectors, suite_of(found))
    assert nobody.startswith("Nobody looked for near-copies")
    assert repeated == "12 of the 48 embeddings equal another one."
    assert told.startswith("6 test recordings have the very embedding of one") and "row 43" in told
    within = embeddings()
    within[-6:-3] = within[-3:]
    assert "None equals one on the other side" in describe_equals(found, within, suite_of(found))[2]


def test_equal_embeddings_of_nobody_named_are_one_subjects():
    found, vectors = split_rows(lambda i: f"{i}.wav"), embeddings()
    vectors[1] = vectors[0]
    subjects = [r.subject_id for r in rows_of_equals(found, vectors)]
    assert subjects[0] == subjects[1] and len(set(subjects)) == COUNT - 1
    assert rows_of_equals(found, vectors, "subject") == found


def test_unnamed_subjects_are_told_whatever_copies_there_are():
    found, vectors = split_rows(lambda i: f"{i}.wav"), embeddings()
    vectors[1] = vectors[0]
    joined = rows_of_equals(found, vectors)
    assert "48 of 48 recordings name no subject" in limits_of(suite_of(joined), joined)[1]
    pairs = split_rows(lambda i: f"s{i // 2}")
    assert len(limits_of(suite_of(pairs), pairs)) == 1


def test_that_intervals_are_widened_is_told_where_there_are_folds():
    found = split_rows(lambda i: f"s{i // 2}")
    told = [any("Nadeau" in text for text in limits_of(suite_of(found, folds), found))
            for folds in (0, 4)]  # fmt: skip
    assert told == [False, True]


def run_table(tmp_path, *more, **columns):
    """The exit status of a table without a manifest, whose labels can be heard."""
    labels = ["ab"[i % 2] for i in range(COUNT)]
    vectors = embeddings() + np.array([[i % 2] for i in range(COUNT)])
    table = {"embedding": vectors.tolist(), "label": labels} | columns
    pq.write_table(pa.table(table), tmp_path / "metadata.parquet")
    given = ["--embeddings", str(tmp_path / "metadata.parquet"), "--out", str(tmp_path / "out")]
    return main([*given, "--tasks", "label", *more])


def test_a_table_is_checked_as_a_manifest_is(tmp_path, capsys):
    leak = [f"s{i % 16}" for i in range(COUNT)]
    assert run_table(tmp_path, subject_id=leak, split=halves("train", "test")) == 1
    assert "subject 's0' is in more than one split: train (row 1), test" in capsys.readouterr().err
    own = [f"s{i}" for i in range(COUNT)]
    assert run_table(tmp_path, subject_id=own, split=halves("train", "tset")) == 1
    assert "unknown split 'tset' (did you mean 'test'?)" in capsys.readouterr().err
    assert run_table(tmp_path, "--metadata", "nosuch", subject_id=own,
                     split=halves("train", "test")) == 1  # fmt: skip
    assert "no target column 'nosuch'" in capsys.readouterr().err


def test_a_tables_findings_stand_beside_its_results(tmp_path, capsys):
    subjects = [f"{'Ss'[i // 24]}{i % 24}" for i in range(COUNT)]
    sexes = ["fm"[i % 3 % 2] for i in range(COUNT)]
    assert run_table(tmp_path, Subject_ID=subjects, split=halves("Train", "Testing"),
                     sex=sexes) == 0  # fmt: skip
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    (told,) = content["provenance"]["alike_subjects"]
    assert "'S0' and 's0'" in told and content["provenance"]["near_copies"][0].startswith("Nobody")
    page = (tmp_path / "out" / "report.html").read_text()
    screen = capsys.readouterr().out
    assert "Subjects that may be one" in page and "Subjects that may be one" in screen
    stages = {r["stage"] for r in content["results"]}
    assert {"metadata (given)", "metadata"} <= stages
    assert {r["n_test"] for r in content["results"]} == {COUNT // 2}
    assert (tmp_path / "out" / "unusable_rows.jsonl").exists()
