"""Many penalised linear models at once, by Newton's method with preconditioned conjugate gradients.

Fits lie side by side in the last axes, so that what costs is products of one matrix with many
columns; columns that are done are left out. Done by NumPy on the host: every set of rows has shapes
of its own, and compiling for them took longer than fitting.

The objective of a fit is

    sum_i weight_i * loss(z_i, y_i) + ridge * sum of squared coefficients / 2,    z = forward(theta)

with weights that sum to 1; the last coefficient is the intercept and free. Axes: S matrices, r
coefficients, n rows, F fits, c outputs (1 for two classes and a regression, else one per class).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol

import numpy as np
from scipy.special import expit

BINARY, MULTICLASS, NUMBERS = "binary", "multiclass", "numbers"
HALVINGS = 12


def row_losses(kind: str, z: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(..., F) losses of (..., F, c) outputs: cross-entropy, or half the squared error."""
    if kind == BINARY:
        return (np.maximum(z, 0) + np.log1p(np.exp(-np.abs(z))) - y * z)[..., 0]
    if kind == MULTICLASS:
        top = z.max(axis=-1)
        return top + np.log(np.exp(z - top[..., None]).sum(axis=-1)) - np.sum(y * z, axis=-1)
    return 0.5 * np.square(z - y)[..., 0]


def response(kind: str, z: np.ndarray) -> np.ndarray:
    """The mean that outputs stand for; its difference from y is the gradient by z."""
    if kind == BINARY:
        return expit(z)
    if kind == MULTICLASS:
        z = np.exp(z - z.max(axis=-1, keepdims=True))
        return z / z.sum(axis=-1, keepdims=True)
    return z


