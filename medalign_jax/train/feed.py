"""Moves batches from the host to the mesh ahead of the step, with the state to resume from."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from medalign_jax.core.mesh import batch_sharding


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays from this process's rows; the first dimension is spread over the mesh."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, np.asarray(value))
        for name, value in batch.items()
    }


class Feed:
    """Iterates over (device batch, iterator state after it), two batches ahead in a thread.

    The iterator's state is taken with each batch, so a checkpoint knows exactly which batches the
    step has seen, however far the thread has read ahead.

    Attributes:
      waited: seconds that the consumer has waited for data.
    """

    def __init__(self, iterator: Any, mesh: Mesh, names: tuple[str, ...], ahead: int = 2):
        """`iterator` has get_state(); `names` are the arrays that the step takes."""
        self._iterator, self._mesh, self._names = iterator, mesh, names
        self._queue: queue.Queue = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self.waited = 0.0
        self._thread = threading.Thread(target=self._fill, name="feed", daemon=True)
        self._thread.start()

    def _fill(self) -> None:
        try:
            for batch in self._iterator:
                arrays = put_batch({name: batch[name] for name in self._names}, self._mesh)
                if not self._offer((arrays, self._iterator.get_state())):
                    return
            self._offer(None)
        except BaseException as error:  # handed to the consumer, which raises it
            self._offer(error)

    def _offer(self, item: Any) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[tuple[dict[str, jax.Array], Any]]:
        while True:
            begun = time.monotonic()
            item = self._queue.get()
            self.waited += time.monotonic() - begun
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """Stops the thread and waits for it."""
        self._stop.set()
        self._thread.join()
