"""Paths over penalties, and the exact last fit, of the linear probe.

A path is run in float32, in the coordinates of the smaller of the two Gram matrices, where the
Hessian is nearly diagonal: an L2-penalised solution lies in the span of the rows, so with fewer
rows n than features D it has n coordinates. The fit that is kept is done again in float64 on the
features themselves, from the path's solution, with the same decomposition as a preconditioner; so
nothing of the float32 arithmetic is left in it.

Axes: S stacked designs, n rows, D features, P penalties, p problems, K inner folds, c outputs.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from medalign_jax.evaluate.probes.newton import Fits, minimise, row_losses

CHOICE = 1e-6  # decrement at which a fit is good enough to choose a penalty by
RESOLUTION = 1e-3  # so near, relatively, a path's held-out losses are to the exact ones
EXACT = 1e-18
STEPS, CHOICE_PRODUCTS, EXACT_PRODUCTS = 30, 100, 1000


class Basis(NamedTuple):
    """Z^T Z / n = V diag(variance) V^T: directions V (S or 1, D, r) and variances (S, r)."""

    directions: np.ndarray
    variance: np.ndarray


class Paths(NamedTuple):
    """Held-out losses (S, P, p, K), outputs (S, P, n, p, c) for each row of the fit that held it
    out (0 where none did), decrements (S, P, p, K + 1), coefficients (S, P, r + 1, p, c) of the
    fits on all rows, the basis that these are in, and the products of a matrix spent."""

    losses: np.ndarray
    outputs: np.ndarray
    decrements: np.ndarray
    theta: np.ndarray
    basis: Basis
    products: int


def axes(z: np.ndarray) -> np.ndarray:
    """(D, D) eigenvectors of Z^T Z, for the rows z (n, D)."""
    return np.linalg.eigh(z.T @ z)[1]


def _decompose(z: np.ndarray, count: np.ndarray, shared) -> tuple[np.ndarray, Basis]:
    """The rows in the basis (S, n, r), and the basis; r = min(n, D)."""
    _, n, width = z.shape
    turned, count = z.transpose(0, 2, 1), count[:, None]
    if shared is not None:
        matrix = z @ shared
        return matrix, Basis(shared[None], np.sum(np.square(matrix), axis=1) / count)
    if n >= width:
        variance, directions = np.linalg.eigh(turned @ z / count[:, None])
        return z @ directions, Basis(directions, np.maximum(variance, 0))
    variance, rows = np.linalg.eigh(z @ turned / count[:, None])
    variance = np.maximum(variance, 0)
    length = np.sqrt(variance * count)
    known = variance > 1e-6 * variance[:, -1:]
    inverse = np.where(known, 1 / np.where(known, length, 1), 0)
    return rows * length[:, None], Basis(turned @ rows * inverse[:, None], variance)


def _times(matrix: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(S, n, r) times (S, r, F, c)."""
    flat = matrix @ columns.reshape(*columns.shape[:2], -1)
    return flat.reshape(*flat.shape[:2], *columns.shape[2:])


@dataclasses.dataclass(frozen=True, eq=False)
class _Matrix:
    """Rows (S, n, r), with an intercept as the last of r + 1 coefficients."""

    matrix: np.ndarray

    def forward(self, theta):
        return _times(self.matrix, theta[:, :-1]) + theta[:, -1:]

    def backward(self, z):
        back = _times(self.matrix.transpose(0, 2, 1), z)
        return np.concatenate([back, z.sum(axis=1, keepdims=True)], axis=1)


@dataclasses.dataclass(frozen=True, eq=False)
class _Turned(_Matrix):
    """Rows in their basis: the preconditioner is a diagonal."""

    variance: np.ndarray  # (S, r)

    def precondition(self, gradient, curvature, ridge):
        bend = self.variance[..., None, None] * curvature[:, None] + ridge[:, None, :, None]
        inside = gradient[:, :-1] / np.maximum(bend, 1e-20)
        last = gradient[:, -1:] / np.maximum(curvature[:, None], 1e-20)
        return np.concatenate([inside, last], axis=1)


