"""Results laid out as tables, text and CSV."""

import csv
import io

from medalign_jax.evaluate.results import Result
from medalign_jax.evaluate.tables import csv_of, tables_of, text_of


def result(task, stage, value, kind="linear", metric="auroc", low=None, high=None, **fields):
    low, high = (value - 0.1, value + 0.1) if low is None else (low, high)
    return Result(task, "toy", kind, stage, metric, value, low, high, 60, 40, **fields)


RESULTS = [
    result("AS", "before", 0.7),
    result("AS", "after", 0.8),
    result("AS", "after minus before", 0.1, low=0.02, high=0.18, notes="p 0.01"),
    result("MR", "before", 0.6),
    Result("MR", "toy", "linear", "after", "auroc", 0.65, None, None, 60, 40, notes="too few"),
    result("AS", "before", 0.75, metric="accuracy"),
    result("audio_to_report", "after", 0.5, kind="retrieval", metric="recall@1"),
    result("audio_to_report", "after", 0.9, kind="retrieval", metric="recall@5"),
]


def test_a_stage_a_row_and_a_task_a_column():
    values, differences, accuracy, retrieval = tables_of(RESULTS)
    assert values.head == ("stage", "AS", "MR")
    assert values.rows == (
        ("before", "0.700 (0.600 to 0.800)", "0.600 (0.500 to 0.700)"),
        ("after", "0.800 (0.700 to 0.900)", "0.650 (no interval)"),
    )
    assert differences.rows == (("after minus before", "+0.100 (+0.020 to +0.180)"),)
    assert accuracy.caption == "linear: accuracy"
    assert retrieval.head == ("stage", "audio to report recall@1", "audio to report recall@5")


def test_what_a_number_would_mislead_without_stands_below_it():
    few = "no interval: only 1 subject of class 'a'; an interval needs 5"
    slow = "the chosen epoch is the last of 64: not converged (4 of 5 fits)"
    rows = [
        Result("AS", "toy", "linear", stage, "auroc", 0.6, None, None, 60, 40,
               notes=f"{few}; p 0.3" + (f"; {slow}" if stage == "after" else ""))
        for stage in ("before", "after")
    ]  # fmt: skip
    (table,) = tables_of(rows)
    assert table.notes == (few.partition("; ")[0], f"after: {slow}")
    assert text_of([table]).splitlines()[-1] == f"  after: {slow}"


def test_text_is_aligned():
    lines = text_of(tables_of(RESULTS)[:1]).splitlines()
    assert lines[0] == "linear: auroc"
    assert [line.index("0.") for line in lines[2:]] == [lines[1].index("AS")] * 2


def test_csv_has_one_line_a_result():
    lines = list(csv.DictReader(io.StringIO(csv_of(RESULTS))))
    assert len(lines) == len(RESULTS)
    assert lines[2]["stage"] == "after minus before" and lines[2]["ci_low"] == "0.02"
    assert lines[4]["ci_low"] == "" and lines[4]["notes"] == "too few"
    assert lines[0]["seeds"] == "1"
