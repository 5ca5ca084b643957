"""Scores, tables and page of a distillation, from made-up answers counted by hand."""

import dataclasses
import json
import re

import numpy as np
import pytest
import soundfile
from ml_collections import ConfigDict

from configs.distill import ARMS as PAPER_ARMS
from configs.distill import get_config
from medalign_jax.core.errors import UserError
from medalign_jax.data.questions.question import Question
from medalign_jax.evaluate.results import read_results
from medalign_jax.runs.distill import examples as distill_examples
from medalign_jax.runs.distill import page as distill_page
from medalign_jax.runs.distill import results as distill_results
from medalign_jax.runs.distill import tables as distill_tables
from medalign_jax.runs.distill.arms import QuestionTask, Setting
from tests.page.test_report import HOSTILE, Page

SEEDS = (3, 5)
COPIES = 4  # of every pattern of six answers: subjects enough for an interval
ARMS = {
    "sft": {"text_weight": 0.0, "acoustic_weight": 0.0},
    "layers": {"acoustic_weight": 0.0},
    "layers | all": {},
}


def _config(arms=ARMS, seeds=SEEDS) -> ConfigDict:
    config = get_config("demo")
    config.arms = ConfigDict({name: dict(changes) for name, changes in arms.items()})
    config.seeds = seeds
    return config


def _question(folder, n, task="", text="Which one?", **more):
    path = folder / f"r{n}.wav"
    if not path.exists():
        soundfile.write(path, np.sin(np.arange(1600) * 0.1 * (n + 1)) * 0.3, 8000)
    fields = {"choices": ("left", "right"), "answer": ("left", "right")[n % 2], "task": task}
    return Question(f"{task}{n}", (str(path),), text, subject_id=f"p{n}", **(fields | more))


