"""Timing by turns: a machine whose speed drifts slows all contestants alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call, which has to wait for its own result."""
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def in_turns(
    contestants: Mapping[Name, Callable[[], object]], rounds: int, settle: int = 0
) -> dict[Name, list]:
    """Seconds of each contestant's call in every round, one after the other.

    Before each timed call come `settle` calls that are not timed: the first after another's finds
    the caches, the memory and the waiting threads of the other.
    """
    taken: dict[Name, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, function in contestants.items():
            for _ in range(settle):
                function()
            taken[name].append(seconds(function))
    return taken
