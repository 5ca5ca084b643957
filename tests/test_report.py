import re

import pytest

from medalign_jax import cli
from medalign_jax.evaluate.results import Result, write_results
from medalign_jax.evaluate.stages import MINUS


def results(after, n_test=60, data="hearts"):
    values = {"before": 0.71, "after": after, "spectral statistics": 0.8,
              f"after{MINUS}before": after - 0.71}  # fmt: skip
    return [
        Result(task, data, "linear", stage, "auroc", value, value - 0.05, value + 0.05, 90, n_test)
        for task in ("murmur", "phase")
        for stage, value in values.items()
    ]


@pytest.fixture
def folders(tmp_path):
    for name, after in (("one", 0.82), ("two", 0.87)):
        (tmp_path / name).mkdir()
        write_results(tmp_path / name / "evaluation.json", results(after), {"device": name})
    return [str(tmp_path / "one"), str(tmp_path / "two")]


def test_runs_stand_side_by_side_and_what_is_the_same_stands_once(folders, tmp_path, capsys):
    out = tmp_path / "new" / "page.html"
    assert cli.main(["report", folders[0], f"later={folders[1]}", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    firsts = [re.split(r"  +", line)[0] for line in lines]
    assert firsts[:6] == ["linear: auroc", "stage", "one: after", "later: after", "before",
                          "spectral statistics"]  # fmt: skip
    assert f"one: after{MINUS}before" in firsts and f"later: after{MINUS}before" in firsts
    text = out.read_text()
    assert "Equal in every run, and shown once: before, spectral statistics." in text
    assert "Runs stand side by side" in text and "what was in force" in text


def test_one_run_keeps_its_names(folders, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert cli.main(["report", folders[0], "--out", str(out), "--title", "Hearts <1>"]) == 0
    assert "one: " not in capsys.readouterr().out
    assert "Hearts &lt;1&gt;" in out.read_text()


def test_other_recordings_are_named(folders, tmp_path, capsys):
    write_results(tmp_path / "two" / "evaluation.json", results(0.9, n_test=61), {})
    assert cli.main(["report", *folders, "--out", str(tmp_path / "p.html")]) == 0
    shown = capsys.readouterr().out
    assert "note: murmur (linear) of hearts was tested on different numbers" in shown
    assert "60 in one, 61 in two" in shown
    assert "one: before" in shown, "on other recordings it is another number"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda a, b: [a, a], "two runs are called 'one'; name them: A="),
        (lambda a, b: [f"A={a}", f"A={b}"], "name them: A=/"),
        (lambda a, b: [f"x minus y={a}"], "cannot be the name of a run"),
        (lambda a, b: [f"={a}"], "cannot be the name of a run"),
        (lambda a, b: [f"{'L' * 300}={a}"], "cannot be the name of a run"),
        (lambda a, b: [a + "/nothing"], "has no evaluation.json"),
        (lambda a, b: ["x=" + a + "/nothing"], "has no evaluation.json"),
        (lambda a, b: [a, "--out", a], "is given twice"),
    ],
)
def test_what_is_no_run_is_said(folders, tmp_path, capsys, given, said):
    arguments = ["report", *given(*folders), "--out", str(tmp_path / "p.html")]
    try:
        status = cli.main(arguments)
    except SystemExit as stop:
        status = stop.code
    assert status in (1, 2)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "p.html").exists()


def test_tasks_of_several_data_sets_are_told_apart(folders, tmp_path, capsys):
    write_results(tmp_path / "two" / "evaluation.json", results(0.9, data="lungs"), {})
    assert cli.main(["report", *folders, "--out", str(tmp_path / "p.html")]) == 0
    shown = capsys.readouterr().out
    assert "murmur (hearts)" in shown and "murmur (lungs)" in shown


def test_a_damaged_run_is_named(folders, tmp_path, capsys):
    (tmp_path / "two" / "evaluation.json").write_text("{")
    assert cli.main(["report", *folders, "--out", str(tmp_path / "p.html")]) == 1
    assert "two/evaluation.json" in capsys.readouterr().err