def _said(questions, right):
    """Responses of which those in `right`, over and over, are right; "?" gives none."""
    right = right * (len(questions) // len(right))
    other = {"left": "right", "right": "left"}
    return {
        q.id: f"<THINK>\nso\n</THINK>\n<RESPONSE>\n{q.answer if ok == '1' else other[q.answer]}\n"
        for q, ok in zip(questions, right, strict=True)
        if ok != "?"
    }


@pytest.fixture
def setting(tmp_path):
    asked = tuple(
        _question(tmp_path, n, "sound" if n % 6 < 4 else "music") for n in range(6 * COPIES)
    )
    heard = tuple(_question(tmp_path, n, "emotion") for n in range(6 * COPIES))
    tasks = (
        QuestionTask("quiz", "made up", asked, "generate"),
        QuestionTask("emotion", "voices", heard, "rank", classes=True),
    )
    return Setting(_config(), tmp_path, None, None, None, asked[:2], (), tasks)


@pytest.fixture
def found(setting):
    quiz, emotion = (task.questions for task in setting.tasks)

    def run(first, second):
        return {"quiz": _said(quiz, first), "emotion": _said(emotion, second)}

    return {
        "before": [run("100000", "111111")],
        "sft": [run("110000", "111110"), run("1100?0", "111110")],
        "layers": [run("111100", "100000"), run("111110", "110000")],
        "layers | all": [run("111110", "111100"), run("111111", "111110")],
    }


def _by_key(results):
    return {(r.task, r.stage, r.metric): r for r in results}


def test_scores_and_differences_are_those_counted_by_hand(setting, found):
    by_key = _by_key(distill_results.results(setting, found))
    quiz = {s: by_key["quiz", s, "accuracy"].value for s in found}
    assert quiz == pytest.approx(
        {"before": 1 / 6, "sft": 2 / 6, "layers": 4.5 / 6, "layers | all": 5.5 / 6}
    )
    assert by_key["quiz: task music", "layers", "accuracy"].value == pytest.approx(0.25)
    emotion = by_key["emotion", "layers", "unweighted_accuracy"]
    # Class left has places 0, 2, 4; right has 1, 3, 5. Seeds: (1/3 + 0)/2 and (1/3 + 1/3)/2.
    assert emotion.value == pytest.approx((1 / 6 + 1 / 3) / 2)
    assert (emotion.kind, emotion.seeds, emotion.n_train) == ("ranking", SEEDS, 2)
    change = by_key["quiz", "layers minus before", "accuracy"]
    assert change.value == pytest.approx(4.5 / 6 - 1 / 6)
    assert "by seed 3: +0.500, 5: +0.667" in change.notes
    assert "2 seeds" in change.notes
    assert by_key["quiz", "before", "accuracy"].n_train == 0
    assert "4 of 48 answers are missing" in by_key["quiz", "sft", "accuracy"].notes
    assert "by seed 3: 0.667, 5: 0.833" in by_key["quiz", "layers", "accuracy"].notes


def test_intervals_hold_what_they_say(setting, found):
    """Identical stages differ by nothing; seeds widen an interval, subjects pair it."""
    same = found | {"layers": found["sft"]}
    change = _by_key(distill_results.results(setting, same))["quiz", "layers minus sft", "accuracy"]
    assert change.value == 0 and change.ci_low < 0 < change.ci_high
    # Two seeds that differ on every question: without resampled seeds the interval is a point.
    apart = found | {
        "layers": [
            found["before"][0],
            found["before"][0] | {"quiz": _said(setting.tasks[0].questions, "011111")},
        ]
    }
    change = _by_key(distill_results.results(setting, apart))[
        "quiz", "layers minus before", "accuracy"
    ]
    assert change.ci_high - change.ci_low > 0.5


def test_compared_are_before_the_baseline_and_arms_that_differ_in_one_setting(setting):
    stages = ("before", *ARMS)
    assert distill_results.comparisons(setting.config, stages) == [
        ("before", "sft"), ("before", "layers"), ("before", "layers | all"),
        ("sft", "layers"), ("sft", "layers | all"), ("layers", "layers | all"),
    ]  # fmt: skip
    arms, paper = PAPER_ARMS, get_config("ablations")
    assert distill_results.ordered(paper, (*sorted(arms), "before")) == [
        "before", "sft", "top", "layers_k1", "layers_k3", "layers_k7", "layers_k14",
        "acoustic_001", "acoustic_005", "kl", "acoustic_010",
    ]  # fmt: skip
    pairs = distill_results.comparisons(paper, tuple(arms))
    assert ("layers_k7", "acoustic_005") in pairs
    assert ("layers_k1", "layers_k14") in pairs
    assert ("acoustic_005", "kl") in pairs
    assert ("top", "acoustic_010") not in pairs
    assert len(set(map(frozenset, pairs))) == len(pairs)
    assert distill_results.main_arm(paper, tuple(arms)) == "acoustic_005"
    # The term that an arm lacks makes it the earlier one, whatever the order of the config.
    turned = _config({"all": {}, "no acoustic": {"acoustic_weight": 0.0}, "sft": ARMS["sft"]})
    assert distill_results.comparisons(turned, ("all", "no acoustic", "sft")) == [
        ("sft", "all"), ("sft", "no acoustic"), ("no acoustic", "all"),
    ]  # fmt: skip


def test_table_has_stages_down_and_tasks_across(setting, found):
    results = distill_results.results(setting, found)
    lines = distill_tables.ablation_table(results).splitlines()
    tables = [line for line in lines if line.startswith("|")]
    cells = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in tables]
    assert cells[0] == ["Stage", "quiz music", "quiz sound", "quiz average",
                        "emotion unweighted accuracy"]  # fmt: skip
    assert [row[0] for row in cells[2:6]] == ["before", "sft", "layers", r"layers \| all"]
    assert [re.match(r"[\d.]+", cell)[0] for cell in cells[4][1:]] == ["25.0", "100.0", "75.0",
                                                                      "25.0"]  # fmt: skip
    assert cells[6][0] == "Difference"
    change = next(row for row in cells if row[0] == "layers minus before")
    assert change[3].startswith("↑ +58.3 [+")
    assert change[4].startswith("↓ -75.0 [-")
    assert {len(row) for row in cells} == {5}


