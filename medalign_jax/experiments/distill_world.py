"""The demo's world: a small student that can hear, a small teacher that can reason, questions.

simulated hearts -+-> acoustic and plain questions -> student (audio language model, from nothing)
                  +-> reasoning questions to distil from, and to test with
random cases -------> textual reasoning questions ---> teacher (text model, from nothing)

Student and teacher have the architectures, the file layout and the code path of the published
ones (Qwen2.5-Omni's thinker, Qwen3); only their sizes and their words are small.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from medalign_jax.data import simulated_questions as world
from medalign_jax.data.chat import AUDIO_TOKEN, ChatTokenizer
from medalign_jax.data.prompts import PromptFormat
from medalign_jax.data.questions import Question
from medalign_jax.data.simulated_cases import write_cases
from medalign_jax.data.word_tokenizer import write_word_tokenizer
from medalign_jax.experiments import distill_parts as parts
from medalign_jax.language_model import LanguageModel, load_language_model, random_language_model
from medalign_jax.methods.distill import Distill, DistillConfig
from medalign_jax.methods.finetune import TextFinetune

_TEACHER_ONLY = ("<think>", "</think>", "<tool_call>")  # Qwen3 has tokens that Qwen2.5 has not


def simulated_setting(config: ConfigDict, workdir: Path, mesh: Mesh) -> parts.Setting:
    """Everything that the arms start from, made once under the workdir."""
    sizes, folder = config.world, workdir / "world"
    recorded = {
        name: _recorded(folder / name, sizes[name], config.seed + place, sizes.seconds)
        for place, name in enumerate(("base", "reasoning", "test"), start=1)
    }
    texts = world.textual_questions(sizes.texts, config.seed)
    every = [*texts, *(q for questions in recorded.values() for q in questions)]
    student, teacher = _models(config, folder, every)
    # Like any audio language model it starts from one that has read, if less than its teacher.
    known = [q for q in recorded["base"] if q.task != "reasoning"] + texts[: sizes.read]
    student = _grown(config, workdir / "student", mesh, student, known, "student")
    teacher = _grown(config, workdir / "teacher", mesh, teacher, texts, "teacher")
    # Nothing that is distilled tells of the acoustic task.
    train = [q for q in recorded["reasoning"] if q.task in ("reasoning", "plain")]
    tasks = tuple(
        parts.Task(name, "simulated hearts", _of(recorded["test"], name), how, name == "acoustic")
        for name, how in (("reasoning", "generate"), ("plain", "rank"), ("acoustic", "rank"))
    )
    return parts.Setting(config, workdir, mesh, student, teacher, tuple(train), (), tasks)


def _of(questions: Sequence[Question], task: str) -> tuple[Question, ...]:
    return tuple(q for q in questions if q.task == task)


def _recorded(folder: Path, count: int, seed: int, seconds: float) -> list[Question]:
    listing = write_cases(folder, count, seed, seconds)
    return world.recorded_questions(listing, seed, topics=2, facts=2)


def _models(
    config: ConfigDict, folder: Path, questions: Sequence[Question]
) -> tuple[LanguageModel, LanguageModel]:
    """Random models with a word-level tokeniser of all words that occur."""
    words = world.words(questions, PromptFormat())
    tokenizers = [
        ChatTokenizer(write_word_tokenizer(folder / name, words, world.MARKS, more))
        for name, more in (("student_words", ()), ("teacher_words", _TEACHER_ONLY))
    ]
    settings = {"remat": False}
    return (
        random_language_model(_student_json(config, tokenizers[0]), tokenizers[0], config.seed,
                              **settings),
        random_language_model(_teacher_json(config, tokenizers[1]), tokenizers[1], config.seed,
                              **settings),
    )  # fmt: skip


def _student_json(config: ConfigDict, tokenizer: ChatTokenizer) -> dict[str, Any]:
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


def _teacher_json(config: ConfigDict, tokenizer: ChatTokenizer) -> dict[str, Any]:
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
        builder = parts.builder_of(config, model, None)
        loss = DistillConfig(text_weight=0.0, acoustic_weight=0.0, sft_weight=1.0)
        if model.listens:
            method = Distill(parts.student_of(model), loss)
        else:
            method = TextFinetune(model.module, model.params, model.sharding)
        params = parts.train(
            config, folder, mesh, method, questions, builder, what, config.stages[what]
        )
        trained = model.with_params(params["student" if model.listens else "text"])
        partial = folder / "export.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        trained.save(partial).rename(exported)
    loaded = load_language_model(exported, mesh)
    return dataclasses.replace(loaded, config_json=model.config_json)
