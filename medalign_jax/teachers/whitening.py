"""Equal weight for every direction in which the reports differ.

Linear CKA weighs directions by their variance. Sentence embeddings put most of it into few: of four
heart diagnoses read by MiniLM, half of it separates normal from the rest, and an encoder that has
learnt that much already scores well. Whitening (Su et al. 2021, "Whitening Sentence Representations
for Better Semantics and Faster Retrieval") gives the finer distinctions the same say.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medalign_jax.errors import UserError


@dataclass(frozen=True)
class Whitening:
    """x -> (x - mean) @ matrix.

    Attributes:
      mean: (H,) float32.
      matrix: (H, k) float32; principal directions over their standard deviations.
    """

    mean: np.ndarray
    matrix: np.ndarray

    @property
    def width(self) -> int:
        """k, the directions kept."""
        return self.matrix.shape[1]

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """(..., H) -> (..., k) float32."""
        return ((vectors - self.mean) @ self.matrix).astype(np.float32)


def fit_whitening(vectors: np.ndarray, share: float) -> Whitening:
    """Whitening fitted on training reports.

    Args:
      vectors: (N, H), one a recording of the training split.
      share: of the variance that the kept principal directions hold, above 0 and at most 1; the
        rest is wording and rounding, which whitening would amplify.

    Raises:
      UserError: a share out of range, or reports that are all the same.
    """
    if not 0.0 < share <= 1.0:
        raise UserError(f"teacher.whiten must lie above 0 and at most at 1, got {share}")
    mean = vectors.mean(0, dtype=np.float64)
    _, spread, directions = np.linalg.svd(vectors - mean, full_matrices=False)
    energy = np.square(spread)
    real = spread > 1e-4 * max(spread[0], 1e-12)
    if not real.any() or spread[0] < 1e-6 * np.abs(vectors).max() * len(vectors) ** 0.5:
        raise UserError("all training reports have the same vector: there is nothing to align with")
    reached = np.cumsum(energy) / energy.sum() >= share - 1e-9
    kept = min(int(np.argmax(reached)) + 1, int(real.sum()))
    deviations = spread[:kept] / len(vectors) ** 0.5
    matrix = (directions[:kept] / deviations[:, None]).T
    return Whitening(mean.astype(np.float32), matrix.astype(np.float32))
