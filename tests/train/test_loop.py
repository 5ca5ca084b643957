"""The loop with a method of one vector: ends, evaluations, early stopping, broken steps."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medalign_jax.core.errors import UserError
from medalign_jax.core.mesh import make_mesh
from medalign_jax.methods.base import Encoded, Method
from medalign_jax.train.loop import Data, LoopConfig, fit
from medalign_jax.train.metrics import read_metrics
from medalign_jax.train.monitors import TrainingStoppedError
from medalign_jax.train.optimizer import OptimizerConfig
from tests import devices

BATCH = 4


class Regression(Method):
    """Squared error of w · x; held-out data are compared as a whole by `couple`."""

    def __init__(self):
        self.couplings = 0

    def init(self, key):
        return {"w": jnp.ones(3)}

    def encode(self, params, frozen, batch, keys, train):
        error = batch["x"] @ params["w"] - batch["y"]
        return Encoded({"error": error}, jnp.square(error), {"absolute": jnp.abs(error)})

    def couple(self, coupled, mask=None):
        self.couplings += 1
        count = jnp.float32(coupled["error"].shape[0])
        return jnp.zeros(()), {"count": count}


class Batches:
    """Endless or `count` batches from a seed; `breaks_at` holds a NaN."""

    def __init__(self, count: int | None = None, breaks_at: int | None = None):
        self.next, self._count, self._breaks_at = 0, count, breaks_at

    def __iter__(self):
        return self

    def __next__(self):
        if self.next == self._count:
            raise StopIteration
        self.next += 1
        x = np.random.default_rng(self.next).standard_normal((BATCH, 3)).astype(np.float32)
        if self.next == self._breaks_at:
            x[0, 0] = np.nan
        return {"x": x, "y": x @ np.float32([1, 2, 3])}

    def get_state(self):
        return {"batch": self.next}

    def set_state(self, state):
        self.next = state["batch"]


def held_out(y: float = 0.0):
    """Six recordings in two batches, the last filled up with rows that do not count."""
    x = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    x[6:] = 1e6
    index = np.array([0, 1, 2, 3, 4, 5, -1, -1], np.int32)
    target = x @ np.float32([1, 2, 3]) + np.float32(y)
    return [{"x": x[i : i + 4], "y": target[i : i + 4], "index": index[i : i + 4]} for i in (0, 4)]


def run(folder, iterator=None, method=None, valid=held_out, rate=0.05, mesh=None, **changes):
    plain = {"total_steps": 12, "log_every": 1, "eval_every": 3}
    return fit(
        method or Regression(),
        Data(iterator or Batches(), ("x", "y"), valid),
        OptimizerConfig(learning_rate=rate, schedule="constant", warmup_steps=0, clip=0.0),
        LoopConfig(**plain | changes),
        folder,
        mesh or make_mesh(devices=jax.devices()[:1]),
    )


def lines(folder, name):
    return {line["step"]: line[name] for line in read_metrics(folder / "metrics.jsonl")
            if name in line}  # fmt: skip


def test_a_run_trains_evaluates_and_gives_its_best(tmp_path):
    fitted = run(tmp_path)
    assert (fitted.last_step, fitted.best_step) == (12, 12)
    scores = lines(tmp_path, "valid/loss")
    assert list(scores) == [3, 6, 9, 12] and scores[12] < scores[3]
    assert fitted.best_metrics["valid/loss"] == scores[12]
    np.testing.assert_array_equal(fitted.best_params["w"], fitted.last_params["w"])
    assert list(lines(tmp_path, "loss")) == list(range(1, 13))


def test_rows_that_fill_a_batch_up_do_not_count(tmp_path):
    run(tmp_path, total_steps=3)
    (line,) = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "valid/loss" in line]
    assert line["valid/count"] == 6.0
    assert line["valid/absolute"] < 100


def test_the_held_out_loss_is_compiled_once(tmp_path):
    method = Regression()
    run(tmp_path, method=method)
    assert method.couplings == 2  # once in the training step, once for the held-out data


def test_lines_hold_the_mean_since_the_last(tmp_path):
    run(tmp_path / "each", total_steps=6, log_every=1, eval_every=6)
    run(tmp_path / "third", total_steps=6, log_every=3, eval_every=6)
    each, third = lines(tmp_path / "each", "loss"), lines(tmp_path / "third", "loss")
    assert list(third) == [3, 6]
    assert third[6] == pytest.approx(np.mean([each[4], each[5], each[6]]), rel=1e-6)


def test_the_best_checkpoint_is_given_where_it_is_not_the_last(tmp_path):
    # Held-out answers are those of w = 1: every step away from it makes them worse.
    def valid():
        return [batch | {"y": batch["x"].sum(1)} for batch in held_out()]

    fitted = run(tmp_path, valid=valid, total_steps=9)
    assert (fitted.best_step, fitted.last_step) == (3, 9)
    moved = {"best": fitted.best_params["w"] - 1, "last": fitted.last_params["w"] - 1}
    assert 0 < np.abs(moved["best"]).max() < np.abs(moved["last"]).max()


def test_patience_ends_a_run_early(tmp_path, capsys):
    def valid():
        return [batch | {"y": batch["x"].sum(1)} for batch in held_out()]

    fitted = run(tmp_path, valid=valid, total_steps=60, patience=2)
    assert (fitted.best_step, fitted.last_step) == (3, 9)
    assert "no better for 2 evaluations" in capsys.readouterr().out
    again = run(tmp_path, valid=valid, total_steps=60, patience=2)
    assert (again.best_step, again.last_step) == (3, 9)  # started again it stays ended


def test_a_broken_step_stops_and_names_the_last_good_checkpoint(tmp_path):
    with pytest.raises(TrainingStoppedError) as caught:
        run(tmp_path, Batches(breaks_at=8))
    assert "step 8" in str(caught.value) and str(tmp_path / "checkpoints" / "6") in str(
        caught.value
    )
    assert max(lines(tmp_path, "loss")) == 7
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()}
    assert "6" in kept and max(map(int, kept)) == 6


def test_a_start_after_a_broken_step_goes_on_from_the_good_one(tmp_path, capsys):
    with pytest.raises(TrainingStoppedError):
        run(tmp_path, Batches(breaks_at=8))
    fitted = run(tmp_path)
    assert fitted.last_step == 12
    assert "going on from the checkpoint of step 6" in capsys.readouterr().out
    run(tmp_path / "undisturbed")
    assert lines(tmp_path, "loss") == lines(tmp_path / "undisturbed", "loss")


def test_data_that_end_early_are_an_error(tmp_path):
    with pytest.raises(UserError, match=r"data ended after 5 of 12 steps"):
        run(tmp_path, Batches(count=5))


def test_a_held_out_score_that_is_not_a_number_ends_nothing(tmp_path):
    fitted = run(tmp_path, valid=lambda: held_out(y=np.nan), total_steps=6, patience=5)
    assert fitted.last_step == 6
    text = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(text[3])["valid/loss"] == "nan"
    again = run(tmp_path, valid=held_out, total_steps=12, patience=5)
    assert (again.best_step, again.last_step) == (12, 12)


def test_without_held_out_data_the_last_is_the_best(tmp_path):
    fitted = run(tmp_path, valid=None, total_steps=4)
    assert (fitted.best_step, fitted.best_metrics) == (4, {})


def test_two_processes_train_as_one(tmp_path):
    """Also: one of them writes the metrics, and padding is dropped from all rows."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    tests = Path(__file__).parent
    processes = [
        subprocess.Popen(
            [sys.executable, str(tests / "run_processes.py"), address, str(i), str(tmp_path)],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(tests.parents[1])},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=devices.WAIT)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], (
        said[0][-2000:] + said[1][-2000:]
    )
    run(tmp_path / "one", total_steps=9)
    for name in ("loss", "valid/loss", "valid/absolute", "valid/count"):
        found, expected = lines(tmp_path, name), lines(tmp_path / "one", name)
        assert found == pytest.approx(expected, rel=1e-5), name
    steps = [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, 10))
