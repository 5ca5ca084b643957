"""What reports bring without training an encoder: a ridge regression from features to them.

An encoder that was aligned has read the reports of all training recordings, which may name what the
probe is asked. A fair comparison gives other features the same reports: here a linear map from
features as they are to the reports' vectors, fitted on the training recordings in closed form. Its
predictions are the features that are probed.
"""

from __future__ import annotations

import numpy as np

from medalign_jax.evaluate.probes.designs import Scaling
from medalign_jax.evaluate.probes.inner_folds import inner_folds

GRID = np.logspace(3, -3, 13)  # penalties, per feature that varies


def predicted_reports(
    features: np.ndarray, vectors: np.ndarray, train: np.ndarray, groups: np.ndarray
) -> np.ndarray:
    """Vectors of reports as far as features say them.

    Features are standardised, and vectors centred, on the training rows; the penalty is that of
    least squared error over five inner folds by group, the stronger of two that are equal.

    Args:
      features: (N, D).
      vectors: (N, H) of the recordings' reports.
      train: (n,) rows that are fitted on.
      groups: (N,) integers, one per subject.

    Returns:
      (N, H) float32.
    """
    scaling = Scaling.of(features[train])
    x, mean = scaling(features), vectors[train].mean(axis=0, dtype=np.float64)
    y = vectors[train] - mean
    penalties = max(1, scaling.varying) * GRID
    folds = inner_folds(y @ _loudest(y), groups[train], 0, seed=0)
    errors = np.zeros(len(penalties))
    for held in folds.held_out():
        fitted = _paths(x[train][~held], y[~held], penalties)
        errors += [((x[train][held] @ w - y[held]) ** 2).sum() for w in fitted]
    (weights,) = _paths(x[train], y, penalties[[int(errors.argmin())]])
    return (x @ weights + mean).astype(np.float32)


def _loudest(y: np.ndarray) -> np.ndarray:
    """(H,) the direction of most variance, by which folds are stratified."""
    return np.linalg.svd(y, full_matrices=False)[2][0]


def _paths(x: np.ndarray, y: np.ndarray, penalties: np.ndarray) -> list[np.ndarray]:
    """(D, H) weights for each penalty, of one decomposition."""
    left, sizes, right = np.linalg.svd(x, full_matrices=False)
    seen = left.T @ y
    return [right.T @ ((sizes / (sizes**2 + penalty))[:, None] * seen) for penalty in penalties]
