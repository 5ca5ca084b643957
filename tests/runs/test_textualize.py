"""Textualisation: whole after a kill, nothing twice, nothing lost without being named."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import textualize as configuration
from medalign_jax.core.errors import UserError
from medalign_jax.core.journal import Journal
from medalign_jax.data.questions.question import Checks
from medalign_jax.data.questions.readers import read_questions, write_questions
from medalign_jax.language_model import load_language_model
from medalign_jax.models.generate import GenerationError, generate
from medalign_jax.runs.describing import record_keys, why_unusable
from medalign_jax.runs.textualize import FAILED, OUTPUT, PARTIAL, run
from tests import devices
from tests.runs import tiny_audio_lm as tiny

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
KILLED = """
import os, signal, sys
from pathlib import Path
from tests.runs import test_textualize as tests
from medalign_jax.core import journal
add = journal.Journal.add
def add_and_die(self, records):
    add(self, records)
    self._file.write(b'{"id": "half a li')
    self._file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
journal.Journal.add = add_and_die
tests.run(tests.config_of(*map(Path, sys.argv[1:3])), Path(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return tiny.reasoning_questions(tmp_path_factory.mktemp("hearts"))


@pytest.fixture(scope="module")
def model(tmp_path_factory, questions):
    return tiny.save_listener(tmp_path_factory.mktemp("listener"), tiny.vocabulary(questions))


@pytest.fixture(scope="module")
def file(tmp_path_factory, questions):
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    write_questions(path, tiny.undescribed(questions))
    return path


def config_of(model: Path, file: Path):
    config = configuration.get_config()
    config.model.update({"source": str(model), "dtype": "float32"})
    config.data.questions = str(file)
    config.prompt.update({"system": "", "text": "Describe .", "notes": " Notes : {reasoning}"})
    config.generate.update(
        {"max_new_tokens": 8, "temperature": 1.0, "top_p": 1.0, "batch_size": 5, "min_words": 1}
    )
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model, file):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    run(config_of(model, file), workdir)
    return workdir


def texts_of(workdir: Path) -> dict[str, str]:
    return {q.id: q.description for q in read_questions(workdir / OUTPUT).questions}


def failures_of(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / FAILED).read_text().splitlines()]


# --------------------------------------------------------------------------------------- output


def test_every_record_gets_a_description_and_keeps_all_else(finished, questions):
    found = read_questions(finished / OUTPUT, Checks(max_bad_fraction=0))
    assert not found.problems and not failures_of(finished)
    assert [q.id for q in found.questions] == [q.id for q in questions]
    for question, before in zip(found.questions, questions, strict=True):
        assert question.description
        assert replace(question, description=None, extra={}) == replace(before, description=None)
    assert len(set(texts_of(finished).values())) == len(questions)
    assert not (finished / PARTIAL).exists()


def test_a_description_says_where_it_comes_from(finished, questions, model):
    found = read_questions(finished / OUTPUT).questions[0]
    reasoning, extra = questions[0].reasoning, found.extra
    assert extra["description_prompt"] == (
        f"Describe . Notes : Planning: {reasoning.planning}\nCaption: {reasoning.caption}\n"
        f"Reasoning: {reasoning.reasoning}"
    )
    chat = (
        "<|im_start|>user\n<|audio_bos|><|AUDIO|><|audio_eos|>"
        f"{extra['description_prompt']}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert extra["description_prompt_sha256"] == hashlib.sha256(chat.encode()).hexdigest()
    assert extra["description_model"] == tiny.identity_of(model)
    key = jax.random.key_data(record_keys(0, [found.id])[0])
    assert extra["description_key"] == "".join(f"{int(word):08x}" for word in key)
    assert (extra["description_seed"], extra["description_temperature"]) == ("0", "1.0")


def test_a_finished_run_is_left_alone(finished, model, file, capsys):
    before = (finished / OUTPUT).stat()
    run(config_of(model, file), finished)
    assert (finished / OUTPUT).stat() == before
    assert "is finished" in capsys.readouterr().out


def test_the_default_prompt_grounds_and_forbids_the_answer():
    prompt = configuration.get_config().prompt
    assert "{reasoning}" in prompt.notes and "do not give away the answer" in prompt.notes.replace(
        "\n", " "
    )
    assert "summary" not in prompt.stages


# --------------------------------------------------------------------------------------- resume


def test_killed_and_resumed_is_the_same_to_the_byte(finished, tmp_path, model, file):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    workdir = tmp_path / "killed"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(model), str(file), str(workdir)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=devices.WAIT,
        check=False,
    )
    assert done.returncode == -9, done.stderr
    lines = (workdir / PARTIAL).read_bytes().split(b"\n")
    assert len(lines) == 7 and lines[-1].startswith(b'{"id": "half')  # head, five records, half
    assert not (workdir / OUTPUT).exists()

    run(config_of(model, file), workdir)
    for name in (OUTPUT, FAILED):
        assert (workdir / name).read_bytes() == (finished / name).read_bytes()


