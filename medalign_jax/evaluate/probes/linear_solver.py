"""The compiled half of the linear probe: paths over penalties, and the exact last fit.

A path is run in float32, in the coordinates of the smaller of the two Gram matrices, where the
Hessian is nearly diagonal: an L2-penalised solution lies in the span of the rows, so with fewer
rows n than features D it has n coordinates. The fit that is kept is done again in float64 on the
features themselves, from the path's solution, with the same decomposition as a preconditioner; so
nothing of the float32 arithmetic is left in it.

Axes: S stacked designs, n rows, D features, P penalties, p problems, K inner folds, c outputs.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from medalign_jax.evaluate.probes.newton import Fits, minimise, row_losses

CHOICE = 1e-6  # decrement at which a fit is good enough to choose a penalty by
EXACT = 1e-18
STEPS, CHOICE_PRODUCTS, EXACT_PRODUCTS = 30, 100, 1000

_dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class Basis(NamedTuple):
    """Z^T Z / n = V diag(variance) V^T: directions V (D, r) and variances (r,)."""

    directions: jax.Array
    variance: jax.Array


class Paths(NamedTuple):
    """Held-out losses (P, p, K), decrements (P, p, K + 1), coefficients (P, r + 1, p, c) of the
    fits on all rows, and the basis that these are in."""

    losses: jax.Array
    decrements: jax.Array
    theta: jax.Array
    basis: Basis
    products: jax.Array


@jax.jit
def axes(z: jax.Array) -> jax.Array:
    """(D, D) eigenvectors of Z^T Z, for the rows z (n, D)."""
    return jnp.linalg.eigh(_dot(z.T, z))[1]


def _decompose(z: jax.Array, count: jax.Array, shared) -> tuple[jax.Array, Basis]:
    """The rows in the basis (n, r), and the basis; r = min(n, D)."""
    n, width = z.shape
    if shared is not None:
        matrix = _dot(z, shared)
        return matrix, Basis(shared, jnp.sum(jnp.square(matrix), axis=0) / count)
    if n >= width:
        variance, directions = jnp.linalg.eigh(_dot(z.T, z) / count)
        return _dot(z, directions), Basis(directions, jnp.maximum(variance, 0.0))
    variance, rows = jnp.linalg.eigh(_dot(z, z.T) / count)
    variance = jnp.maximum(variance, 0.0)
    length = jnp.sqrt(variance * count)
    known = variance > 1e-6 * variance[-1]
    inverse = jnp.where(known, 1 / jnp.where(known, length, 1.0), 0.0)
    return rows * length, Basis(_dot(z.T, rows) * inverse, variance)


def _products(matrix: jax.Array):
    """Products of (n, r) with (r, F, c), and of its transpose with (n, F, c)."""
    transposed = jax.lax.optimization_barrier(matrix.T)  # else it is turned in every step

    def times(matrix, columns):
        return _dot(matrix, columns.reshape(len(columns), -1)).reshape(-1, *columns.shape[1:])

    return functools.partial(times, matrix), functools.partial(times, transposed)


def _outputs(matrix: jax.Array):
    """The same with an intercept as the last of r + 1 coefficients."""
    times, back = _products(matrix)

    def forward(theta):
        return times(theta[:-1]) + theta[-1:]

    def backward(z):
        return jnp.concatenate([back(z), z.sum(axis=0, keepdims=True)])

    return forward, backward


def _penalised(ridge: jax.Array, size: int) -> jax.Array:
    """(size + 1, F, 1) from (F,): all coefficients but the intercept."""
    rows = jnp.broadcast_to(ridge, (size, *ridge.shape))
    return jnp.concatenate([rows, jnp.zeros_like(rows[:1])])[..., None]


@functools.partial(jax.jit, static_argnames="kind")
def paths(z, count, y, weight, held, penalties, shared, *, kind: str) -> Paths:
    """Fits on all rows and on the rows outside each inner fold, for all penalties.

    Args:
      z: (S, n, D) float32 standardised rows, 0 where filled up.
      count: (S,) real rows.
      y: (S, n, p, c) targets.
      weight: (S, n, p, K + 1) 1 for the rows that a fit is on; the last fit is on all rows.
      held: (S, n, p, K) 1 for the rows whose loss is asked.
      penalties: (P,) on half the squared coefficients, beside the sum of losses; falling.
      shared: (D, D) orthonormal axes near those of every design, which save a decomposition
        each; they change how many steps are taken, not where these lead. Or None.
    """

    def one(z, count, y, weight, held):
        matrix, basis = _decompose(z, count, shared)
        forward, backward = _outputs(matrix)
        rows, fits = weight.sum(axis=0).reshape(-1), weight.shape[1:]
        weight = weight.reshape(len(z), -1) / jnp.maximum(rows, 1.0)
        held = held / jnp.maximum(held.sum(axis=0), 1.0)
        y = jnp.broadcast_to(y[:, :, None], (*y.shape[:2], fits[1], y.shape[2]))
        y = y.reshape(len(z), -1, y.shape[-1])
        variance = jnp.append(basis.variance, 1.0)[:, None, None]

        def at(theta, penalty):
            ridge = _penalised(penalty / jnp.maximum(rows, 1.0), matrix.shape[1])

            def precondition(gradient, curvature):
                bend = variance * curvature + ridge
                return gradient / jnp.maximum(bend, 1e-20)

            problem = Fits(kind, forward, backward, precondition, y, weight, ridge)
            found = minimise(problem, theta, CHOICE, STEPS, CHOICE_PRODUCTS)
            losses = row_losses(kind, forward(found.theta), y).reshape(len(z), *fits)[..., :-1]
            shaped = found.theta.reshape(-1, *fits, y.shape[-1])
            out = (jnp.sum(held * losses, axis=0), found.decrement.reshape(fits),
                   shaped[:, :, -1], found.products)  # fmt: skip
            return found.theta, out

        zero = jnp.zeros((matrix.shape[1] + 1, *y.shape[1:]), z.dtype)
        _, (losses, decrements, theta, products) = jax.lax.scan(at, zero, penalties)
        return Paths(losses, decrements, theta, basis, products)

    return jax.vmap(one)(z, count, y, weight, held)


@functools.partial(jax.jit, static_argnames="kind")
def finish(z, y, weight, penalty, theta, basis: Basis, *, kind: str):
    """The fits on all rows, each at its penalty, in the precision of z.

    Args:
      z: (S, n, D).
      y: (S, n, p, c).
      weight: (S, n, p) 1 for the rows of the fit.
      penalty: (S, p).
      theta: (S, r + 1, p, c) to start from, in the basis.

    Returns:
      Coefficients (S, D + 1, p, c), the intercept last, and decrements (S, p).
    """

    def one(z, y, weight, penalty, theta, basis):
        directions, variance = (a.astype(z.dtype) for a in basis)
        forward, backward = _outputs(z)
        into, out_of = _products(directions)  # (r, p, c) to (D, p, c), and back
        rows = jnp.maximum(weight.sum(axis=0), 1.0)
        ridge = _penalised(penalty / rows, z.shape[1])
        small = ridge[0]  # (p, 1)
        rest = jnp.where(small > 0, 1 / jnp.where(small > 0, small, 1.0), 0.0)
        square = directions.shape[0] == directions.shape[1]

        def precondition(gradient, curvature):
            inside = out_of(gradient[:-1])
            bend = variance[:, None, None] * curvature + small
            scaled = into(inside / jnp.maximum(bend, 1e-20))
            if not square:  # outside the directions the Hessian is the penalty alone
                scaled += (gradient[:-1] - into(inside)) * rest
            return jnp.concatenate([scaled, gradient[-1:] / jnp.maximum(curvature, 1e-20)])

        problem = Fits(kind, forward, backward, precondition, y, weight / rows, ridge)
        theta = theta.astype(z.dtype)
        start = jnp.concatenate([into(theta[:-1]), theta[-1:]])
        found = minimise(problem, start, EXACT, STEPS, EXACT_PRODUCTS)
        return found.theta, found.decrement, found.products

    return jax.vmap(one)(z, y, weight, penalty, theta, basis)
