"""The one training loop: any method, any data, one mesh."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from medalign_jax.core.errors import UserError
from medalign_jax.core.mesh import placed, shardings
from medalign_jax.core.progress import Progress
from medalign_jax.methods.base import Method
from medalign_jax.train import monitors
from medalign_jax.train.checkpoint import Checkpoints
from medalign_jax.train.feed import Feed, put_batch
from medalign_jax.train.metrics import MetricWriter, read_metrics
from medalign_jax.train.optimizer import OptimizerConfig, make_optimizer
from medalign_jax.train.step import (
    TrainState,
    compile_train_step,
    init_state,
    make_eval_step,
    state_shardings,
)
from medalign_jax.train.stopping import Stopping, stopped_by

Tree = Any


@dataclass(frozen=True)
class LoopConfig:
    """How long and how often.

    Attributes:
      total_steps: updates in the run.
      log_every: steps between two lines of metrics.jsonl.
      eval_every: steps between two evaluations on held-out data, each followed by a checkpoint.
      accumulate: equal parts that a batch is computed in; the result is the same for any number.
      seed: of the parameters and of all training noise.
      patience: evaluations without a new best before the run ends early; 0 never ends early.
      tensorboard: whether TensorBoard events are written.
      wandb: project at Weights & Biases that metrics go to as well, or "".
    """

    total_steps: int
    log_every: int = 10
    eval_every: int = 100
    accumulate: int = 1
    seed: int = 0
    patience: int = 0
    tensorboard: bool = True
    wandb: str = ""


@dataclass(frozen=True)
class Data:
    """Batches of a run.

    Attributes:
      iterator: yields dicts of this process's rows; has get_state() and set_state().
      names: the arrays of a batch that the method reads.
      held_out: makes an iterable of evaluation batches whose "index" is -1 in padding rows; None
        for no evaluation.
    """

    iterator: Any
    names: tuple[str, ...]
    held_out: Callable[[], Iterable[dict[str, np.ndarray]]] | None = None


@dataclass(frozen=True)
class Fit:
    """Outcome: parameters of the best (by the method's `select`) and of the last checkpoint."""

    best_params: Tree
    best_step: int
    best_metrics: dict[str, float]
    last_params: Tree
    last_step: int


class _Run:
    """One call of `fit`: the objects that live as long as it does."""

    def __init__(self, method, data, optimizer, config, workdir, mesh, what):
        self.method, self.data, self.config, self.mesh = method, data, config, mesh
        self.workdir, self.what = Path(workdir), what
        self.checkpoints = Checkpoints(self.workdir / "checkpoints", method.select)
        self.state, self.frozen = self._start(optimizer)
        self.begun = int(self.state.step)
        if self.begun > config.total_steps:
            raise UserError(
                f"{what}: {self.workdir} is at step {self.begun}, past the {config.total_steps} "
                "that are asked for: ask for as many or more, or begin anew with --restart"
            )
        lines = read_metrics(self.workdir / "metrics.jsonl")
        past = [line for line in lines if line["step"] <= self.begun]
        self._scores = [self._score(line) for line in past if method.select[0] in line]
        self.writer = MetricWriter(
            self.workdir, self.begun, jax.process_index() == 0, config.tensorboard, config.wandb
        )
        self.monitors = monitors.Monitors(config.total_steps)
        self.monitors.replay(past)
        self.eval_step = make_eval_step(method, mesh)
        self._couple = jax.jit(method.couple)
        self._steps: dict[tuple, Callable] = {}

    def _start(self, optimizer: OptimizerConfig) -> tuple[TrainState, Tree]:
        """Order of precedence: a checkpoint in the workdir > loaded weights > random ones."""
        method, config = self.method, self.config
        key = jax.random.key(config.seed)
        abstract_params = jax.eval_shape(method.init, key)
        self.optimizer, self.schedule = make_optimizer(
            optimizer, abstract_params, config.total_steps
        )
        abstract = jax.eval_shape(
            lambda params: init_state(params, self.optimizer, config.seed), abstract_params
        )
        layout = state_shardings(abstract, method.sharding_rules, self.mesh)
        frozen = jax.device_put(
            method.frozen, shardings(method.frozen, method.frozen_rules, self.mesh)
        )
        found = self.checkpoints.restore_newest(placed(abstract, layout))
        if found is None:
            params = jax.device_put(method.initial_params(key), layout.params)
            make = jax.jit(
                lambda params: init_state(params, self.optimizer, config.seed), out_shardings=layout
            )
            return make(params), frozen
        step, state, position = found
        self.data.iterator.set_state(position)
        print(f"{self.what}: going on from the checkpoint of step {step}", flush=True)
        return state, frozen

    def compiled(self, batch: Tree) -> tuple[Callable, float]:
        """The step for the shapes of a batch, and the seconds that it took to compile just now."""
        shapes = tuple(array.shape for array in batch.values())
        if shapes in self._steps:
            return self._steps[shapes], 0.0
        begun = time.monotonic()
        self._steps[shapes] = compile_train_step(
            self.method, self.optimizer, self.schedule, self.mesh, self.state, self.frozen, batch,
            self.config.accumulate,
        )  # fmt: skip
        return self._steps[shapes], time.monotonic() - begun

    def evaluate(self) -> dict[str, float]:
        """Held-out metrics: `couple` over the whole set at once, the rest as means."""
        if self.data.held_out is None:
            return {}
        parts, names = [], (*self.data.names, "index")
        for batch in self.data.held_out():
            arrays = put_batch({name: batch[name] for name in names}, self.mesh)
            encoded, real = jax.device_get(self.eval_step(self.state.params, self.frozen, arrays))
            parts.append(jax.tree.map(lambda x, real=real: x[real], encoded))
        encoded = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
        loss, metrics = self._couple(encoded.coupled)
        metrics = jax.device_get(metrics) | {k: v.mean() for k, v in encoded.metrics.items()}
        metrics["loss"] = jax.device_get(loss) + encoded.per_example.mean()
        return {f"valid/{name}": float(value) for name, value in metrics.items()}

    def log(self, step: int, metrics: dict[str, float], progress: Progress) -> None:
        """Monitors first, so that a broken step never reaches a checkpoint."""
        good = self.checkpoints.latest()
        named = "none yet" if good is None else str(self.checkpoints.folder / str(good))
        for warning in self.monitors.check(step, metrics, named):
            progress.say(f"warning: {warning}")
        self.writer.write(step, metrics)

    def save(self, step: int, position: Any, progress: Progress, due: bool) -> bool:
        """Evaluates, where it is due, and saves; True when the run should end early.

        A stop comes at any step: evaluated there, a run could end with other parameters than one
        that was not stopped, and who asks for a stop gives little time.
        """
        held_out = self.evaluate() if due else {}
        if held_out:
            self.writer.write(step, held_out)
        self.checkpoints.save(step, self.state, position, held_out)
        name = self.method.select[0]
        if name not in held_out:
            return False
        progress.say(f"{self.what}: step {step} {name} {held_out[name]:.4f}")
        self._scores.append(self._score(held_out))
        return self.ended()

    def _score(self, metrics: dict[str, Any]) -> float:
        """Held-out score, larger is better; one that is not finite (NaN or "nan") never wins."""
        name, mode = self.method.select
        value = float(metrics[name])
        if not math.isfinite(value):
            return -math.inf
        return value if mode == "max" else -value

    def ended(self) -> bool:
        """Whether `patience` evaluations have passed without a new best, before a restart too."""
        if not self.config.patience or not self._scores:
            return False
        return len(self._scores) - 1 - int(np.argmax(self._scores)) >= self.config.patience


def fit(
    method: Method,
    data: Data,
    optimizer: OptimizerConfig,
    config: LoopConfig,
    workdir: Path,
    mesh: Mesh,
    what: str = "train",
) -> Fit:
    """Trains `method` on `data`; resumes from the newest checkpoint in `workdir`.

    The step is compiled once for the shapes of a batch (data in buckets of lengths have a few) and
    runs under a guard that forbids implicit transfers between host and device. SIGTERM and Ctrl-C
    save and stop, in all processes after the same step, whichever of them got the signal.

    Raises:
      TrainingStoppedError: the loss became NaN or infinite; names the last good checkpoint.
      UserError: the data ended before the run.
      KeyboardInterrupt: after the state was saved on Ctrl-C; on SIGTERM `commands.Terminated`.
    """
    run = _Run(method, data, optimizer, config, workdir, mesh, what)
    feed = Feed(data.iterator, mesh, data.names)
    progress = Progress(config.total_steps, what, done=run.begun)
    with Stopping(mesh) as stopping:
        try:
            if run.begun < config.total_steps and not run.ended():
                _train(run, feed, progress, stopping)
            run.checkpoints.wait()
            if stop := stopping.ask()():  # asked for since the last step
                raise stopped_by(stop, _saved(run.checkpoints.latest()))
            return _outcome(run)
        finally:
            feed.close()
            progress.close()
            run.writer.close()
            run.checkpoints.close()


def _saved(step: int) -> str:
    return f"saved step {step}; start again to go on"


def _train(run: _Run, feed: Feed, progress: Progress, stopping: Stopping) -> None:
    config, batches = run.config, iter(feed)
    step, clock = run.begun, time.monotonic()
    pending: list[Tree] = []
    samples = 0
    while step < config.total_steps:
        item = next(batches, None)
        if item is None:
            raise UserError(
                f"the data ended after {step} of {config.total_steps} steps: let the iterator run "
                "for more epochs, or train for fewer steps"
            )
        batch, position = item
        step_fn, seconds = run.compiled(batch)
        clock += seconds
        if step == run.begun:  # nor does the wait for the first batch count
            clock, feed.waited = time.monotonic(), 0.0
        asked = stopping.ask()
        with jax.transfer_guard("disallow"):
            run.state, metrics = step_fn(run.state, run.frozen, batch)
        step += 1
        samples += jax.tree.leaves(batch)[0].shape[0]
        pending.append(metrics)
        stop = asked()
        due = step % config.eval_every == 0 or step == config.total_steps
        note = ""
        if step % config.log_every == 0 or due or stop:
            values = _mean_metrics(pending)
            elapsed = max(time.monotonic() - clock, 1e-9)
            values |= {"samples_per_second": samples / elapsed, "data_wait": feed.waited / elapsed}
            run.log(step, values, progress)
            note = _note(values)
            pending, samples, clock, feed.waited = [], 0, time.monotonic(), 0.0
        progress.advance(1, note)
        if due or stop:
            ended = run.save(step, position, progress, due)
            clock = time.monotonic()
            if stop:
                run.checkpoints.wait()
                raise stopped_by(stop, _saved(step))
            if ended:
                progress.say(f"{run.what}: no better for {config.patience} evaluations, ending")
                return


def _mean_metrics(pending: list[Tree]) -> dict[str, float]:
    """Mean over the steps since the last line; a learning rate or a norm is meant as such too."""
    host = jax.device_get(pending)
    return {name: float(np.mean([m[name] for m in host])) for name in host[0]}


def _note(values: dict[str, float]) -> str:
    shown = [n for n in ("loss", "cka", "reconstruction", "accuracy") if n in values]
    text = ", ".join(f"{name} {values[name]:.4f}" for name in shown)
    return f"{text}, {values['samples_per_second']:.1f} samples/s"


def _outcome(run: _Run) -> Fit:
    last = run.checkpoints.latest()
    best, state = run.checkpoints.restore_best(last, run.state)
    metrics = run.checkpoints.metrics(best)
    return Fit(state.params, best, metrics, run.state.params, last)
