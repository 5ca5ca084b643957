"""AdamW with warm-up, clipping and rule tables for freezing and weight decay."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import optax

from medalign_jax.core.errors import UserError
from medalign_jax.core.mesh import path_name

# Fixed position tables, and the running statistics of batch norms.
FIXED = (r"pos_embed", r"(^|/)(mean|var)$")


@dataclass(frozen=True)
class OptimizerConfig:
    """Defaults are AcuLa's recipe.

    Attributes:
      learning_rate: peak.
      schedule: after the warm-up, "linear" or "cosine" to 0, or "constant".
      warmup_steps: linear from 0; at most a tenth of the run.
      weight_decay: decoupled, on every parameter that `no_decay` does not match.
      clip: global gradient norm; 0 turns clipping off.
      frozen: regexes of parameter paths that never move, beside `FIXED`.
      no_decay: regexes of parameter paths without weight decay.
      multipliers: (regex, factor) lines on the update, first match wins.
    """

    learning_rate: float = 1e-5
    schedule: str = "linear"
    warmup_steps: int = 400
    weight_decay: float = 0.01
    clip: float = 1.0
    b1: float = 0.9
    b2: float = 0.999
    frozen: Sequence[str] = ()
    no_decay: Sequence[str] = ()
    multipliers: Sequence[tuple[str, float]] = ()


def make_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Learning rate of the update number; step 0 of a warm-up already moves a little."""
    warmup = min(config.warmup_steps, max(total_steps // 10, 1)) if config.warmup_steps else 0
    rest = max(total_steps - warmup, 1)
    tails = {
        "linear": optax.linear_schedule(config.learning_rate, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(config.learning_rate, rest),
        "constant": optax.constant_schedule(config.learning_rate),
    }
    if config.schedule not in tails:
        raise UserError(f"schedule {config.schedule!r} is not one of {', '.join(tails)}")
    start = config.learning_rate / max(warmup, 1)
    ramp = optax.linear_schedule(start, config.learning_rate, max(warmup - 1, 1))
    return optax.join_schedules([ramp, tails[config.schedule]], [warmup])


def make_optimizer(
    config: OptimizerConfig, params: Any, total_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Optimizer for `params` (arrays or shapes) and the schedule that it follows.

    Raises:
      UserError: a regex of `frozen`, `no_decay` or `multipliers` that matches no parameter.
    """
    _check_rules(config, params)
    schedule = make_schedule(config, total_steps)
    decay_mask = _matching(params, config.no_decay, invert=True)
    steps = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    steps += [
        optax.scale_by_adam(config.b1, config.b2),
        optax.add_decayed_weights(config.weight_decay, decay_mask),
        optax.scale_by_learning_rate(schedule),
    ]
    if config.multipliers:
        steps.append(_scale_by_path(config.multipliers))
    moving = optax.chain(*steps)
    labels = jax.tree.map(
        lambda stop: "frozen" if stop else "train", _matching(params, (*FIXED, *config.frozen))
    )
    return optax.multi_transform({"train": moving, "frozen": optax.set_to_zero()}, labels), schedule


def _matching(params: Any, patterns: Sequence[str], invert: bool = False) -> Any:
    def match(path, _):
        return any(re.search(p, path_name(path)) for p in patterns) != invert

    return jax.tree_util.tree_map_with_path(match, params)


def _scale_by_path(lines: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
    def factor(path) -> float:
        name = path_name(path)
        return next((value for pattern, value in lines if re.search(pattern, name)), 1.0)

    def update(updates, state, params=None):
        del params
        return jax.tree_util.tree_map_with_path(lambda p, u: u * factor(p), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _check_rules(config: OptimizerConfig, params: Any) -> None:
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    patterns = [*config.frozen, *config.no_decay, *(line[0] for line in config.multipliers)]
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise UserError(
                f"the optimizer rule {pattern!r} matches no parameter; parameters are: "
                + ", ".join(names[:20])
                + (" ..." if len(names) > 20 else "")
            )
