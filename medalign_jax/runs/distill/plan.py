"""A distillation in shapes only: the method, state and batch of a config, without an array."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from medalign_jax.audio.whisper_mel import WhisperMel
from medalign_jax.core.batches import QuestionBatch, shapes
from medalign_jax.core.errors import UserError
from medalign_jax.core.mesh import batch_sharding, check_batch, placed, shardings
from medalign_jax.language_model import abstract_params, build_module
from medalign_jax.methods.base import Method
from medalign_jax.methods.distill import Distill, Student
from medalign_jax.methods.text_teacher import TextTeacher
from medalign_jax.models.audio_lm import (
    QWEN2_5_OMNI_3B,
    QWEN2_5_OMNI_7B,
    QWEN2_AUDIO_7B,
    AudioLM,
    AudioLMConfig,
)
from medalign_jax.models.language.decoder import Decoder
from medalign_jax.models.language.decoder_config import QWEN3_8B
from medalign_jax.models.layers.sharded_weights import over_mesh
from medalign_jax.runs.parts.blocks import typed
from medalign_jax.runs.parts.distillation import distill_config, lora_of
from medalign_jax.train.optimizer import OptimizerConfig, make_optimizer
from medalign_jax.train.step import init_state, state_shardings, trace_train_step
from medalign_jax.weights.tables import audio_lm as audio_lm_table
from medalign_jax.weights.tables import decoder as decoder_table

Tree = Any

# Sizes of published models, so that a plan needs no download.
PRESETS = {
    "Qwen/Qwen2.5-Omni-7B": QWEN2_5_OMNI_7B,
    "Qwen/Qwen2.5-Omni-3B": QWEN2_5_OMNI_3B,
    "Qwen/Qwen2-Audio-7B": QWEN2_AUDIO_7B,
    "Qwen/Qwen3-8B": QWEN3_8B,
}


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Shapes of a batch's rows.

    Attributes:
      sequence: tokens of the student's and of the teacher's sequence.
      response: tokens of the response at most.
      seconds: of a clip.
      clips: per row.
    """

    sequence: int
    response: int
    seconds: float
    clips: int = 1


def trace(config: ConfigDict, mesh: Mesh, lengths: Lengths, attention: str) -> jax.stages.Traced:
    """The train step of a config, traced for a mesh of any devices, attached or not.

    Args:
      config: of ``configs/distill.py``.
      mesh: where it would run.
      lengths: of a batch.
      attention: back end of the language models' attention; "auto" would choose for this machine.

    Raises:
      UserError: a model whose sizes are not known here, or settings that make no method.
    """
    method = planned_method(config, mesh, attention)
    params = jax.eval_shape(method.init, jax.random.key(0))
    settings = typed(OptimizerConfig, config.optimizer, "optimizer")
    optimizer, schedule = make_optimizer(settings, params, total_steps=1000)
    state = jax.eval_shape(lambda params: init_state(params, optimizer, 0), params)
    state = placed(state, state_shardings(state, method.sharding_rules, mesh))
    frozen = placed(method.frozen, shardings(method.frozen, method.frozen_rules, mesh))
    batch = planned_batch(config.train.batch_size, lengths, mesh)
    return trace_train_step(
        method, optimizer, schedule, mesh, state, frozen, batch, config.train.accumulate
    )


def planned_method(config: ConfigDict, mesh: Mesh, attention: str) -> Method:
    """The method of a config; shapes take the place of its parameters."""
    loss = distill_config(config)
    model = _module(
        config.student.source, mesh, attention, dtype=jnp.dtype(config.student.dtype),
        param_dtype=jnp.float32, remat=config.student.remat,
    )  # fmt: skip
    if not isinstance(model, AudioLM):
        raise UserError(
            f"config.student.source {config.student.source!r} is not an audio language model"
        )
    front_end = WhisperMel(n_mels=model.config.audio.mels)
    student = Student(
        model, front_end, abstract_params(model), audio_lm_table.SHARDING, lora_of(config)
    )
    if not loss.text_weight:
        return Distill(student, loss)
    return Distill(student, loss, _teacher(config, mesh, attention, model.config.text.vocab_size))


def _teacher(config: ConfigDict, mesh: Mesh, attention: str, tokens: int) -> TextTeacher:
    if config.teacher.mode != "live":
        raise UserError("a plan is made for a live teacher; set config.teacher.mode=live")
    dtype = jnp.dtype(config.teacher.dtype)
    source = config.teacher.source
    model = _module(source, mesh, attention, dtype=dtype, param_dtype=dtype, remat=False)
    if not isinstance(model, Decoder):
        raise UserError(f"config.teacher.source {source!r} is not a text model")
    # Without their tokenisers, as many tokens as both can share at most.
    shared = min(tokens, model.config.vocab_size)
    return TextTeacher(model, abstract_params(model), decoder_table.SHARDING, shared)


def _module(source: str, mesh: Mesh, attention: str, **settings: Any) -> nn.Module:
    """The module of a published model or of a folder with a config.json."""
    takes_audio = isinstance(PRESETS.get(source), AudioLMConfig)
    path = Path(source) / "config.json"
    if source in PRESETS:
        module = (AudioLM if takes_audio else Decoder)(PRESETS[source], **settings)
    elif path.is_file():
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            raise UserError(f"{path} is not JSON: {error}") from error
        module = build_module(content, **settings)
    else:
        raise UserError(
            f"the sizes of {source!r} are not known here; give a folder with its config.json, or "
            f"one of {', '.join(PRESETS)}"
        )
    tables = audio_lm_table if isinstance(module, AudioLM) else decoder_table
    return over_mesh(_with_attention(module, attention), mesh, tables.SHARDING)


def _with_attention(module: nn.Module, backend: str) -> nn.Module:
    if isinstance(module, AudioLM):
        # A tower's windows of 100 tokens are too short for a fused kernel.
        tower = dataclasses.replace(module.config.audio, attention="xla")
        module = module.clone(config=dataclasses.replace(module.config, audio=tower))
    return module.clone(backend=backend)


def planned_batch(rows: int, lengths: Lengths, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch as `data.questions.batches` makes it."""
    sizes = {"B": rows, "K": lengths.clips, "R": lengths.response}
    sizes |= {"T": lengths.sequence, "U": lengths.sequence}
    sizes["S"] = round(lengths.seconds * WhisperMel().sample_rate)
    check_batch(mesh, rows)
    batch = shapes(QuestionBatch, sizes)
    return placed(batch, dict.fromkeys(batch, batch_sharding(mesh)))