def _curvature(kind: str, mean: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Second derivative by z, times u."""
    if kind == BINARY:
        return mean * (1 - mean) * u
    if kind == MULTICLASS:
        return mean * (u - np.sum(mean * u, axis=-1, keepdims=True))
    return u


def _spread(kind: str, mean: np.ndarray) -> np.ndarray:
    return np.ones_like(mean) if kind == NUMBERS else mean * (1 - mean)


class Rows(Protocol):
    """The matrices that fits are on, in some coordinates."""

    def forward(self, theta: np.ndarray) -> np.ndarray:
        """(S, r, F, c) coefficients to (S, n, F, c) outputs."""

    def backward(self, z: np.ndarray) -> np.ndarray:
        """The transpose of `forward`."""

    def precondition(self, gradient, curvature, ridge) -> np.ndarray:
        """About Hessian^-1 gradient, from the mean curvature (S, F, c) and the ridge (S, F)."""


@dataclasses.dataclass(frozen=True, eq=False)
class Fits:
    """F fits on each of S matrices.

    Attributes:
      kind: BINARY, MULTICLASS or NUMBERS.
      rows: the matrices.
      y: (S, n, F, c) targets.
      weight: (S, n, F) weights of rows.
      ridge: (S, F) penalties.
    """

    kind: str
    rows: Rows
    y: np.ndarray
    weight: np.ndarray
    ridge: np.ndarray

    def take(self, columns: np.ndarray) -> Fits:
        """Some of the fits."""
        if len(columns) == self.ridge.shape[1]:
            return self
        return dataclasses.replace(self, y=self.y[:, :, columns], weight=self.weight[:, :, columns],
                                   ridge=self.ridge[:, columns])  # fmt: skip

    def shrinkage(self, theta: np.ndarray) -> np.ndarray:
        """Gradient of the penalty."""
        pull = self.ridge[:, None, :, None] * theta
        pull[:, -1] = 0
        return pull

    def value(self, theta: np.ndarray, z: np.ndarray) -> np.ndarray:
        """(S, F) objectives, float64."""
        loss = np.sum(self.weight * row_losses(self.kind, z, self.y), axis=1, dtype=np.float64)
        squares = np.sum(np.square(theta[:, :-1]), axis=(1, 3), dtype=np.float64)
        return loss + 0.5 * self.ridge * squares


class Solution(NamedTuple):
    """Coefficients (S, r, F, c), their outputs (S, n, F, c), and (S, F) Newton decrements: twice
    the objective's distance from its minimum before the last step. `steps` and `products` count
    what was spent."""

    theta: np.ndarray
    z: np.ndarray
    decrement: np.ndarray
    steps: int
    products: int


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("srfc,srfc->sf", a, b)


def minimise(
    fits: Fits, theta: np.ndarray, tolerance: float, max_steps: int, max_products: int
) -> Solution:
    """Newton's method from `theta` until every decrement is at most `tolerance`.

    The step that comes with the last decrement is still taken, so that what remains is smaller by
    an order or more. A fit that does not get there within `max_steps`, or that no step improves,
    keeps its larger decrement.
    """
    theta = theta.copy()
    z = fits.rows.forward(theta)
    decrement = np.full(fits.ridge.shape, np.inf)
    active = np.ones(decrement.shape, bool)
    steps = products = 0
    while active.any() and steps < max_steps:
        columns = np.flatnonzero(active.any(axis=0))
        among = active[:, columns]
        now, length, direction, change, spent = _step(
            fits.take(columns), theta[:, :, columns], z[:, :, columns], among, tolerance,
            max_products,
        )  # fmt: skip
        move = length.astype(theta.dtype)[:, None, :, None]
        theta[:, :, columns] += move * direction
        z[:, :, columns] += move * change
        decrement[:, columns] = np.where(among, now, decrement[:, columns])
        active[:, columns] = among & (now > tolerance) & (length > 0)
        steps, products = steps + 1, products + spent
    return Solution(theta, z, decrement, steps, products)


def _step(fits: Fits, theta, z, active, tolerance: float, max_products: int):
    """What a step of the active fits is: decrements, lengths, directions of coefficients and of
    outputs, and products spent."""
    mean = response(fits.kind, z)
    gradient = fits.rows.backward(fits.weight[..., None] * (mean - fits.y)) + fits.shrinkage(theta)
    direction, change, products = _direction(fits, mean, gradient, active, tolerance, max_products)
    slope = np.minimum(_dot(gradient, direction), 0.0)
    length = np.where(active, _step_length(fits, theta, z, direction, change, slope), 0.0)
    return -slope, length, direction, change, products


def _direction(fits: Fits, mean, gradient, active, tolerance: float, max_products: int):
    """Conjugate gradients for Hessian direction = -gradient, as exactly as the step deserves.

    A tenth of the squared error may stay, less near the end, and never less than a hundredth of
    the tolerance is asked for; a quadratic is solved at once.

    Returns the direction, its change of the outputs, and the number of products.
    """
    kind, rows = fits.kind, fits.rows
    curvature = np.sum(fits.weight[..., None] * _spread(kind, mean), axis=1)
    direction, change = np.zeros_like(gradient), np.zeros_like(fits.y)
    columns = np.arange(gradient.shape[2])
    r = -gradient
    p = _preconditioned(fits, r, curvature)
    size = _dot(r, p)
    goal = 0.01 * tolerance
    if kind != NUMBERS:
        goal = np.maximum(size * np.minimum(0.1, size), goal)
    goal = np.broadcast_to(goal, size.shape)
    active = active & (size > goal)
    if not active.any():
        return p, rows.forward(p), 1
    for count in range(1, max_products + 1):  # noqa: B007
        keep = active.any(axis=0)
        if keep.sum() <= 0.75 * len(keep):
            kept = np.flatnonzero(keep)
            fits, columns = fits.take(kept), columns[kept]
            mean, r, p = (a[:, :, kept] for a in (mean, r, p))
            curvature, size, goal, active = (a[:, kept] for a in (curvature, size, goal, active))
        u = rows.forward(p)
        pulled = rows.backward(fits.weight[..., None] * _curvature(kind, mean, u))
        product = pulled + fits.shrinkage(p)
        bend = _dot(p, product)
        active = active & (bend > 0)
        rate = _ratio(size, bend, active)
        direction[:, :, columns] += rate * p
        change[:, :, columns] += rate * u
        r = r - rate * product
        s = _preconditioned(fits, r, curvature)
        after = np.where(active, _dot(r, s), size)
        p = s + _ratio(after, size, active) * p
        size, active = after, active & (after > goal)
        if not active.any():
            break
    return direction, change, count


def _preconditioned(fits: Fits, r, curvature) -> np.ndarray:
    s = fits.rows.precondition(r, curvature, fits.ridge)
    # What all classes share changes no probability; there the preconditioner would be wrong.
    return s - s.mean(axis=-1, keepdims=True) if fits.kind == MULTICLASS else s


def _ratio(a, b, active) -> np.ndarray:
    """(S, 1, F, 1) a / b where active, else 0."""
    return np.where(active, a / np.where(active, b, 1), 0).astype(a.dtype)[:, None, :, None]


def _step_length(fits: Fits, theta, z, direction, change, slope) -> np.ndarray:
    """(S, F) largest of 1, 1/2, 1/4, ... that lowers the objective enough, up to rounding; or 0."""
    before = fits.value(theta, z)
    slack = 10 * np.finfo(theta.dtype).eps * (1 + np.abs(before))
    length = np.ones(slope.shape)
    for _ in range(HALVINGS):
        moved = length.astype(theta.dtype)[:, None, :, None]
        after = fits.value(theta + moved * direction, z + moved * change)
        rejected = ~(after <= before + 1e-4 * length * slope + slack)
        if not rejected.any():
            return length
        length = np.where(rejected, length / 2, length)
    return np.where(rejected, 0.0, length)
