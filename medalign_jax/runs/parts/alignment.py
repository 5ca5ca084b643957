"""The alignment's loss, and the language model that embeds its reports."""

from __future__ import annotations

from jax.sharding import Mesh
from ml_collections import ConfigDict

from medalign_jax.core.errors import UserError
from medalign_jax.methods.acula import AculaConfig
from medalign_jax.runs.parts.blocks import dtype_of, typed
from medalign_jax.teachers import Teacher, load_teacher
from medalign_jax.teachers.teacher import teacher_width as width_of_teacher


def acula_config(config: ConfigDict) -> AculaConfig:
    """The alignment's own settings; `loss.ssm` belongs to the student."""
    block = config.loss.copy_and_resolve_references()
    with block.unlocked():
        del block.ssm
    return typed(AculaConfig, block, "loss")


def check_loss(config: ConfigDict) -> None:
    """Raises UserError where the alignment's loss is wrong by what the config says alone."""
    loss = acula_config(config)
    if loss.align != "cka" and loss.text_head != "mlp" and config.teacher.whiten:
        raise UserError(
            f"loss.align={loss.align} compares vectors of equal width, and whitened reports have "
            "one of their own: set loss.audio_head=mlp and loss.text_head=mlp, or "
            "teacher.whiten=0"
        )


def teacher_width(config: ConfigDict) -> int:
    """H of the language model's vectors, from its files' headers alone.

    Raises:
      UserError: it is not there, or config.teacher asks it for what it does not have.
    """
    block = config.teacher
    return width_of_teacher(
        block.source,
        layer=block.layer,
        pooling=block.pooling,
        max_tokens=block.max_tokens,
        dtype=dtype_of(config, "teacher"),
    )


def teacher_of(config: ConfigDict, mesh: Mesh) -> Teacher:
    """The frozen language model."""
    block = config.teacher
    return load_teacher(
        block.source,
        mesh,
        layer=block.layer,
        pooling=block.pooling,
        max_tokens=block.max_tokens,
        lowercase=block.lowercase,
        dtype=dtype_of(config, "teacher"),
    )
