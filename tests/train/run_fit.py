"""Run by test_resume.py: trains a tiny AcuLa on a manifest, to be killed and started again.

Usage: run_fit.py MANIFEST WORKDIR [key=value]; a key of `config` below.
"""

import sys
import time
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from medalign_jax.core.errors import UserError
from medalign_jax.core.mesh import make_mesh
from medalign_jax.data import open_dataset
from medalign_jax.data.pipeline import BatchSpec, make_iterator
from medalign_jax.runs.workdir import open_workdir
from medalign_jax.train.loop import Data, LoopConfig, fit
from medalign_jax.train.optimizer import OptimizerConfig
from tests import tiny_models as tiny

BATCH = 8


def config_of(changes: list[str]) -> ConfigDict:
    config = ConfigDict({"optimizer": {"learning_rate": 1e-3}, "steps": 14, "eval_every": 4})
    for change in changes:
        key, _, value = change.partition("=")
        config.update_from_flattened_dict({key: float(value)})
    return config


def texts(index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A fresh wording of a recording's report, and time for a kill between two steps."""
    time.sleep(0.005)
    wording = np.random.default_rng([index, int(rng.integers(4))])
    return {"text": wording.standard_normal(tiny.TEXT_WIDTH).astype(np.float32)}


def train(manifest: Path, config: ConfigDict, workdir: Path) -> None:
    workdir = open_workdir(workdir, config)
    dataset = open_dataset(manifest)
    spec = BatchSpec(batch_size=BATCH, samples=tiny.SAMPLES, random_crop=True, seed=1)
    held_out = BatchSpec(BATCH, tiny.SAMPLES, random_crop=False, shuffle=False, epochs=1)
    valid = dataset.split("valid")
    data = Data(
        make_iterator(dataset.split("train"), spec, texts),
        ("waveform", "text"),
        lambda: make_iterator(valid, held_out, texts),
    )
    loop = LoopConfig(total_steps=config.steps, log_every=1, eval_every=config.eval_every, seed=2)
    optimizer = OptimizerConfig(learning_rate=config.optimizer.learning_rate, warmup_steps=2)
    fitted = fit(tiny.acula(dropout=0.2), data, optimizer, loop, workdir, make_mesh())
    print(f"done {fitted.last_step}", flush=True)


if __name__ == "__main__":
    sys.modules["torch"] = None  # TensorBoard's writer would import it, which takes seconds
    assert jax.config.jax_compilation_cache_dir
    try:
        train(Path(sys.argv[1]), config_of(sys.argv[3:]), Path(sys.argv[2]))
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        print(f"stopped: {stop}", flush=True)
        sys.exit(130)
