"""The demo's world: a small audio-conditioned student, a small text-only teacher, questions.

simulated hearts ---> acoustic, plain questions -+
emotional speech --> (in place of the acoustic) -+-> student (audio language model, from nothing)
random cases -----> some textual questions ------+
                +-> all of them -------------------> teacher (text model, from nothing)
simulated hearts ---> reasoning and plain questions: to distil from, held out, to test with

Student and teacher have the architectures, the file layout and the code path of the published
ones (Qwen2.5-Omni's thinker, Qwen3); only their sizes and their words are small.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict

from medalign_jax.core import processes
from medalign_jax.core.errors import UserError
from medalign_jax.data.questions.prompts import PromptFormat
from medalign_jax.data.questions.question import Question
from medalign_jax.datasets.simulated import questions as world
from medalign_jax.datasets.simulated.cases import write_cases
from medalign_jax.language_model import LanguageModel, load_language_model, random_language_model
from medalign_jax.methods.distill import Distill, DistillConfig
from medalign_jax.methods.text_finetune import TextFinetune
from medalign_jax.runs.distill.arms import QuestionTask, Setting, train_on
from medalign_jax.runs.distill.data import emotion_corpora, limited
from medalign_jax.runs.parts.distillation import audio_lm_student_of, builder_of
from medalign_jax.text.chat import AUDIO_TOKEN, ChatTokenizer
from medalign_jax.text.word_tokenizer import write_word_tokenizer

_SIMULATED = "simulated hearts"
_TEACHER_ONLY = ("<think>", "</think>", "<tool_call>")  # Qwen3 has tokens that Qwen2.5 has not


def simulated_setting(
    config: ConfigDict, workdir: Path, mesh: Mesh, begin: Callable[[], None] = lambda: None
) -> Setting:
    """Everything that the arms start from, made once under the workdir.

    `begin` is called when the data are there, before anything is trained.
    """
    _refuse_published(config)
    sizes, folder = config.world, workdir / "world"
    recorded = {
        name: _recorded(
            folder / name, sizes[name], seed, sizes.seconds,
            label_noise=sizes.label_noise if name == "reasoning" else 0.0,
        )
        for name, seed in _seeds(config).items()
    }  # fmt: skip
    acoustic_task = _acoustic(config, workdir, recorded)
    texts = world.textual_questions(sizes.texts, config.seed)
    every = [*texts, *acoustic_task.learnt, *acoustic_task.task.questions]
    every += [q for questions in recorded.values() for q in questions]
    begin()
    student, teacher = _models(config, folder, every)
    # Like any audio language model it starts from one that has read, if less than its teacher.
    known = [*acoustic_task.learnt, *_of(recorded["base"], "plain"), *texts[: sizes.read]]
    student = _grown(config, workdir / "student", mesh, student, known, "student")
    teacher = _grown(config, workdir / "teacher", mesh, teacher, texts, "teacher")
    # Nothing that is distilled mentions the acoustic task.
    train, valid = (_distilled(recorded[name]) for name in ("reasoning", "valid"))
    tasks = (
        QuestionTask("reasoning", _SIMULATED, _of(recorded["test"], "reasoning"), "generate"),
        QuestionTask("plain", _SIMULATED, _of(recorded["test"], "plain"), "rank"),
        acoustic_task.task,
    )
    tasks = tuple(limited(config, task) for task in tasks)
    # The held-out questions watch, and are there to choose by; an arm ends where it ends.
    return Setting(config, workdir, mesh, student, teacher, train, valid, tasks, keep="last")


def _seeds(config: ConfigDict) -> dict[str, int]:
    """Of each set of recordings; the test's own, so that a choice can be made without it."""
    names = ("base", "reasoning", "valid")
    found = {name: config.seed + place for place, name in enumerate(names, start=1)}
    if config.world.test_seed in found.values():
        raise UserError(
            f"config.world.test_seed={config.world.test_seed} makes the recordings that "
            f"config.seed={config.seed} trains on or holds out; take another"
        )
    return found | {"test": config.world.test_seed}


def _distilled(questions: Sequence[Question]) -> tuple[Question, ...]:
    return (*_of(questions, "reasoning"), *_of(questions, "plain"))


def _refuse_published(config: ConfigDict) -> None:
    """What the simulated world has no place for is not passed over in silence."""
    given = [f"data.{name}" for name in ("mmau", "iemocap", "folds") if config.data[name]]
    given += [f"{name}.source" for name in ("student", "teacher") if config[name].source]
    if given:
        raise UserError(
            f"config.{given[0]} goes with config.data.questions: without them hearts are "
            "simulated, for a student and a teacher that are made here and know nothing else "
            "(data.emodb can join them)"
        )


class _Heard(NamedTuple):
    """The acoustic task: what the student learns of it, and its test."""

    learnt: tuple[Question, ...]
    task: QuestionTask


