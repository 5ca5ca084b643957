"""Real questions and published models become what a distillation starts from, or are refused."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
import soundfile

from configs import distill as configuration
from medalign_jax.core import seals
from medalign_jax.core.errors import UserError
from medalign_jax.data.questions.overlap import OverlapError, refuse_overlap
from medalign_jax.data.questions.question import Question, QuestionsError
from medalign_jax.data.questions.readers import write_questions
from medalign_jax.runs.distill import overlap
from medalign_jax.runs.distill.data import published_setting, wants_teacher
from medalign_jax.runs.distill.overlap import check_overlap
from medalign_jax.runs.parts.blocks import mesh_of
from medalign_jax.runs.parts.distillation import builder_of, open_all
from medalign_jax.text.tokenizers import TokenizerError
from tests.runs import tiny_audio_lm as tiny

ASKS_NOT_TO_THINK = (
    "{% if enable_thinking is defined and not enable_thinking %}<think> </think>{% endif %}"
)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return tiny.reasoning_questions(tmp_path_factory.mktemp("hearts"), 20)


@pytest.fixture(scope="module")
def student(tmp_path_factory, questions):
    return tiny.save_listener(tmp_path_factory.mktemp("student"), tiny.vocabulary(questions))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, questions):
    words = tiny.vocabulary(questions)
    folder = tiny.save_reader(tmp_path_factory.mktemp("teacher"), words, ("<think>", "</think>"))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    end = "{% endif %}"
    template = settings["chat_template"].removesuffix(end) + ASKS_NOT_TO_THINK + end
    path.write_text(json.dumps(settings | {"chat_template": template}))
    (folder / seals.NAME).unlink()  # it was meant
    return folder


@pytest.fixture
def config(tmp_path, questions, student, teacher):
    config = configuration.get_config()
    config.student.update({"source": str(student), "dtype": "bfloat16"})
    config.teacher.source = str(teacher)
    config.data.update({"questions": str(tmp_path / "hearts.jsonl"), "max_length": 512})
    config.evaluate.max_new_tokens = 64
    write_questions(tmp_path / "hearts.jsonl", questions)
    return config


def setting_of(config, tmp_path):
    return published_setting(config, tmp_path / "run", mesh_of(config))


def rewrite(config, questions):
    write_questions(config.data.questions, questions)


def of_split(questions, split):
    return [question.id for question in questions if question.split == split]


# --------------------------------------------------------------------------------------- whole


def test_questions_are_dealt_by_split_and_the_test_is_a_task(config, tmp_path, questions):
    setting = setting_of(config, tmp_path)
    assert [q.id for q in setting.train] == of_split(questions, "train")
    assert [q.id for q in setting.valid] == of_split(questions, "valid")
    (task,) = setting.tasks
    assert (task.name, task.dataset, task.how, task.classes) == (
        "reasoning", "hearts", "generate", False
    )  # fmt: skip
    assert [q.id for q in task.questions] == of_split(questions, "test")
    assert (tmp_path / "run" / "unusable_rows.jsonl").read_text() == ""


def test_models_are_loaded_as_the_config_says(config, tmp_path, student, teacher):
    setting = setting_of(config, tmp_path)
    ours, theirs = setting.student, setting.teacher
    assert {leaf.dtype for leaf in jax.tree.leaves(ours.params)} == {jnp.dtype("float32")}
    assert ours.module.dtype == jnp.bfloat16 and ours.module.remat
    assert {leaf.dtype for leaf in jax.tree.leaves(theirs.params)} == {jnp.dtype("bfloat16")}
    assert (ours.identity, theirs.identity) == (
        tiny.identity_of(student), tiny.identity_of(teacher)
    )  # fmt: skip
    assert theirs.tokenizer.prompt("Which?").endswith("<|im_start|>assistant\n<think> </think>")


def test_the_parts_of_a_run_are_made_from_it(config, tmp_path):
    setting = setting_of(config, tmp_path)
    builder = builder_of(config, setting.student, setting.teacher)
    data = open_all(config, tmp_path, setting.train, builder)
    assert len(data) == len(setting.train) and data.has_teacher


@pytest.mark.parametrize(
    ("loss", "arms", "wanted"),
    [
        ({}, {}, True),
        ({"text_weight": 0.0}, {}, False),
        ({}, {"sft": {"text_weight": 0.0}, "top": {"layers_weight": 0.0}}, True),
        ({}, {"sft": {"text_weight": 0.0}}, False),
    ],
)
def test_a_teacher_is_loaded_where_an_arm_has_one(config, loss, arms, wanted):
    config.loss.update(loss)
    with config.unlocked():
        config.arms = arms
    assert wants_teacher(config) is wanted


def test_without_a_teacher_no_description_is_needed(config, tmp_path, questions):
    config.loss.text_weight = 0.0
    config.teacher.source = ""
    rewrite(config, tiny.undescribed(questions))
    setting = setting_of(config, tmp_path)
    assert setting.teacher is None and setting.train


def test_benchmarks_become_tasks(config, tmp_path, questions):
    other = tiny.reasoning_questions(tmp_path / "other", 5)
    rows = [
        {"id": q.id, "audio_id": q.audio[0], "question": q.question, "choices": q.choices,
         "answer": q.answer, "task": "sound", "difficulty": "easy"}
        for q in other
    ]  # fmt: skip
    for question in other:
        change_a_sample(question.audio[0])
    (tmp_path / "mmau.json").write_text(json.dumps(rows))
    lines = [
        f"{q.audio[0]},speaker{n},anger,{('train', 'test')[n > 1]}" for n, q in enumerate(other)
    ]
    speech = tmp_path / "speech"
    speech.mkdir()
    table = "\n".join(["audio_path,subject_id,emotion,split", *lines]) + "\n"
    (speech / "metadata.csv").write_text(table)
    config.data.mmau = str(tmp_path / "mmau.json")
    config.data.emodb = str(speech / "metadata.csv")
    config.data.copies = False  # in one sample they are others
    config.evaluate.update({"answers": "rank", "limit": 2})
    tasks = {task.name: task for task in setting_of(config, tmp_path).tasks}
    assert [(t.name, t.dataset, t.how, t.classes) for t in tasks.values()] == [
        ("reasoning", "hearts", "rank", False),
        ("mmau", "MMAU", "rank", False),
        ("emotion", "speech", "rank", True),
    ]
    assert {name: len(task.questions) for name, task in tasks.items()} == dict.fromkeys(tasks, 2)
    ids = [q.id for q in other]
    asked = [q.id for q in tasks["mmau"].questions]
    assert asked == sorted(asked, key=ids.index)
    assert {q.split for q in tasks["emotion"].questions} == {"test"}


def change_a_sample(path):
    """The tiny data sets share recordings; these are to be others."""
    import soundfile

    samples, rate = soundfile.read(path, dtype="int16")
    samples[100] += 7
    soundfile.write(path, samples, rate)


def test_a_table_of_emotions_is_trained_on_by_folds(config, tmp_path, questions):
    rows = [f"{q.audio[0]},speaker{n % 2},anger" for n, q in enumerate(questions[:4])]
    table = tmp_path / "speech.csv"
    table.write_text("\n".join(["audio_path,subject_id,emotion", *rows]) + "\n")
    config.data.update({"questions": str(table), "format": "emotions", "folds": "subject_id"})
    config.loss.text_weight = 0.0
    setting = setting_of(config, tmp_path)
    (task,) = setting.tasks
    assert (task.name, task.dataset, task.how, task.classes) == (
        "speech emotion", "speech", "rank", True
    )  # fmt: skip
    assert [(fold.name, len(fold.train), len(fold.test)) for fold in setting.folds] == [
        ("speaker0", 2, 2), ("speaker1", 2, 2)
    ]  # fmt: skip
    assert setting.train == setting.valid == ()


def test_without_evaluation_no_benchmark_is_read(config, tmp_path):
    config.evaluate.enabled = False
    config.data.mmau = "nowhere.json"
    assert setting_of(config, tmp_path).tasks == ()


def test_test_questions_without_a_prompt_are_listed_or_refused(config, tmp_path, questions):
    *rest, last = [q for q in questions if q.split == "test"]
    long = replace(last, question="murmur " * 600)
    rewrite(config, [q for q in questions if q.split != "test"] + [*rest, long])
    with pytest.raises(QuestionsError, match="longer than the window") as error:
        setting_of(config, tmp_path)
    assert last.id in str(error.value)
    config.data.max_bad_fraction = 0.5
    (task,) = setting_of(config, tmp_path).tasks
    assert [q.id for q in task.questions] == [q.id for q in rest]
    (listed,) = (tmp_path / "run" / "unaskable_reasoning.jsonl").read_text().splitlines()
    assert last.id in listed


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("student.source", "", "config.student.source is empty"),
        ("teacher.source", "", "config.teacher.source is empty"),
        ("data.questions", "nowhere.jsonl", "no file of questions"),
        ("data.format", "csv", "config.data.format"),
        ("data.audio", "folder", "data.format=cota"),
        ("data.folds", "session", "no question of"),
        ("data.max_seconds", 1.5, "longer than the 1.5 s"),
        ("data.max_length", 60, "longer than the window of 60"),
        ("evaluate.answers", "guess", "evaluate.answers"),
        ("evaluate.limit", -1, "evaluate.limit"),
    ],
)
def test_what_cannot_be_is_refused(config, tmp_path, key, value, words):
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError) as error:
        setting_of(config, tmp_path)
    assert words in str(error.value)


def test_models_in_the_wrong_place_are_refused(config, tmp_path, student, teacher):
    config.student.source = str(teacher)
    with pytest.raises(UserError, match="is text-only"):
        setting_of(config, tmp_path)
    config.student.source = config.teacher.source = str(student)
    with pytest.raises(UserError, match="takes audio; the text teacher"):
        setting_of(config, tmp_path)


def test_a_teacher_of_another_vocabulary_is_refused(config, tmp_path, questions, teacher):
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    path = other / "tokenizer.json"
    content = json.loads(path.read_text())
    table = content["model"]["vocab"]
    words = [word for word in table if not word.startswith("<")]
    ids = np.roll([table[word] for word in words], 1).tolist()
    content["model"]["vocab"] = table | dict(zip(words, ids, strict=True))
    path.write_text(json.dumps(content))
    config.teacher.source = str(other)
    with pytest.raises(TokenizerError, match="share no vocabulary"):
        setting_of(config, tmp_path)


def test_questions_not_put_into_words_are_refused(config, tmp_path, questions):
    rewrite(config, tiny.undescribed(questions))
    with pytest.raises(QuestionsError, match=r"no description.*configs/textualize.py"):
        setting_of(config, tmp_path)


@pytest.mark.parametrize("split", ["test-mini", "fold1"])
def test_another_split_is_refused(config, tmp_path, questions, split):
    subject = questions[0].subject_id
    rewrite(config, [replace(q, split=split) if q.subject_id == subject else q for q in questions])
    with pytest.raises(UserError, match=f"has the split '{split}'"):
        setting_of(config, tmp_path)


def test_bad_rows_are_listed_and_too_many_refused(config, tmp_path, questions):
    first, *rest = questions
    rewrite(config, [replace(first, audio=(str(tmp_path / "nowhere.wav"),)), *rest])
    with pytest.raises(QuestionsError, match="1 of 20 rows"):
        setting_of(config, tmp_path)
    (line,) = (tmp_path / "run" / "unusable_rows.jsonl").read_text().splitlines()
    assert json.loads(line)["row"] == 1 and "nowhere.wav" in line
    config.data.max_bad_fraction = 0.1
    assert len(setting_of(config, tmp_path).train) == len(of_split(rest, "train"))


def test_training_on_recordings_of_a_test_is_refused(config, tmp_path, questions):
    """The benchmark has a copy of a training recording under another name."""
    trained = next(q for q in questions if q.split == "train")
    copy = tmp_path / "benchmark.wav"
    shutil.copy(trained.audio[0], copy)
    row = {"id": "b1", "audio_id": str(copy), "question": "Which?", "choices": ["a", "b"],
           "answer": "a"}  # fmt: skip
    (tmp_path / "mmau.json").write_text(json.dumps([row]))
    config.data.mmau = str(tmp_path / "mmau.json")
    with pytest.raises(OverlapError) as error:
        setting_of(config, tmp_path)
    assert all(word in str(error.value) for word in (trained.id, "'b1' of mmau", str(copy)))
    assert "b1" in (tmp_path / "run" / "overlap.jsonl").read_text()


def test_a_test_recording_that_is_a_training_recording_in_another_form_is_refused(
    tmp_path, monkeypatch
):
    """Another rate, format and loudness, and half a second missing; a different noise is taken."""
    rng = np.random.default_rng(0)
    hiss = scipy.signal.sosfilt(
        scipy.signal.butter(4, 400, fs=16_000, output="sos"), rng.standard_normal((3, 64_000))
    )
    for i, name in enumerate(("trained", "other")):
        soundfile.write(tmp_path / f"{name}.wav", 0.2 * hiss[i], 16_000)
    cut = scipy.signal.resample_poly(hiss[0, 8_000:], 1, 2)
    soundfile.write(tmp_path / "copy.flac", 0.05 * cut, 8_000)
    soundfile.write(tmp_path / "mine.wav", 0.2 * hiss[2], 16_000)

    def ask(name):
        return Question(name, (str(tmp_path / name),), "Which?", (), "this")

    train = [ask("trained.wav"), ask("other.wav")]
    check_overlap(train, {"mmau": [ask("mine.wav")]}, tmp_path / "list.jsonl", copies=True)
    check_overlap(train, {"mmau": [ask("copy.flac")]}, tmp_path / "list.jsonl", copies=False)
    tests = {"mmau": [ask("mine.wav"), ask("copy.flac")]}
    with pytest.raises(OverlapError, match=r"(?s)of 1 test questions .*copy.flac' of mmau is"):
        check_overlap(train, tests, tmp_path / "run" / "list.jsonl", copies=True)
    assert "trained.wav" in (tmp_path / "run" / "list.jsonl").read_text()
    # The same files are not looked through again, and what was found holds; other files are.
    monkeypatch.setattr(overlap, "near_copies", lambda *_, **__: 1 / 0)
    with pytest.raises(OverlapError):
        check_overlap(train, tests, tmp_path / "run" / "list.jsonl", copies=True)
    (tmp_path / "other.wav").touch()
    with pytest.raises(ZeroDivisionError):
        check_overlap(train, tests, tmp_path / "run" / "list.jsonl", copies=True)
    (tmp_path / "run" / overlap.RECORD).write_text('{"files": 3')
    with pytest.raises(ZeroDivisionError):
        check_overlap(train, tests, tmp_path / "run" / "list.jsonl", copies=True)


def test_too_many_recordings_are_not_looked_through_and_that_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(overlap, "_MOST", 1)
    for name in ("a.wav", "b.wav"):
        soundfile.write(tmp_path / name, np.zeros(16_000), 16_000)
    train, test = (
        Question(n, (str(tmp_path / f"{n}.wav"),), "Which?", (), "this") for n in ("a", "b")
    )
    overlap.refuse_near_copies([train], {"mmau": [test]}, 60.0, tmp_path / "record")
    assert "are not looked for among 2 recordings, more than 1" in capsys.readouterr().out


def test_subjects_are_compared_and_every_overlap_is_kept():
    def ask(id, subject):
        return Question(id, (), "Which?", (), "this", description="x", subject_id=subject)

    train = [ask("1", "s1"), ask("2", "s2"), ask("3", "")]
    tests = {"mmau": [ask("4", "s2"), ask("5", "")], "emotion": [ask("6", "s1"), ask("7", "s3")]}
    with pytest.raises(OverlapError) as error:
        refuse_overlap(train, tests)
    reasons = [problem.reason for problem in error.value.problems]
    assert reasons == [
        "subject 's2' is in training question '2' and in '4' of mmau",
        "subject 's1' is in training question '1' and in '6' of emotion",
    ]
    refuse_overlap(train[2:], tests)
