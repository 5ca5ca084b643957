"""Columns that state the circumstances of a recording and not what it holds.

A probe on these alone shows how much of a task device, site or age give away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from medalign_jax.core.errors import UserError
from medalign_jax.data.recordings.manifest import Row
from medalign_jax.reports.vocabulary import normalise_column

CONTEXT_COLUMNS = frozenset(
    {
        "age", "age_group", "sex", "gender", "height", "weight", "bmi", "smoker", "smoking",
        "ethnicity", "pregnancy_status", "lives", "country", "region", "language",
        "device", "recorder", "stethoscope", "microphone", "equipment", "acquisition_mode",
        "site", "hospital", "center", "centre", "campaign", "date", "year", "seconds",
        "posture", "valve_area", "valve", "location", "chest_location", "recording_location",
    }
)  # fmt: skip

# Of these, what is an amount or a time where it is a number; a number in any other is a name.
_AMOUNTS = frozenset({"age", "height", "weight", "bmi", "date", "year", "seconds"})
_CODES = frozenset({"id", "code"})


# What a task gives away: the same said otherwise, or what it follows from.
_GIVES_AWAY = {
    "age": {"age_group"}, "age_group": {"age"},
    "sex": {"gender"}, "gender": {"sex"},
    "smoker": {"smoking"}, "smoking": {"smoker"},
    "bmi": {"height", "weight"}, "height": {"bmi"}, "weight": {"bmi"},
    "date": {"year"}, "year": {"date"},
    "valve": {"valve_area"}, "valve_area": {"valve"},
    "chest_location": {"recording_location"}, "recording_location": {"chest_location"},
}  # fmt: skip


def answers_in(columns: Sequence[str], tasks: Sequence[str]) -> dict[str, str]:
    """column -> task, for those columns that hold a task's answers or give them away.

    Args:
      columns: of a manifest, in any spelling.
      tasks: as `tasks.tasks_of` takes them.
    """
    revealed: dict[str, str] = {}
    for task in (name.partition(":")[0] for name in tasks):
        plain = normalise_column(task)
        for column in {plain, *_GIVES_AWAY.get(plain, ())}:
            revealed.setdefault(column, task)
    return {c: revealed[normalise_column(c)] for c in columns if normalise_column(c) in revealed}


def holds_codes(column: str) -> bool:
    """Whether numbers in a column are names, as of sites and devices, so that 2 is not between 1
    and 3.

    Args:
      column: of a manifest, in any spelling: a circumstance that is not an amount, or an id or code
        ("ward_id"). Of another column nothing is known but its values.
    """
    plain = normalise_column(column)
    return plain in CONTEXT_COLUMNS - _AMOUNTS or plain.rpartition("_")[2] in _CODES


def check_metadata(metadata: Sequence[str], tasks: Sequence[str]) -> None:
    """Refuses columns for the metadata baseline that hold the answers.

    Raises:
      UserError: naming column and task.
    """
    for column, task in answers_in(metadata, tasks).items():
        same = normalise_column(column) == normalise_column(task)
        why = "which is asked for" if same else f"which gives away the task {task!r}"
        raise UserError(f"the metadata baseline may not read {column!r}, {why}; leave it out")


def context_columns(columns: Sequence[str], tasks: Sequence[str]) -> tuple[str, ...]:
    """Columns of a manifest that are circumstances, less those that give away what is asked."""
    asked = answers_in(columns, tasks)
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
