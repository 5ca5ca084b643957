"""What may have leaked from training into testing, reported beside an evaluation's results.

Of recordings, near-copies are looked for (`copies`). Of embeddings made elsewhere only those that
are equal can be reported. Of either, subjects whose names may be two spellings of one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from medalign_jax.data.recordings.manifest import Row
from medalign_jax.data.recordings.subjects import alike_subjects
from medalign_jax.evaluate.copies import subjects_of_copies
from medalign_jax.evaluate.suite import Suite

_NO_SOUND = "Nobody looked for near-copies: there are embeddings only, and no recordings."
_EXAMPLES = 3
_NONE = ("No two of the", "None lies across")  # how sentences begin that say that all is well


@dataclasses.dataclass(frozen=True)
class Findings:
    """Sentences for the reader.

    Attributes:
      copies: on near-copies, or equal embeddings.
      subjects: on subjects that may be one.
      trained: on encoders that were trained on what is tested.
    """

    copies: tuple[str, ...] = ()
    subjects: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()

    @property
    def sentences(self) -> tuple[str, ...]:
        """All of them, for the screen and the page."""
        return (*self.copies, *self.subjects, *self.trained)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Those that say that something did leak, or may have."""
        clean = any(sentence.startswith(_NONE) for sentence in self.copies)
        return (*(() if clean else self.copies), *self.subjects, *self.trained)

    def provenance(self) -> dict[str, Any]:
        """For evaluation.json."""
        return {
            "near_copies": list(self.copies),
            "alike_subjects": list(self.subjects),
            "trained_on_tested": list(self.trained),
        }


def describe_subjects(rows: Sequence[Row], suite: Suite) -> tuple[str, ...]:
    """On subjects that may be one, where one spelling is tested and another is not.

    Without folds any two splits count: validation recordings choose the model.

    Args:
      rows: of the recordings.
      suite: over them.
    """
    across = [
        group
        for group in alike_subjects([row.named_subject for row in rows])
        if _crosses(list(group.values()), suite)
    ]
    if not across:
        return ()
    examples = [" and ".join(f"'{name}'" for name in group) for group in across[:_EXAMPLES]]
    more = f" and {len(across) - _EXAMPLES} more" if len(across) > _EXAMPLES else ""
    what = "folds" if suite.options.folds else "splits"
    return (
        f"Subjects that may be one stand in different {what}: {'; '.join(examples)}{more}. If they "
        "are, give them one name: the results are too good.",
    )


def _crosses(recordings: Sequence[int], suite: Suite) -> bool:
    for fold in suite.tested_folds():
        splits = np.array(fold.split_of(suite.count), object)[list(recordings)]
        if suite.options.folds:
            splits = np.where(splits == "test", "test", "train")
        if len(set(splits)) > 1:
            return True
    return False


def equal_embeddings(embeddings: np.ndarray) -> np.ndarray:
    """(N,) group numbers from 0: the same for rows of (N, D) that hold the same numbers."""
    _, groups = np.unique(embeddings + 0.0, axis=0, return_inverse=True)  # -0.0 is 0.0
    return groups.reshape(-1)


def rows_of_equals(
    rows: Sequence[Row], embeddings: np.ndarray, aggregate: str = "recording"
) -> list[Row]:
    """Rows with equal embeddings that name no subject become one subject's, as near-copies do.

    Args:
      rows, embeddings: of a table.
      aggregate: of `suite.Options`, see `copies.search`.
    """
    if aggregate != "recording":
        return list(rows)
    names = subjects_of_copies(rows, equal_embeddings(embeddings))
    pairs = zip(rows, names, strict=True)
    return [dataclasses.replace(row, subject_id=name) for row, name in pairs]


def describe_equals(rows: Sequence[Row], embeddings: np.ndarray, suite: Suite) -> tuple[str, ...]:
    """On equal embeddings, and which of them are tested after one like them was trained on.

    Args:
      rows, embeddings: of a table.
      suite: over them.
    """
    groups = equal_embeddings(embeddings)
    size = np.bincount(groups)
    if not (repeated := int((size[groups] > 1).sum())):
        return (_NO_SOUND, f"No two of the {len(rows)} embeddings are equal.")
    leaking: set[int] = set()
    for fold in suite.tested_folds():
        tested = np.array(fold.split_of(suite.count), object) == "test"
        beside = np.bincount(groups[~tested], minlength=len(size)) > 0
        leaking |= set(np.flatnonzero(tested & beside[groups]).tolist())
    repeats = f"{repeated} of the {len(rows)} embeddings equal another one."
    if not leaking:
        return (_NO_SOUND, repeats, "None equals one on the other side of a test.")
    first = min(leaking)
    return (
        _NO_SOUND,
        repeats,
        f"{len(leaking)} test recordings have the very embedding of one that is not tested with "
        f"them, e.g. row {rows[first].row}: the results are too good.",
    )
