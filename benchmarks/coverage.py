"""How often 95 % intervals hold the truth, by simulation.

    python -m benchmarks.coverage [--repetitions 1000]

Recordings of a subject share half of the variance of their scores; labels belong to subjects.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools

import numpy as np
from scipy.stats import norm

from medalign_jax.evaluate import statistics as st
from medalign_jax.evaluate.intervals import interval, paired_interval

SHARED = 0.5  # intraclass correlation
PAIRED = 0.7  # correlation of the two stages of a difference


@dataclasses.dataclass(frozen=True)
class Case:
    """A score whose true value is known.

    Attributes:
      kind: "auroc", "accuracy", "mae", "auroc difference".
      truth: Its value; of a difference (earlier value, later value).
      subjects, recordings: Of a sample, and of each subject.
    """

    kind: str
    truth: float | tuple[float, float]
    subjects: int
    recordings: int

    def __str__(self) -> str:
        return f"{self.kind} {self.truth}, {self.subjects} x {self.recordings}"


@dataclasses.dataclass(frozen=True)
class Coverage:
    """Share of intervals that held the truth, mean width, and how many were [1, 1]."""

    covered: float
    width: float
    certain: int


_SIZES = tuple(itertools.product((20, 50, 150), (2, 8)))
_TRUTHS = {
    "auroc": (0.5, 0.8, 0.967),
    "accuracy": (0.5, 0.8, 0.95),
    "mae": (1.0,),
    "auroc difference": ((0.8, 0.8), (0.75, 0.8)),
}
CASES = tuple(
    Case(kind, truth, *size)
    for kind, truths in _TRUTHS.items()
    for truth in truths
    for size in _SIZES
)


def _latent(case: Case, rng: np.random.Generator) -> np.ndarray:
    """(2, n) standard normal, correlated within subjects and between the two."""

    def pair(*shape: int) -> np.ndarray:
        first, other = rng.standard_normal((2, *shape))
        return np.stack([first, PAIRED * first + (1 - PAIRED**2) ** 0.5 * other])

    own = pair(case.subjects, 1) * SHARED**0.5
    noise = pair(case.subjects, case.recordings) * (1 - SHARED) ** 0.5
    return (own + noise).reshape(2, -1)


def _auroc(case: Case, latent: np.ndarray, truth: float) -> st.AurocStatistic:
    labels = np.repeat(np.arange(case.subjects) % 2, case.recordings)
    scores = latent + 2**0.5 * norm.ppf(truth) * labels
    return st.auroc_statistic(labels, np.stack([-scores, scores], axis=1))


def _interval(case: Case, rng: np.random.Generator) -> st.Interval:
    latent, subjects = _latent(case, rng), np.repeat(np.arange(case.subjects), case.recordings)
    if case.kind == "auroc difference":
        pair = [_auroc(case, x, truth) for x, truth in zip(latent, case.truth, strict=True)]
        return paired_interval(*pair, subjects)
    if case.kind == "auroc":
        return interval(_auroc(case, latent[0], case.truth), subjects)
    if case.kind == "accuracy":
        hits = latent[0] < norm.ppf(case.truth)
        return interval(st.mean_statistic(hits, scale="share"), subjects)
    errors = np.abs(latent[0]) * case.truth * (np.pi / 2) ** 0.5
    return interval(st.mean_statistic(errors, scale="error"), subjects)


def coverage(case: Case, repetitions: int, seed: int = 0) -> Coverage:
    """Simulates a case."""
    rng = np.random.default_rng(seed)
    found = [_interval(case, rng) for _ in range(repetitions)]
    truth = case.truth[1] - case.truth[0] if isinstance(case.truth, tuple) else case.truth
    covered = [i.low - 1e-12 <= truth <= i.high + 1e-12 for i in found]
    return Coverage(
        float(np.mean(covered)),
        float(np.mean([i.high - i.low for i in found])),
        sum(i.low >= 1 - 1e-9 for i in found) if case.kind != "mae" else 0,
    )


def main() -> None:
    """Prints a line a case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=1000)
    repetitions = parser.parse_args().repetitions
    print(f"{'score, subjects x recordings':42} covered  mean width  [1, 1]")
    worst = 1.0
    for case in CASES:
        found = coverage(case, repetitions)
        worst = min(worst, found.covered)
        print(f"{case!s:42} {found.covered:.3f}    {found.width:.3f}       {found.certain}")
    print(f"least coverage {worst:.3f} over {len(CASES)} cases of {repetitions} repetitions")


if __name__ == "__main__":
    main()
