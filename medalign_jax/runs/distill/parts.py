"""Turns the blocks of a distillation config into its parts; what methods share is `runs.build`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
from medalign_jax.data.questions.question import Fold, Question
from medalign_jax.data.questions.source import QuestionData, open_questions
from medalign_jax.data.recordings.manifest import write_problems
from medalign_jax.language_model import LanguageModel
from medalign_jax.methods.base import Method
from medalign_jax.methods.distill import Distill, DistillConfig, Student
from medalign_jax.methods.text_teacher import LAST, LIVE, TOP_K, TextTeacher
from medalign_jax.models.layers.lora import LoraConfig
from medalign_jax.models.layers.sharded_weights import over_mesh
from medalign_jax.runs.build import check_batch, dtype_of, typed
from medalign_jax.runs.distill import cache as distill_cache
from medalign_jax.train.loop import Data, LoopConfig, fit
from medalign_jax.train.optimizer import OptimizerConfig, make_schedule

Tree = Any


@dataclass(frozen=True)
class Task:
    """Questions that a model is judged by.

    Attributes:
      name: "reasoning", "acoustic", "mmau", "emotion", ...
      dataset: name of the data.
      questions: of the test.
      how: "generate" or "rank".
      classes: whether it is a classification, scored by unweighted accuracy.
    """

    name: str
    dataset: str
    questions: tuple[Question, ...]
    how: str
    classes: bool = False


@dataclass(frozen=True)
class Setting:
    """What all arms of a run start from.

    Attributes:
      student, teacher: as they are before.
      train, valid: textualised questions.
      tasks: what is measured before and after.
      folds: where one model per fold is trained, on `train` and the fold's own (`distill_folds`).
      keep: what an arm ends with where there is `valid`: "best" by its loss, or "last".
    """

    config: ConfigDict
    workdir: Path
    mesh: Mesh
    student: LanguageModel
    teacher: LanguageModel | None
    train: tuple[Question, ...]
    valid: tuple[Question, ...]
    tasks: tuple[Task, ...]
    folds: tuple[Fold, ...] = ()
    keep: str = "best"


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


def student_of(model: LanguageModel, lora: LoraConfig | None = None) -> Student:
    """The method's view of an audio language model."""
    return Student(model.module, model.front_end, model.params, model.sharding, lora)


def teacher_of(model: LanguageModel, builder: SequenceBuilder, form: str = LIVE) -> TextTeacher:
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
    make_schedule(typed(OptimizerConfig, config.optimizer, "optimizer"), 1)
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


def train(
    config: ConfigDict,
    folder: Path,
    mesh: Mesh,
    method: Method,
    questions: Sequence[Question],
    builder: SequenceBuilder,
    what: str,
    changes: ConfigDict | None = None,
    valid: Sequence[Question] = (),
    clip_samples: int | None = None,
    extras_of: Callable[[list[QuestionData]], Extras] | None = None,
    keep: str = "best",
) -> Tree:
    """Trains a method on questions; `changes` of steps, batch size and rate.

    Gives the last parameters, as in the paper (3 epochs), or with held-out questions the best by
    them, unless `keep` is "last". `extras_of` makes, from all questions that are going to be seen,
    what gives each example further arrays in place of the teacher's tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    block = config.train.copy_and_resolve_references()
    optimizer = config.optimizer.copy_and_resolve_references()
    if changes is not None:
        block.update({"steps": changes.steps, "batch_size": changes.batch_size})
        optimizer.learning_rate = changes.learning_rate
    opened = [open_all(config, folder, questions, builder)]
    if valid:
        opened.append(open_all(config, folder, valid, builder, "unusable_held_out.jsonl"))
    extras = None if extras_of is None else extras_of(opened)
    loop = LoopConfig(
        total_steps=block.steps or (len(opened[0]) // block.batch_size) * block.epochs,
        log_every=block.log_every,
        eval_every=block.eval_every,
        accumulate=block.accumulate,
        seed=config.seed,
        patience=block.patience,
    )
    batches = _batches(config, block.batch_size, mesh, opened, clip_samples, extras)
    settings = typed(OptimizerConfig, optimizer, "optimizer")
    fitted = fit(method, batches, settings, loop, folder, mesh, what)
    return fitted.best_params if valid and keep == "best" else fitted.last_params


def _batches(
    config: ConfigDict,
    batch_size: int,
    mesh: Mesh,
    opened: Sequence[QuestionData],
    clip_samples: int | None,
    extras: Extras | None,
) -> Data:
    """Batches of the first of the data, and of the second, if there is one, to evaluate on."""
    edges = tuple(config.data.buckets)
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


def distill(setting: Setting, config: ConfigDict, folder: Path, what: str) -> tuple[Distill, Tree]:
    """One arm: the method, and the parameters that it ends with."""
    loss, form = distill_config(config), teacher_form(config)
    if not setting.valid:
        loss = replace(loss, monitor_acoustic=False)  # it would hold a snapshot for nothing
    teacher = setting.teacher if loss.text_weight else None
    builder = builder_of(config, setting.student, teacher)
    student = _on_mesh(setting.student, setting.mesh)
    teacher = None if teacher is None else _on_mesh(teacher, setting.mesh)
    method = Distill(
        student_of(student, lora_of(config)),
        loss,
        None if teacher is None else teacher_of(teacher, builder, form),
    )

    def stored(data: list[QuestionData]) -> Extras:
        """Lets the teacher run over the data first."""
        fingerprint = distill_cache.fingerprint_of(method, teacher, config.teacher.top_k)
        base = Path(config.teacher.cache or setting.workdir / "teacher_cache")
        return distill_cache.fill(
            base / distill_cache.folder_name(fingerprint), fingerprint, teacher, data,
            setting.mesh, config.train.batch_size, what,
        )  # fmt: skip

    params = train(
        config, folder, setting.mesh, method, setting.train, builder, what, valid=setting.valid,
        clip_samples=student.clip_samples,
        extras_of=None if teacher is None or form == LIVE else stored, keep=setting.keep,
    )  # fmt: skip
    return method, params


def _on_mesh(model: LanguageModel, mesh: Mesh) -> LanguageModel:
    """The model, which gathers its weights layer by layer where the mesh divides them."""
    return replace(model, module=over_mesh(model.module, mesh, model.sharding))
