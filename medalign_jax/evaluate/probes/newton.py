"""Many penalised linear models at once, by Newton's method with preconditioned conjugate gradients.

Fits lie side by side in the last axes, so that what costs is products of one matrix with many
columns. The objective of a fit is

    sum_i weight_i * loss(z_i, y_i) + sum_j ridge_j * theta_j^2 / 2,    z = forward(theta)

with weights that sum to 1. Axes: r coefficients, n rows, F fits, c outputs (1 for two classes and
for a regression, one a class otherwise).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

BINARY, MULTICLASS, NUMBERS = "binary", "multiclass", "numbers"
HALVINGS = 12


def row_losses(kind: str, z: jax.Array, y: jax.Array) -> jax.Array:
    """(n, F) losses of (n, F, c) outputs: cross-entropy, or half the squared error."""
    if kind == BINARY:
        return (jax.nn.softplus(z) - y * z)[..., 0]
    if kind == MULTICLASS:
        return jax.nn.logsumexp(z, axis=-1) - jnp.sum(y * z, axis=-1)
    return 0.5 * jnp.square(z - y)[..., 0]


def response(kind: str, z: jax.Array) -> jax.Array:
    """The mean that outputs stand for; its difference from y is the gradient by z."""
    if kind == BINARY:
        return jax.nn.sigmoid(z)
    return jax.nn.softmax(z, axis=-1) if kind == MULTICLASS else z


def _curvature(kind: str, mean: jax.Array, u: jax.Array) -> jax.Array:
    """Second derivative by z, times u."""
    if kind == BINARY:
        return mean * (1 - mean) * u
    if kind == MULTICLASS:
        return mean * (u - jnp.sum(mean * u, axis=-1, keepdims=True))
    return u


@dataclasses.dataclass(frozen=True)
class Fits:
    """F fits of one matrix.

    Attributes:
      kind: BINARY, MULTICLASS or NUMBERS.
      forward: (r, F, c) coefficients to (n, F, c) outputs.
      backward: Its transpose.
      precondition: (gradient (r, F, c), mean curvature (F, c)) to about Hessian^-1 gradient.
      y: (n, F, c) targets.
      weight: (n, F) weights of rows.
      ridge: (r, F, 1) penalties.
    """

    kind: str
    forward: Callable
    backward: Callable
    precondition: Callable
    y: jax.Array
    weight: jax.Array
    ridge: jax.Array

    def value(self, theta: jax.Array, z: jax.Array) -> jax.Array:
        """(F,) objectives."""
        loss = jnp.sum(self.weight * row_losses(self.kind, z, self.y), axis=0)
        return loss + 0.5 * _dot(theta, self.ridge * theta)


class Solution(NamedTuple):
    """Coefficients (r, F, c), and (F,) Newton decrements: twice the objective's distance from its
    minimum before the last step. `steps` and `products` count what was spent."""

    theta: jax.Array
    decrement: jax.Array
    steps: jax.Array
    products: jax.Array


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(a * b, axis=(0, 2))


def minimise(
    fits: Fits, theta: jax.Array, tolerance: float, max_steps: int, max_products: int
) -> Solution:
    """Newton's method from `theta` until every decrement is at most `tolerance`.

    The step that comes with the last decrement is still taken, so that what remains is smaller by
    an order or more. A fit that does not get there within `max_steps` keeps its larger decrement.
    """
    infinite = jnp.full(theta.shape[1], jnp.inf, theta.dtype)
    start = Solution(theta, infinite, jnp.int32(0), jnp.int32(0))

    def unfinished(now: Solution):
        return (now.steps < max_steps) & jnp.any(now.decrement > tolerance)

    def step(now: Solution) -> Solution:
        done = now.decrement <= tolerance
        z = fits.forward(now.theta)
        mean = response(fits.kind, z)
        slope = fits.weight[..., None] * (mean - fits.y)
        gradient = fits.backward(slope) + fits.ridge * now.theta
        direction, change, products = _direction(fits, mean, gradient, done, max_products)
        slope = jnp.minimum(_dot(gradient, direction), 0.0)
        length = _step_length(fits, now.theta, z, direction, change, slope)
        theta = now.theta + jnp.where(done, 0.0, length)[:, None] * direction
        decrement = jnp.where(done, now.decrement, -slope)
        return Solution(theta, decrement, now.steps + 1, now.products + products)

    return jax.lax.while_loop(unfinished, step, start)


def _direction(fits: Fits, mean, gradient, done, max_products: int):
    """Conjugate gradients for Hessian direction = -gradient, as exactly as the step deserves.

    Returns the direction, its change of the outputs, and the number of products.
    """
    curvature = jnp.sum(fits.weight[..., None] * _spread(fits.kind, mean), axis=0)

    def product(d):
        u = fits.forward(d)
        pulled = fits.backward(fits.weight[..., None] * _curvature(fits.kind, mean, u))
        return pulled + fits.ridge * d, u

    def precondition(r):
        s = fits.precondition(r, curvature)
        # What all classes share changes no probability; there the preconditioner would be wrong.
        return s - s.mean(axis=-1, keepdims=True) if fits.kind == MULTICLASS else s

    first = precondition(-gradient)
    size = _dot(-gradient, first)
    # A quadratic is solved at once; else a tenth of the error may stay, and less near the end.
    goal = size * (1e-9 if fits.kind == NUMBERS else jnp.minimum(0.01, size))

    def unfinished(state):
        _, _, _, _, _, active, count = state
        return (count < max_products) & jnp.any(active)

    def step(state):
        d, u, r, p, size, active, count = state
        hp, up = product(p)
        bend = _dot(p, hp)
        active &= bend > 0
        rate = jnp.where(active, size / jnp.where(active, bend, 1.0), 0.0)[:, None]
        d, u, r = d + rate * p, u + rate * up, r - rate * hp
        s = precondition(r)
        after = jnp.where(active, _dot(r, s), size)
        ratio = jnp.where(active, after / jnp.where(active, size, 1.0), 0.0)[:, None]
        p = jnp.where(active[:, None], s + ratio * p, p)
        return d, u, r, p, after, active & (after > goal), count + 1

    zero = jnp.zeros_like(gradient)
    active = ~done & (size > 0)
    start = (zero, jnp.zeros_like(fits.y), -gradient, first, size, active, jnp.int32(0))
    d, u, *_, count = jax.lax.while_loop(unfinished, step, start)
    return d, u, count


def _spread(kind: str, mean: jax.Array) -> jax.Array:
    return jnp.ones_like(mean) if kind == NUMBERS else mean * (1 - mean)


def _step_length(fits: Fits, theta, z, direction, change, slope) -> jax.Array:
    """(F,) largest of 1, 1/2, 1/4, ... that lowers the objective enough, up to rounding."""
    before = fits.value(theta, z)
    slack = 10 * jnp.finfo(theta.dtype).eps * (1 + jnp.abs(before))

    def rejected(length):
        moved = length[:, None]
        after = fits.value(theta + moved * direction, z + moved * change)
        return ~(after <= before + 1e-4 * length * slope + slack)

    def halve(state):
        length, bad, count = state
        length = jnp.where(bad, length / 2, length)
        return length, rejected(length), count + 1

    one = jnp.ones(theta.shape[1], theta.dtype)
    start = (one, rejected(one), jnp.int32(0))
    length, bad, _ = jax.lax.while_loop(lambda s: jnp.any(s[1]) & (s[2] < HALVINGS), halve, start)
    return jnp.where(bad, 0.0, length)