def test_sub_categories_have_a_table_of_their_own(setting, found):
    asked = tuple(
        dataclasses.replace(q, sub_category=("fine", "fi|ner")[n % 2], difficulty="hard")
        for n, q in enumerate(setting.tasks[0].questions)
    )
    tasks = (dataclasses.replace(setting.tasks[0], questions=asked),)
    results = distill_results.results(dataclasses.replace(setting, tasks=tasks), found)
    names = {r.task for r in results}
    assert "quiz: sub-category fine" in names
    assert "quiz: difficulty hard" not in names, "all questions are not a group"
    table = distill_tables.ablation_table(results)
    assert r"| sub-category fi\|ner | 12 | 0.0" in table


def test_answers_that_do_not_fit_are_refused(setting, found):
    with pytest.raises(UserError, match="no answers to emotion"):
        distill_results.results(setting, found | {"before": [{"quiz": {}}]})
    with pytest.raises(UserError, match="1 runs, not of 2"):
        distill_results.results(setting, found | {"sft": found["sft"][:1]})
    with pytest.raises(UserError, match="2 runs, not of 1"):
        distill_results.results(setting, found | {"before": found["sft"]})
    with pytest.raises(UserError, match="nothing was evaluated"):
        distill_results.results(setting, {})
    stray = [{"quiz": {"unknown": "left"}, "emotion": {}}]
    with pytest.raises(UserError, match="belong to no question"):
        distill_results.results(setting, found | {"before": stray})


def _one_subject(setting):
    tasks = tuple(
        dataclasses.replace(
            t, questions=tuple(dataclasses.replace(q, subject_id="p") for q in t.questions)
        )
        for t in setting.tasks
    )
    return dataclasses.replace(setting, tasks=tasks)


def test_one_subject_gives_no_interval_and_no_claim(setting, found):
    alone = _one_subject(setting)
    results = distill_results.results(alone, found)
    assert all(r.ci_low is None and "one subject alone" in r.notes for r in results)
    text = " ".join(distill_page.headline(alone, tuple(found), results))
    assert "nothing can be concluded" in text
    assert not re.search("rose|fell", text)
    assert "+58.3 (no interval)" in distill_tables.ablation_table(results)


def test_headline_tells_the_arms_that_matter(setting, found):
    """Of two seeds that agree: two that differ say next to nothing of others."""
    unclear = distill_results.results(setting, found)
    told = distill_page.headline(setting, tuple(found), unclear)
    assert "no clear change in quiz accuracy" in told[0]
    found = {stage: runs[:1] * len(runs) for stage, runs in found.items()}
    results = distill_results.results(setting, found)
    lines = distill_page.headline(setting, tuple(found), results)
    assert [line.split(":")[0] for line in lines] == [
        "layers | all against before", "layers | all against sft", "layers | all against layers",
        "layers against before", "layers against sft", "sft against before",
    ]  # fmt: skip
    assert "quiz accuracy rose from 16.7 % to 83.3 % (+" in lines[0]
    assert "emotion unweighted accuracy fell from 83.3 % to 66.7 % (-" in lines[1]
    assert "emotion unweighted accuracy rose" in lines[2]
    assert "emotion unweighted accuracy fell from 100.0 % to 16.7 % (-" in lines[3]


def test_one_run_is_before_and_after(setting, found):
    config = _config({}, (0,))
    config.arms = ConfigDict(convert_dict=True)
    alone = dataclasses.replace(setting, config=config)
    stages = {"before": found["before"], "after": found["layers"][:1]}
    results = distill_results.results(alone, stages)
    change = _by_key(results)["quiz", "after minus before", "accuracy"]
    assert change.value == pytest.approx(0.5)
    assert "one seed" in change.notes
    assert distill_page.headline(alone, tuple(stages), results)[0].startswith(
        "After distillation: "
    )


def test_examples_are_those_on_which_stages_differ(setting, found):
    shown = distill_examples.examples(setting, found)
    quiz = [e for e in shown if e.task == "quiz"]
    assert len(quiz) == 4
    for example in shown:
        assert len({r.right for r in example.responses}) == 2
    sft = quiz[0].responses[1]
    assert (sft.stage, sft.answer, sft.right, sft.note) == ("sft", "right", True,
                                                            "2 of 2 seeds right")  # fmt: skip
    assert sft.text.startswith("<THINK>")
    assert quiz[0].sounds[0].waveform.shape == (3200,)


