"""How well the linear probe's penalty is chosen, by simulation: few subjects, many features.

    python -m benchmarks.penalties [--repetitions 16]

Recordings of a subject share part of their features; a few directions, of which most have little
variance, carry the class of a third of the subjects. Printed are mean AUROCs of 200 other
subjects, each scored by the mean over its recordings: with the best penalty of the grid (which
nobody knows), with the one of least held-out loss, and with the one that the probe chooses.
"""

from __future__ import annotations

import argparse

import numpy as np

from medalign_jax.evaluate.probes import Problem, fit_linear
from medalign_jax.evaluate.probes.linear import default_penalties
from medalign_jax.evaluate.statistics import auroc

TEST = 200  # subjects
SHARED = 0.6  # of the variance of features, by the recordings of a subject
WIDTH = 256

# Training subjects, recordings of each, distance between the classes, decay of the spectrum.
CASES = (
    (65, 1, 2.5, 0.5), (65, 1, 4.0, 0.5), (65, 8, 1.5, 0.5), (65, 8, 2.5, 0.5), (65, 8, 2.0, 1.0),
    (300, 1, 1.0, 0.5),
)  # fmt: skip


def simulate(
    rng: np.random.Generator, subjects: int, recordings: int, distance: float, decay: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features (N, WIDTH), classes (N,) and subjects (N,) of training and test subjects."""
    count = subjects + TEST
    classes = (rng.random(count) < 0.35).astype(int)
    classes[:10] = np.arange(10) % 2  # both are there
    own = np.repeat(rng.standard_normal((count, WIDTH)), recordings, axis=0)
    noise = rng.standard_normal((count * recordings, WIDTH))
    direction = rng.standard_normal(WIDTH) * (rng.random(WIDTH) < 0.1)
    direction /= max(np.linalg.norm(direction), 1e-9)
    y = np.repeat(classes, recordings)
    x = SHARED**0.5 * own + (1 - SHARED) ** 0.5 * noise + distance * np.outer(y, direction)
    rotation = np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0]
    x = x * np.arange(1, WIDTH + 1) ** -decay @ rotation
    return x.astype(np.float32), y, np.repeat(np.arange(count), recordings)


def scores_of(case: tuple[int, int, float, float], seed: int) -> tuple[float, float, float]:
    """AUROC with the best penalty, the one of least loss, and the one chosen."""
    subjects, recordings = case[:2]
    x, y, subject = simulate(np.random.default_rng(seed), *case)
    train, test = np.flatnonzero(subject < subjects), np.flatnonzero(subject >= subjects)
    problem = Problem(targets=y, train=train, test=test, groups=subject, classes=2)

    def auroc_of(model) -> float:
        z = model.scaling(x[test]) @ model.weights[:, 0] + model.intercept[0]
        z = z.reshape(-1, recordings).mean(axis=1)
        return auroc(y[test][::recordings], np.stack([-z, z], axis=1)).value

    (chosen,) = fit_linear(x, [problem])
    grid = np.sort(default_penalties(WIDTH))[::-1]
    found = np.array([auroc_of(fit_linear(x, [problem], [l2])[0]) for l2 in grid])
    return found.max(), found[np.argmin(chosen.losses)], auroc_of(chosen)


def main() -> None:
    """Prints one line per case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=16)
    repetitions = parser.parse_args().repetitions
    print("subjects x recordings, distance, decay   best  least loss  chosen (minus least loss)")
    for case in CASES:
        found = np.array([scores_of(case, seed) for seed in range(repetitions)])
        gain = found[:, 2] - found[:, 1]
        error = gain.std(ddof=1) / repetitions**0.5
        print(
            f"{case[0]:8} x {case[1]}, {case[2]:.1f}, {case[3]:.1f}"
            f"{found[:, 0].mean():25.3f}  {found[:, 1].mean():10.3f}  {found[:, 2].mean():6.3f} "
            f"({gain.mean():+.3f}, standard error {error:.3f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
