"""What loading costs: memory, time, and bytes read when two processes share a model.

    python -m benchmarks.loading [--gigabytes 4] [--rounds 5] [--folder DIR]

Makes a bfloat16 checkpoint with the names and shapes of a Llama, in shards of 1 GB, in a temporary
folder below DIR, and removes it afterwards. Loading takes turns with `cat FILES > /dev/null`, which
keeps nothing, and with reading the files into fresh memory, which is the least that a loader can
do; each in a fresh process, so that a machine whose speed drifts slows all alike.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from medalign_jax.core.mesh import make_mesh
from medalign_jax.weights import Rule, Table
from medalign_jax.weights.lazy import FileTensor
from medalign_jax.weights.load import load, save
from medalign_jax.weights.table import LINEAR

WIDTH, KV_WIDTH, MLP_WIDTH, VOCABULARY = 2048, 512, 8192, 128_256
SHARD_BYTES = 10**9

# upstream module of a layer -> its place, (in, out)
DENSE = {
    "self_attn.q_proj": ("attention/query", WIDTH, WIDTH),
    "self_attn.k_proj": ("attention/key", WIDTH, KV_WIDTH),
    "self_attn.v_proj": ("attention/value", WIDTH, KV_WIDTH),
    "self_attn.o_proj": ("attention/out", WIDTH, WIDTH),
    "mlp.gate_proj": ("mlp/gate", WIDTH, MLP_WIDTH),
    "mlp.up_proj": ("mlp/up", WIDTH, MLP_WIDTH),
    "mlp.down_proj": ("mlp/down", MLP_WIDTH, WIDTH),
}
NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}

TABLE = Table(
    "llama",
    (
        Rule("model.embed_tokens.weight", "embed/embedding"),
        *(
            Rule(f"model.layers.{{i}}.{upstream}.weight", f"layers/{path}/kernel", LINEAR)
            for upstream, (path, _, _) in DENSE.items()
        ),
        *(
            Rule(f"model.layers.{{i}}.{upstream}.weight", f"layers/{path}/scale")
            for upstream, path in NORMS.items()
        ),
        Rule("model.norm.weight", "norm/scale"),
    ),
)


def depth_for(gigabytes: float) -> int:
    """Layers that bring the checkpoint to about so many GB, at least one."""
    layer = 2 * sum(wide * out for _, wide, out in DENSE.values())
    return max(1, round((gigabytes * 1e9 - 2 * VOCABULARY * WIDTH) / layer))


def upstream_shapes(depth: int) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor, by upstream name."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for layer in range(depth):
        for name, (_, wide, out) in DENSE.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = (out, wide)
        shapes |= {f"model.layers.{layer}.{name}.weight": (WIDTH,) for name in NORMS}
    return shapes | {"model.norm.weight": (WIDTH,)}


def make_checkpoint(folder: Path, depth: int) -> list[Path]:
    """Writes shards and index; returns the shards."""
    noise = np.random.default_rng(0).integers(0, 2**14, 2**24, np.uint16)
    shards: list[list[str]] = [[]]
    size = 0
    shapes = upstream_shapes(depth)
    for name, shape in shapes.items():
        if size > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 2 * int(np.prod(shape))
    files, places = [], {}
    for number, names in enumerate(shards):
        files.append(folder / f"model-{number + 1:05}-of-{len(shards):05}.safetensors")
        save(
            files[-1],
            {name: np.resize(noise, shapes[name]).view(ml_dtypes.bfloat16) for name in names},
        )
        places |= {name: files[-1].name for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return files


def abstract(depth: int, fsdp: int) -> dict:
    """The parameter tree; matrices divided over `fsdp` devices if there are several."""
    mesh = make_mesh(fsdp=fsdp) if fsdp > 1 else None

    def leaf(shape, *spec):
        sharding = None if mesh is None else NamedSharding(mesh, P(*spec))
        return jax.ShapeDtypeStruct(shape, ml_dtypes.bfloat16, sharding=sharding)

    layers: dict = {path: {"scale": leaf((depth, WIDTH))} for path in NORMS.values()}
    for path, wide, out in DENSE.values():
        group, name = path.split("/")
        # As the language models' own tables: into heads and hidden units by row, out of them not.
        spec = (None, None, "fsdp") if name in ("out", "down") else (None, "fsdp", None)
        layers.setdefault(group, {})[name] = {"kernel": leaf((depth, wide, out), *spec)}
    return {
        "embed": {"embedding": leaf((VOCABULARY, WIDTH), None, "fsdp")},
        "layers": layers,
        "norm": {"scale": leaf((WIDTH,))},
    }


def measure_load(folder: Path, depth: int, address: str | None, process: int) -> None:
    """Loads once in this process and prints the figures as JSON."""
    if address is not None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, num_processes=2, process_id=process)
    tree = abstract(depth, jax.device_count())
    jax.block_until_ready(jax.device_put(np.zeros(1)))
    counted = [0]
    whole_read = FileTensor.read

    def counting_read(self, index=None):
        array = whole_read(self, index)
        counted[0] += array.nbytes  # one addition under the interpreter's lock
        return array

    FileTensor.read = counting_read
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest mark
    begun = time.perf_counter()
    params = jax.block_until_ready(load(folder, TABLE, tree))
    seconds = time.perf_counter() - begun
    here = sum(
        shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards
    )
    peak = resident("VmHWM") - before
    print(json.dumps({"seconds": seconds, "peak": peak, "read": counted[0], "model": here}))


def resident(mark: str) -> int:
    """Bytes of this process in memory now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(mark))


