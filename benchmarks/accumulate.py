"""What a batch in parts costs: a step in k parts beside one step and one forward pass.

    python -m benchmarks.accumulate [--encoder small whisper] [--parts 2 4] [--batch 8] [--rounds 5]

AcuLa as `configs/acula.py:small` has it, with its own small encoder on clips of 2 s, or with an
encoder of Whisper-base's size on clips of 5 s (random weights: time does not depend on them). A
batch in k parts is embedded once more, so that CKA sees all of it, and nothing else: the ratio

    time in k parts / (time in one part + time of one forward pass)

should be 1 or less. Contestants take turns; gradients are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.turns import in_turns
from configs import acula
from medalign_jax.core.host_memory import keep_host_memory
from medalign_jax.methods.accumulate import loss_and_grad
from medalign_jax.methods.acula import Acula
from medalign_jax.runs.parts.alignment import acula_config
from medalign_jax.runs.parts.audio import architecture_of, audio_student_of

_TEXT_WIDTH = 64


def method_of(encoder: str) -> Acula:
    """The small config's method, with its own encoder or one of Whisper-base's size."""
    config = acula.get_config("small")
    if encoder == "whisper":
        config.encoder.name = "whisper"
        config.encoder.overrides, config.encoder.front_end = {}, {}
        config.data.seconds = 5.0
    made = architecture_of(config)
    student = audio_student_of(config, made, None)
    return Acula(student, _TEXT_WIDTH, acula_config(config), made.sharding)


def batch_of(method: Acula, rows: int) -> dict[str, np.ndarray]:
    """Noise, and a vector of its own for each clip."""
    rng = np.random.default_rng(0)
    waveform = 0.1 * rng.standard_normal((rows, method.student.samples))
    text = rng.standard_normal((rows, _TEXT_WIDTH))
    return {"waveform": waveform.astype(np.float32), "text": text.astype(np.float32)}


class Compiled:
    """A function compiled for its arguments; a call waits for the result."""

    def __init__(self, function: Callable, *arguments: Any):
        begun = time.process_time()
        self.run = jax.jit(function).lower(*arguments).compile()
        self.seconds = time.process_time() - begun
        self.bytes = self.run.memory_analysis().temp_size_in_bytes
        self.arguments = arguments

    def __call__(self) -> Any:
        return jax.block_until_ready(self.run(*self.arguments))


def contestants(encoder: str, rows: int, parts: list[int]) -> dict[Any, Compiled]:
    """What is timed, ready to be called: "forward", and the numbers of parts."""
    method, key = method_of(encoder), jax.random.key(0)
    params = jax.jit(method.init)(key)
    batch = jax.device_put(batch_of(method, rows))
    keys = jax.random.split(key, rows)

    def step(params, batch, keys, chunks):
        return loss_and_grad(method, params, {}, batch, keys, chunks)

    def forward(params, batch, keys):
        return method.encode(params, {}, batch, keys, True).coupled

    found: dict[Any, Compiled] = {"forward": Compiled(forward, params, batch, keys)}
    for k in (1, *parts):
        found[k] = Compiled(lambda *a, k=k: step(*a, k), params, batch, keys)
    return found


def compare(encoder: str, rows: int, parts: list[int], rounds: int) -> None:
    """Prints time, memory and compile time of each number of parts, and the ratios."""
    runs = contestants(encoder, rows, parts)
    results = {k: jax.device_get(run()) for k, run in runs.items() if k != "forward"}
    for k in parts:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4),
                     results[k], results[1])  # fmt: skip
    taken = in_turns(runs, rounds)
    print(f"{encoder}: batch of {rows}, {jax.devices()[0].device_kind}, {rounds} rounds")
    for k, run in runs.items():
        what = "forward pass" if k == "forward" else f"step in {k} part(s)"
        print(f"  {what:20s} {statistics.median(taken[k]):8.2f} s, "
              f"{run.bytes / 2**20:7.0f} MiB of temporaries, "
              f"compiled in {run.seconds:.0f} s of CPU time")  # fmt: skip
    for k in parts:
        each = [t / (one + forward) for t, one, forward in
                zip(taken[k], taken[1], taken["forward"], strict=True)]  # fmt: skip
        print(f"  {k} parts / (1 part + forward pass): {statistics.median(each):.2f} "
              f"({min(each):.2f} to {max(each):.2f})", flush=True)  # fmt: skip


def main() -> None:
    """Prints the ratio for every encoder and number of parts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--encoder", nargs="+", choices=("small", "whisper"),
                        default=("small", "whisper"))  # fmt: skip
    parser.add_argument("--parts", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    keep_host_memory()  # as training does on a CPU
    for encoder in arguments.encoder:
        compare(encoder, arguments.batch, arguments.parts, arguments.rounds)


if __name__ == "__main__":
    main()
