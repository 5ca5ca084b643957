"""SIGTERM and Ctrl-C during training: every process of a run stops after the same step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from medalign_jax.core.commands import Terminated
from medalign_jax.core.mesh import replicated

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopping:
    """Catches the signals while its `with` block lasts; one that nobody asked about is passed on.

    One of several processes may be asked to stop, and all of them have to, after the same step:
    else those that go on wait for ever for those that have left. Before each step they exchange
    what they were asked. That is put on the devices' queues in front of the step and read when the
    step is on them too, so a device never waits for a host, and one step at most waits for a
    device.
    """

    def __init__(self, mesh: Mesh):
        self._asked = 0  # number of the signal
        self._mesh = mesh
        self._largest = None
        if jax.process_count() > 1:
            self._largest = jax.jit(lambda numbers: numbers.max(), out_shardings=replicated(mesh))
        self._old = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        if self._asked and kind is None:
            signal.raise_signal(self._asked)

    def _note(self, number: int, frame: object) -> None:
        self._asked = number

    def ask(self) -> Callable[[], int]:
        """To be called before a step is started; gives what to call when it has been.

        That gives the number of the signal for which the run has to stop with this step, 0 to go
        on: the same in all processes, all of which have to call both.
        """
        if self._largest is None:
            return lambda: self._asked
        place = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
        mine = np.full(1, self._asked, np.int32)
        found = self._largest(
            jax.make_array_from_callback((self._mesh.size,), place, lambda _: mine)
        )
        return lambda: int(jax.device_get(found))


def stopped_by(number: int, text: str) -> KeyboardInterrupt:
    """What to raise after a signal, so that the command ends with its status."""
    return Terminated(text) if number == signal.SIGTERM else KeyboardInterrupt(text)
