"""Real data and published models: what the arms of a distillation start from.

training questions (textualised) -> train, valid, test (or folds) -+
MMAU, IEMOCAP, tables of emotional speech -------------------------+-> tasks
                                                                   +-> nothing on both sides
student, teacher -> token ids of everything, before a step is taken
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from medalign_jax.core.errors import UserError
from medalign_jax.data.questions.prompts import ExampleError
from medalign_jax.data.questions.question import Checks, Loaded, Question, QuestionsError
from medalign_jax.data.questions.readers import read_mmau
from medalign_jax.data.questions.source import clip_samples, open_questions
from medalign_jax.data.recordings.manifest import Problem, write_problems
from medalign_jax.datasets.emotions import read_emotions, read_iemocap
from medalign_jax.datasets.question_sets import QUESTION_SETS
from medalign_jax.language_model import LanguageModel, chat_tokenizer, load_language_model
from medalign_jax.runs.distill.arms import QuestionTask, Setting
from medalign_jax.runs.distill.folds import asked, folded
from medalign_jax.runs.distill.overlap import check_overlap
from medalign_jax.runs.parts.blocks import dtype_of
from medalign_jax.runs.parts.distillation import builder_of
from medalign_jax.weights.source import resolve

ANSWERS = ("generate", "rank")
_SAMPLED = 41  # so that no two uses of a seed share random numbers


def published_setting(
    config: ConfigDict, workdir: Path, mesh: Mesh, begin: Callable[[], None] = lambda: None
) -> Setting:
    """Models and questions that a config names; everything is checked before anything is trained.

    `begin` is called when all of it has passed. Rows that cannot be used are listed in the workdir:
    ``unusable_rows.jsonl`` of the training questions, ``unusable_<task>.jsonl`` of a benchmark.

    Raises:
      UserError: a file, a row or a model that cannot be used, a teacher without the student's
        vocabulary, or training that shares subjects or recordings with a test (`OverlapError`).
    """
    _check_settings(config)
    loaded = read_training(config.data, workdir / "unusable_rows.jsonl", config.data.decode)
    if config.data.folds:
        setting = _folded_setting(config, workdir, mesh, loaded)
        begin()
        return setting
    train, valid, test = splits_of(loaded)
    tasks = _tasks(config, workdir, test) if config.evaluate.enabled else []
    _check_overlap(config, (*train, *valid), tasks, workdir)
    setting = _with_models(config, workdir, mesh, (train, valid), tasks)
    begin()
    print(f"{len(train)} training questions, {len(valid)} to validate", flush=True)
    return replace(setting, train=train, valid=valid)


def _folded_setting(config: ConfigDict, workdir: Path, mesh: Mesh, loaded: Loaded) -> Setting:
    """Leave one group out; `train` is what every fold learns from besides its own."""
    always, folds, task = folded(config, loaded.questions)
    for fold in folds:
        left_out = replace(task, questions=fold.test)
        _check_overlap(config, (*always, *fold.train), [left_out], workdir)
    task = limited(config, task)
    setting = _with_models(config, workdir, mesh, [loaded.questions], [task])
    folds = asked(folds, setting.tasks[0])
    names = ", ".join(fold.name for fold in folds)
    print(f"a model for each of {len(folds)} folds: {names}; {len(always)} questions are in all")
    return replace(setting, train=always, folds=folds)


def _with_models(
    config: ConfigDict,
    workdir: Path,
    mesh: Mesh,
    learnt: Sequence[Questions],
    tasks: Sequence[QuestionTask],
) -> Setting:
    """Models, and the tasks whose questions make a prompt; `learnt` is checked, not kept."""
    student = load_student(config, mesh)
    teacher = load_text_teacher(config, mesh) if wants_teacher(config) else None
    # Refuses what makes no example, and a teacher of another vocabulary, before hours of answers.
    builder = builder_of(config, student, teacher)
    for questions in filter(None, learnt):
        open_questions(questions, builder, max_bad_fraction=config.data.max_bad_fraction)
    tasks = tuple(_askable(config, workdir, student, task) for task in tasks)
    for task in tasks:
        print(f"{task.name}: {len(task.questions)} questions of {task.dataset}", flush=True)
    return Setting(config, workdir, mesh, student, teacher, (), (), tasks)


def _check_settings(config: ConfigDict) -> None:
    if config.evaluate.answers not in ANSWERS:
        raise UserError(
            f"config.evaluate.answers is {config.evaluate.answers!r}; it is one of {ANSWERS}"
        )
    if config.evaluate.limit < 0:
        raise UserError(
            f"config.evaluate.limit is {config.evaluate.limit}; give 0 for all, or more"
        )
    named = [("student", "an audio language model, e.g. Qwen/Qwen2.5-Omni-7B")]
    if wants_teacher(config):
        named.append(("teacher", "a text model of the student's family, e.g. Qwen/Qwen3-8B"))
    for name, kind in named:
        if not config[name].source:
            raise UserError(f"config.{name}.source is empty; give {kind}, or a folder")


# ------------------------------------------------------------------------------------- questions


def read_training(data: ConfigDict, listing: Path, decode: bool) -> Loaded:
    """The questions of ``data.questions``; those that cannot be used are written to `listing`.

    Args:
      data: questions, format (in `QUESTION_SETS`), audio, max_seconds and max_bad_fraction, as
        in configs/distill.py.
      listing: JSONL of `manifest.Problem`.
      decode: whether recordings are decoded to their last sample.

    Raises:
      UserError: an unknown format, `audio` where paths are relative to the file.
      QuestionsError: see `questions.Collector.finish`.
    """
    if data.format not in QUESTION_SETS:
        known = tuple(QUESTION_SETS)
        raise UserError(f"config.data.format is {data.format!r}; it is one of {known}")
    if data.format != "cota" and data.audio:
        raise UserError(
            "config.data.audio is for data.format=cota; in other files paths are relative to the "
            "file, or absolute"
        )
    read = QUESTION_SETS[data.format]
    if data.format == "cota":
        read = functools.partial(read, audio_folder=data.audio or None)
    read = functools.partial(read, data.questions, checks=_checks(data, decode))
    return _listed(read, data.questions, listing)


def _checks(data: ConfigDict, decode: bool) -> Checks:
    return Checks(
        decode=decode, max_seconds=data.max_seconds, max_bad_fraction=data.max_bad_fraction
    )


def _listed(read: Callable[[], Loaded], name: str, listing: Path) -> Loaded:
    """What `read` gives; its problems are on disk, whether or not there are too many to go on."""
    print(f"checking {name}", flush=True)
    try:
        loaded = read()
    except QuestionsError as error:
        if error.problems:
            _write(error.problems, listing)
        raise
    _write(loaded.problems, listing)
    bad = {problem.row for problem in loaded.problems if problem.fatal}
    if bad:
        print(f"{len(bad)} rows cannot be used: {listing}", flush=True)
    return loaded


def _write(problems: Sequence[Problem], listing: Path) -> None:
    if jax.process_index() == 0:  # one writer
        listing.parent.mkdir(parents=True, exist_ok=True)
        write_problems(problems, listing)


Questions = tuple[Question, ...]


def splits_of(loaded: Loaded) -> tuple[Questions, Questions, Questions]:
    """Questions to train on (split "train" or none), to validate with and to test with.

    Raises:
      UserError: another split, or nothing to train on.
    """
    found: dict[str, list[Question]] = {"train": [], "valid": [], "test": []}
    for question in loaded.questions:
        split = question.split or "train"
        if split not in found:
            raise UserError(
                f"question '{question.id}' has the split '{split}'; training questions have "
                f"{', '.join(found)}, or none to be trained on"
            )
        found[split].append(question)
    if not found["train"]:
        raise UserError("config.data.questions has no question to train on (split 'train' or none)")
    return tuple(found["train"]), tuple(found["valid"]), tuple(found["test"])


def _tasks(config: ConfigDict, workdir: Path, test: Questions) -> list[QuestionTask]:
    """What is measured before and after; see `QuestionTask`."""
    data, how = config.data, config.evaluate.answers
    found = []
    if test:
        found.append(
            QuestionTask("reasoning", Path(data.questions).stem, _rankable(test, how), how)
        )
    if data.mmau:
        read = functools.partial(
            read_mmau, data.mmau, data.mmau_audio or None, _checks(data, data.decode)
        )
        loaded = _listed(read, data.mmau, workdir / "unusable_mmau.jsonl")
        found.append(QuestionTask("mmau", "MMAU", loaded.questions, how))
    found += [corpus.test() for corpus in emotion_corpora(data, workdir)]
    return [limited(config, task) for task in found if task.questions]


def _rankable(test: Questions, how: str) -> Questions:
    kept = tuple(q for q in test if q.choices or how != "rank")
    if left := len(test) - len(kept):
        print(f"{left} test questions have no options to be ranked and are left out", flush=True)
    return kept


class EmotionCorpus(NamedTuple):
    """Emotional speech: the name of its task, that of the data, all its questions."""

    task: str
    dataset: str
    questions: Questions

    def test(self) -> QuestionTask:
        """Classification of the test split, or of all where there is none."""
        held_out = tuple(q for q in self.questions if q.split == "test")
        return QuestionTask(
            self.task, self.dataset, held_out or self.questions, "rank", classes=True
        )


def emotion_corpora(data: ConfigDict, workdir: Path) -> list[EmotionCorpus]:
    """What ``data.emodb`` and ``data.iemocap`` name; unusable rows are listed in the workdir."""
    checks = _checks(data, data.decode)
    corpora = [
        (Path(data.emodb).parent.name or "emodb", read_emotions, data.emodb),
        ("IEMOCAP", read_iemocap, data.iemocap),
    ]
    corpora = [each for each in corpora if each[-1]]
    found = []
    for dataset, read, path in corpora:
        name = "emotion" if len(corpora) == 1 else f"emotion_{dataset}"
        loaded = _listed(
            functools.partial(read, path, checks=checks), path,
            workdir / f"unusable_{name}.jsonl",
        )  # fmt: skip
        found.append(EmotionCorpus(name, dataset, loaded.questions))
    return found


def _check_overlap(
    config: ConfigDict, train: Sequence[Question], tasks: Sequence[QuestionTask], workdir: Path
) -> None:
    tests = {task.name: task.questions for task in tasks}
    data = config.data
    check_overlap(train, tests, workdir / "overlap.jsonl", data.copies, data.max_seconds)


def limited(config: ConfigDict, task: QuestionTask) -> QuestionTask:
    """A task with at most ``evaluate.limit`` questions: a random part, in the file's order."""
    limit, count = config.evaluate.limit, len(task.questions)
    if not limit or count <= limit:
        return task
    rng = np.random.default_rng((config.seed, _SAMPLED))
    kept = np.sort(rng.permutation(count)[:limit])
    return QuestionTask(
        task.name, task.dataset, tuple(task.questions[n] for n in kept), task.how, task.classes
    )


