"""Subjects in more than one split, and names that may be those of one subject.

Nothing that is trained on may come from a subject that is tested on. Near-copies under other names
are found by `datasets.near_copies`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from medalign_jax.core.words import plain_spelling


def in_two_splits(rows: Iterable[tuple[int, str, str]]) -> list[str]:
    """What is wrong with subjects that have rows in more than one split, a sentence for each.

    Args:
      rows: (number, subject, split) of each row that names a subject.
    """
    splits: dict[str, dict[str, int]] = {}
    for row, subject, split in rows:
        splits.setdefault(subject, {}).setdefault(split, row)
    found = []
    for subject, first in splits.items():
        if len(first) > 1:
            where = ", ".join(f"{split or 'none'} (row {row})" for split, row in first.items())
            found.append(f"subject '{subject}' is in more than one split: {where}")
    return found


def plain_subject(subject: str) -> str:
    """Without case, spaces, decimals and leading zeros: "P 01" and "p1", "1.0" and "001"."""
    name = re.sub(r"\s", "", plain_spelling(subject))
    name = re.sub(r"(?<=\d)\.0*$", "", name)
    return re.sub(r"(?<![\d.])0+(?=\d)", "", name)


def alike_subjects(subjects: Sequence[str | None]) -> list[dict[str, int]]:
    """Groups of two or more subjects whose names have one plain form.

    Args:
      subjects: one for each row, None where it names none.

    Returns:
      For each group: subject -> position of its first row, in the order of the rows.
    """
    alike: dict[str, dict[str, int]] = {}
    for place, subject in enumerate(subjects):
        if subject is not None:
            alike.setdefault(plain_subject(subject), {}).setdefault(subject, place)
    return [spellings for spellings in alike.values() if len(spellings) > 1]
