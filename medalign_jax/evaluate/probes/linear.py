"""The linear probe, solved to convergence: logistic and multinomial regression, and ridge.

Features are standardised by mean and deviation of the training rows (a constant one becomes 0),
targets of a regression likewise. Minimised is

    sum of losses over the n training rows + l2 / 2 * sum of squared weights

with the cross-entropy or half the squared error; the intercept is free. Two classes have one vector
of weights, more have one each. In scikit-learn's terms C = 1 / l2, and alpha = l2 of its Ridge.

The penalty comes from a grid by inner folds of the training rows (`inner_folds.py`): least mean
over folds of the mean loss of the rows held out, the stronger of two that are equal; of classes
only among penalties whose AUROC of the rows held out, by the pairs of each inner fold, is within
`ALIKE` of the best one. The loss alone prefers a probe that says nothing to one that ranks well and
is too sure of itself, which is what few subjects and many features give (`benchmarks.penalties`).
The standardisation is not repeated inside. The losses are known to a thousandth: penalties nearer
to each other than that may change places.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import threadpoolctl

from medalign_jax.evaluate.probes import linear_solver, newton
from medalign_jax.evaluate.probes.designs import Design, Scaling, stacks
from medalign_jax.evaluate.probes.inner_folds import FOLDS, InnerFolds, inner_folds
from medalign_jax.evaluate.probes.problem import Prediction, ProbeError, Problem, check
from medalign_jax.evaluate.statistics import StatisticsError, auroc_statistic

GRID = np.logspace(3, -3, 10)
ALIKE = 0.005  # AUROC
SEPARATED = "classes are separable and there is no penalty: the weights have no limit"
SHARED_WIDTH = 256  # from here on, designs with more rows than features share their axes


def default_penalties(width: int) -> np.ndarray:
    """(10,) penalties: 1000 to 0.001 for each of the features that vary over the training rows.

    A feature being of variance 1, this lets the log-odds have a standard deviation of 0.03 to 30
    before any data are used, whatever the width. A feature that is constant there says nothing and
    does not count.

    Args:
      width: how many vary.
    """
    return max(1, width) * GRID


@dataclasses.dataclass(frozen=True, eq=False)
class LinearModel:
    """A fitted probe.

    Attributes:
      scaling: of the features.
      weights: (D, c) of the standardised features; c is 1 for two classes and for a regression.
      intercept: (c,).
      classes: 0 for a regression.
      unit: mean and deviation of a regression's training targets.
      penalty: l2.
      losses: (P,) mean loss of the held-out rows for each penalty, falling; NaN where none was
        measured.
      aurocs: (P,) AUROC of the held-out rows for each penalty; NaN where it is not defined.
      note: what is not as it should be.
    """

    scaling: Scaling
    weights: np.ndarray
    intercept: np.ndarray
    classes: int
    unit: tuple[float, float]
    penalty: float
    losses: np.ndarray
    aurocs: np.ndarray
    note: str

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """(m, classes) probabilities or (m,) numbers for the features x (m, D)."""
        z = self.scaling(x) @ self.weights + self.intercept
        if self.classes == 0:
            return z[:, 0] * self.unit[1] + self.unit[0]
        return _probabilities(z)


def linear(
    x: np.ndarray, problems: Sequence[Problem], penalties: Sequence[float] | None = None
) -> list[Prediction]:
    """Fits a linear probe to each problem and predicts its test rows.

    Args:
      x: (N, D) features.
      problems: P problems on rows of x.
      penalties: l2 to choose from; one is not chosen but taken; 0 means none. By default
        `default_penalties`.

    Raises:
      ProbeError: as `problem.check`; or there is no penalty, or one is negative or not finite.
    """
    models = fit_linear(x, problems, penalties)
    x = np.asarray(x)
    return [Prediction(model(x[p.test]), model.note) for model, p in zip(models, problems,
                                                                        strict=True)]  # fmt: skip


def fit_linear(
    x: np.ndarray, problems: Sequence[Problem], penalties: Sequence[float] | None = None
) -> list[LinearModel]:
    """The models themselves; arguments and errors as `linear`."""
    x = check(x, problems)
    grid = None if penalties is None else _checked(penalties)
    parts = list(stacks(problems, x.shape[1]))

    def fit(part, shared) -> dict[int, LinearModel]:
        (classes, rows, _), designs = part
        axes = shared if _can_share(rows, x.shape[1]) else None
        return _Stack(x, problems, designs, classes, rows, grid).fit(axes)

    found: dict[int, LinearModel] = {}
    # One thread per stack: BLAS's own threads wait for each other in products as small as these.
    with _blas().limit(limits=1, user_api="blas"), ThreadPoolExecutor(os.cpu_count()) as pool:
        shared = _shared_axes(x, parts)
        for models in pool.map(lambda part: fit(part, shared), parts):
            found |= models
    return [found[number] for number in range(len(problems))]


def _checked(penalties: Sequence[float]) -> np.ndarray:
    """(P,) falling."""
    grid = np.asarray(penalties, float)
    if grid.ndim != 1 or not grid.size or not np.isfinite(grid).all() or (grid < 0).any():
        raise ProbeError(f"penalties are finite numbers from 0 upwards; got {penalties!r}")
    return np.sort(grid)[::-1]


@functools.cache
def _blas() -> threadpoolctl.ThreadpoolController:
    return threadpoolctl.ThreadpoolController()


def _can_share(rows: int, width: int) -> bool:
    return rows >= width >= SHARED_WIDTH


def _shared_axes(x: np.ndarray, parts) -> np.ndarray | None:
    """Axes of the first of the designs that share them; None where none does."""
    for (_, rows, _), designs in parts:
        if _can_share(rows, x.shape[1]):
            features = x[designs[0].train]
            return linear_solver.axes(Scaling.of(features)(features).astype(np.float32))
    return None


class _Stack:
    """Designs of about the same size, filled up to the same shapes."""

    def __init__(self, x, problems, designs: list[Design], classes: int, rows: int, grid):
        self.problems, self.designs, self.classes = problems, designs, classes
        self.kind = (
            newton.NUMBERS if classes == 0
            else newton.BINARY if classes == 2 else newton.MULTICLASS
        )  # fmt: skip
        outputs, members = classes if classes > 2 else 1, len(designs[0].members)
        self.z = np.zeros((len(designs), rows, x.shape[1]))
        self.y = np.zeros((len(designs), rows, members, outputs))
        self.weight = np.zeros((len(designs), rows, members))
        self.scalings, self.units = [], {}
        for s, design in enumerate(designs):
            n, features = len(design.train), x[design.train]
            self.scalings.append(Scaling.of(features))
            self.z[s, :n] = self.scalings[s](features)
            for p, number in enumerate(design.members):
                self.weight[s, :n, p] = 1
                self.y[s, :n, p] = self._targets(number)
        self.grid = np.stack([
            default_penalties(scaling.varying) if grid is None else grid
            for scaling in self.scalings
        ])  # fmt: skip

    def _targets(self, number: int) -> np.ndarray:
        """(n, c): 0 or 1, or a standardised number."""
        problem = self.problems[number]
        targets = np.asarray(problem.targets)[problem.train]
        if self.classes > 2:
            return np.eye(self.classes)[targets]
        if self.classes == 2:
            return targets[:, None].astype(float)
        targets = targets.astype(float)
        deviation = float(targets.std())
        self.units[number] = (float(targets.mean()), deviation if deviation > 0 else 1.0)
        return ((targets - self.units[number][0]) / self.units[number][1])[:, None]

    def fit(self, axes) -> dict[int, LinearModel]:
        """A model of each problem, by its number."""
        count = self.grid.shape[1]
        folds = {
            number: self._folds(number) for design in self.designs for number in design.members
        } if count > 1 else {}  # fmt: skip
        path = self._paths(folds, axes)
        losses, decrements = path.losses, path.decrements
        chosen = np.full(self.weight.shape[::2], count // 2)
        mean, aurocs = np.full((2, *chosen.shape, count), np.nan)
        for s, p, number in self._members():
            usable = folds[number].usable.sum() if folds else 0
            if usable:
                mean[s, p] = losses[s, :, p, :usable].mean(axis=1)
                if self.classes:
                    aurocs[s, p] = self._aurocs(path.outputs[s, :, :, p], number, folds[number])
                chosen[s, p] = _choice(mean[s, p], aurocs[s, p])
        penalty = np.take_along_axis(self.grid, chosen, axis=1)
        theta = np.take_along_axis(path.theta, chosen[:, None, None, :, None], axis=1)[:, 0]
        theta, left, products = linear_solver.finish(
            self.z, self.y, self.weight, penalty, theta, path.basis, kind=self.kind
        )
        self.products = path.products, products
        models = {}
        for s, p, number in self._members():
            note = _note(folds.get(number), count, chosen[s, p], decrements[s, :, p], left[s, p])
            if penalty[s, p] == 0 and self._separated(s, p, theta[s, :, p]):
                note = "; ".join(filter(None, (note, SEPARATED)))
            models[number] = LinearModel(
                self.scalings[s], theta[s, :-1, p], theta[s, -1, p], self.classes,
                self.units.get(number, (0.0, 1.0)), float(penalty[s, p]), mean[s, p],
                aurocs[s, p], note,
            )  # fmt: skip
        return models

    def _aurocs(self, outputs: np.ndarray, number: int, folds: InnerFolds) -> np.ndarray:
        """(P,) from the outputs (P, n, c) of the fits that held a row out."""
        problem = self.problems[number]
        rows = np.flatnonzero(folds.usable[folds.number])
        labels = np.asarray(problem.targets)[problem.train][rows]
        scores = _probabilities(outputs[:, rows].astype(np.float64))
        try:
            statistic = auroc_statistic(labels, scores, folds=folds.number[rows])
        except StatisticsError:  # no fold holds two classes
            return np.full(len(outputs), np.nan)
        return statistic(np.ones((1, len(rows))))[0]

    def _separated(self, s: int, p: int, theta: np.ndarray) -> bool:
        """Whether the classes of a problem's training rows are all but certain."""
        if self.classes == 0:
            return False
        outputs = self.z[s] @ theta[:-1] + theta[-1]
        loss = newton.row_losses(self.kind, outputs[:, None], self.y[s][:, [p]])[:, 0]
        return float(np.max(loss * self.weight[s, :, p])) < 1e-6

    def _members(self):
        for s, design in enumerate(self.designs):
            for p, number in enumerate(design.members):
                yield s, p, number

    def _folds(self, number: int) -> InnerFolds:
        problem = self.problems[number]
        rows = np.asarray(problem.train)
        targets, groups = np.asarray(problem.targets)[rows], np.asarray(problem.groups)[rows]
        return inner_folds(targets, groups, problem.classes, problem.seed)

    def _paths(self, folds: dict[int, InnerFolds], axes) -> linear_solver.Paths:
        held = np.zeros((*self.weight.shape, FOLDS if folds else 0), bool)
        for s, p, number in self._members():
            if folds:
                out = folds[number].held_out()
                held[s, : out.shape[1], p, : len(out)] = out.T
        used = held.any(axis=1, keepdims=True) & ~held & (self.weight[..., None] > 0)
        weight = np.concatenate([used, self.weight[..., None] > 0], axis=-1)
        return linear_solver.paths(
            *(a.astype(np.float32) for a in (self.z, self.weight[:, :, 0].sum(axis=1), self.y,
                                             weight, held, self.grid)),
            axes, kind=self.kind,
        )  # fmt: skip