def _acoustic(config: ConfigDict, workdir: Path, recorded: dict[str, list[Question]]) -> _Heard:
    """The recorder's noise, or with ``data.emodb`` the emotion of real speech."""
    if not config.data.emodb:
        learnt, asked = (_of(recorded[name], "acoustic") for name in ("base", "test"))
        return _Heard(learnt, QuestionTask("acoustic", _SIMULATED, asked, "rank", classes=True))
    (corpus,) = emotion_corpora(config.data, workdir)
    task = corpus.test()
    learnt = tuple(q for q in corpus.questions if q not in task.questions)
    if not learnt:
        raise UserError(
            f"config.data.emodb: '{config.data.emodb}' needs a column 'split' that keeps some "
            "speakers for 'test' and leaves others to learn from"
        )
    return _Heard(learnt, task)


def _of(questions: Sequence[Question], task: str) -> tuple[Question, ...]:
    return tuple(q for q in questions if q.task == task)


def _recorded(
    folder: Path, count: int, seed: int, seconds: float, label_noise: float
) -> list[Question]:
    processes.by_first(lambda: write_cases(folder, count, seed, seconds))
    listing = write_cases(folder, count, seed, seconds)  # finds what is there
    return world.recorded_questions(listing, seed, topics=2, facts=2, label_noise=label_noise)


def _models(
    config: ConfigDict, folder: Path, questions: Sequence[Question]
) -> tuple[LanguageModel, LanguageModel]:
    """Random models with a word-level tokeniser of all words that occur."""
    words = world.words(questions, PromptFormat())
    folders = {"student_words": (), "teacher_words": _TEACHER_ONLY}

    def write() -> None:
        for name, more in folders.items():
            write_word_tokenizer(folder / name, words, world.MARKS, more)

    processes.by_first(write)
    tokenizers = [ChatTokenizer(folder / name) for name in folders]
    settings = {"remat": False}
    return (
        random_language_model(student_json(config, tokenizers[0]), tokenizers[0], config.seed,
                              **settings),
        random_language_model(teacher_json(config, tokenizers[1]), tokenizers[1], config.seed,
                              **settings),
    )  # fmt: skip


def student_json(config: ConfigDict, tokenizer: ChatTokenizer) -> dict[str, Any]:
    """A config.json of Qwen2.5-Omni's thinker."""
    c = config.world.student
    head_dim = c.width // c.heads
    third = head_dim // 6
    sections = [head_dim // 2 - 2 * third, third, third]
    return {
        "model_type": "qwen2_5_omni_thinker",
        "audio_token_index": tokenizer.ids(AUDIO_TOKEN)[0],
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "qwen2_5_omni_text",
            "vocab_size": len(tokenizer.tokens()),
            "hidden_size": c.width,
            "intermediate_size": c.mlp_width,
            "num_hidden_layers": c.depth,
            "num_attention_heads": c.heads,
            "num_key_value_heads": c.heads // 2,
            "max_position_embeddings": 1024,
            "rope_scaling": {"rope_type": "default", "mrope_section": sections},
        },
        "audio_config": {
            "model_type": "qwen2_5_omni_audio_encoder",
            "num_mel_bins": c.mels,
            "d_model": c.audio_width,
            "encoder_layers": c.audio_depth,
            "encoder_attention_heads": c.heads,
            "encoder_ffn_dim": 4 * c.audio_width,
            "n_window": 50,
            "output_dim": c.width,
        },
    }


def teacher_json(config: ConfigDict, tokenizer: ChatTokenizer) -> dict[str, Any]:
    """A config.json of Qwen3."""
    c = config.world.teacher
    return {
        "model_type": "qwen3",
        "vocab_size": len(tokenizer.tokens()),
        "hidden_size": c.width,
        "intermediate_size": c.mlp_width,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.heads // 2,
        "head_dim": c.width // c.heads,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    }


def _grown(
    config: ConfigDict,
    folder: Path,
    mesh: Mesh,
    model: LanguageModel,
    questions: Sequence[Question],
    what: str,
) -> LanguageModel:
    """The model after supervised training on the questions; read back where it is done."""
    exported = folder / "export"
    if not (exported / "config.json").is_file():
        builder = builder_of(config, model, None)
        loss = DistillConfig(text_weight=0.0, acoustic_weight=0.0, sft_weight=1.0)
        if model.takes_audio:
            method = Distill(audio_lm_student_of(model), loss)
        else:
            method = TextFinetune(model.module, model.params, model.sharding)
        params = train_on(
            config, folder, mesh, method, questions, builder, what, config.stages[what]
        )
        trained = model.with_params(params["student" if model.takes_audio else "text"])
        partial = folder / "export.partial"
        processes.by_first(lambda: shutil.rmtree(partial, ignore_errors=True))
        trained.save(partial)
        processes.by_first(lambda: partial.rename(exported))
    loaded = load_language_model(exported, mesh)
    return dataclasses.replace(loaded, config_json=model.config_json)
