"""What the processes of a run do one after another or together, and how they end."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from medalign_jax.core.errors import UserError
from medalign_jax.core.locks import held

_FAILED = 10  # seconds that a failed process waits for the others to fail too
_EVER = 10 * 365 * 24 * 3600


@contextlib.contextmanager
def at_work_in(folder: Path, **advice: str) -> Iterator[None]:
    """A block of work of all processes, for which the first holds a folder; they end together.

    Args:
      folder: of the run.
      **advice: as of `locks.held`.

    Raises:
      LockedError: another run holds it.
      UserError: another process has failed.
    """
    with contextlib.ExitStack() as stack:
        by_first(lambda: stack.enter_context(held(folder, **advice)))
        with ending_together():
            yield


def by_first(step: Callable[[], object]) -> None:
    """Runs a step on the first process, while the others wait, however long.

    Raises:
      UserError: the first process has failed.
    """
    problem = None
    if jax.process_index() == 0:
        try:
            step()
        except Exception as error:
            if jax.process_count() == 1:
                raise
            problem = error
    if jax.process_count() > 1:
        _meet("a step of the first process", problem, _EVER)


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Who leaves the block waits until all do, however long one of them still works.

    JAX ends processes that leave minutes after the others. If one has failed, all fail.

    Raises:
      UserError: another process has failed.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        problem = error
    if jax.process_count() > 1:
        _meet("the end of the run", problem, _FAILED if problem else _EVER)


def _meet(what: str, problem: Exception | None, seconds: int) -> None:
    """Returns when all processes are here, and none with a problem; else each raises."""
    try:
        _wait(what, seconds)
    except jax.errors.JaxRuntimeError as error:  # somebody has failed, or was stopped, elsewhere
        if problem is not None:
            raise problem from None
        raise UserError("another process has failed or left; see what it says") from error
    failed = multihost_utils.process_allgather(np.array(problem is not None))
    if problem is not None:
        raise problem
    if failed.any():
        raise UserError(f"process {int(failed.argmax())} has failed; see what it says")


def _wait(what: str, seconds: int) -> None:
    """Returns when all processes are here; a signal is handled meanwhile.

    Raises:
      JaxRuntimeError: the time is over, here or where another process waits for the same.
    """
    found: list[Exception] = []
    barrier = ocp.multihost.get_barrier_sync_fn()

    def wait() -> None:
        try:
            barrier(key=what, timeout_ms=1000 * seconds)
        except jax.errors.JaxRuntimeError as error:  # handed to the main thread
            found.append(error)

    thread = threading.Thread(target=wait, name=what, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if found:
        raise found[0]