@dataclasses.dataclass(frozen=True, eq=False)
class _Plain(_Matrix):
    """Rows as they are: the preconditioner goes into the basis and back."""

    basis: Basis

    def precondition(self, gradient, curvature, ridge):
        directions, variance = self.basis
        plain, small = gradient[:, :-1], ridge[:, None, :, None]
        inside = _times(directions.transpose(0, 2, 1), plain)
        bend = variance[..., None, None] * curvature[:, None] + small
        scaled = _times(directions, inside / np.maximum(bend, 1e-20))
        if directions.shape[1] > directions.shape[2]:  # outside, the Hessian is the penalty alone
            rest = np.where(small > 0, 1 / np.where(small > 0, small, 1.0), 0.0)
            scaled += (plain - _times(directions, inside)) * rest
        last = gradient[:, -1:] / np.maximum(curvature[:, None], 1e-20)
        return np.concatenate([scaled, last], axis=1)


def paths(z, count, y, weight, held, penalties, shared, *, kind: str) -> Paths:
    """Fits on all rows and on the rows outside each inner fold, for all penalties.

    Args:
      z: (S, n, D) float32 standardised rows, 0 where filled up.
      count: (S,) real rows.
      y: (S, n, p, c) targets.
      weight: (S, n, p, K + 1) 1 for the rows that a fit is on; the last fit is on all rows.
      held: (S, n, p, K) 1 for the rows whose loss is asked.
      penalties: (S, P) on half the squared coefficients, beside the sum of losses; falling.
      shared: (D, D) orthonormal axes near those of every design, which save a decomposition
        each; they change how many steps are taken, not where these lead. Or None.
      kind: as `newton.Fits` has it.
    """
    matrix, basis = _decompose(z, count, shared)
    shape = weight.shape[:2]
    rows, fits = np.maximum(weight.sum(axis=1), 1), weight.shape[2:]
    weight = (weight / rows[:, None]).reshape(*shape, -1)
    out = held[..., None]
    held = held / np.maximum(held.sum(axis=1, keepdims=True), 1)
    y = np.repeat(y, fits[1], axis=2)
    turned = _Turned(matrix, basis.variance)
    theta = np.zeros((len(z), matrix.shape[2] + 1, *y.shape[2:]), z.dtype)
    losses, outputs, decrements, kept, products = [], [], [], [], 0
    for penalty in penalties.T:
        ridge = (penalty[:, None, None] / rows).reshape(len(z), -1)
        found = minimise(Fits(kind, turned, y, weight, ridge), theta, CHOICE, STEPS,
                         CHOICE_PRODUCTS)  # fmt: skip
        theta, products = found.theta, products + found.products
        by_row = row_losses(kind, found.z, y).reshape(*shape, *fits)
        losses.append(np.sum(held * by_row[..., :-1], axis=1, dtype=np.float64))
        outputs.append(np.sum(out * found.z.reshape(*shape, *fits, -1)[..., :-1, :], axis=3))
        decrements.append(found.decrement.reshape(len(z), *fits))
        kept.append(theta.reshape(*theta.shape[:2], *fits, -1)[:, :, :, -1])
    parts = (losses, outputs, decrements, kept)
    return Paths(*(np.stack(a, axis=1) for a in parts), basis, products)


def finish(z, y, weight, penalty, theta, basis: Basis, *, kind: str):
    """The fits on all rows, each at its penalty, in the precision of z.

    Args:
      z: (S, n, D).
      y: (S, n, p, c).
      weight: (S, n, p) 1 for the rows of the fit.
      penalty: (S, p).
      theta: (S, r + 1, p, c) to start from, in the basis.
      basis: of the path.
      kind: as `newton.Fits` has it.

    Returns:
      Coefficients (S, D + 1, p, c), the intercept last, decrements (S, p) and products spent.
    """
    basis = Basis(*(a.astype(z.dtype) for a in basis))
    theta = theta.astype(z.dtype)
    rows = np.maximum(weight.sum(axis=1), 1.0)
    problem = Fits(kind, _Plain(z, basis), y, weight / rows[:, None], penalty / rows)
    start = np.concatenate([_times(basis.directions, theta[:, :-1]), theta[:, -1:]], axis=1)
    found = minimise(problem, start, EXACT, STEPS, EXACT_PRODUCTS)
    return found.theta, found.decrement, found.products
