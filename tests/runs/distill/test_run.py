"""A distillation that is killed and started again ends as if nothing had happened, to the bit."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import devices
from tests.quick import FLAGS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
STEPS = 9  # evaluated and saved every third
MODES = ("live", "cached")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("distill_run")


def start(place: Path, name: str, mode: str) -> subprocess.Popen:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": FLAGS,
    }
    script = Path(__file__).with_name("run_distill.py")
    return subprocess.Popen(
        [sys.executable, str(script), str(place / mode), str(place / name), mode],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen, code: int = 0) -> str:
    try:
        out, err = process.communicate(timeout=devices.WAIT)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == code, out[-2000:] + err[-3000:]
    return out


def kill_after_a_save(processes: dict[Path, subprocess.Popen]) -> list[str]:
    """Kills each as soon as a checkpoint of its folder is whole; gives what they printed.

    Saves go on in the background of later steps. The last that Orbax writes of one, after the
    folder has its name, says that it is whole.
    """
    pending, deadline = dict(processes), time.monotonic() + devices.WAIT
    while pending:
        for folder, process in list(pending.items()):
            if any(folder.glob("checkpoints/[0-9]/commit_success.txt")):
                pending.pop(folder).send_signal(signal.SIGKILL)
            else:
                assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return [finish(process, -signal.SIGKILL) for process in processes.values()]


def lines(folder: Path, name: str) -> dict[int, dict]:
    """What was logged, by step, without what depends on the clock."""
    found = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in found if name in line]
    assert len({line["step"] for line in kept}) == len(kept)
    clock = ("samples_per_second", "data_wait", "time")
    return {line["step"]: {k: v for k, v in line.items() if k not in clock} for line in kept}


@pytest.fixture(scope="module")
def whole(place):
    """Of runs that nobody disturbed, side by side: what they print, log and measure."""
    processes = {mode: start(place, f"whole_{mode}", mode) for mode in MODES}
    found = {}
    for mode, process in processes.items():
        out, folder = finish(process), place / f"whole_{mode}"
        trained, held_out = lines(folder, "loss"), lines(folder, "valid/loss")
        assert list(trained) == list(range(1, STEPS + 1))
        assert list(held_out) == [3, 6, 9]
        found[mode] = digest(out), trained, held_out
    return found


def digest(out: str) -> str:
    """Of the parameters that the run ended with."""
    return re.search(r"^done ([0-9a-f]{64})$", out, re.MULTILINE)[1]


def test_sigkill_changes_no_bit(place, whole):
    """Killed after a save and before the end; live and cached at the same time."""
    folders = {mode: place / f"killed_{mode}" for mode in MODES}
    killed = {folder: start(place, folder.name, mode) for mode, folder in folders.items()}
    for out in kill_after_a_save(killed):
        assert "going on" not in out and "done" not in out
    again = {mode: start(place, folders[mode].name, mode) for mode in MODES}
    for mode, process in again.items():
        out = finish(process)
        assert "going on from the checkpoint of step" in out
        found = digest(out), lines(folders[mode], "loss"), lines(folders[mode], "valid/loss")
        assert found == whole[mode]


def test_a_cached_teacher_teaches_as_a_live_one_does(place, whole):
    """To the rounding of its states, over a whole run, in which errors add up."""
    (_, live, valid), (_, cached, cached_valid) = (whole[mode] for mode in MODES)
    assert live[STEPS]["loss"] < live[1]["loss"] - 0.1
    for ours, theirs in ((live, cached), (valid, cached_valid)):
        for step, line in ours.items():
            for name, value in line.items():
                if name.endswith(("loss", "top", "layers", "cross_entropy")):
                    assert theirs[step][name] == pytest.approx(value, rel=0.01), (step, name)
    assert list((place / "whole_cached" / "teacher_cache").glob("last_layers_01/states-*"))
    assert not (place / "whole_live" / "teacher_cache").exists()
