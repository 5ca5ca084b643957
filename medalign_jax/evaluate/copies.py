"""Near-copies among the recordings of an evaluation, and what is done about them.

Two recordings that are one sound (`datasets.near_copies`) turn a measure of generalisation into
one of memory where one is trained on and the other tested. Where the data names no subjects, such
recordings count as one subject's: folds keep them together and intervals count them once. What is
left is reported beside the results.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from medalign_jax.core.progress import Progress
from medalign_jax.data.recordings.dataset import AudioDataset
from medalign_jax.data.recordings.manifest import COPIES_OF, Row
from medalign_jax.datasets.near_copies import NearCopies, near_copies
from medalign_jax.evaluate.suite import Suite


@dataclasses.dataclass(frozen=True)
class Searched:
    """A data set that was looked through.

    Attributes:
      data: the recordings; those without a subject have the one of their near-copies.
      copies: what was found; None where nobody looked.
    """

    data: AudioDataset
    copies: NearCopies | None

    def findings(self, suite: Suite) -> list[str]:
        """What a reader of the results has to know, in sentences.

        Args:
          suite: folds over the recordings of `data`.
        """
        copies = self.copies
        if copies is None:
            return ["Nobody looked for near-copies among the recordings."]
        names = [row.audio_path for row in self.data.rows]
        if not len(copies.pairs):
            return [f"No two of the {copies.count} recordings are near-copies of each other."]
        lines = [f"{len(copies.pairs)} pairs of the {copies.count} recordings are near-copies."]
        if not suite.options.folds:
            splits = suite.training_folds()[0].split_of(suite.count)
            return [*lines, *(f"{text}." for text in copies.leaks_between(splits, names))]
        leaking = _across_folds(copies, suite)
        if not leaking:
            return [*lines, "None lies across training and test recordings of a fold."]
        return [
            *lines,
            f"{len(leaking)} of {suite.count} test recordings have a near-copy among the training "
            f"recordings of their fold, e.g. '{names[leaking[0]]}'.",
        ]


def search(data: AudioDataset, aggregate: str = "recording", enabled: bool = True) -> Searched:
    """Looks for near-copies and gives recordings without a subject the one of their copies.

    Args:
      data: all recordings that are evaluated.
      aggregate: of `suite.Options`. Where a subject's recordings become one row, copies of unnamed
        subjects stay apart: they may be in different splits, or carry different answers.
      enabled: False leaves them as they are.
    """
    if not enabled:
        return Searched(data, None)
    progress, seen = Progress(len(data), "looking for near-copies", "recording"), 0

    def advance(done: int, total: int) -> None:
        nonlocal seen
        progress.advance(done - seen)
        seen = done

    copies = near_copies(data.waveform, len(data), data.sample_rate, progress=advance)
    progress.close()
    if aggregate == "recording":
        data = data.with_subjects(subjects_of_copies(data.rows, copies.groups))
    return Searched(data, copies)


def subjects_of_copies(rows: Sequence[Row], groups: np.ndarray) -> list[str]:
    """Subjects of N rows; those of one group (N,) that name none get one between them."""
    size = np.bincount(groups)
    return [
        row.subject_id if row.names_subject or size[group] == 1 else f"{COPIES_OF}{group}"
        for row, group in zip(rows, groups, strict=True)
    ]


def _across_folds(copies: NearCopies, suite: Suite) -> list[int]:
    """Test recordings with a near-copy in the training part of their fold."""
    found: set[int] = set()
    for fold in suite.tested_folds():
        tested = np.zeros(suite.count, bool)
        tested[fold.test] = True
        crossing = copies.pairs[tested[copies.pairs].sum(axis=1) == 1]
        found |= set(crossing[tested[crossing]].tolist())
    return sorted(found)
