"""Subjects that may be one: names that differ only as spellings of one name do."""

from __future__ import annotations

import re
from collections.abc import Sequence

from medalign_jax.core.words import plain_spelling


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
