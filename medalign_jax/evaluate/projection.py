"""Two-dimensional maps of embeddings for the report page."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class EmbeddingMap:
    """Coordinates on the first two principal components of the training embeddings.

    Attributes:
      coordinates: one (n_i, 2) array for the training embeddings and for each other set.
      explained: shares of the training variance on the two axes; zeros if there is none.
    """

    coordinates: tuple[np.ndarray, ...]
    explained: tuple[float, float]


def embedding_map(train: np.ndarray, *others: np.ndarray) -> EmbeddingMap:
    """Projects embeddings on a principal component analysis fitted on `train` alone.

    The sign of an axis is fixed (its largest loading is positive), so the same embeddings give
    the same map on every machine.

    Args:
      train: (n, D) embeddings that the axes are fitted on.
      *others: (m, D) embeddings to be placed on these axes.

    Raises:
      ValueError: a set that is not (m, D), or holds a value that is not finite.
    """
    sets = [np.asarray(x, np.float64) for x in (train, *others)]
    for i, x in enumerate(sets):
        if x.ndim != 2 or x.shape[1] != sets[0].shape[1] or not np.all(np.isfinite(x)):
            raise ValueError(f"embeddings {i} of shape {x.shape} are not finite rows of one width")
    mean = sets[0].mean(axis=0)
    _, singular, axes = np.linalg.svd(sets[0] - mean, full_matrices=False)
    axes = np.pad(axes[:2], ((0, max(0, 2 - len(axes))), (0, 0)))
    largest = axes[np.arange(2), np.abs(axes).argmax(axis=1)]
    axes *= np.where(largest < 0, -1.0, 1.0)[:, None]
    variance = np.pad(singular**2, (0, 2))
    share = variance[:2] / variance.sum() if variance.sum() > 0 else np.zeros(2)
    coordinates = tuple((x - mean) @ axes.T for x in sets)
    return EmbeddingMap(coordinates, (float(share[0]), float(share[1])))
