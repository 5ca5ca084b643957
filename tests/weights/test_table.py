"""Transforms move numbers only, can be undone, and read slices as they read the whole."""

import itertools

import numpy as np
import pytest

from medalign_jax.weights.table import (
    CONV1D,
    CONV2D,
    IDENTITY,
    LINEAR,
    Ignore,
    MergeAxes,
    NotUpstream,
    PadAxis,
    Permute,
    Rule,
    ShapeMismatch,
    SplitAxis,
    Squeeze,
    chain,
    fill,
    path_pattern,
    read_part,
    upstream_pattern,
)

CASES = [
    (IDENTITY, (4, 6), (4, 6)),
    (IDENTITY, (), ()),
    (LINEAR, (6, 4), (4, 6)),
    (CONV1D, (5, 4, 3), (3, 4, 5)),
    (CONV2D, (5, 4, 2, 3), (2, 3, 4, 5)),
    (Permute((1, 2, 0)), (3, 4, 5), (4, 5, 3)),
    (SplitAxis(0, (2, 3)), (6, 4), (2, 3, 4)),
    (SplitAxis(1, (3, 2, 2)), (5, 12), (5, 3, 2, 2)),
    (MergeAxes(0, (2, 3)), (2, 3, 4), (6, 4)),
    (MergeAxes(1, (3, 2, 2)), (2, 3, 2, 2), (2, 12)),
    (Squeeze(0), (1, 4, 5), (4, 5)),
    (Squeeze(2), (4, 5, 1), (4, 5)),
    (chain(LINEAR, SplitAxis(1, (3, 2))), (6, 4), (4, 3, 2)),
    (chain(CONV2D, MergeAxes(0, (2, 3)), MergeAxes(0, (6, 4))), (5, 4, 2, 3), (24, 5)),
    (chain(Squeeze(0), LINEAR), (1, 4, 5), (5, 4)),
    (PadAxis(0, 3, 7), (3, 2), (7, 2)),
    (PadAxis(1, 3, 3), (2, 3), (2, 3)),
    (PadAxis(0, 0, 2), (0, 2), (2, 2)),
    (chain(PadAxis(0, 5, 6), LINEAR, SplitAxis(1, (3, 2))), (5, 4), (4, 3, 2)),
    (chain(LINEAR, PadAxis(1, 5, 8), MergeAxes(0, (4, 8))), (5, 4), (32,)),
    (chain(LINEAR, chain(SplitAxis(1, (3, 2)), MergeAxes(0, (4, 3)))), (6, 4), (12, 2)),
]


def _slices(size):
    return [slice(0, size), slice(0, 0), *(slice(a, b) for a in range(size) for b in (a + 1, size))]


@pytest.mark.parametrize(("transform", "source", "target"), CASES)
def test_shape_and_inverse(transform, source, target):
    tensor = np.arange(np.prod(source, dtype=int)).reshape(source)
    parameter = transform.apply(tensor)
    assert transform.target_shape(source) == parameter.shape == target
    np.testing.assert_array_equal(transform.invert(parameter), tensor)


@pytest.mark.parametrize(("transform", "source", "target"), CASES)
def test_a_slice_is_read_as_the_slice_of_the_whole(transform, source, target):
    tensor = np.arange(np.prod(source, dtype=int)).reshape(source)
    whole = transform.apply(tensor)
    choices = list(itertools.product(*(_slices(size) for size in target)))
    draw = np.random.default_rng(0)
    for place in draw.permutation(len(choices))[:300]:
        index = choices[place]
        part = read_part(transform, tensor.__getitem__, index, source)
        np.testing.assert_array_equal(part, whole[index], strict=True)


