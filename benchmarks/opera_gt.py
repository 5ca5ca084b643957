"""OPERA-GT at full size against the same architecture in PyTorch, on the same CPU cores.

    python -m benchmarks.opera_gt [--batch 8] [--rounds 3] [--what forward,step]

PyTorch runs in a second process with as many threads as there are cores. The two take turns (one
sleeps while the other runs), so what else the machine does hits both alike; medians over the
rounds are printed. Both start from the same weights, and both have to agree on features and losses
before anything is timed. Needs PyTorch (requirements-dev.txt) and about 20 GB of memory for
batch 8: each side holds the activations of a step.

`forward` is the feature of whole clips. `step` is the masked pass, the full pass, backward and an
AdamW update; the mean of the feature stands in for the alignment loss. The rate of matrix products
is the best of two square sizes in JAX, measured between the runs; model FLOPs are counted by
formula, multiply-adds of matrix products only, backward as twice the forward, nothing for
recomputation.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from medalign_jax.core.host_memory import keep_host_memory

FRAMES, MELS = 256, 64
MATRICES = (2048, 3072)


def inputs(batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Random features (B, T, M), and the noise (B, N) that decides what is masked."""
    rng = np.random.default_rng(0)
    features = rng.random((batch, FRAMES, MELS), dtype=np.float32)
    return features, rng.random((batch, 1024), dtype=np.float32)


def gflop(batch: int) -> dict[str, float]:
    """Billions of floating-point operations of one run."""

    def vit_block(tokens: int, width: int) -> float:
        return 2 * tokens * (12 * width**2) + 2 * 2 * tokens**2 * width

    def window_block(tokens: int, width: int, window: int) -> float:
        return 2 * tokens * (12 * width**2) + 2 * 2 * tokens * window * width

    full = 12 * vit_block(1025, 384) + 2 * 1024 * 16 * 384
    masked = 12 * vit_block(308, 384) + 2 * 307 * 16 * 384
    decoder = 16 * window_block(1024, 256, 16) + 2 * 307 * 384 * 256 + 2 * 1024 * 256 * 16
    scale = batch / 1e9
    return {"forward": full * scale, "step": 3 * (full + masked + decoder) * scale}


def jax_runs(batch: int, weights: Path) -> tuple[dict, dict]:
    """Functions to time, and values to compare; writes the weights for PyTorch."""
    import jax
    import jax.numpy as jnp
    import optax

    from medalign_jax.models.encoders.vit_mae import OPERA_GT, ViTMAE
    from medalign_jax.weights.load import export
    from medalign_jax.weights.tables.opera_gt import TABLE

    model = ViTMAE(OPERA_GT)
    features, noise = (jnp.asarray(x) for x in inputs(batch))
    params = jax.jit(model.init)(jax.random.key(0), features[:1], noise[:1])["params"]
    np.savez(weights, **export(params, TABLE))

    def feature(params, features):
        return model.apply({"params": params}, features, method="embed")[0]

    def loss(params, features, noise):
        lost = model.apply({"params": params}, features, noise, method="reconstruct")[0]
        return jnp.mean(lost) + jnp.mean(feature(params, features))

    optimizer = optax.adamw(1e-5, weight_decay=0.01)

    def update(state, features, noise):
        params, moments = state
        value, gradient = jax.value_and_grad(loss)(params, features, noise)
        changes, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, changes), moments), value

    embed, update = jax.jit(feature), jax.jit(update, donate_argnums=0)
    product = jax.jit(jnp.dot)
    first = np.asarray(embed(params, features))
    state = [(jax.tree.map(jnp.copy, params), optimizer.init(params))]

    def step():
        state[0], value = update(state[0], features, noise)
        return float(value)

    runs = {
        "forward": lambda: embed(params, features).block_until_ready(),
        "step": step,
    }
    for size in MATRICES:
        matrix = jnp.asarray(np.random.default_rng(1).random((size, size), dtype=np.float32))
        runs[f"matmul {size}"] = lambda m=matrix: product(m, m).block_until_ready()
    return runs, {"feature": first}


