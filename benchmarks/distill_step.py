"""One distillation step at the demo's size, ours beside PyTorch with transformers' modules.

    python -m benchmarks.distill_step [--batch 32] [--rounds 25] [--given_features]

Student, snapshot and teacher are the same random weights on both sides, written once and read by
both; the batch, the losses (JSD at the response tokens, JSD of paired layers through projections,
JSD at the audio tokens, cross-entropy) and the optimizer are the same. Both work the log-mel out of
the waveform in the step, PyTorch by transformers' feature extractor, or with --given_features not
at all. The steps take turns, and as in training
each timed step follows one of its own; the first losses are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.distill_step_torch import TorchStep
from benchmarks.turns import in_turns
from configs import distill
from medalign_jax.core.host_memory import keep_host_memory
from medalign_jax.core.mesh import make_mesh
from medalign_jax.data.questions.batches import QuestionBatchSpec, make_question_iterator
from medalign_jax.data.questions.prompts import PromptFormat
from medalign_jax.data.questions.source import open_questions
from medalign_jax.datasets.simulated import questions as world
from medalign_jax.datasets.simulated.cases import write_cases
from medalign_jax.language_model import LanguageModel, random_language_model
from medalign_jax.methods.distill import Distill
from medalign_jax.runs.distill.world import student_json, teacher_json
from medalign_jax.runs.parts.distillation import (
    audio_lm_student_of,
    builder_of,
    distill_config,
    text_teacher_of,
)
from medalign_jax.text.chat import ChatTokenizer
from medalign_jax.text.word_tokenizer import write_word_tokenizer
from medalign_jax.train.feed import put_batch
from medalign_jax.train.optimizer import OptimizerConfig, make_optimizer
from medalign_jax.train.step import compile_train_step, init_state

_RATE = 1e-4


class OurStep:
    """The loop's compiled step with its state."""

    def __init__(self, method: Distill, batch: dict[str, np.ndarray]):
        mesh = make_mesh()
        self.method = method
        params = method.initial_params(jax.random.key(0))
        settings = OptimizerConfig(learning_rate=_RATE, warmup_steps=0, schedule="constant")
        optimizer, schedule = make_optimizer(settings, params, 1000)
        self.projections = jax.device_get(params["projections"])
        self.state, self.frozen = init_state(params, optimizer, 0), method.frozen
        self.batch = put_batch(batch, mesh)
        self.run = compile_train_step(
            method, optimizer, schedule, mesh, self.state, self.frozen, self.batch
        )

    def __call__(self) -> float:
        """One update; the loss before it."""
        self.state, metrics = self.run(self.state, self.frozen, self.batch)
        return float(metrics["loss"])


def made(folder: Path, rows: int):
    """(student, teacher, method, batch) of the demo's sizes, with random weights."""
    config = distill.get_config("demo")
    questions = world.recorded_questions(write_cases(folder / "hearts", rows, 0, 2.0), 0)
    questions = [q for q in questions if q.task == "reasoning"]
    words = world.words(questions, PromptFormat())
    tokenizers = [
        ChatTokenizer(write_word_tokenizer(folder / name, words, world.MARKS))
        for name in ("student_words", "teacher_words")
    ]
    jsons = student_json(config, tokenizers[0]), teacher_json(config, tokenizers[1])
    student, teacher = (
        random_language_model(json, tokenizer, seed, remat=False)
        for seed, (json, tokenizer) in enumerate(zip(jsons, tokenizers, strict=True))
    )
    builder = builder_of(config, student, teacher)
    data = open_questions(questions, builder)
    batch = next(make_question_iterator(data, QuestionBatchSpec(rows, shuffle=False)))
    method = Distill(
        audio_lm_student_of(student), distill_config(config), text_teacher_of(teacher, builder)
    )
    return student, teacher, method, batch


def features_of(student: LanguageModel, batch: dict[str, np.ndarray]) -> np.ndarray:
    """(B, mels, frames) log-mel for the side that is given it."""
    waveform = jnp.asarray(batch["waveform"][:, 0])
    return np.asarray(jax.jit(student.front_end)(waveform)).transpose(0, 2, 1)


def main() -> None:
    """Prints the first losses, samples/s of both, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--given_features", action="store_true")
    arguments = parser.parse_args()
    keep_host_memory()  # as training does on a CPU
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        student, teacher, method, batch = made(folder, arguments.batch)
        ours = OurStep(method, batch)
        saved = student.save(folder / "student"), teacher.save(folder / "teacher")
        theirs = TorchStep(
            saved,
            batch,
            features_of(student, batch) if arguments.given_features else None,
            method,
            ours.projections,
            _RATE,
        )
    steps = {"medalign_jax": ours, "PyTorch": theirs}
    losses = {name: [step() for _ in range(3)] for name, step in steps.items()}
    for name, values in losses.items():
        print(f"{name:13s} losses of the first steps: {', '.join(f'{v:.5f}' for v in values)}")
    np.testing.assert_allclose(losses["medalign_jax"], losses["PyTorch"], rtol=1e-5)
    taken = in_turns(steps, arguments.rounds, settle=1)
    for name, times in taken.items():
        print(f"{name:13s} {arguments.batch / statistics.median(times):7.1f} samples/s")
    ratios = [b / a for a, b in zip(*taken.values(), strict=True)]
    print(f"PyTorch / medalign_jax, time of a step: {statistics.median(ratios):.2f} "
          f"({min(ratios):.2f} to {max(ratios):.2f})")  # fmt: skip


if __name__ == "__main__":
    main()
