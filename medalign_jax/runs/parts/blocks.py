"""Config blocks that every method has."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from medalign_jax.core.errors import UserError
from medalign_jax.core.mesh import make_mesh
from medalign_jax.core.words import did_you_mean
from medalign_jax.train.loop import LoopConfig
from medalign_jax.train.optimizer import OptimizerConfig

DTYPES = ("bfloat16", "float32")


def typed(kind: type, block: ConfigDict, name: str) -> Any:
    """A frozen dataclass from a config block of the same keys.

    Raises:
      UserError: a key that the dataclass does not have.
    """
    values = {k: _plain(v) for k, v in block.items()}
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - known):
        raise UserError(f"config.{name} has unknown keys {unknown}; it takes {sorted(known)}")
    return kind(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, ConfigDict):
        return value.to_dict()
    return tuple(_plain(v) for v in value) if isinstance(value, list | tuple) else value


def mesh_of(config: ConfigDict) -> Mesh:
    """The mesh that config.mesh asks for."""
    return make_mesh(**config.mesh.to_dict())


def dtype_of(config: ConfigDict, block: str) -> jnp.dtype:
    """What the key `dtype` of a block asks for.

    Raises:
      UserError: it is neither bfloat16 nor float32.
    """
    name = config[block].dtype
    if name not in DTYPES:
        raise UserError(
            f"{block}.dtype is {name!r}{did_you_mean(name, DTYPES)}; it is {' or '.join(DTYPES)}"
        )
    return jnp.dtype(name)


def check_batch(config: ConfigDict) -> None:
    """Raises UserError unless parts and devices share a batch."""
    size, parts = config.train.batch_size, config.train.accumulate
    if size % (parts * jax.device_count()):
        raise UserError(
            f"train.batch_size {size} must be a multiple of train.accumulate {parts} times "
            f"the {jax.device_count()} devices"
        )


def loop_config(config: ConfigDict, examples: int, what: str) -> LoopConfig:
    """Length and rhythm of training; `steps`, if given, takes precedence over `epochs`.

    Raises:
      UserError: the examples (`what`) fill no batch, or parts and devices do not share one.
    """
    block = config.train
    steps = block.steps or (examples // block.batch_size) * block.epochs
    if steps < 1:
        raise UserError(
            f"{examples} training {what} fill no batch of {block.batch_size}: lower "
            "train.batch_size"
        )
    check_batch(config)
    return LoopConfig(
        total_steps=steps,
        log_every=block.log_every,
        eval_every=block.eval_every,
        accumulate=block.accumulate,
        seed=config.seed,
        patience=block.patience,
        tensorboard=block.tensorboard,
        wandb=block.wandb,
    )


def optimizer_config(config: ConfigDict) -> OptimizerConfig:
    """What config.optimizer asks for."""
    return typed(OptimizerConfig, config.optimizer, "optimizer")
