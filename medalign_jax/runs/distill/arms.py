"""One arm of a distillation: a method, fitted on questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from medalign_jax.data.questions.batches import Extras
from medalign_jax.data.questions.prompts import SequenceBuilder
from medalign_jax.data.questions.question import Fold, Question
from medalign_jax.data.questions.source import QuestionData
from medalign_jax.language_model import LanguageModel
from medalign_jax.methods.base import Method
from medalign_jax.methods.distill import Distill
from medalign_jax.methods.text_teacher import LIVE
from medalign_jax.models.layers.sharded_weights import over_mesh
from medalign_jax.runs.distill import cache as distill_cache
from medalign_jax.runs.parts.blocks import loop_config, optimizer_config
from medalign_jax.runs.parts.distillation import (
    audio_lm_student_of,
    batches_of,
    builder_of,
    distill_config,
    lora_of,
    open_all,
    teacher_form,
    text_teacher_of,
)
from medalign_jax.train.loop import fit

Tree = Any


@dataclass(frozen=True)
class QuestionTask:
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
    tasks: tuple[QuestionTask, ...]
    folds: tuple[Fold, ...] = ()
    keep: str = "best"


def train_on(
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
    config = config.copy_and_resolve_references()
    if changes is not None:
        config.train.update({"steps": changes.steps, "batch_size": changes.batch_size})
        config.optimizer.learning_rate = changes.learning_rate
    opened = [open_all(config, folder, questions, builder)]
    if valid:
        opened.append(open_all(config, folder, valid, builder, "unusable_held_out.jsonl"))
    extras = None if extras_of is None else extras_of(opened)
    loop = loop_config(config, len(opened[0]), "questions")
    batches = batches_of(config, mesh, opened, clip_samples, extras)
    fitted = fit(method, batches, optimizer_config(config), loop, folder, mesh, what)
    return fitted.best_params if valid and keep == "best" else fitted.last_params


def fit_arm(setting: Setting, config: ConfigDict, folder: Path, what: str) -> tuple[Distill, Tree]:
    """One arm: the method, and the parameters that it ends with."""
    loss, form = distill_config(config), teacher_form(config)
    if not setting.valid:
        loss = replace(loss, monitor_acoustic=False)  # it would hold a snapshot for nothing
    teacher = setting.teacher if loss.text_weight else None
    builder = builder_of(config, setting.student, teacher)
    student = _on_mesh(setting.student, setting.mesh)
    teacher = None if teacher is None else _on_mesh(teacher, setting.mesh)
    method = Distill(
        audio_lm_student_of(student, lora_of(config)),
        loss,
        None if teacher is None else text_teacher_of(teacher, builder, form),
    )

    def stored(data: list[QuestionData]) -> Extras:
        """Lets the teacher run over the data first."""
        fingerprint = distill_cache.fingerprint_of(method, teacher, config.teacher.top_k)
        base = Path(config.teacher.cache or setting.workdir / "teacher_cache")
        return distill_cache.fill(
            base / distill_cache.folder_name(fingerprint), fingerprint, teacher, data,
            setting.mesh, config.train.batch_size, what,
        )  # fmt: skip

    params = train_on(
        config, folder, setting.mesh, method, setting.train, builder, what, valid=setting.valid,
        clip_samples=student.clip_samples,
        extras_of=None if teacher is None or form == LIVE else stored, keep=setting.keep,
    )  # fmt: skip
    return method, params


def _on_mesh(model: LanguageModel, mesh: Mesh) -> LanguageModel:
    """The model, which gathers its weights layer by layer where the mesh divides them."""
    return replace(model, module=over_mesh(model.module, mesh, model.sharding))