def _askable(
    config: ConfigDict, workdir: Path, student: LanguageModel, task: QuestionTask
) -> QuestionTask:
    """The task's questions that make a prompt; the others are listed, too many are an error."""
    builder = builder_of(config, student, None)
    room = config.evaluate.max_new_tokens if task.how == "generate" else 0
    kept, problems = [], []
    for number, question in enumerate(task.questions, start=1):
        try:
            builder.prompt(question, [clip_samples(path) for path in question.audio], room)
            kept.append(question)
        except ExampleError as error:
            problems.append(Problem(number, question.id, error.reason, fatal=True))
    if not problems:
        return task
    listing = workdir / f"unaskable_{task.name}.jsonl"
    _write(problems, listing)
    share = f"{len(problems)} of {len(task.questions)} questions of {task.name} make no prompt"
    if not kept or len(problems) > config.data.max_bad_fraction * len(task.questions):
        raise QuestionsError(
            f"{share} (all in {listing}); the first, '{problems[0].audio_path}': "
            f"{problems[0].reason}",
            tuple(problems),
        )
    print(f"{share} and are left out: {listing}", flush=True)
    return QuestionTask(task.name, task.dataset, tuple(kept), task.how, task.classes)


# ---------------------------------------------------------------------------------------- models


def wants_teacher(config: ConfigDict) -> bool:
    """Whether any arm learns from the text teacher."""
    changes = config.arms.values() if config.arms else [{}]
    return any(each.get("text_weight", config.loss.text_weight) for each in changes)