def torch_runs(batch: int, weights: Path) -> tuple[dict, dict]:
    """The same in PyTorch."""
    import torch

    from benchmarks.opera_gt_torch import TorchOperaGT

    torch.set_num_threads(os.cpu_count() or 1)
    features, noise = (torch.from_numpy(x) for x in inputs(batch))
    with np.load(weights) as file:
        model = TorchOperaGT({name: torch.from_numpy(file[name]) for name in file.files})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01, fused=True)

    def forward():
        with torch.inference_mode():
            return model.embed(features)

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = model.reconstruct(features, noise) + model.embed(features).mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return {"forward": forward, "step": step}, {"feature": forward().numpy()}


def timed(run) -> dict[str, float]:
    """Seconds of the clock and of the CPU that a call takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    value = run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"wall": wall, "cpu": cpu, "value": value if isinstance(value, float) else 0.0}


def serve_torch(batch: int, weights: Path) -> None:
    """Child process: a line with a name comes in, a line with its times goes out."""
    runs, values = torch_runs(batch, weights)
    print(json.dumps({"feature": values["feature"].tolist()}), flush=True)
    for line in sys.stdin:
        print(json.dumps(timed(runs[line.strip()])), flush=True)


def check_equal(what: str, ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> None:
    """Ends the benchmark where the two sides do not compute the same."""
    difference = float(np.abs(np.asarray(ours) - np.asarray(theirs)).max())
    print(f"{what}: JAX and PyTorch differ by {difference:.1e}")
    if not difference < tolerance:
        sys.exit(f"{what} differ by more than {tolerance}: the two are not the same model")


def measure(names: list[str], runs: dict, ask, rounds: int) -> dict[str, list[dict]]:
    """Alternates the two processes; products of matrices are measured between their runs."""
    records: dict[str, list[dict]] = {f"matmul {size}": [] for size in MATRICES}

    def products(keep: bool = True) -> None:
        for size in MATRICES:
            record = timed(runs[f"matmul {size}"])
            if keep:
                records[f"matmul {size}"].append(record)

    products(keep=False)  # compiles
    for name in names:
        ours, theirs = timed(runs[name]), ask(name)  # compiles, and fills allocators
        if name == "step":
            check_equal("losses", ours["value"], theirs["value"], 1e-4)
        records |= {f"jax {name}": [], f"torch {name}": []}
        for _ in range(rounds):
            records[f"torch {name}"].append(ask(name))
            products()
            records[f"jax {name}"].append(timed(runs[name]))
            products()
    return records


def show(names: list[str], records: dict[str, list[dict]], batch: int) -> None:
    """Prints medians, by the clock on the wall and by processor time."""

    def median(what: str, clock: str) -> float:
        return statistics.median(record[clock] for record in records[what])

    cores = os.cpu_count() or 1
    print(f"\n{cores} cores, batch {batch}; model GFLOP per run: {gflop(batch)}")
    print("clock  run      torch clips/s  JAX clips/s  JAX/torch  matmul GFLOP/s  JAX share of it")
    for clock in ("wall", "cpu"):
        rate = max(2e-9 * size**3 / median(f"matmul {size}", clock) for size in MATRICES)
        for name in names:
            ours, theirs = median(f"jax {name}", clock), median(f"torch {name}", clock)
            print(
                f"{clock:<6} {name:<8} {batch / theirs:>13.2f} {batch / ours:>12.2f} "
                f"{theirs / ours:>10.2f} {rate:>15.0f} {gflop(batch)[name] / ours / rate:>16.0%}"
            )
    print(
        "cpu: per second of processor time, all threads; other programs on the machine count less"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--what", default="forward,step", help="forward, step or both")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    keep_host_memory()  # in both processes
    if options.serve:
        serve_torch(options.batch, options.serve)
        return
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    names = options.what.split(",")
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.npz"
        runs, values = jax_runs(options.batch, weights)
        command = [sys.executable, "-m", "benchmarks.opera_gt", "--batch", str(options.batch)]
        child = subprocess.Popen(
            [*command, "--serve", str(weights)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

        def ask(name: str | None) -> dict:
            if name is not None:
                child.stdin.write(name + "\n")
                child.stdin.flush()
            line = child.stdout.readline()
            if not line:
                sys.exit(f"the PyTorch process ended with status {child.wait()}")
            return json.loads(line)

        try:
            check_equal("features", values["feature"], ask(None)["feature"], 1e-4)
            records = measure(names, runs, ask, options.rounds)
        finally:
            child.stdin.close()
            child.wait()
    show(names, records, options.batch)


if __name__ == "__main__":
    main()
