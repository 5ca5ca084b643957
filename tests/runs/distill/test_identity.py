"""A distillation goes on with what it began with; answers are of the model and questions asked."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from configs import distill as configuration
from medalign_jax.core.errors import UserError
from medalign_jax.data.questions.question import Question
from medalign_jax.runs.distill import run as distill
from medalign_jax.runs.distill.arms import QuestionTask, Setting
from medalign_jax.runs.recordings import _sound
from medalign_jax.runs.workdir import open_workdir


@pytest.fixture
def setting(tmp_path, monkeypatch):
    """Of a model that answers with a number that grows with each task that is answered."""
    _sound.cache_clear()
    config = configuration.get_config("sft")
    config.arms = {"one": {"sft_weight": 1.0}}
    paths = [tmp_path / f"{i}.wav" for i in range(3)]
    for path in paths:
        path.write_bytes(path.name.encode())
    train, valid, test = (
        Question(f"q{i}", (str(path),), "what?", ("a", "b"), "a") for i, path in enumerate(paths)
    )
    model = SimpleNamespace(identity="s" * 64, params={"w": np.ones(2, np.float32)})
    workdir = open_workdir(tmp_path / "run", config)
    asked = []

    def answer(setting, model, task, what):
        asked.append(task.name)
        return {q.id: f"answer {len(asked)}" for q in task.questions}

    monkeypatch.setattr(distill, "_answer", answer)
    task = QuestionTask("mmau", "MMAU", (test,), "generate")
    return Setting(config, workdir, None, model, model, (train,), (valid,), (task,))


def test_answers_are_kept_for_the_same_model_questions_and_settings(setting):
    def ask(**model):
        model = SimpleNamespace(**vars(setting.student) | model)
        return distill.answers_of(setting, model, setting.workdir / "before", "before")["mmau"]

    assert [ask(), ask()] == [{"q2": "answer 1"}] * 2
    setting.config.evaluate.batch_size = 1  # does not decide an answer
    assert ask() == {"q2": "answer 1"}
    setting.config.evaluate.max_new_tokens = 7
    assert [ask(), ask()] == [{"q2": "answer 2"}] * 2
    trained = {"identity": "", "params": {"w": np.zeros(2, np.float32)}}
    assert [ask(**trained), ask(**trained)] == [{"q2": "answer 3"}] * 2
    Path(setting.tasks[0].questions[0].audio[0]).write_bytes(b"another recording")
    _sound.cache_clear()  # another process
    assert ask(**trained) == {"q2": "answer 4"}
    (setting.workdir / "before" / "answered.json").write_text("{")
    assert ask(**trained) == {"q2": "answer 5"}


def test_other_questions_recordings_and_weights_are_refused(setting):
    distill._bind(setting)
    (setting.workdir / "arms" / "one_0" / "checkpoints" / "3").mkdir(parents=True)
    distill._bind(setting)
    (question,) = setting.train
    other = replace(setting, train=(replace(question, answer="b"),))
    with pytest.raises(UserError, match=r"1 of 2 are changed.*'train: q0'\): another text"):
        distill._bind(other)
    with pytest.raises(UserError, match=r"1 of 2 are not there any more, the first: 'valid: q1'"):
        distill._bind(replace(setting, valid=()))
    teacher = SimpleNamespace(identity="t" * 64)
    with pytest.raises(UserError, match=r"teacher weights ssss.* there, tttt"):
        distill._bind(replace(setting, teacher=teacher))
    Path(question.audio[0]).write_bytes(b"another recording")
    _sound.cache_clear()
    with pytest.raises(UserError, match=r"'train: q0'\): another sound"):
        distill._bind(setting)


def test_an_arm_that_was_trained_otherwise_is_refused(setting):
    distill._bind(setting)
    (setting.workdir / "arms" / "one_0" / "checkpoints" / "3").mkdir(parents=True)
    setting.config.arms["two"] = {"sft_weight": 0.1}
    distill._bind(setting)
    with setting.config.unlocked():
        setting.config.arms["one"] = {"sft_weight": 2.0}
    with pytest.raises(UserError, match=r"arms/one_0 was begun with others: arm one"):
        distill._bind(setting)