def test_a_batch_that_is_half_there_is_completed(finished, tmp_path, model, file, monkeypatch):
    def fail_after_two(self, records):
        add(self, records[:2])
        raise KeyboardInterrupt

    add = Journal.add
    monkeypatch.setattr(Journal, "add", fail_after_two)
    with pytest.raises(KeyboardInterrupt):
        run(config_of(model, file), tmp_path / "run")
    monkeypatch.undo()
    run(config_of(model, file), tmp_path / "run")
    assert (tmp_path / "run" / OUTPUT).read_bytes() == (finished / OUTPUT).read_bytes()


def test_a_sample_does_not_depend_on_its_batch(finished, tmp_path, model, questions):
    few = tmp_path / "few.jsonl"
    write_questions(few, tiny.undescribed(questions[3:6]))
    run(config_of(model, few), tmp_path / "few")
    assert texts_of(tmp_path / "few").items() < texts_of(finished).items()


def test_another_seed_is_another_sample(finished, tmp_path, model, file):
    config = config_of(model, file)
    config.seed = 1
    run(config, tmp_path / "run")
    found, before = texts_of(tmp_path / "run"), texts_of(finished)
    assert all(found[id] != before[id] for id in before)


def test_other_data_does_not_go_on_with_the_old_descriptions(
    tmp_path, model, questions, monkeypatch
):
    path = tmp_path / "questions.jsonl"
    write_questions(path, tiny.undescribed(questions[:6]))
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", lambda self, records: (_ for _ in ()).throw(KeyError()))
        with pytest.raises(KeyError):
            run(config_of(model, path), tmp_path / "run")
    write_questions(path, tiny.undescribed(questions[:5]))
    with pytest.raises(UserError, match="begun with others: questions file"):
        run(config_of(model, path), tmp_path / "run")


# --------------------------------------------------------------------------------------- failures


def test_failed_records_are_listed_with_their_reasons(finished, tmp_path, model, questions, capsys):
    good, traceless, long, described, absent = tiny.undescribed(questions[:5])
    bad = [
        good,
        replace(traceless, reasoning=None),
        replace(long, reasoning="murmur " * 5000),
        replace(described, description="A heart ."),
        replace(absent, audio=(str(tmp_path / "nowhere.wav"),)),
    ]
    path = tmp_path / "questions.jsonl"
    write_questions(path, bad)
    config = config_of(model, path)
    config.data.max_bad_fraction = 0.5
    run(config, tmp_path / "run")
    assert [q.id for q in read_questions(tmp_path / "run" / OUTPUT).questions] == [
        good.id, described.id
    ]  # fmt: skip
    failed = failures_of(tmp_path / "run")
    reasons = {each.get("id", each.get("row")): each["reason"] for each in failed}
    assert reasons.keys() == {traceless.id, long.id, 5}
    assert "no reasoning to ground" in reasons[traceless.id]
    assert "longer than the window" in reasons[long.id]
    assert "no such file" in reasons[5].lower() or "not there" in reasons[5].lower()
    said = capsys.readouterr().out
    assert "1 records described" in said and "3 failed" in said and "1 had a description" in said
    assert texts_of(tmp_path / "run")[good.id] == texts_of(finished)[good.id]


