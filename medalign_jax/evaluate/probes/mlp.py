"""A probe with one small hidden layer, on standardised features, trained full-batch.

Protocol (our own; no published one is followed): 64 hidden units with GELU, AdamW with decoupled
weight decay of 0.1 on both kernels, learning rate 0.01 falling to 0 along a cosine, 300 steps over
all training rows, cross-entropy or squared error of standardised targets; the average of three runs
(probabilities or numbers). Nothing is chosen on data.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from medalign_jax.evaluate.probes.designs import Scaling, padded
from medalign_jax.evaluate.probes.problem import Prediction, ProbeError, Problem, check


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """Settings of the probe, as the module's text has them.

    Attributes:
      hidden: units of the hidden layer.
      steps: full-batch steps.
      learning_rate: of the first step.
      weight_decay: decoupled, on kernels.
      runs: initial weights that are averaged over.
    """

    hidden: int = 64
    steps: int = 300
    learning_rate: float = 1e-2
    weight_decay: float = 0.1
    runs: int = 3

    def __post_init__(self) -> None:
        if min(self.hidden, self.steps, self.runs) < 1:
            raise ProbeError("hidden, steps and runs of an MLP probe are at least 1")


def mlp(
    x: np.ndarray, problems: Sequence[Problem], config: MLPConfig | None = None
) -> list[Prediction]:
    """Fits a small network to each problem and predicts its test rows.

    The same seeds give the same scores.
    Its length is part of its definition: nothing waits for convergence.

    Args:
      x: (N, D) features.
      problems: problems on rows of x.
      config: settings; defaults as the module's text has them.

    Raises:
      ProbeError: as `problem.check`; or the training diverged.
    """
    x, config = check(x, problems), config or MLPConfig()
    return [_fit(x, number, problem, config) for number, problem in enumerate(problems)]


def _fit(x: np.ndarray, number: int, problem: Problem, config: MLPConfig) -> Prediction:
    train, test = np.asarray(problem.train), np.asarray(problem.test)
    scaling = Scaling.of(x[train])
    rows = np.zeros((padded(len(train)), x.shape[1]), np.float32)
    rows[: len(train)] = scaling(x[train])
    asked = np.zeros((padded(len(test)), x.shape[1]), np.float32)
    asked[: len(test)] = scaling(x[test])
    targets, mean, deviation = np.asarray(problem.targets)[train], 0.0, 1.0
    if problem.classes == 0:
        mean, deviation = float(targets.mean()), float(targets.std()) or 1.0
        targets = ((targets - mean) / deviation).astype(np.float32)
    y = np.zeros(len(rows), np.float32 if problem.classes == 0 else np.int32)
    y[: len(train)] = targets
    weight = (np.arange(len(rows)) < len(train)).astype(np.float32) / len(train)
    keys = jax.vmap(lambda run: jax.random.fold_in(jax.random.key(problem.seed), run))(
        np.arange(config.runs)
    )
    outputs = _train(rows, y, weight, asked, keys, classes=problem.classes, config=config)
    scores = np.asarray(outputs, np.float64)[: len(test)]
    if not np.isfinite(scores).all():
        raise ProbeError(f"problem {number}: the MLP probe diverged; lower learning_rate")
    return Prediction(scores if problem.classes else scores[:, 0] * deviation + mean)


@functools.partial(jax.jit, static_argnames=("classes", "config"))
def _train(x, y, weight, test_x, keys, *, classes: int, config: MLPConfig):
    """Mean outputs (m, C) of the runs."""
    rate = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    optimizer = optax.adamw(rate, weight_decay=config.weight_decay, mask=_kernels)

    def loss(params):
        z = _outputs(params, x)
        if classes:
            losses = optax.softmax_cross_entropy_with_integer_labels(z, y)
        else:
            losses = jnp.square(z[:, 0] - y) / 2
        return jnp.sum(losses * weight)

    def run(key):
        def step(carry, _):
            params, moments = carry
            gradient = jax.grad(loss)(params)
            updates, moments = optimizer.update(gradient, moments, params)
            return (optax.apply_updates(params, updates), moments), None

        params = _initial(key, x.shape[1], config.hidden, max(classes, 1))
        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=config.steps)
        outputs = _outputs(params, test_x)
        return jax.nn.softmax(outputs) if classes else outputs

    return jax.vmap(run)(keys).mean(axis=0)


def _initial(key, width: int, hidden: int, outputs: int) -> dict:
    first = jax.random.normal(key, (width, hidden)) / jnp.sqrt(width)
    return {
        "hidden": {"kernel": first, "bias": jnp.zeros(hidden)},
        "output": {"kernel": jnp.zeros((hidden, outputs)), "bias": jnp.zeros(outputs)},
    }


def _kernels(params):
    return jax.tree.map(lambda p: p.ndim == 2, params)


def _outputs(params: dict, x: jax.Array) -> jax.Array:
    dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    hidden = jax.nn.gelu(dot(x, params["hidden"]["kernel"]) + params["hidden"]["bias"])
    return dot(hidden, params["output"]["kernel"]) + params["output"]["bias"]
