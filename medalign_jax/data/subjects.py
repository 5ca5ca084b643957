"""Subjects that may be one: names that differ only as spellings of one name do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from medalign_jax.data.tables import plain_spelling

if TYPE_CHECKING:
    from medalign_jax.data.manifest import Row


def plain_subject(subject: str) -> str:
    """Without case, spaces, decimals and leading zeros: "P 01" and "p1", "1.0" and "001"."""
    name = re.sub(r"\s", "", plain_spelling(subject))
    name = re.sub(r"(?<=\d)\.0*$", "", name)
    return re.sub(r"(?<![\d.])0+(?=\d)", "", name)


def alike_subjects(rows: Sequence[Row]) -> list[dict[str, int]]:
    """Groups of two or more subjects whose names have one plain form.

    Rows that name no subject do not count.

    Returns:
        For each group: subject -> position of its first row, in the order of the rows.
    """
    alike: dict[str, dict[str, int]] = {}
    for place, row in enumerate(rows):
        if row.names_subject:
            spellings = alike.setdefault(plain_subject(row.subject_id), {})
            spellings.setdefault(row.subject_id, place)
    return [spellings for spellings in alike.values() if len(spellings) > 1]
