"""Run by test_run.py: a tiny distillation, to be killed and started again, or divided.

Usage: run_distill.py FOLDER WORKDIR MODE [ADDRESS NUMBER]; MODE is that of config.teacher. With an
address this is process NUMBER of two, each with a FOLDER of its own.
"""

import dataclasses
import hashlib
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np

from configs.distill import get_config
from medalign_jax.core.mesh import make_mesh
from medalign_jax.data.questions.prompts import SequenceBuilder
from medalign_jax.data.questions.source import QuestionData
from medalign_jax.evaluate.answering import likeliest_options, write_answers
from medalign_jax.language_model import LanguageModel
from medalign_jax.runs.distill.arms import Setting, fit_arm
from medalign_jax.runs.workdir import open_workdir
from tests import distill_models as tiny

STEPS, EVAL_EVERY, QUESTIONS, VALID = 9, 3, 10, 2


def config_of(mode: str):
    config = get_config()
    config.teacher.mode = mode
    config.data.update({"max_length": 64, "buckets": (64,)})
    config.loss.update({"every": 2, "chunk": 4})
    config.train.update({"batch_size": 2, "steps": STEPS, "eval_every": EVAL_EVERY, "log_every": 1})
    config.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 2})
    return config


def slowly(waveform):
    """Time for a kill between two steps."""

    def read(self, index, clip):
        time.sleep(0.02)
        return waveform(self, index, clip)

    return read


def ask(setting: Setting, model: LanguageModel) -> None:
    """Answers of both kinds, in batches that are narrower than the mesh."""
    asked = [dataclasses.replace(q, choices=(q.answer, "wheeze")) for q in setting.train]
    builder = SequenceBuilder(
        model.tokenizer, None, model.audio_tokens, 128, max_samples=model.max_samples,
        format=tiny.FORMAT,
    )  # fmt: skip
    found = {
        "ranked": likeliest_options(model, asked, builder, 1, mesh=setting.mesh),
        "written": write_answers(model, asked, builder, 4, 1, mesh=setting.mesh),
    }
    if jax.process_index() == 0:
        (setting.workdir / "answers.json").write_text(json.dumps(found))


def main(folder: Path, workdir: Path, mode: str) -> None:
    config = config_of(mode)
    open_workdir(workdir, config)
    world = tiny.world(folder, QUESTIONS)
    questions = world.data.questions
    mesh = make_mesh(fsdp=jax.device_count())
    setting = Setting(
        config, workdir, mesh, world.student, world.teacher, questions[VALID:],
        questions[:VALID], (),
    )  # fmt: skip
    QuestionData.waveform = slowly(QuestionData.waveform)
    method, params = fit_arm(setting, config, workdir, "distil")
    if jax.device_count() > 1:
        ask(setting, setting.student.with_params(method.student_params(params)))
        return
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    print(f"done {digest.hexdigest()}", flush=True)


if __name__ == "__main__":
    sys.modules["torch"] = None  # TensorBoard's writer would import it, which takes seconds
    folder, workdir, mode, *process = sys.argv[1:]
    if process:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(process[0], num_processes=2, process_id=int(process[1]))
    main(Path(folder), Path(workdir), mode)
