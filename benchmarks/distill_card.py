"""The paper's distillation with low-rank factors on one card, ours beside PyTorch.

    python -m benchmarks.distill_card --side ours [--batch 8] [--rounds 8] [--small]
    python -m benchmarks.distill_card --side torch

Two programs, since the card does not hold both; whoever runs them divides.

A student of Qwen2.5-Omni-7B's size with rank-16 factors at the projections of its attention, its
snapshot, and a teacher of Qwen3-8B's, all bfloat16 with random weights; sequences of 2,048 tokens
with 30 s of sound (750 tokens) and 1,024 response tokens: `configs/distill.py:lora`. PyTorch takes
transformers' modules, sdpa attention, gradient checkpointing, peft's factors, and scores at the
response tokens in checkpointed chunks. That the two are the same step is checked where both can
have the same weights, by `benchmarks.distill_step`. The memory that the compiler planned stands
beside what the step took.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.turns import seconds
from configs import distill
from medalign_jax.core.mesh import make_mesh
from medalign_jax.runs.distill import plan as distill_plan
from medalign_jax.runs.parts.blocks import typed
from medalign_jax.train import cost
from medalign_jax.train.optimizer import OptimizerConfig, make_optimizer
from medalign_jax.train.step import init_state, trace_train_step

_AUDIO_TOKEN = 151_646
LENGTHS = distill_plan.Lengths(sequence=2048, response=1024, seconds=30.0)
_SMALL = distill_plan.Lengths(sequence=64, response=16, seconds=1.0)
# What --small gives both sides in place of the published sizes.
_TEXT = {
    "vocab_size": 256, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 7,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip
SMALL_STUDENT = {
    "model_type": "qwen2_5_omni_thinker",
    "audio_token_index": 250,
    "tie_word_embeddings": False,
    "text_config": _TEXT | {
        "model_type": "qwen2_5_omni_text", "max_position_embeddings": 1024,
        "rope_scaling": {"rope_type": "default", "mrope_section": [4, 4, 4]},
    },
    "audio_config": {
        "model_type": "qwen2_5_omni_audio_encoder", "num_mel_bins": 128, "d_model": 32,
        "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "n_window": 50,
        "output_dim": 48,
    },
}  # fmt: skip
SMALL_TEACHER = _TEXT | {"model_type": "qwen3", "head_dim": 24, "tie_word_embeddings": False}


def random_tree(shapes: Any, seed: int) -> Any:
    """Arrays of small random numbers in the place of shapes, made on the device."""
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def make(key, leaf):
        return 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)

    made = [jax.jit(make, static_argnums=1)(k, leaf) for k, leaf in zip(keys, leaves, strict=True)]
    return structure.unflatten(made)


def random_batch(rows: int, lengths: distill_plan.Lengths, token: int, vocab: int) -> dict:
    """A full batch: sound, question and response, without padding."""
    rng = np.random.default_rng(0)
    samples = round(lengths.seconds * 16_000)
    audio_tokens = round(lengths.seconds * 25)
    ids = rng.integers(1, vocab, (rows, lengths.sequence), np.int32)
    ids[ids == token] = 0
    teacher_ids = ids.copy()
    ids[:, 4 : 4 + audio_tokens] = token
    places = np.arange(lengths.sequence - lengths.response, lengths.sequence, dtype=np.int32)
    places = np.broadcast_to(places, (rows, lengths.response)).copy()
    waveform = 0.1 * rng.standard_normal((rows, 1, samples), np.float32)
    return {
        "waveform": waveform,
        "samples": np.full((rows, 1), samples, np.int32),
        "student_ids": ids,
        "student_mask": np.ones(ids.shape, bool),
        "teacher_ids": teacher_ids,
        "teacher_mask": np.ones(ids.shape, bool),
        "response_ids": ids[:, places[0]],
        "response_mask": np.ones(places.shape, bool),
        "student_at": places - 1,
        "teacher_at": places - 1,
        "index": np.arange(rows, dtype=np.int32),
    }


class OurStep:
    """The compiled step of a run with its state; `planned` (bytes) and `flop` as compiled."""

    def __init__(self, config, batch: Mapping[str, np.ndarray]):
        mesh = make_mesh()
        self.method = distill_plan.planned_method(config, mesh, "auto")
        frozen = random_tree(self.method.frozen, 1)
        params = jax.jit(self.method.init)(jax.random.key(0))
        settings = typed(OptimizerConfig, config.optimizer, "optimizer")
        optimizer, schedule = make_optimizer(settings, params, total_steps=1000)
        self.frozen, self.state = frozen, init_state(params, optimizer, 0)
        self.batch = {name: jnp.asarray(x) for name, x in batch.items()}
        traced = trace_train_step(
            self.method, optimizer, schedule, mesh, self.state, self.frozen, self.batch
        )
        self.flop = cost.matrix_flops(traced.jaxpr)
        self.run = traced.lower().compile()
        self.planned = cost.memory(self.run).peak

    def __call__(self) -> float:
        """One update; the loss before it."""
        self.state, metrics = self.run(self.state, self.frozen, self.batch)
        return float(metrics["loss"])


def _config(small: bool, folder: Path):
    config = distill.get_config("lora")
    if small:
        for name, content in (("student", SMALL_STUDENT), ("teacher", SMALL_TEACHER)):
            (folder / name).mkdir()
            (folder / name / "config.json").write_text(json.dumps(content))
            config[name].source = str(folder / name)
    return config


def _in_use() -> float | None:
    """GiB that the device has held at most, where it counts them."""
    counted = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return None if counted is None else counted / 2**30


def timed(step: Callable[[], float], rounds: int) -> tuple[list[float], float]:
    """The first three losses, and the median of the seconds of later steps."""
    losses = [step() for _ in range(3)]
    return losses, statistics.median(seconds(step) for _ in range(rounds))


def main() -> None:
    """Prints the first losses, seconds per step, tokens/s and memory of one side."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--side", choices=("ours", "torch"), default="ours")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--small", action="store_true", help="tiny models, for a CPU")
    options = parser.parse_args()
    lengths = _SMALL if options.small else LENGTHS
    token = SMALL_STUDENT["audio_token_index"] if options.small else _AUDIO_TOKEN
    batch = random_batch(options.batch, lengths, token, 250 if options.small else 151_000)
    with tempfile.TemporaryDirectory() as folder:
        config = _config(options.small, Path(folder))
        if options.side == "ours":
            step = OurStep(config, batch)
        else:
            from benchmarks.distill_card_torch import TorchStep

            method = distill_plan.planned_method(config, make_mesh(), "auto")
            step = TorchStep(batch, method, options.small)
    losses, taken = timed(step, options.rounds)
    tokens = options.batch * lengths.sequence
    print(f"{options.side}: first losses {', '.join(f'{loss:.4f}' for loss in losses)}")
    print(f"{options.side}: {taken:.3f} s per step, {tokens / taken:.0f} tokens/s")
    if options.side == "torch":
        print(f"memory: {step.peak():.2f} GiB at most in use")
        return
    used = _in_use()
    used_text = "not counted here" if used is None else f"{used:.2f} GiB at most in use"
    print(f"products: {step.flop / taken / 1e12:.0f} TFLOP/s, what is computed anew included")
    print(f"memory: {step.planned / 2**30:.2f} GiB planned, {used_text}")


if __name__ == "__main__":
    main()
