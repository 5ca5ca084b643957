"""Run by test_stopping.py: the loop in one of two processes, to be stopped, killed, started again.

Usage: run_stopping.py FOLDER PORT NUMBER
"""

import hashlib
import sys
import time
from pathlib import Path

import jax
import numpy as np

from medalign_jax.core import commands, rendezvous
from medalign_jax.core.mesh import on_host
from tests.train import test_loop
from tests.train.run_processes import Share, share

STEPS = 40


class Slow(Share):
    """Time for a signal between two steps."""

    def __next__(self):
        time.sleep(0.03)
        return super().__next__()


def train(folder: Path, port: str, number: int) -> None:
    rendezvous.join(False, f"127.0.0.1:{port}", 2, number)
    fitted = test_loop.run(
        folder,
        Slow(),
        valid=lambda: [share(batch) for batch in test_loop.held_out()],
        mesh=test_loop.make_mesh(data=1, fsdp=2),
        total_steps=STEPS,
    )
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves((fitted.best_params, fitted.last_params)):
        digest.update(np.asarray(on_host(leaf)).tobytes())
    print(f"done {digest.hexdigest()}", flush=True)


if __name__ == "__main__":
    folder, port, number = sys.argv[1:]
    sys.exit(commands.ended(lambda: train(Path(folder), port, int(number))))
