"""Equal weight for every direction in which the reports differ.

Linear CKA weighs directions by their variance. Sentence embeddings put most of it into few: of four
heart diagnoses read by MiniLM, half of it separates normal from the rest, and an encoder that has
learnt that much already scores well. Whitening (Su et al. 2021, "Whitening Sentence Representations
for Better Semantics and Faster Retrieval") gives the finer distinctions the same say.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medalign_jax.core.errors import UserError


@dataclass(frozen=True)
class Whitening:
    """x -> (x - mean) @ matrix.

    Attributes:
      mean: (H,) float32.
      matrix: (H, k) float32; principal directions over their standard deviations.
      share: of the reports' variance that the k directions hold.
    """

    mean: np.ndarray
    matrix: np.ndarray
    share: float = 1.0

    @property
    def width(self) -> int:
        """k, the directions kept."""
        return self.matrix.shape[1]

    def describe(self) -> str:
        """What was kept, for the screen."""
        kept = f"{self.width} direction{'' if self.width == 1 else 's'} of {len(self.mean)}"
        return f"whitening keeps {kept}, {100 * self.share:.0f} % of the reports' variance"

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """(..., H) -> (..., k) float32."""
        return ((vectors - self.mean) @ self.matrix).astype(np.float32)


def fit_whitening(vectors: np.ndarray, share: float, classes: int | None = None) -> Whitening:
    """Whitening fitted on training reports.

    Args:
      vectors: (N, H), one per recording of the training split.
      share: of the variance that the kept principal directions hold, above 0 and at most 1; the
        rest is wording and rounding, which whitening would amplify.
      classes: that the kept directions have to be able to tell apart, which takes one direction
        fewer than there are classes; None does not ask.

    Raises:
      UserError: a share out of range, reports that are all the same, or too few directions for
        the classes.
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
    if classes is not None and kept < classes - 1:
        raise UserError(
            f"teacher.whiten={share:g} keeps {kept} of {vectors.shape[1]} directions of the "
            f"reports; {classes} classes cannot be told apart in fewer than {classes - 1}: raise "
            f"teacher.whiten (the first {classes - 1} hold "
            f"{energy[: classes - 1].sum() / energy.sum():.2f} of the variance), or set it to 0"
        )
    deviations = spread[:kept] / len(vectors) ** 0.5
    matrix = (directions[:kept] / deviations[:, None]).T
    held = float(energy[:kept].sum() / energy.sum())
    return Whitening(mean.astype(np.float32), matrix.astype(np.float32), held)
