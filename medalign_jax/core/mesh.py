"""The device mesh and the one rule that lays trees of arrays out on it.

A sharding table is a tuple of ``(regex, spec)`` lines. The path of a leaf, written
``encoder/block00/attn/qkv/kernel``, is searched for each regex in turn; the first match gives the
spec: one mesh axis, a tuple of axes, or None for each dimension. A leaf that no line covers is an
error. A dimension that an axis does not divide stays whole, as does everything of rank 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from medalign_jax.core.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))

Rules = Sequence[tuple[str, tuple[Any, ...]]]


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Mesh with axes `AXES`; one size may be -1 and takes the devices that the others leave.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"mesh sizes must be positive, at most one of them -1: got {sizes}")
    if free:
        sizes[free[0]] = len(devices) // max(fixed, 1)
    if int(np.prod(list(sizes.values()))) != len(devices):
        raise UserError(
            f"mesh {sizes} does not use {len(devices)} devices: choose mesh.data, mesh.fsdp and "
            "mesh.tensor whose product is the number of devices (-1 for the rest)"
        )
    return Mesh(np.asarray(devices).reshape(tuple(sizes.values())), AXES)


def path_name(path: tuple[Any, ...]) -> str:
    """``encoder/block00/kernel`` from a jax key path."""
    parts = (getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))) for k in path)
    return "/".join(str(part) for part in parts)


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by path name, in tree order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def shardings(tree: Any, rules: Rules, mesh: Mesh) -> Any:
    """A tree of `NamedSharding` like `tree` (arrays or ShapeDtypeStructs), chosen by `rules`.

    Raises:
      UserError: leaves that no rule covers, all in one error.
    """
    uncovered: list[str] = []

    def choose(path, leaf):
        name = path_name(path)
        if np.ndim(leaf) == 0:
            return NamedSharding(mesh, PartitionSpec())
        for pattern, spec in rules:
            if re.search(pattern, name):
                return NamedSharding(mesh, _fit(spec, np.shape(leaf), mesh))
        uncovered.append(f"{name} {np.shape(leaf)}")
        return None

    chosen = jax.tree_util.tree_map_with_path(choose, tree)
    if uncovered:
        raise UserError(
            "no line of the sharding table covers: " + ", ".join(uncovered) + ". Add a line "
            "(regex, spec) for it; (r'.*', ()) keeps everything else whole on each device"
        )
    return chosen


def placed(tree: Any, places: Any) -> Any:
    """The shapes and types of `tree`, each with its place; no array is made.

    Args:
      tree: arrays or ShapeDtypeStructs.
      places: a tree of shardings like it, as of `shardings`.

    Returns:
      A tree of ShapeDtypeStructs.
    """
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        tree,
        places,
    )


def _fit(spec: tuple[Any, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Aligns a spec with the last dimensions of a shape and drops axes that do not divide."""
    spec = tuple(spec)[-len(shape) :] if shape else ()
    spec = (None,) * (len(shape) - len(spec)) + spec
    fitted = []
    for size, axes in zip(shape, spec, strict=True):
        names = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
        ways = int(np.prod([mesh.shape[name] for name in names])) if names else 1
        fitted.append(axes if ways > 1 and size % ways == 0 else None)
    return PartitionSpec(*fitted)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first dimension spread over the `data` and `fsdp` axes, the others whole."""
    return NamedSharding(mesh, BATCH)


def batch_ways(mesh: Mesh | None) -> int:
    """Parts that `batch_sharding` cuts a batch into; 1 without a mesh."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(mesh: Mesh, batch_size: int) -> None:
    """Refuses a batch that does not divide over the devices.

    Raises:
      UserError: naming both numbers.
    """
    ways = batch_ways(mesh)
    if batch_size % ways:
        raise UserError(
            f"a batch of {batch_size} does not divide over {ways} devices (mesh.data x mesh.fsdp); "
            "make train.batch_size a multiple of that"
        )


def local_rows(mesh: Mesh, batch_size: int) -> range:
    """Rows of a global batch that this process has to provide, as `batch_sharding` lays them out.

    Processes that share rows, as where `tensor` spans several, all provide them.

    Raises:
      UserError: the batch does not divide, or the process's rows are not neighbours.
    """
    check_batch(mesh, batch_size)
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    rows = sorted({row for (part,) in places.values() for row in range(*part.indices(batch_size))})
    if rows != list(range(rows[0], rows[-1] + 1)):
        raise UserError(
            "the devices of this process hold rows of a batch that are not neighbours: lay the "
            "mesh out with the devices in the order of jax.devices()"
        )
    return range(rows[0], rows[-1] + 1)


def on_host(array: Any) -> np.ndarray:
    """A whole array on this host, wherever its parts are.

    Where several processes hold parts of it, all of them have to call this.
    """
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(jax.device_get(array))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())