def _choice(losses: np.ndarray, aurocs: np.ndarray) -> int:
    """Number of the penalty, of the losses and AUROCs (P,) of the rows held out."""
    if np.isnan(aurocs).any():
        return int(np.argmin(losses))
    return int(np.argmin(np.where(aurocs >= aurocs.max() - ALIKE, losses, np.inf)))


def _probabilities(z: np.ndarray) -> np.ndarray:
    """(..., classes) of the outputs (..., c); c is 1 for two classes."""
    if z.shape[-1] == 1:
        z = np.concatenate([-z, z], axis=-1) / 2
    z = np.exp(z - z.max(axis=-1, keepdims=True))
    return z / z.sum(axis=-1, keepdims=True)


def _note(folds, count: int, chosen, decrements, left) -> str:
    """What is not as it should be with a fit."""
    notes = []
    if folds is not None and folds.note:
        notes.append(folds.note)
        if not folds.usable.any():
            notes.append("the middle of the grid is taken")
    if folds is not None and folds.usable.any():
        late = int(np.sum(~(decrements[:, :-1] <= linear_solver.CHOICE).all(axis=1)))
        if late:
            notes.append(f"inner fits not converged at {late} of {count} penalties")
        if chosen in (0, count - 1):
            end = "strongest" if chosen == 0 else "weakest"
            notes.append(f"the chosen penalty is the {end} of the grid")
    if not left <= linear_solver.EXACT:
        notes.append(f"not converged: the Newton decrement is {left:.0e}")
    return "; ".join(notes)