def measure_read(folder: Path) -> None:
    """Reads all shards into new memory, by two threads, and prints the seconds."""
    files = sorted(folder.glob("*.safetensors"))
    begun = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        arrays = list(pool.map(lambda file: np.fromfile(file, np.uint8), files))
    print(json.dumps({"seconds": time.perf_counter() - begun, "read": sum(map(len, arrays))}))


def loads(folder: Path, depth: int, processes: int = 1) -> list[dict]:
    """Loads in fresh processes, together; the figures of each. Depth 0: only reads."""
    command = [sys.executable, "-m", "benchmarks.loading", "--child", str(folder), str(depth)]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            command.append(f"localhost:{free.getsockname()[1]}")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    running = [
        subprocess.Popen(
            [*command, *([str(each)] if processes > 1 else [])],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for each in range(processes)
    ]
    printed = [each.communicate()[0] for each in running]
    if any(each.returncode for each in running):
        sys.exit("a loading process failed; its error is above")
    return [json.loads(text.splitlines()[-1]) for text in printed]


def cat(files: list[Path]) -> float:
    """Seconds that `cat FILES > /dev/null` takes."""
    begun = time.perf_counter()
    subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begun


def report(folder: Path, depth: int, rounds: int) -> None:
    """Makes the checkpoint, measures, prints."""
    files = make_checkpoint(folder, depth)
    print(f"checkpoint: {sum(each.stat().st_size for each in files) / 1e9:.2f} GB, "
          f"{len(files)} shards, {depth} layers, {os.cpu_count()} cores", flush=True)  # fmt: skip
    cat(files)  # into the page cache
    loads(folder, depth)  # the system's memory has been used once, too
    turns = [(cat(files), loads(folder, 0)[0], loads(folder, depth)[0]) for _ in range(rounds)]
    seconds = [(plain, read["seconds"], load["seconds"]) for plain, read, load in turns]
    plain, reading, loading = (statistics.median(each) for each in zip(*seconds, strict=True))
    print(f"time: load {loading:.2f} s, read into memory {reading:.2f} s, cat {plain:.2f} s")
    for place, name in enumerate(("cat", "read into memory")):
        ratios = [each[2] / each[place] for each in seconds]
        print(f"load / {name}: {statistics.median(ratios):.2f} "
              f"({min(ratios):.2f} to {max(ratios):.2f})")  # fmt: skip
    one = turns[0][2]
    peak = max(load["peak"] / load["model"] for _, _, load in turns)
    print(f"memory: peak is {peak:.3f} of the model's own size")
    print(f"one process reads {one['read'] / one['model']:.3f} of the model")
    for process, each in enumerate(loads(folder, depth, processes=2)):
        print(f"process {process} of 2 reads {each['read'] / one['model']:.3f}, "
              f"peak {each['peak'] / each['model']:.3f} of its part")  # fmt: skip


def main() -> None:
    """Parses the flags; with --child, loads once."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where the checkpoint goes")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        folder, depth, *group = arguments.child
        address, process = (group[0], int(group[1])) if group else (None, 0)
        if depth == "0":
            measure_read(Path(folder))
        else:
            measure_load(Path(folder), int(depth), address, process)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the folder goes
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        report(Path(folder), depth_for(arguments.gigabytes), arguments.rounds)


if __name__ == "__main__":
    main()