@pytest.fixture
def written(setting, found, capsys):
    """The page of hostile questions, with a recording that is gone and an answer that is not."""
    odd = _question(setting.workdir, 0, "sound", HOSTILE, choices=(HOSTILE, "left"), answer="left")
    gone = dataclasses.replace(setting.tasks[0].questions[1], audio=("/gone/<b>.wav",))
    asked = (odd, gone, *setting.tasks[0].questions[2:])
    tasks = (dataclasses.replace(setting.tasks[0], questions=asked), setting.tasks[1])
    found["sft"][0]["quiz"][odd.id] = HOSTILE
    for arm in ARMS:
        for seed in SEEDS:
            folder = distill_page.arm_folder(setting.workdir, arm, seed)
            folder.mkdir(parents=True)
            lines = [{"step": s, "loss": 2.0 / s + seed, "cross_entropy": "nan"} for s in (1, 2, 3)]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / "metrics.jsonl").write_text(text)
            problem = {"row": 7, "audio_path": "q7", "reason": HOSTILE, "fatal": True}
            (folder / "unusable_questions.jsonl").write_text(json.dumps(problem) + "\n")
    note = {"row": 2, "audio_path": "b", "reason": "a note", "fatal": False}
    bad = {"row": None, "audio_path": "m.wav", "reason": "is empty", "fatal": True}
    listed = "".join(json.dumps(problem) + "\n" for problem in (note, bad))
    (setting.workdir / "unusable_mmau.jsonl").write_text(listed)
    (setting.workdir / "config.json").write_text(
        json.dumps({"config": {}, "provenance": {"devices": "d", "git_commit": "c",
                                                 "packages": {}, "student_weights": "s"}})
    )  # fmt: skip
    setting = dataclasses.replace(setting, tasks=tasks)
    distill_page.write(setting, found)
    return setting, capsys.readouterr().out


def test_page_shows_everything_and_nothing_becomes_markup(written):
    setting, _ = written
    text = (setting.workdir / "report.html").read_text()
    page = Page(text)
    assert text.count("<script") == 3, "the data, Plotly and our own"
    assert not re.search("<b>|evil.example/a>", text)
    shown = " ".join(page.texts)
    for words in ("✓ right", "✗ wrong", "no such file", "whole response", "quiz average", "Limits",
                  "<script>alert", "paired differences", "2 rows of the data"):  # fmt: skip
        assert words in shown, words
    assert "mmau: is empty" in shown
    assert "a note" not in shown
    assert all(each["src"].startswith("data:audio/mpeg") for each in page.find("audio"))
    assert len(page.find("audio")) >= 6
    for tag, attributes in page.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("data:", "#")), (tag, attributes)


def test_files_of_a_run(written):
    setting, printed = written
    results, provenance = read_results(setting.workdir / "evaluation.json")
    assert provenance["student_weights"] == "s"
    assert (setting.workdir / "ablations.md").read_text().startswith("Score in %")
    assert (setting.workdir / "ablations.md").read_text().strip() in printed
    assert {r.stage for r in results} >= {"before", "layers | all minus layers"}


def test_curves_are_means_over_seeds(written):
    setting, _ = written
    (chart,) = [c for c in distill_page._curves(setting, ("before", *ARMS)) if c.title == "Loss"]
    assert [line.name for line in chart.series] == list(ARMS)
    np.testing.assert_allclose(chart.series[0].y, [6.0, 5.0, 4 + 2 / 3])


@pytest.mark.parametrize("line", [b'{"row": 1', b'{"row": 1}', b"[]", b'{"\xff": 1}'])
def test_damaged_list_of_problems_is_named(setting, line):
    (setting.workdir / "unusable_questions.jsonl").write_bytes(line + b"\n")
    with pytest.raises(UserError, match=r"unusable_questions.jsonl, line 1"):
        distill_page._unusable(setting, ("before",))
