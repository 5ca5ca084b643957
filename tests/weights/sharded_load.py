"""Run by test_load.py with eight virtual devices, and by test_two_processes in each process.

Checks that a sharded load gives the same bits as a plain one and reads no more than it must.
"""

import math
import sys
import tempfile
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from medalign_jax.weights import Rule, Table
from medalign_jax.weights.lazy import FileTensor
from medalign_jax.weights.load import export, load, save
from medalign_jax.weights.table import LINEAR, SplitAxis, chain

LAYERS, IN, HEADS, WIDTH = 4, 16, 8, 4
TABLE = Table(
    "toy",
    (
        Rule("l.{i}.fc.weight", "layers/fc/kernel", LINEAR),
        Rule("l.{i}.q.weight", "layers/q/kernel", chain(LINEAR, SplitAxis(1, (HEADS, WIDTH)))),
        Rule("embed.weight", "embed/embedding"),
        Rule("norm.weight", "norm/scale"),
    ),
)
SPECS = {
    "layers/fc/kernel": P(None, "fsdp", "tensor"),
    "layers/q/kernel": P("fsdp", None, "tensor", None),
    "embed/embedding": P(("fsdp", "tensor"), None),
    "norm/scale": P(),
}


def upstream():
    draw = np.random.default_rng(0)
    shapes = {"embed.weight": (64, IN), "norm.weight": (IN,)}
    for layer in range(LAYERS):
        shapes[f"l.{layer}.fc.weight"] = shapes[f"l.{layer}.q.weight"] = (HEADS * WIDTH, IN)
    return {
        name: draw.standard_normal(shape).astype(ml_dtypes.bfloat16)
        for name, shape in shapes.items()
    }


def abstract(mesh):
    def leaf(path, shape):
        sharding = None if mesh is None else NamedSharding(mesh, SPECS[path])
        return jax.ShapeDtypeStruct(shape, ml_dtypes.bfloat16, sharding=sharding)

    return {
        "layers": {
            "fc": {"kernel": leaf("layers/fc/kernel", (LAYERS, IN, HEADS * WIDTH))},
            "q": {"kernel": leaf("layers/q/kernel", (LAYERS, IN, HEADS, WIDTH))},
        },
        "embed": {"embedding": leaf("embed/embedding", (64, IN))},
        "norm": {"scale": leaf("norm/scale", (IN,))},
    }


def check(folder, share):
    """Loads on all devices; `share` is the part of each sharded tensor that is read here."""
    tensors = upstream()
    path = folder / f"model{jax.process_index()}.safetensors"
    save(path, tensors)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("fsdp", "tensor", "data"))
    read_bytes = []
    whole_read = FileTensor.read

    def counted(self, index=None):
        array = whole_read(self, index)
        read_bytes.append(array.nbytes)
        return array

    FileTensor.read = counted
    params = load(path, TABLE, abstract(mesh))
    FileTensor.read = whole_read
    norm = tensors["norm.weight"].nbytes
    sharded = sum(tensor.nbytes for tensor in tensors.values()) - norm
    assert sum(read_bytes) == sharded * share + norm, (sum(read_bytes), sharded * share + norm)
    plain = load(tensors, TABLE, abstract(None))
    for spread, whole in zip(jax.tree.leaves(params), jax.tree.leaves(plain), strict=True):
        assert spread.dtype == whole.dtype
        for shard in spread.addressable_shards:
            expected = np.asarray(whole)[shard.index]
            assert np.asarray(shard.data).tobytes() == expected.tobytes()
    kernel = params["layers"]["fc"]["kernel"]
    assert kernel.addressable_shards[0].data.size == math.prod(kernel.shape) // 4
    written = export(params, TABLE)
    assert set(written) == set(tensors)
    assert all(written[name].tobytes() == tensors[name].tobytes() for name in tensors)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        address, process, folder = sys.argv[1:]
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, num_processes=2, process_id=int(process))
        assert len(jax.devices()) == 8 and jax.process_count() == 2
        check(Path(folder), share=0.5)
    else:
        assert len(jax.devices()) == 8
        with tempfile.TemporaryDirectory() as temporary:
            check(Path(temporary), share=1)
