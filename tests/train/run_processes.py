"""Run by test_loop.py in each of two processes: the loop on data that the processes share out."""

import sys
from pathlib import Path

import jax
import numpy as np

from tests.train import test_loop


class Share(test_loop.Batches):
    """This process's rows of the batches that one process would see."""

    def __next__(self):
        return share(super().__next__())


def share(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The first half of the rows in the first process, the second in the second."""
    return {name: np.split(rows, 2)[jax.process_index()] for name, rows in batch.items()}


if __name__ == "__main__":
    address, process, folder = sys.argv[1:]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=int(process))
    assert jax.process_count() == 2 == len(jax.devices())
    for steps in (6, 9):  # a fresh start, and one that goes on
        fitted = test_loop.run(
            Path(folder),
            Share(),
            valid=lambda: [share(batch) for batch in test_loop.held_out()],
            mesh=test_loop.make_mesh(data=1, fsdp=2),
            total_steps=steps,
        )
        assert fitted.last_step == steps