@pytest.mark.parametrize(
    ("transform", "source", "index", "elements"),
    [
        (LINEAR, (6, 4), (slice(1, 2), slice(0, 3)), 3),
        (CONV2D, (5, 4, 2, 3), (slice(0, 2), slice(0, 3), slice(0, 4), slice(2, 3)), 24),
        (chain(LINEAR, SplitAxis(1, (3, 2))), (6, 4), (slice(0, 4), slice(1, 2), slice(0, 2)), 8),
        (MergeAxes(0, (6, 2)), (6, 2, 3), (slice(3, 5), slice(0, 3)), 12),
        (chain(MergeAxes(0, (6, 2)), LINEAR), (6, 2, 3), (slice(0, 3), slice(3, 5)), 12),
        (PadAxis(0, 3, 7), (3, 2), (slice(2, 6), slice(0, 2)), 2),
        (PadAxis(0, 3, 7), (3, 2), (slice(4, 6), slice(0, 2)), 0),
        (chain(PadAxis(0, 5, 8), LINEAR), (5, 4), (slice(0, 4), slice(4, 8)), 4),
    ],
)
def test_only_what_is_needed_is_read(transform, source, index, elements):
    read = []

    def count(wanted):
        read.append(np.zeros(source)[wanted])
        return read[-1]

    read_part(transform, count, index, source)
    assert [array.size for array in read] == [elements]


@pytest.mark.parametrize("grown", [1.0, np.nan])
def test_padding_that_is_no_longer_zero_is_not_dropped(grown):
    padded = np.ones((2, 5), np.float32)
    padded[:, 3:] = -0.0
    assert PadAxis(1, 3, 5).invert(padded).shape == (2, 3)
    padded[1, 4] = grown
    with pytest.raises(NotUpstream, match="axis 1 is not zero everywhere from 3 on"):
        PadAxis(1, 3, 5).invert(padded)
    with pytest.raises(ValueError, match="an axis of 3 cannot be padded to 2"):
        PadAxis(1, 3, 2)


@pytest.mark.parametrize(
    ("transform", "shape"),
    [
        (LINEAR, (2, 3, 4)),
        (SplitAxis(0, (2, 3)), (5, 4)),
        (SplitAxis(2, (2, 3)), (6, 6)),
        (MergeAxes(0, (2, 3)), (3, 2)),
        (Squeeze(0), (2, 3)),
        (PadAxis(0, 3, 4), (4, 2)),
        (PadAxis(2, 3, 4), (3, 3)),
        (chain(LINEAR, SplitAxis(0, (2, 3))), (6, 5)),
    ],
)
def test_a_shape_that_does_not_suit_is_refused(transform, shape):
    with pytest.raises(ShapeMismatch):
        transform.target_shape(shape)


def test_patterns():
    pattern = upstream_pattern("{prefix}layers.{i}.fc.weight", "model.")
    assert pattern.fullmatch("model.layers.12.fc.weight")["i"] == "12"
    for name in ("model.layers.x.fc.weight", "layers.1.fc.weight", "model.layers.01.fc.weight"):
        assert pattern.fullmatch(name) is None
    assert upstream_pattern("a.*.b", "").fullmatch("a.x.y.b")
    assert upstream_pattern("a.b", "").fullmatch("a_b") is None
    twice = path_pattern("stage{i}/block{i}/kernel")
    assert twice.fullmatch("stage3/block3/kernel")["i"] == "3"
    assert twice.fullmatch("stage3/block4/kernel") is None
    assert fill("{prefix}l.{i}.w", "m.", 3) == "m.l.3.w"


@pytest.mark.parametrize(
    "arguments",
    [
        ("a.weight", "b_{i}/kernel"),
        ("a.{i}.{i}.weight", "b_{i}/kernel"),
        ("a.{layer}.weight", "b/kernel"),
        (("a.{i}.weight", "a.weight"), "b/kernel"),
        ("a.weight", "{prefix}b/kernel"),
        ("a.weight", "b/kernel", IDENTITY, (0, 1)),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(arguments):
    with pytest.raises(ValueError, match=r"\{|layers"):
        Rule(*arguments)


def test_an_ignore_with_an_unknown_field_is_refused():
    with pytest.raises(ValueError, match="unknown field"):
        Ignore("{layer}.weight", "no such field")
