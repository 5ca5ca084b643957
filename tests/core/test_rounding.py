"""Sizes rounded up."""

import pytest

from medalign_jax.core.rounding import power_of_two, round_up


@pytest.mark.parametrize(
    ("number", "multiple", "rounded"), [(0, 4, 0), (1, 4, 4), (4, 4, 4), (5, 4, 8), (7, 1, 7)]
)
def test_multiples(number, multiple, rounded):
    assert round_up(number, multiple) == rounded


def test_powers_of_two():
    assert [power_of_two(n) for n in (1, 2, 3, 4, 5, 8, 9)] == [1, 2, 4, 4, 8, 8, 16]
