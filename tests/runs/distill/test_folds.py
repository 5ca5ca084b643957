"""Leave one group out: one model per fold, and the answers of each to what it had not seen."""

import json
from dataclasses import replace

import pytest

from configs import distill as configuration
from medalign_jax.core.errors import UserError
from medalign_jax.data.questions.question import QuestionsError
from medalign_jax.data.questions.readers import write_questions
from medalign_jax.runs.distill import run as distill
from medalign_jax.runs.distill.arms import fit_arm
from medalign_jax.runs.distill.folds import asked, folded
from tests.runs import tiny_audio_lm as tiny

pytestmark = pytest.mark.slow

SESSIONS = ("Ses01", "Ses02", "Ses 03")


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Two of each session, and one of none."""
    found = tiny.reasoning_questions(tmp_path_factory.mktemp("hearts"), 7)
    sessions = [*SESSIONS, *SESSIONS, ""]
    return [
        replace(q, split="", subject_id=f"s{n}", extra={"session": session} if session else {})
        for n, (q, session) in enumerate(zip(found, sessions, strict=True))
    ]


def config_of(path, source=""):
    config = configuration.get_config("sft")
    config.student.update({"source": str(source), "dtype": "float32", "remat": False})
    config.data.update({"questions": str(path), "folds": "session"})
    config.data.update({"max_length": 512, "buckets": (512,)})
    config.train.update({"batch_size": 2, "steps": 1})
    config.evaluate.update({"answers": "rank"})
    return config


def test_each_question_is_answered_by_a_model_without_its_session(
    tmp_path, monkeypatch, questions, capsys
):
    write_questions(tmp_path / "asked.jsonl", questions)
    words = tiny.vocabulary(questions)
    config = config_of(tmp_path / "asked.jsonl", tiny.save_listener(tmp_path / "student", words))
    trained, real = {}, fit_arm

    def spy(setting, block, folder, what):
        trained[folder.name] = {q.id for q in setting.train}
        return real(setting, block, folder, what)

    monkeypatch.setattr(distill, "fit_arm", spy)
    workdir = tmp_path / "run"
    distill.run(config, workdir)
    everything = {q.id for q in questions}
    folders = {name: name.replace(" ", "_") for name in SESSIONS}
    for name, folder in folders.items():
        of_session = {q.id for q in questions if q.extra.get("session") == name}
        assert trained[folder] == everything - of_session
        (answers,) = json.loads((workdir / "folds" / folder / "answers.json").read_text()).values()
        assert answers.keys() == of_session
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    found = {
        (r["stage"], r["metric"]): r for r in evaluation["results"] if r["task"] == "reasoning"
    }
    assert {stage for stage, _ in found} == {"before", "after", "after minus before"}
    after = found["after", "accuracy"]
    assert (after["n_test"], after["n_train"]) == (6, 5)
    assert "3 folds" in (workdir / "report.html").read_text()
    assert not (workdir / "export").exists()
    assert "3 folds: Ses 03, Ses01, Ses02; 1 questions are in all" in capsys.readouterr().out


def test_the_same_options_make_a_classification(questions):
    config = config_of("asked.jsonl")
    same = [replace(q, choices=("a", "b"), answer="a", task="speech emotion") for q in questions]
    task = folded(config, same).task
    assert (task.name, task.how, task.classes) == ("speech emotion", "rank", True)
    config.evaluate.answers = "generate"
    mixed = [same[0], *questions[1:]]
    task = folded(config, mixed).task
    assert (task.name, task.how, task.classes) == ("folds", "generate", False)


def test_by_subject_splits_are_passed_over_and_said(questions, capsys):
    config = config_of("asked.jsonl")
    config.data.folds = "subject_id"
    found = folded(config, [replace(q, split="test") for q in questions])
    assert [len(fold.train) for fold in found.folds] == [6] * 7 and not found.train
    assert "splits are passed over" in capsys.readouterr().out


def test_a_fold_without_a_test_is_left_out(questions):
    found = folded(config_of("asked.jsonl"), questions)
    task = replace(found.task, questions=tuple(questions[:2]))
    assert [(fold.name, len(fold.test)) for fold in asked(found.folds, task)] == [
        ("Ses01", 1), ("Ses02", 1)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("data.folds", "sesion", "no question of asked.jsonl has.*session"),
        ("data.mmau", "mmau.json", "leave data.mmau empty"),
        ("evaluate.enabled", False, "evaluate.enabled"),
    ],
)
def test_what_cannot_be_folded_is_refused(questions, key, value, words):
    config = config_of("asked.jsonl")
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=words):
        folded(config, questions)


def test_held_out_questions_of_no_group_and_a_subject_of_two_are_refused(questions):
    config = config_of("asked.jsonl")
    with pytest.raises(UserError, match=r"has the split 'test' and no group"):
        folded(config, [*questions[:-1], replace(questions[-1], split="test")])
    with pytest.raises(QuestionsError, match="is in the groups"):
        folded(config, [replace(q, subject_id="one") for q in questions])
