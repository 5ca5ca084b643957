"""Run by test_distill_run.py: a tiny distillation, to be killed and started again, or divided.

Usage: run_distill.py FOLDER WORKDIR MODE [ADDRESS NUMBER]; MODE is that of config.teacher. With an
address this is process NUMBER of two, each with a FOLDER of its own.
"""

import hashlib
import sys
import time
from pathlib import Path

import jax
import numpy as np

from configs.distill import get_config
from medalign_jax.data.question_data import QuestionData
from medalign_jax.experiments import distill_parts as parts
from medalign_jax.experiments.workdir import open_workdir
from medalign_jax.train.mesh import make_mesh
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


def main(folder: Path, workdir: Path, mode: str) -> None:
    config = config_of(mode)
    open_workdir(workdir, config)
    world = tiny.world(folder, QUESTIONS)
    questions = world.data.questions
    mesh = make_mesh(fsdp=jax.device_count())
    setting = parts.Setting(
        config, workdir, mesh, world.student, world.teacher, questions[VALID:],
        questions[:VALID], (),
    )  # fmt: skip
    QuestionData.waveform = slowly(QuestionData.waveform)
    _, params = parts.distill(setting, config, workdir, "distil")
    if jax.process_count() > 1:
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
