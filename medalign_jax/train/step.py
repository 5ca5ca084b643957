"""The train state and the jitted step that every method, test and compile check shares."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from medalign_jax.core.mesh import Rules, batch_sharding, replicated, shardings
from medalign_jax.methods.accumulate import loss_and_grad
from medalign_jax.methods.base import Encoded, Method

Tree = Any


@flax.struct.dataclass
class TrainState:
    """All that a run needs to go on: step count, parameters, optimizer state, random key."""

    step: jax.Array
    params: Tree
    opt_state: Tree
    key: jax.Array


def init_state(params: Tree, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """A fresh state around given parameters."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        key=jax.random.key_data(jax.random.key(seed)),
    )


def state_shardings(state: Tree, rules: Rules, mesh: Mesh) -> TrainState:
    """Shardings of a `TrainState`: moments like their parameters, counters and key replicated."""
    return TrainState(
        step=replicated(mesh),
        params=shardings(state.params, rules, mesh),
        opt_state=shardings(state.opt_state, rules, mesh),
        key=replicated(mesh),
    )


def train_step(
    state: TrainState,
    frozen: Tree,
    batch: Tree,
    *,
    method: Method,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    chunks: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update from one global batch; see `methods.accumulate` for what `chunks` does.

    Returns:
      The next state and scalar metrics: loss, what the method reports, grad_norm, learning_rate.
    """
    size = jax.tree.leaves(batch)[0].shape[0]
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    keys = jax.random.split(key, size)
    loss, metrics, grads = loss_and_grad(method, state.params, frozen, batch, keys, chunks)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    metrics = metrics | {
        "loss": loss,
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": schedule(state.step),
    }
    params = optax.apply_updates(state.params, updates)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics


def trace_train_step(
    method: Method,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    state: TrainState,
    frozen: Tree,
    batch: Tree,
    chunks: int = 1,
) -> jax.stages.Traced:
    """`train_step` traced for the given arrays or ShapeDtypeStructs with shardings.

    The state is donated. The step is that of a run, of a test and of a plan (`medalign_jax.plan`).
    """
    out = (state_shardings(state, method.sharding_rules, mesh), replicated(mesh))
    step = partial(train_step, method=method, optimizer=optimizer, schedule=schedule, chunks=chunks)
    with jax.set_mesh(mesh):
        return jax.jit(step, donate_argnums=0, out_shardings=out).trace(state, frozen, batch)


def compile_train_step(
    method: Method,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    state: TrainState,
    frozen: Tree,
    batch: Tree,
    chunks: int = 1,
) -> Callable[[TrainState, Tree, Tree], tuple[TrainState, dict[str, jax.Array]]]:
    """Compiles `train_step` ahead of time; arguments as of `trace_train_step`.

    A compiled step cannot recompile: another shape is an error. The state is donated.
    """
    traced = trace_train_step(method, optimizer, schedule, mesh, state, frozen, batch, chunks)
    return traced.lower().compile()


def make_eval_step(
    method: Method, mesh: Mesh
) -> Callable[[Tree, Tree, Tree], tuple[Encoded, jax.Array]]:
    """Jitted `encode` without training noise, on fixed keys; outputs replicated for gathering.

    The batch also holds "index" (B,); the second output (B,) marks the rows where it is not
    padding (-1).
    """

    def step(params: Tree, frozen: Tree, batch: Tree) -> tuple[Encoded, jax.Array]:
        real = batch["index"] >= 0
        keys = jax.random.split(jax.random.key(0), real.shape[0])
        return method.encode(params, frozen, batch, keys, False), real

    return jax.jit(step, out_shardings=replicated(mesh))


__all__ = [
    "TrainState",
    "batch_sharding",
    "compile_train_step",
    "init_state",
    "make_eval_step",
    "state_shardings",
    "trace_train_step",
    "train_step",
]
