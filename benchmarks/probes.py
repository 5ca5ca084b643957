"""Linear probes of OPERA's 19 tasks, solved to convergence, against the published loop in PyTorch.

    python -m benchmarks.probes [--widths 768] [--rounds 1] [--torch_runs 1]

Random features and labels of the published sizes. Ours: 5 seeds (of the inner folds) per task, 10
penalties, 5 inner folds each, and the last fit. PyTorch: one run for each task, outer fold, seed
and penalty at the published settings (64 epochs, batch 64 or 32, Adam 1e-4, decay 0.97, clip 1, L2
in the loss, validation AUROC or MAE after each epoch); it chooses the penalty by its validation
rows and has no inner folds. Only `torch_runs` of the 50 runs per fold, and 2 of the outer folds of
a leave-one-out task, are timed, and scaled: the runs are alike but for a number. PyTorch has one
thread: steps as small as these are slower with more. Needs PyTorch and scikit-learn
(requirements-dev.txt).

CPU seconds of all threads stand beside wall seconds: a busy machine stretches the latter only.

Sizes the papers do not give (T3, T4, T12, T19) are set to plausible ones, marked with *.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.probes_torch import published_run
from benchmarks.turns import in_turns, seconds
from medalign_jax.evaluate.probes import Problem, linear

SEEDS, PENALTIES = 5, 10


@dataclasses.dataclass(frozen=True)
class Size:
    """Rows of a task; `folds` above 1 leave one of so many subjects out in turn."""

    name: str
    train: int
    valid: int
    test: int
    classes: int = 2
    batch: int = 64
    epochs: int = 64
    folds: int = 1


TASKS = (
    Size("T1 coviduk exhalation", 1000, 500, 1000),
    Size("T2 coviduk cough", 1000, 500, 1000),
    Size("T3 covid19sounds breath *", 2000, 600, 1200),
    Size("T4 covid19sounds cough *", 2000, 600, 1200),
    Size("T5 coughvid covid", 2749, 919, 2507),
    Size("T6 coughvid sex", 3218, 1090, 2955),
    Size("T7 icbhi disease", 369, 93, 366, batch=32),
    Size("T8 coswara smoker", 606, 152, 190, batch=32),
    Size("T9 coswara sex", 1596, 400, 500, batch=32),
    Size("T10 kauh", 145, 17, 72, batch=32, epochs=50),
    Size("T11 copd", 312, 84, 108, classes=5, batch=32),
    Size("T12 snoring *", 4400, 1470, 1470, classes=5, epochs=32),
    *(Size(f"T{13 + k} mmlung", 34, 5, 1, classes=0, folds=40) for k in range(6)),
    Size("T19 breathing rate *", 120, 30, 10, classes=0, folds=16),
)


class Contest:
    """Features, labels and both ways to fit a task."""

    def __init__(self, size: Size, width: int, torch_runs: int):
        self.size, self.torch_runs = size, torch_runs
        rng = np.random.default_rng(0)
        rows = np.arange(size.train + size.valid + size.test)
        self.x = rng.standard_normal((len(rows), width), np.float32)
        classes = size.classes
        targets = rng.integers(0, classes, len(rows)) if classes else rng.normal(3, 1, len(rows))
        self.folds = []
        for k in range(size.folds):
            order = np.roll(rows, k)
            cut = np.split(order, [size.train, size.train + size.valid])
            self.folds.append(Problem(targets, cut[0], cut[2], rows, classes, cut[1]))

    def ours(self) -> None:
        """All seeds and folds, predictions on the host."""
        linear(self.x, [dataclasses.replace(f, seed=s) for f in self.folds for s in range(SEEDS)])

    def torch(self) -> None:
        """Some of the runs."""
        for fold in self.folds[:2]:
            for run in range(self.torch_runs):
                published_run(self.x, fold, self.size.batch, self.size.epochs, 1e-5, run)

    @property
    def scale(self) -> float:
        """All runs over those that `torch` does."""
        return len(self.folds) / len(self.folds[:2]) * SEEDS * PENALTIES / self.torch_runs


class Measured:
    """A function that adds up the CPU seconds of its calls."""

    def __init__(self, function: Callable[[], None]):
        self.function, self.cpu = function, 0.0

    def __call__(self) -> None:
        begun = time.process_time()
        self.function()
        self.cpu += time.process_time() - begun


def main() -> None:
    """Prints a table of seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", default="768", help="of the features: 384,768,1280")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--torch_runs", type=int, default=1, help="of the 50 per fold, timed")
    parser.add_argument("--tasks", default="", help="only those whose name has this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # faster than several on steps as small as these
    print(f"numpy {np.__version__}, torch {torch.__version__}; wall and CPU seconds; PyTorch is "
          f"scaled from {arguments.torch_runs} of {SEEDS * PENALTIES} runs per fold; sizes marked "
          "with * are guessed")  # fmt: skip
    print(f"{'task':28s}{'width':>6s}{'first call':>12s}{'ours':>9s}{'CPU':>9s}{'PyTorch':>10s}"
          f"{'CPU':>10s}{'ratio':>8s}{'CPU':>8s}")  # fmt: skip
    total = np.zeros(5)
    for width in map(int, arguments.widths.split(",")):
        for size in TASKS:
            if arguments.tasks in size.name:
                row = _row(Contest(size, width, arguments.torch_runs), arguments.rounds)
                total += row
                _print(f"{size.name:28s}{width:6d}", row)
    _print(f"{'all':34s}", total)


def _row(contest: Contest, rounds: int) -> np.ndarray:
    """Seconds of our first call; of ours, wall and CPU; of PyTorch's, likewise, scaled."""
    first = seconds(contest.ours)
    contestants = {"torch": Measured(contest.torch), "ours": Measured(contest.ours)}
    taken = in_turns(contestants, rounds)
    ours, theirs = (statistics.median(taken[name]) for name in ("ours", "torch"))
    cpu = {name: timed.cpu / rounds for name, timed in contestants.items()}
    return np.array([first, ours, cpu["ours"], theirs * contest.scale,
                     cpu["torch"] * contest.scale])  # fmt: skip


def _print(name: str, row: np.ndarray) -> None:
    first, ours, ours_cpu, theirs, theirs_cpu = row
    print(f"{name}{first:12.2f}{ours:9.2f}{ours_cpu:9.2f}{theirs:10.1f}{theirs_cpu:10.1f}"
          f"{theirs / ours:8.0f}{theirs_cpu / ours_cpu:8.0f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
