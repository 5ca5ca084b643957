import json
import math

import pytest

from medalign_jax.evaluate import results as module
from medalign_jax.evaluate.results import Result, ResultsError, read_results, write_results
from medalign_jax.evaluate.statistics import Interval

FIELDS = {
    "task": "diagnosis",
    "dataset": "heart_sounds",
    "kind": "probe_10_labels",
    "stage": "before",
    "metric": "auroc",
    "n_train": 40,
    "n_test": 149,
    "seeds": range(3),
}


def result(**changes):
    values = {"value": 0.9, "ci_low": 0.8, "ci_high": 0.95}
    return Result(**(FIELDS | values | changes))


def test_written_and_read_back(tmp_path):
    path = tmp_path / "deep" / "evaluation.json"
    interval = Interval(0.92, 0.9, 0.94, 0.95, 2000)
    written = [result(), Result.of(interval, **(FIELDS | {"stage": "after", "notes": "é"}))]
    write_results(path, written, {"git_commit": "abc"})
    content = json.loads(path.read_text(encoding="utf-8"))
    assert set(content) == {"provenance", "results"}
    assert list(content["results"][0]) == [
        "task", "dataset", "kind", "stage", "metric", "value", "ci_low", "ci_high",
        "n_train", "n_test", "seeds", "notes",
    ]  # fmt: skip
    assert content["results"][1]["ci_high"] == 0.94
    assert read_results(path) == (written, {"git_commit": "abc"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value": math.nan}, "value is nan.*left out and named"),
        ({"ci_low": -math.inf}, "ci_low is -inf"),
        ({"value": None}, "not a number"),
        ({"value": True}, "not a number"),
        ({"ci_low": None}, "one end of the interval"),
        ({"ci_low": None, "ci_high": None}, "say why in notes"),
        ({"ci_low": 0.96}, "0.96 > 0.95"),
        ({"stage": ""}, "stage is empty"),
        ({"n_test": 0}, "n_test 0"),
    ],
)
def test_bad_values_are_refused_with_the_reason(changes, message):
    with pytest.raises(ResultsError, match=message):
        result(**changes)


def test_no_interval_is_allowed_with_a_reason():
    assert result(ci_low=None, ci_high=None, notes="one subject per class").ci_low is None


def test_same_key_twice_is_refused(tmp_path):
    with pytest.raises(ResultsError, match="two results diagnosis/heart_sounds"):
        write_results(tmp_path / "e.json", [result(), result(value=0.91)], {})


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "evaluation.json"
    write_results(path, [result()], {})
    before = path.read_bytes()
    with pytest.raises(ResultsError, match="provenance cannot be written"):
        write_results(path, [result()], {"a": object()})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(module.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_results(path, [result(value=0.1, ci_low=0.0)], {})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["evaluation.json"]


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "evaluation.json"
    with pytest.raises(ResultsError, match="cannot read results"):
        read_results(path)
    path.write_text("[]")
    with pytest.raises(ResultsError, match='"provenance" and "results"'):
        read_results(path)
    path.write_text('{"provenance": {}, "results": [{"task": "x", "extra": 1}]}')
    with pytest.raises(ResultsError, match="result 0 lacks or has unknown fields"):
        read_results(path)
