"""Questions put to a language model one at a time, in Python and on the command line."""

import json

import pytest
import soundfile

from medalign_jax import ask
from medalign_jax.core.errors import UserError
from medalign_jax.data.questions.prompts import SequenceBuilder
from medalign_jax.evaluate.answering import write_answers
from medalign_jax.language_model import load_language_model
from tests import distill_models as tiny


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.world(tmp_path_factory.mktemp("ask"), 4)


@pytest.fixture(scope="module")
def asked(world):
    return [q for q in world.data.questions if not q.choices][:3]


@pytest.fixture(scope="module")
def written(world, asked):
    """What `evaluate` lets the model write: prompts padded otherwise, in batches."""
    student = world.student
    builder = SequenceBuilder(
        student.tokenizer, None, student.audio_tokens, 128, max_samples=student.max_samples
    )
    return write_answers(student, asked, builder, 6, 2)


def test_answers_are_those_of_an_evaluation(world, asked, written):
    assert len({len(q.audio) for q in asked}) == 2  # one recording, and two
    for q in asked:
        said = world.student.answer(q.question, list(q.audio), max_new_tokens=6)
        assert said == written[q.id]
    assert any(written.values())


def test_a_waveform_at_another_rate_is_taken(world, asked, written):
    waveform, rate = soundfile.read(asked[0].audio[0])
    said = world.student.answer(asked[0].question, (waveform, rate), max_new_tokens=6)
    assert said == written[asked[0].id]


def test_the_command_says_the_same(world, asked, written, tmp_path, capsys):
    folder = world.student.save(tmp_path / "model")
    given = ["--model", str(folder), "--question", asked[0].question, "--max_new_tokens", "6"]
    assert ask.main([*given, *asked[0].audio]) == 0
    assert capsys.readouterr().out.strip() == written[asked[0].id].strip()
    assert ask.main([*given, *asked[0].audio, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["response"] == written[asked[0].id]
    assert ask.main([*given]) == 1
    assert "name recordings, or --description" in capsys.readouterr().err
    (tmp_path / "no.wav").write_bytes(b"no sound")
    assert ask.main([*given, str(tmp_path / "no.wav")]) == 1
    assert "no.wav" in capsys.readouterr().err
    assert repr(load_language_model(folder)) == repr(world.student)


def test_what_makes_no_prompt_is_said(world, asked):
    with pytest.raises(UserError, match="a text-only model takes no audio"):
        world.teacher.answer("?", asked[0].audio[0])
    assert isinstance(world.teacher.answer("?", description="a murmur", max_new_tokens=2), str)
    with pytest.raises(UserError, match="longer than the window"):
        world.student.answer(asked[0].question, asked[0].audio[0], max_new_tokens=10**6)
