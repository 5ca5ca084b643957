"""The reports of a data set in several wordings, and the column of a batch that stands for them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from medalign_jax.data.recordings.dataset import AudioDataset


@dataclasses.dataclass(frozen=True)
class Reports:
    """Every recording's wordings: K texts each, the last repeated where fewer exist.

    Attributes:
      texts: one tuple of wordings per recording.
    """

    texts: tuple[tuple[str, ...], ...]

    @classmethod
    def of(
        cls, dataset: AudioDataset, count: int, seed: int, leave_out: Sequence[str] = ()
    ) -> Reports:
        """Up to `count` wordings of each recording of a data set."""
        of_one = functools.partial(dataset.reports, count=count, seed=seed, leave_out=leave_out)
        return cls(tuple(of_one(i) for i in range(len(dataset))))

    def unique(self) -> list[str]:
        """All texts, each once, in a fixed order."""
        return sorted({text for texts in self.texts for text in texts})


@dataclasses.dataclass(frozen=True)
class TextColumn:
    """Adds a recording's report to a batch: a fresh wording each time, or the mean of all.

    Attributes:
      arrays: name -> (U, ...), one row per unique text.
      rows: for each recording, the rows of its wordings.
      use: "fresh" draws one, "mean" averages ("text" only), "first" always takes the first.
      marks: (N, K) of the reports, see `report_marks`; None leaves them out of the batch.
    """

    arrays: dict[str, np.ndarray]
    rows: tuple[np.ndarray, ...]
    use: str
    marks: np.ndarray | None = None

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        rows, marked = self.rows[index], {}
        if self.marks is not None:
            marked["report"] = self.marks[index]
        if self.use == "mean":
            return marked | {"text": self.arrays["text"][rows].mean(0)}
        row = rows[rng.integers(len(rows))] if self.use == "fresh" else rows[0]
        return marked | {name: array[row] for name, array in self.arrays.items()}


def report_marks(*parts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """(N, 8) float32 for each part: equal for recordings that have the same wordings.

    Args:
      *parts: for each recording the rows of its wordings.
    """
    number = {tuple(rows): 0 for part in parts for rows in part}
    number = {wordings: i for i, wordings in enumerate(number)}
    marks = np.random.default_rng(0).standard_normal((len(number), 8)).astype(np.float32)
    return [marks[[number[tuple(rows)] for rows in part]] for part in parts]


def rows_of(reports: Reports, row: dict[str, int]) -> tuple[np.ndarray, ...]:
    """For each recording the rows of its wordings."""
    return tuple(np.array([row[text] for text in texts]) for texts in reports.texts)