def test_where_all_fail_nothing_is_written_but_the_list(tmp_path, model, file, questions):
    config = config_of(model, file)
    config.generate.min_words = 100
    with pytest.raises(UserError, match="all 12 failed"):
        run(config, tmp_path / "run")
    found = failures_of(tmp_path / "run")
    assert [each["id"] for each in found] == [q.id for q in questions]
    assert all("words" in each["reason"] for each in found)
    assert not (tmp_path / "run" / OUTPUT).exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "wrote nothing"),
        ("A murmur .", "only 3 words"),
        ("I'm sorry, but I cannot listen to audio.", "refuses"),
        ("the heart the heart " * 10, "repeats itself"),
        ("A heart with <|im_end|> in the middle of it", "<|im_end|>"),
        ("A steady heart with a faint murmur .", ""),
    ],
)
def test_what_is_not_a_description(text, reason):
    found = why_unusable(text, 5, ("<|im_end|>",))
    assert reason in found and bool(reason) == bool(found)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model.source", "", "config.model.source is empty"),
        ("data.questions", "", "config.data.questions is empty"),
        ("data.format", "mmau", "config.data.format"),
        ("prompt.notes", "nothing", "no {reasoning}"),
        ("prompt.stages", ("verdict",), "verdict"),
        ("generate.batch_size", 0, "batch_size"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, model, file, key, value, words):
    config = config_of(model, file)
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError) as error:
        run(config, tmp_path / "run")
    assert words in str(error.value)


def test_a_model_that_only_reads_is_refused(tmp_path, file, questions):
    reader = tiny.save_reader(tmp_path, tiny.vocabulary(questions))
    with pytest.raises(UserError, match="is text-only"):
        run(config_of(reader, file), tmp_path / "run")


# --------------------------------------------------------------------------------------- journal


def test_a_journal_holds_each_record_once(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path, "run") as journal:
        journal.add([{"id": "a", "text": "ä"}])
        with pytest.raises(ValueError, match="'a' is in"):
            journal.add([{"id": "a", "text": "other"}])
        with pytest.raises(UserError, match="open in another process"):
            Journal(path, "run")
    with Journal(path, "run") as journal:
        assert journal.done == {"a": {"id": "a", "text": "ä"}}
    with pytest.raises(UserError, match="other data, weights or settings"):
        Journal(path, "another")


@pytest.mark.parametrize(
    "line", [b"not json\n", b"[1]\n", b'{"text": "no id"}\n', b'{"id": "a"}\n']
)
def test_a_damaged_journal_is_named(tmp_path, line):
    path = tmp_path / "journal.jsonl"
    with Journal(path, "run") as journal:
        journal.add([{"id": "a"}])
    with path.open("ab") as file:
        file.write(line + b'{"id": "b"}\n')
    with pytest.raises(UserError, match=r"journal.jsonl, line 3, is damaged"):
        Journal(path, "run")


def test_keys_follow_from_seed_and_id_alone():
    def words(seed, ids):
        return np.asarray(jax.random.key_data(record_keys(seed, ids)))

    first = words(0, ["a", "b", "c"])
    np.testing.assert_array_equal(first[[2, 0]], words(0, ["c", "a"]))
    assert (first != words(1, ["a", "b", "c"])).any(axis=1).all()


def test_generation_takes_a_key_for_each_prompt(model):
    loaded = load_language_model(model, identity=False)
    prompts = loaded.module, loaded.params, np.full((2, 3), 7), np.ones((2, 3), bool)
    options = {"max_new_tokens": 4, "temperature": 1.0}
    keys = jax.random.split(jax.random.key(3), 3)
    with pytest.raises(GenerationError, match=r"\(3,\) for 2 prompts"):
        generate(*prompts, key=keys, **options)
    both = generate(*prompts, key=keys[:2], **options)
    swapped = generate(*prompts, key=keys[:2][::-1], **options)
    np.testing.assert_array_equal(both.tokens, swapped.tokens[::-1])
    assert (both.tokens[0] != both.tokens[1]).any()
