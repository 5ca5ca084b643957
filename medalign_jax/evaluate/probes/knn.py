"""Nearest neighbours on standardised features."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medalign_jax.evaluate.probes.designs import Scaling
from medalign_jax.evaluate.probes.inner_folds import InnerFolds, inner_folds
from medalign_jax.evaluate.probes.problem import Prediction, ProbeError, Problem, check

NEIGHBOURS = (1, 3, 5, 9, 15, 25)
TIED = 1e-9  # of the squared length of a row: nearer than this to the k-th counts as well


def knn(
    x: np.ndarray,
    problems: Sequence[Problem],
    neighbours: Sequence[int] = NEIGHBOURS,
    metric: str = "cosine",
) -> list[Prediction]:
    """Predicts from the k nearest training rows of features standardised on the training rows.

    All rows as near as the k-th count, so the order of rows does not matter. A class scores
    (its neighbours + its share of the training rows) / (neighbours + 1): as if one more neighbour
    were an average row, which keeps probabilities above 0. A number is the mean of the
    neighbours'. k has the least held-out log loss or squared error over inner folds, the larger of
    two that are equal; a k beyond the rows outside a fold means all of them.

    Args:
      x: (N, D) features.
      problems: problems on rows of x.
      neighbours: values of k to choose from; one alone is taken.
      metric: "cosine" or "euclidean".

    Raises:
      ProbeError: as `problem.check`; or an unknown metric, or no k of at least 1.
    """
    x = check(x, problems)
    ks = sorted(set(neighbours), reverse=True)
    if not ks or min(ks) < 1:
        raise ProbeError(f"numbers of neighbours are at least 1; got {tuple(neighbours)}")
    if metric not in ("cosine", "euclidean"):
        raise ProbeError(f"the metric is 'cosine' or 'euclidean'; got {metric!r}")
    return [_fit(x, problem, ks, metric) for problem in problems]


def _fit(x: np.ndarray, problem: Problem, ks: list[int], metric: str) -> Prediction:
    train, values = np.asarray(problem.train), _values(problem)
    scaling = Scaling.of(x[train])
    rows = _rows(scaling(x[train]), metric)
    k, note = ks[0], ""
    if len(ks) > 1:
        targets, groups = np.asarray(problem.targets)[train], np.asarray(problem.groups)[train]
        folds = inner_folds(targets, groups, problem.classes, problem.seed)
        note = folds.note.replace("penalty", "k")
        k = ks[len(ks) // 2]
        if folds.usable.any():
            k = _choose(rows, values, folds, ks, problem.classes)
    nearness = _nearness(_rows(scaling(x[problem.test]), metric), rows)
    scores = _predict(nearness, values, k, problem.classes)
    return Prediction(scores if problem.classes else scores[:, 0], note)


def _values(problem: Problem) -> np.ndarray:
    """(n, C) one-hot classes, or (n, 1) numbers, of the training rows."""
    targets = np.asarray(problem.targets)[problem.train]
    return np.eye(problem.classes)[targets] if problem.classes else targets[:, None].astype(float)


def _rows(z: np.ndarray, metric: str) -> np.ndarray:
    """Rows on which squared Euclidean distance orders as the metric does."""
    if metric == "euclidean":
        return z
    length = np.linalg.norm(z, axis=1, keepdims=True)
    return z / np.where(length > 0, length, 1.0)


def _nearness(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(m, n) squared distances."""
    squares = np.sum(queries**2, axis=1)[:, None] + np.sum(rows**2, axis=1)[None]
    return squares - 2 * queries @ rows.T


def _predict(distance: np.ndarray, values: np.ndarray, k: int, classes: int) -> np.ndarray:
    """(m, C) scores from (m, n) squared distances to rows with values (n, C)."""
    k = min(k, distance.shape[1])
    last = np.partition(distance, k - 1, axis=1)[:, k - 1 : k]
    slack = TIED * np.abs(distance).max(axis=1, keepdims=True)
    near = (distance <= last + slack).astype(float)
    count = near.sum(axis=1, keepdims=True)
    if classes:
        return (near @ values + values.mean(axis=0)) / (count + 1)
    return near @ values / count


def _choose(rows, values, folds: InnerFolds, ks: list[int], classes: int) -> int:
    losses = np.zeros(len(ks))
    distance = _nearness(rows, rows)
    for out in folds.held_out():
        inside, truth = distance[np.ix_(out, ~out)], values[out]
        for i, k in enumerate(ks):
            scores = _predict(inside, values[~out], k, classes)
            if classes:
                losses[i] -= np.mean(np.log(np.sum(scores * truth, axis=1)))
            else:
                losses[i] += np.mean((scores - truth) ** 2)
    return ks[int(np.argmin(losses))]
