"""Problems that are fitted on the same rows share one standardised matrix.

Small matrices of about the same size are stacked, so that they do not cost one call each.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from medalign_jax.core.rounding import round_up
from medalign_jax.evaluate.probes.problem import Problem

MEMBERS = 16
STACK = 2**19  # numbers in a stack of matrices, unless one alone has more


@dataclasses.dataclass(frozen=True, eq=False)
class Design:
    """Rows that some problems are fitted on.

    Attributes:
      train: (n,) rows.
      members: numbers of the problems, at most 16.
    """

    train: np.ndarray
    members: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Scaling:
    """Mean and inverse deviation of each feature over training rows; (D,) float64.

    A feature that is constant there has inverse deviation 0: it is 0 in every row.
    """

    mean: np.ndarray
    inverse: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray) -> Scaling:
        """Of all rows of x (n, D)."""
        x = np.asarray(x, np.float64)
        mean, deviation = x.mean(axis=0), x.std(axis=0)
        varies = deviation > 1e-12 * np.abs(x).max(axis=0)
        return cls(mean, np.where(varies, 1 / np.where(varies, deviation, 1.0), 0.0))

    @property
    def varying(self) -> int:
        """How many features are not constant."""
        return int(np.count_nonzero(self.inverse))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """(m, D) standardised, float64."""
        return (np.asarray(x, np.float64) - self.mean) * self.inverse


def padded(n: int) -> int:
    """Rows that n rows are filled up to: at most an eighth more, or up to 16.

    A solver's time grows with every row, so a power of two, as for batches, would cost too much.
    """
    step = max(16, 2 ** (max(n - 1, 1).bit_length() - 1) // 8)
    return round_up(n, step)


def stacks(
    problems: Sequence[Problem], width: int
) -> Iterator[tuple[tuple[int, int, int], list[Design]]]:
    """Designs to be fitted together.

    Yields:
      (classes, padded rows, members) and designs that have these.
    """
    rows: dict[tuple, list[int]] = collections.defaultdict(list)
    for number, problem in enumerate(problems):
        key = (problem.classes, np.asarray(problem.train, np.int64).tobytes())
        rows[key].append(number)
    alike: dict[tuple[int, int, int], list[Design]] = collections.defaultdict(list)
    for (classes, _), numbers in rows.items():
        for first in range(0, len(numbers), MEMBERS):
            members = tuple(numbers[first : first + MEMBERS])
            train = np.asarray(problems[members[0]].train)
            fill = padded(len(train))
            size = fill if fill * width <= STACK else len(train)  # else it is alone
            alike[classes, size, len(members)].append(Design(train, members))
    for key, designs in alike.items():
        limit = max(1, STACK // (key[1] * width))
        for first in range(0, len(designs), limit):
            yield key, designs[first : first + limit]
