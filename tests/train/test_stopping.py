"""Signals: who is asked to stop saves first, and of several processes all stop after one step."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from medalign_jax.core.commands import Terminated
from medalign_jax.train.checkpoint import steps_in
from medalign_jax.train.metrics import read_metrics
from tests import devices
from tests.train import test_loop
from tests.train.run_stopping import STEPS

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("run_stopping.py")


@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_saves_the_step_and_tells_which_it_was(tmp_path, number, kind):
    class Asked(test_loop.Batches):
        def __next__(self):
            if self.next == 4:
                os.kill(os.getpid(), number)
            return super().__next__()

    with pytest.raises(KeyboardInterrupt, match=r"saved step \d; start again to go on") as stop:
        test_loop.run(tmp_path, Asked(), total_steps=9)
    assert type(stop.value) is kind
    (step,) = re.findall(r"\d", str(stop.value))
    assert steps_in(tmp_path / "checkpoints")[-1] == int(step) < 9
    assert test_loop.run(tmp_path, total_steps=9).last_step == 9
    # Nothing was chosen by that a run without a stop would not have had.
    assert list(test_loop.lines(tmp_path, "valid/loss")) == [3, 6, 9]


def test_a_signal_during_the_last_evaluation_is_not_lost(tmp_path):
    """The run is whole, but what comes after it has to stop."""
    evaluated = []

    def valid():
        evaluated.append(True)
        if len(evaluated) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return test_loop.held_out()

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated, match="saved step 6"):
        test_loop.run(tmp_path, valid=valid, total_steps=6, eval_every=4)
    assert signal.getsignal(signal.SIGTERM) is before
    assert steps_in(tmp_path / "checkpoints")[-1] == 6


def start(folder: Path):
    port = devices.free_port()
    return [devices.start([SCRIPT, folder, port, number], devices=1) for number in (0, 1)]


def when(folder: Path, step: int, processes) -> None:
    """Returns when the run has passed a step."""
    deadline = time.monotonic() + devices.WAIT
    path = folder / "metrics.jsonl"
    while not (path.exists() and any(line["step"] >= step for line in read_metrics(path))):
        assert all(p.poll() is None for p in processes), processes[0].communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def finish(processes, code: int) -> str:
    """What the first has said; all end with the same status."""
    said = [process.communicate(timeout=devices.WAIT)[0] for process in processes]
    assert [process.returncode for process in processes] == [code] * len(said), "\n".join(said)
    return said[0]


def trained(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(folder / "metrics.jsonl")
            if "loss" in line}  # fmt: skip


def test_two_processes_stop_together_and_go_on_as_if_nothing_had_happened(tmp_path):
    """One is killed, then the other is asked to stop: in the end no bit is other than it was."""
    whole, disturbed = tmp_path / "whole", tmp_path / "disturbed"
    end = re.search(r"done \w+", finish(start(whole), 0))[0]
    assert list(trained(whole)) == list(range(1, STEPS + 1))

    processes = start(disturbed)
    when(disturbed, 5, processes)
    processes[1].kill()
    processes[0].kill()  # as a launcher does, which ends all with one
    finish(processes, -signal.SIGKILL)
    assert max(trained(disturbed)) < STEPS

    processes = start(disturbed)
    when(disturbed, 12, processes)
    processes[1].send_signal(signal.SIGTERM)
    said = finish(processes, 143)
    last = max(trained(disturbed))
    assert 12 <= last < STEPS and f"stopped: saved step {last};" in said
    assert steps_in(disturbed / "checkpoints")[-1] == last

    said = finish(start(disturbed), 0)
    assert f"going on from the checkpoint of step {last}\n" in said
    assert end in said
    assert trained(disturbed) == trained(whole)
