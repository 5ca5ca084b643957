"""Columns that tell of the circumstances of a recording and not of what it holds.

A probe on these alone shows how much of a task device, site or age give away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from medalign_jax.data.manifest import Row
from medalign_jax.data.vocabulary import normalise_column
from medalign_jax.evaluate.tasks import columns_of

CONTEXT_COLUMNS = frozenset(
    {
        "age", "age_group", "sex", "gender", "height", "weight", "bmi", "smoker", "smoking",
        "ethnicity", "pregnancy_status", "lives", "country", "region", "language",
        "device", "recorder", "stethoscope", "microphone", "equipment", "acquisition_mode",
        "site", "hospital", "center", "centre", "campaign", "date", "year", "seconds",
        "posture", "valve_area", "valve", "location", "chest_location", "recording_location",
    }
)  # fmt: skip


def context_columns(columns: Sequence[str], tasks: Sequence[str]) -> tuple[str, ...]:
    """Columns of a manifest that count as circumstances, less those that are asked for."""
    asked = {"label", *columns_of(tasks)}
    return tuple(c for c in columns if c not in asked and normalise_column(c) in CONTEXT_COLUMNS)


def context_of(rows: Sequence[Row], columns: Sequence[str]) -> Mapping[str, list[str]]:
    """column -> (N,) values, "" where a row says nothing."""
    found = {
        column: [
            row.targets.get(column) or row.metadata.get(normalise_column(column), "")
            for row in rows
        ]
        for column in columns
    }
    return {column: values for column, values in found.items() if any(values)}