def load_student(config: ConfigDict, mesh: Mesh) -> LanguageModel:
    """The audio language model of ``config.student``, with float32 master parameters.

    Raises:
      UserError: it does not load, or is text-only.
    """
    block = config.student
    model = _load(config, "student", mesh, param_dtype=jnp.float32, remat=block.remat)
    if not model.takes_audio:
        raise UserError(
            f"config.student.source {block.source!r} is text-only; the student has to be an audio "
            "language model"
        )
    return model


def load_text_teacher(config: ConfigDict, mesh: Mesh) -> LanguageModel:
    """The text-only model of ``config.teacher``; ``teacher.chat`` goes into its chat template.

    Raises:
      UserError: it does not load, or is audio-conditioned.
    """
    model = _load(config, "teacher", mesh)
    if model.takes_audio:
        raise UserError(
            f"config.teacher.source {config.teacher.source!r} takes audio; the text teacher has to "
            "be text-only"
        )
    return model


def _load(config: ConfigDict, name: str, mesh: Mesh, **settings) -> LanguageModel:
    block = config[name]
    weights = resolve(block.source)
    chat = block.get("chat")
    tokenizer = chat_tokenizer(weights, options=chat.to_dict()) if chat else None
    print(f"loading {block.source}", flush=True)
    return load_language_model(
        weights, mesh, dtype=dtype_of(config, name), tokenizer=tokenizer, **settings
    )
