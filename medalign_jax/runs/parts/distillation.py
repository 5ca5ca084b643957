"""An audio language model, its text teacher, and their batches of questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from medalign_jax.core.errors import UserError
from medalign_jax.core.mesh import local_rows
from medalign_jax.data.questions.batches import (
    Extras,
    QuestionBatchSpec,
    make_question_iterator,
)
from medalign_jax.data.questions.prompts import PromptFormat, SequenceBuilder
from medalign_jax.data.questions.question import Question
from medalign_jax.data.questions.source import QuestionData, open_questions
from medalign_jax.data.recordings.manifest import write_problems
from medalign_jax.language_model import LanguageModel
from medalign_jax.methods.distill import DistillConfig, Student
from medalign_jax.methods.text_teacher import LAST, LIVE, TOP_K, TextTeacher
from medalign_jax.models.layers.lora import LoraConfig
from medalign_jax.runs.parts.blocks import check_batch, dtype_of, optimizer_config, typed
from medalign_jax.train.loop import Data
from medalign_jax.train.optimizer import make_schedule


def builder_of(
    config: ConfigDict, model: LanguageModel, teacher: LanguageModel | None
) -> SequenceBuilder:
    """Makes token ids for a model, audio-conditioned or text-only, and its teacher."""
    return SequenceBuilder(
        model.tokenizer,
        None if teacher is None else teacher.tokenizer,
        model.audio_tokens if model.takes_audio else None,
        config.data.max_length,
        max_samples=model.max_samples if model.takes_audio else None,
        format=PromptFormat(),
    )


def audio_lm_student_of(model: LanguageModel, lora: LoraConfig | None = None) -> Student:
    """The method's view of an audio language model."""
    return Student(model.module, model.front_end, model.params, model.sharding, lora)


def text_teacher_of(
    model: LanguageModel, builder: SequenceBuilder, form: str = LIVE
) -> TextTeacher:
    """The method's view of a text model."""
    return TextTeacher(model.module, model.params, model.sharding, builder.shared_vocab, form)


def teacher_form(config: ConfigDict) -> str:
    """How config.teacher asks for the teacher: "live", or the form of its cache.

    Raises:
      UserError: an unknown mode or form.
    """
    block = config.teacher
    for name, known in (("mode", (LIVE, "cached")), ("form", (LAST, TOP_K))):
        if block[name] not in known:
            raise UserError(f"teacher.{name} {block[name]!r} is not one of {', '.join(known)}")
    return LIVE if block.mode == LIVE else block.form


def lora_of(config: ConfigDict) -> LoraConfig | None:
    """The adapter that config.lora asks for, or None."""
    block = config.lora.copy_and_resolve_references()
    with block.unlocked():
        enabled = block.enabled
        del block.enabled
    return typed(LoraConfig, block, "lora") if enabled else None


def distill_config(config: ConfigDict) -> DistillConfig:
    """The loss."""
    return typed(DistillConfig, config.loss, "loss")


def check_settings(config: ConfigDict) -> None:
    """Builds what an arm is made of beside models and data.

    Raises:
      UserError: what any of it refuses.
    """
    check_batch(config)
    distill_config(config)
    teacher_form(config)
    lora_of(config)
    make_schedule(optimizer_config(config), 1)
    for name in ("student", "teacher"):
        if "dtype" in config[name]:
            dtype_of(config, name)


def open_all(
    config: ConfigDict,
    folder: Path,
    questions: Sequence[Question],
    builder: SequenceBuilder,
    listed: str = "unusable_questions.jsonl",
) -> QuestionData:
    """Token ids of all questions; those that make no example are listed in the folder."""
    data = open_questions(questions, builder, max_bad_fraction=config.data.max_bad_fraction)
    if jax.process_index() == 0:
        write_problems(data.problems, folder / listed)
    if data.problems:
        print(f"{len(data.problems)} questions make no example: {folder / listed}")
    return data


def batches_of(
    config: ConfigDict,
    mesh: Mesh,
    opened: Sequence[QuestionData],
    clip_samples: int | None,
    extras: Extras | None,
) -> Data:
    """Batches of the first of the data, and of the second, if there is one, to evaluate on."""
    batch_size, edges = config.train.batch_size, tuple(config.data.buckets)
    spec = QuestionBatchSpec(
        batch_size, edges, samples=clip_samples, seed=config.seed, workers=config.data.workers
    )
    rows = local_rows(mesh, batch_size)
    first = make_question_iterator(opened[0], replace(spec, workers=0, prefetch=1), rows, extras)
    # The tokens of a teacher that does not run stay on the host.
    unread = () if extras is None else ("teacher_ids", "teacher_mask", "teacher_at")
    names = tuple(name for name in next(first) if name not in unread)
    first.close()

    def held_out():
        unshuffled = replace(spec, shuffle=False, epochs=1, workers=0)
        return make_question_iterator(opened[1], unshuffled, rows, extras)

    iterator = make_question_iterator(opened[0], spec, rows, extras)
    return Data(iterator, names, held_out if len(opened) > 1 else None)
