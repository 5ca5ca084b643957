"""What a config alone says about its run, checked before data are made or read and weights loaded.

A part that is built late is built here once, of shapes alone: whatever it refuses (an unknown name,
sides of unequal widths, a teacher that is not there) is refused in the first second.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from medalign_jax.architecture import Architecture
from medalign_jax.audio.clip import PADDINGS
from medalign_jax.core.errors import UserError
from medalign_jax.core.words import did_you_mean
from medalign_jax.data.recordings.manifest import Row
from medalign_jax.evaluate.retrieval import MAPS
from medalign_jax.models.layers.pooling import check_pooling, embed_pooled
from medalign_jax.runs.arms import Arm
from medalign_jax.runs.parts.alignment import check_loss, teacher_width
from medalign_jax.runs.parts.audio import audio_student_of, check_source, samples_of, spec_of
from medalign_jax.runs.parts.blocks import check_batch, mesh_of, typed
from medalign_jax.runs.texts import check_texts
from medalign_jax.train.optimizer import OptimizerConfig, make_schedule


def check_training(config: ConfigDict, made: Architecture, self_supervised: bool) -> None:
    """Builds the parts of one training: mesh, batches, augmentation, optimizer, the loss's term.

    Args:
      config: of the run, or of one of its stages (`stages_of`).
      made: the encoder.
      self_supervised: whether its self-supervised term is part of the loss.

    Raises:
      UserError: what any of them refuses.
    """
    mesh_of(config)
    check_batch(config)
    spec_of(config, made.front_end.sample_rate, config.train.batch_size, True)
    make_schedule(typed(OptimizerConfig, config.optimizer, "optimizer"), 1)
    student = audio_student_of(config, made, None)
    if self_supervised:
        student.term  # noqa: B018 - made when it is asked for


def stages_of(config: ConfigDict) -> Iterator[tuple[str, ConfigDict]]:
    """("pretrain" or "supervised", the config with its changes) of the stages that are on."""
    for stage in ("pretrain", "supervised"):
        if config[stage].enabled and not (stage == "pretrain" and config.encoder.source):
            block = config.copy_and_resolve_references()
            with block.unlocked():
                block.update(config[stage].changes)
            yield stage, block


def check_alignment(config: ConfigDict, made: Architecture, arms: Sequence[Arm]) -> None:
    """Everything of an AcuLa run that needs no recording: stages, arms, teachers, evaluation.

    Raises:
      UserError: the first thing that would stop the run later.
    """
    check_evaluation(config, made)
    check_source(config, made)
    for stage, block in stages_of(config):
        check_training(block, made, self_supervised=stage == "pretrain")
    widths: dict[str, int] = {}
    for arm in arms:
        check_loss(arm.config)
        check_training(arm.config, made, self_supervised=bool(arm.config.loss.ssm_weight))
        check_texts(arm.config)
        key = arm.config.teacher.to_json_best_effort()
        if key not in widths:
            widths[key] = teacher_width(arm.config)
        _check_widths(arm, made, widths[key])
    _check_map(config, made, widths[arms[0].config.teacher.to_json_best_effort()])


def check_fills(
    config: ConfigDict, arms: Sequence[Arm], train: Sequence[Row], fold: str = ""
) -> None:
    """Refuses batches that the recordings of a training split do not fill.

    Args:
      config: of the run.
      arms: its alignments; () where the run is one training by itself.
      train: rows of the training split, of one fold.
      fold: its name, for the message.

    Raises:
      UserError: names the training, both numbers, and the key.
    """
    if config.data.mix:  # simulated recordings join them
        return
    trainings = [("", config)]
    if arms:
        trainings = [*stages_of(config), *((arm.name, arm.config) for arm in arms)]
    for name, block in trainings:
        size, what, count = block.train.batch_size, "recordings", len(train)
        if block.data.one_per_subject:
            what, count = "subjects", len({row.subject_id or row.row for row in train})
        if count < size:
            of = " of ".join(filter(None, (name, fold)))
            raise UserError(
                f"{count} training {what} fill no batch of {size}{f' ({of})' if of else ''}: lower "
                "train.batch_size"
            )


def check_evaluation(config: ConfigDict, made: Architecture) -> None:
    """Refuses mistakes in settings that come last.

    Raises:
      UserError: names the key, and what it may be.
    """
    evaluate = config.evaluate
    if not evaluate.enabled:
        return
    for key, value, known in (("map", evaluate.map, MAPS), ("pad", evaluate.pad, PADDINGS)):
        if value not in known:
            raise UserError(
                f"evaluate.{key} is {value!r}{did_you_mean(value, known)}; it is one of "
                f"{', '.join(known)}"
            )
    check_pooling(made.module.config, evaluate.pooling, evaluate.layer)
    embedding_width(config, made)


def embedding_width(config: ConfigDict, made: Architecture) -> int:
    """D of the embeddings that are evaluated.

    Raises:
      UserError: a pooling that the encoder's tokens do not allow.
    """
    evaluate, sizes = config.evaluate, made.module.config
    if evaluate.pooling == "mean" and evaluate.layer is None:
        return sizes.width
    pooled = functools.partial(
        embed_pooled, made.module, pooling=evaluate.pooling, layer=evaluate.layer
    )
    frames = made.front_end.frames(samples_of(config, made.front_end.sample_rate))
    features = jax.ShapeDtypeStruct((1, frames, sizes.mels), jnp.float32)
    return jax.eval_shape(pooled, made.abstract_params(), features).shape[1]


def _check_widths(arm: Arm, made: Architecture, teacher: int) -> None:
    """Of the losses that compare number by number."""
    loss, sizes = arm.config.loss, made.module.config
    if loss.align == "cka" or not loss.align_weight:
        return
    text = loss.out if loss.text_head == "mlp" else teacher
    for layer in loss.layers:
        own = sizes.width if layer == -1 else sizes.layer_widths[layer]
        audio = loss.out if loss.audio_head == "mlp" else own
        if audio != text:
            raise UserError(
                f"loss.align={loss.align} ({arm.name}) compares vectors of equal width, and the "
                f"audio side has {audio} numbers, the text side {text}: set loss.audio_head=mlp "
                "and loss.text_head=mlp"
            )


def _check_map(config: ConfigDict, made: Architecture, teacher: int) -> None:
    """Sentences and retrieval take embeddings through the heads into the space of the texts."""
    evaluate, loss = config.evaluate, config.loss
    if not _measures_sentences(config):
        return
    embedded = embedding_width(config, made)
    if loss.audio_head == "mlp" and embedded != made.module.config.width:
        raise UserError(
            f"evaluate.sentences: the audio head takes {made.module.config.width} numbers, and "
            f"evaluate.pooling={evaluate.pooling} gives {embedded}: set evaluate.sentences=False, "
            "or evaluate.pooling=mean"
        )
    if evaluate.map != "none":
        return
    audio = loss.out if loss.audio_head == "mlp" else embedded
    text: Any = loss.out if loss.text_head == "mlp" else teacher
    if loss.text_head != "mlp" and config.teacher.whiten:
        text = f"as many as whitening keeps of {teacher}"
    if audio != text:
        raise UserError(
            f"evaluate.map=none compares sound and text as they come out of their heads, and the "
            f"audio side has {audio} numbers, the text side {text}: take evaluate.map=procrustes, "
            "or set loss.audio_head=mlp and loss.text_head=mlp"
        )


def _measures_sentences(config: ConfigDict) -> bool:
    """Whether sentences and retrieval are measured after the alignment, as far as is known."""
    evaluate = config.evaluate
    kinds: Mapping[str, str] = dict(task.partition(":")[::2] for task in evaluate.tasks)
    return bool(
        evaluate.enabled
        and evaluate.sentences
        and evaluate.aggregate == "recording"
        and kinds.get("label", "regression") in ("", "classification")
        and -1 in tuple(config.loss.layers)
    )
