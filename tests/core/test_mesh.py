"""The mesh and the sharding table, without devices: shapes and names only."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from medalign_jax.architecture import architecture
from medalign_jax.core.errors import UserError
from medalign_jax.core.mesh import (
    AXES,
    batch_sharding,
    batch_ways,
    check_batch,
    make_mesh,
    named_leaves,
    placed,
    shardings,
)

CUBE = AbstractMesh((2, 2, 2), AXES)


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_the_rest_of_the_devices_goes_to_the_free_axis():
    device = jax.devices()[:1]
    assert dict(make_mesh(devices=device).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh(1, -1, 1, device).shape) == {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((2, 1, 1), "does not use 1 devices"),
        ((-1, 2, 1), "does not use 1 devices"),
        ((-1, -1, 1), "at most one of them -1"),
        ((1, 0, 1), "must be positive"),
        ((1, 1, -3), "must be positive"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, words):
    with pytest.raises(UserError, match=words):
        make_mesh(*sizes, devices=jax.devices()[:1])


def test_every_uncovered_leaf_is_named_with_its_shape():
    tree = {"a": {"kernel": leaf(4, 6), "odd": leaf(3)}, "lost": leaf(2, 2)}
    with pytest.raises(UserError) as caught:
        shardings(tree, ((r"kernel$", ("fsdp", None)),), CUBE)
    assert "a/odd (3,)" in str(caught.value) and "lost (2, 2)" in str(caught.value)
    assert "a/kernel" not in str(caught.value)


def test_the_first_matching_line_wins():
    tree = {"qkv": {"kernel": leaf(4, 6)}, "out": {"kernel": leaf(4, 6)}}
    rules = ((r"qkv/kernel", ("fsdp", "tensor")), (r"kernel", (None, "data")))
    found = shardings(tree, rules, CUBE)
    assert found["qkv"]["kernel"].spec == PartitionSpec("fsdp", "tensor")
    assert found["out"]["kernel"].spec == PartitionSpec(None, "data")


@pytest.mark.parametrize(
    ("shape", "spec", "expected"),
    [
        ((4, 6), ("fsdp", "tensor"), ("fsdp", "tensor")),
        ((5, 6), ("fsdp", "tensor"), (None, "tensor")),  # 2 does not divide 5
        ((6, 4), (("data", "fsdp"), None), (None, None)),  # 4 do not divide 6
        ((8, 4), (("data", "fsdp"), None), (("data", "fsdp"), None)),
        ((3, 4, 6), ("fsdp", "tensor"), (None, "fsdp", "tensor")),  # stacked over layers
        ((6,), ("fsdp", "tensor"), ("tensor",)),  # a spec stands for the last dimensions
        ((4, 6), (), (None, None)),
    ],
)
def test_a_spec_is_fitted_to_the_shape(shape, spec, expected):
    found = shardings({"w": leaf(*shape)}, ((r"w", spec),), CUBE)
    assert found["w"].spec == PartitionSpec(*expected)


def test_an_axis_of_one_device_shards_nothing():
    mesh = AbstractMesh((8, 1, 1), AXES)
    found = shardings({"w": leaf(4, 6)}, ((r"w", ("fsdp", "tensor")),), mesh)
    assert found["w"].spec == PartitionSpec(None, None)


def test_scalars_need_no_line():
    found = shardings({"count": leaf(), "n": 3}, (), CUBE)
    assert found["count"].spec == found["n"].spec == PartitionSpec()


def test_batches_are_spread_over_data_and_fsdp():
    assert batch_sharding(CUBE).spec == PartitionSpec(("data", "fsdp"))
    assert batch_sharding(CUBE).shard_shape((8, 3)) == (2, 3)


def test_a_batch_is_cut_into_as_many_parts_as_its_sharding_has():
    mesh = AbstractMesh((2, 3, 5), AXES)
    assert batch_ways(mesh) == 6 == 12 // batch_sharding(mesh).shard_shape((12,))[0]
    assert batch_ways(None) == 1
    check_batch(mesh, 12)
    with pytest.raises(UserError, match="a batch of 8 does not divide over 6 devices"):
        check_batch(mesh, 8)


def test_placed_shapes_keep_shape_and_type():
    tree = {"w": leaf(4, 6), "n": [np.zeros(3, np.int8)]}
    found = placed(tree, shardings(tree, ((r"w", ("fsdp", "tensor")), (r"n", ())), CUBE))
    w, (n,) = found["w"], found["n"]
    assert (w.shape, w.dtype, w.sharding.spec) == (
        (4, 6), jnp.float32, PartitionSpec("fsdp", "tensor")
    )  # fmt: skip
    assert (n.shape, n.dtype, n.sharding.spec) == ((3,), jnp.int8, PartitionSpec(None))
    assert isinstance(n, jax.ShapeDtypeStruct)


def test_path_names():
    assert list(named_leaves({"b": [1, {"c": 2}], "a": 0})) == ["a", "b/0", "b/1/c"]


@pytest.mark.parametrize("name", ["opera_gt", "vit_mae_small"])
def test_the_table_of_the_encoders_covers_every_leaf_and_shards_the_large_ones(name):
    made = architecture(name)
    tree = named_leaves(made.abstract_params())
    found = named_leaves(shardings(made.abstract_params(), made.sharding, CUBE))
    assert tree.keys() == found.keys()
    kernels = [path for path in tree if re.search(r"block\d+/(attn|mlp)/\w+/kernel", path)]
    assert len(kernels) == 4 * (made.module.config.depth + made.module.config.decoder_depth)
    for path in kernels:
        held = np.prod(found[path].shard_shape(tree[path].shape))
        assert held == np.prod(tree[path].shape) / 4, path
