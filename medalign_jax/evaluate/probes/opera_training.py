"""Training of all runs of a linear probe at once, in one jitted function.

The protocol is described in `opera_protocol.py`. Epochs and steps are scanned and runs (seeds or
few-shot draws) are mapped over, so a probe compiles once per shape and never waits for the host.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from medalign_jax.evaluate.probes.problem import ProbeError


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
    """The published protocol; the classification defaults.

    Attributes:
      epochs: passes over the training examples.
      batch_size: examples per step; the last batch of an epoch may be smaller and is used.
      learning_rate: Adam's, in the first epoch.
      decay: factor on the learning rate after each epoch.
      l2: weight of the sum of squares of all parameters.
      clip: largest gradient norm.
      init_std: standard deviation of the initial weights.
      select_every: only every k-th epoch may be selected (5 for KAUH, 3 for SSBPR and
        spirometry in the published code).
      standardise: centre and scale the features by the examples that a run trains on. Not part
        of the published protocol.
    """

    epochs: int = 64
    batch_size: int = 64
    learning_rate: float = 1e-4
    decay: float = 0.97
    l2: float = 1e-5
    clip: float = 1.0
    init_std: float = 0.01
    select_every: int = 1
    standardise: bool = False

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size, self.select_every) < 1:
            raise ProbeError("epochs, batch_size and select_every of a probe are at least 1")
        if self.select_every > self.epochs:
            raise ProbeError(
                f"select_every={self.select_every} leaves no epoch of {self.epochs} to select"
            )


def macro_auroc(labels: jax.Array, scores: jax.Array) -> jax.Array:
    """Macro one-vs-rest AUROC on the device; ties count one half.

    The selection score of a probe. Classes without a positive or a negative are left out. The
    exact, weighted version for results is `statistics.auroc`.

    Args:
      labels: (n,) integer classes.
      scores: (n, C).
    """
    n, n_classes = scores.shape

    def one(score, positive):
        ranked = jnp.sort(score)
        below = jnp.searchsorted(ranked, score, side="left")
        upto = jnp.searchsorted(ranked, score, side="right")
        centred = (below + upto - n).astype(jnp.float32) / 2  # rank minus (n + 1) / 2
        p = positive.sum().astype(jnp.float32)
        defined = (p > 0) & (p < n)
        value = 0.5 + jnp.sum(centred * positive) / jnp.where(defined, p * (n - p), 1.0)
        return jnp.where(defined, value, 0.0), defined

    first = 1 if n_classes == 2 else 0
    classes = jnp.arange(first, n_classes)
    values, defined = jax.vmap(one)(scores.T[first:], labels[None, :] == classes[:, None])
    return values.sum() / defined.sum()


@functools.partial(jax.jit, static_argnames=("config", "n_outputs", "regression"))
def train(train_x, train_y, valid_x, valid_y, test_x, draws, seeds, *, config, n_outputs,
           regression):  # fmt: skip
    """Trains all runs; returns test outputs, selected epochs and selection scores (higher is
    better), each with a leading axis of runs."""

    def run(draw, seed):
        x = train_x if draw is None else train_x[draw]
        y = train_y if draw is None else train_y[draw]
        shift, scale = _standardisation(x, config.standardise)
        target = (y.mean(), _safe(y.std())) if regression else None
        predict = functools.partial(_predict, shift=shift, scale=scale, target=target)
        init_key, shuffle_key = jax.random.split(jax.random.key(seed))
        params = {
            "kernel": config.init_std * jax.random.normal(init_key, (x.shape[1], n_outputs)),
            "bias": jnp.zeros((n_outputs,)),
        }

        def score(params):
            if valid_x is None:
                return jnp.float32(0)
            outputs = predict(params, valid_x)
            if regression:
                return -jnp.mean(jnp.abs(outputs - valid_y))
            return macro_auroc(valid_y, jax.nn.softmax(outputs))

        def epoch(carry, number):
            params, moments, best = carry
            key = jax.random.fold_in(shuffle_key, number)
            rate = config.learning_rate * config.decay ** number.astype(jnp.float32)
            params, moments = _epoch(params, moments, key, rate, x, y, predict, config)
            now = {"params": params, "epoch": number, "score": score(params)}
            # Without validation the last eligible epoch wins; with it, the first of the best.
            better = now["score"] > best["score"] if valid_x is not None else True
            better &= (number + 1) % config.select_every == 0
            best = jax.tree.map(lambda a, b: jnp.where(better, a, b), now, best)
            return (params, moments, best), None

        start = {"params": params, "epoch": jnp.int32(-1), "score": jnp.float32(-jnp.inf)}
        carry = (params, _adam(config).init(params), start)
        (_, _, best), _ = jax.lax.scan(epoch, carry, jnp.arange(config.epochs))
        outputs = predict(best["params"], test_x)
        outputs = outputs if regression else jax.nn.softmax(outputs)
        selected = best["score"] if valid_x is not None else jnp.float32(jnp.nan)
        return outputs, best["epoch"], selected

    return jax.vmap(run, in_axes=(None if draws is None else 0, 0))(draws, seeds)


def _epoch(params, moments, key, rate, x, y, predict, config):
    """One pass over the examples in a new order; a short last batch counts with its own mean."""
    n = len(x)
    size = min(config.batch_size, n)
    steps = -(-n // size)
    order = jnp.pad(jax.random.permutation(key, n), (0, steps * size - n)).reshape(steps, size)
    used = (jnp.arange(steps * size) < n).reshape(steps, size)
    optimizer = _adam(config)

    def step(carry, batch):
        params, moments = carry
        rows, mask = batch
        gradient = jax.grad(_loss)(params, x[rows], y[rows], mask, predict, config.l2)
        gradient = _clip(gradient, config.clip)
        updates, moments = optimizer.update(gradient, moments, params)
        params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
        return (params, moments), None

    (params, moments), _ = jax.lax.scan(step, (params, moments), (order, used))
    return params, moments


def _loss(params, x, y, mask, predict, l2):
    """Cross-entropy (integer y) or squared error (real y) over unmasked rows, plus penalty."""
    outputs = predict(params, x)
    if jnp.issubdtype(y.dtype, jnp.integer):
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, y)
    else:
        losses = jnp.square(outputs - y)
    penalty = sum(jnp.sum(jnp.square(p)) for p in jax.tree.leaves(params))
    return jnp.sum(losses * mask) / jnp.sum(mask) + l2 * penalty


def _predict(params, x, *, shift, scale, target):
    """Logits (n, C), or predictions (n,) in the target's unit."""
    features = (x - shift) * scale
    outputs = jnp.matmul(features, params["kernel"], precision=jax.lax.Precision.HIGHEST)
    outputs = outputs + params["bias"]
    return outputs if target is None else outputs[:, 0] * target[1] + target[0]


def _clip(gradient, norm):
    """Scales the gradient to at most `norm`, with the 1e-6 in the divisor that PyTorch has."""
    length = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradient)))
    factor = jnp.minimum(1.0, norm / (length + 1e-6))
    return jax.tree.map(lambda g: g * factor, gradient)


def _adam(config):
    return optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)


def _safe(std):
    return jnp.where(std > 0, std, 1.0)


def _standardisation(x, standardise):
    if not standardise:
        return jnp.float32(0), jnp.float32(1)
    return x.mean(axis=0), 1 / _safe(x.std(axis=0))
