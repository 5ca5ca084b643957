"""Deals subjects out to folds, with like shares of every label in each.

That no subject is in two splits is checked where rows are read (`data.recordings.subjects`).
"""

from __future__ import annotations

import numpy as np

from medalign_jax.core.errors import UserError

DEALS = 100  # tries at folds of a hundred subjects


class SplitError(UserError):
    """Folds that cannot be dealt."""


def deal_folds(labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Folds that share out every label as evenly as can be.

    The most even of up to `DEALS` iterative stratifications (Sechidis, Tsoumakas and Vlahavas
    2011, "On the Stratification of Multi-label Data"): the rarest label that is left goes first,
    each of its rows to the fold that lacks it most, then to the one with the most room, then by
    lot. Here no fold grows beyond its share of the rows, rounded up.

    Args:
      labels: (S, L) 0 or 1, one row per subject; L may be 0.
      folds: how many, at least 2.
      seed: of the lots.

    Returns:
      (S,) fold of each row, 0 to folds - 1.

    Raises:
      SplitError: fewer than 2 folds, or more than rows.
    """
    labels = np.asarray(labels, bool)
    if not 2 <= folds <= len(labels):
        raise SplitError(f"{folds} folds of {len(labels)} subjects; give 2 to {len(labels)}")
    if not labels.shape[1]:
        labels = np.zeros((len(labels), 1), bool)
    counted = np.column_stack([labels, np.ones(len(labels), bool)])
    rng = np.random.default_rng(seed)

    def unevenness(fold: np.ndarray) -> float:
        counts = np.stack([counted[fold == f].sum(0) for f in range(folds)])
        return float(np.square(counts - counts.mean(0)).sum())

    tries = max(1, DEALS * 100 // max(100, len(labels)))  # many subjects come out even at once
    return min((_deal(labels, folds, rng) for _ in range(tries)), key=unevenness)


def _deal(labels: np.ndarray, folds: int, rng: np.random.Generator) -> np.ndarray:
    """One iterative stratification, (S,) fold of each row."""
    room = np.full(folds, -(-len(labels) // folds))
    wanted = np.repeat(labels.sum(0)[None] / folds, folds, 0)
    fold = np.full(len(labels), -1)
    while (fold < 0).any():
        left = labels[fold < 0].sum(0)
        rarest = int(np.where(left, left, len(labels) + 1).argmin())
        rows = np.flatnonzero((fold < 0) & (labels[:, rarest] if left.any() else True))
        for row in rng.permutation(rows):
            keys = (rng.random(folds), -room, -wanted[:, rarest], room == 0)  # the last goes first
            fold[row] = chosen = np.lexsort(keys)[0]
            room[chosen] -= 1
            wanted[chosen] -= labels[row]
    return fold
