"""Processes that do shares of one piece of work give each other the results.

With one process nothing is exchanged. Every function here has to be called by all processes, in
the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from medalign_jax.core.errors import UserError

_ROWS = 8192  # exchanged at a time


def _gathered(array: np.ndarray) -> np.ndarray:
    """(...) of each process -> (processes, ...)."""
    if jax.process_count() == 1:
        return array[None]
    return np.asarray(multihost_utils.process_allgather(array))


def filled_in(table: np.ndarray) -> np.ndarray:
    """(N, ...) unsigned integers of which each process has filled in some rows, the others 0."""
    return _gathered(table).max(axis=0)


def all_or_none(step: Callable[[], None], what: str) -> None:
    """Runs a step; if it fails on one process it fails on all, so that none waits for ever.

    Raises:
      UserError: here or, as `what` says, on another process.
    """
    problem = None
    try:
        step()
    except UserError as error:
        problem = error
    failed = np.flatnonzero(_gathered(np.array(problem is not None)))
    if problem is not None:
        raise problem
    if failed.size:
        raise UserError(f"process {failed[0]} could not {what}; see what it says")


def lacking(known: Mapping[bytes, object], keys: Sequence[bytes]) -> set[bytes]:
    """Keys that no process knows."""
    there = _gathered(np.array([key in known for key in keys], bool)).any(axis=0)
    return {key for key, is_there in zip(keys, there, strict=True) if not is_there}


def complete(known: MutableMapping[bytes, np.ndarray], keys: Sequence[bytes]) -> None:
    """Gives every process the vectors (D,) of all keys, from the first that has each."""
    if jax.process_count() == 1 or not keys:
        return
    there = _gathered(np.array([key in known for key in keys], bool))
    owner = there.argmax(axis=0)
    wanted = np.flatnonzero(~there.all(axis=0))
    width = int(_gathered(np.array(len(next(iter(known.values()), ())))).max())
    for start in range(0, len(wanted), _ROWS):
        part = wanted[start : start + _ROWS]
        table = np.zeros((len(part), width), np.float32)
        for row, number in enumerate(part):
            if owner[number] == jax.process_index():
                table[row] = known[keys[number]]
        whole = _gathered(table)
        for row, number in enumerate(part):
            known.setdefault(keys[number], whole[owner[number], row])
