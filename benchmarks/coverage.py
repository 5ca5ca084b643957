"""How often 95 % intervals hold the truth, by simulation.

    python -m benchmarks.coverage [--repetitions 1000]

Recordings of a subject share half of the variance of their scores; labels belong to subjects.
Draws of few labels give probes of differing quality, with noise of their own on each recording.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools

import numpy as np
from scipy.stats import norm

from medalign_jax.evaluate import statistics as st
from medalign_jax.evaluate.intervals import LEAST_SUBJECTS, interval, paired_interval

SHARED = 0.5  # intraclass correlation
PAIRED = 0.7  # correlation of the two stages of a difference
OF_DRAWS = 0.3  # standard deviation over draws of the distance between the classes
OF_EACH_DRAW = 0.5  # standard deviation of a draw's own noise on a recording


@dataclasses.dataclass(frozen=True)
class Case:
    """A score whose true value is known.

    Attributes:
      kind: "auroc", "accuracy", "mae", "auroc difference".
      truth: its value; of a difference (earlier value, later value).
      subjects, recordings: of a sample, and of each subject.
      classes, draws: of an AUROC.
    """

    kind: str
    truth: float | tuple[float, float]
    subjects: int
    recordings: int
    classes: int = 2
    draws: int = 1

    def __str__(self) -> str:
        more = f", {self.classes} classes" if self.classes > 2 else ""
        more += f", {self.draws} draws" if self.draws > 1 else ""
        return f"{self.kind} {self.truth}{more}, {self.subjects} x {self.recordings}"


@dataclasses.dataclass(frozen=True)
class Coverage:
    """Share of intervals that held the truth, mean width, and how many were [1, 1]."""

    covered: float
    width: float
    certain: int


_SIZES = tuple(itertools.product((2 * LEAST_SUBJECTS, 20, 50, 150), (2, 8)))
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
CASES += tuple(
    Case("auroc", truth, *size, **several)
    for several in ({"classes": 3}, {"draws": 20})
    for truth in _TRUTHS["auroc"]
    for size in ((18, 2), (18, 8), (60, 2))
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


def _auroc_of_classes(case: Case, rng: np.random.Generator) -> st.AurocStatistic:
    """Each class against the rest has the same true AUROC."""
    labels = np.repeat(np.arange(case.subjects) % case.classes, case.recordings)
    latent = np.stack([_latent(case, rng)[0] for _ in range(case.classes)], axis=1)
    distance = 2**0.5 * norm.ppf(case.truth)
    return st.auroc_statistic(labels, latent + distance * np.eye(case.classes)[labels])


def _auroc_of_draws(case: Case, rng: np.random.Generator) -> st.AurocStatistic:
    """The truth is the mean over all draws that there could be."""
    labels = np.repeat(np.arange(case.subjects) % 2, case.recordings)
    spread = 2 * (1 + OF_EACH_DRAW**2) + OF_DRAWS**2  # of a pair's difference
    distance = spread**0.5 * norm.ppf(case.truth) + OF_DRAWS * rng.standard_normal((case.draws, 1))
    noise = OF_EACH_DRAW * rng.standard_normal((case.draws, len(labels)))
    scores = _latent(case, rng)[0] + noise + distance * labels
    return st.auroc_statistic(labels, np.stack([-scores, scores], axis=2))


def _interval(case: Case, rng: np.random.Generator) -> st.Interval:
    subjects = np.repeat(np.arange(case.subjects), case.recordings)
    if case.classes > 2:
        return interval(_auroc_of_classes(case, rng), subjects)
    if case.draws > 1:
        return interval(_auroc_of_draws(case, rng), subjects)
    latent = _latent(case, rng)
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
    """Prints one line per case."""
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
