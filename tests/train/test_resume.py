"""A run that is killed and started again goes on as if nothing had happened, to the bit."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests import devices
from tests import tiny_models as tiny
from tests.quick import FLAGS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
STEPS, EVAL_EVERY, RECORDS = 14, 4, 22
VALID = 6


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder with recordings of several lengths, their manifest, and the compilation cache."""
    folder = tmp_path_factory.mktemp("resume")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(RECORDS):
        samples = tiny.SAMPLES + int(rng.integers(-2000, 6000))
        soundfile.write(folder / f"{i}.wav", tiny.waveforms(1, i, samples)[0], 16_000)
        split = "valid" if i < VALID else "train"
        rows.append({"audio_path": f"{i}.wav", "subject_id": f"s{i}", "split": split,
                     "diagnosis": "Normal"})  # fmt: skip
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def start(place: Path, name: str, *changes: str) -> subprocess.Popen:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(place / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": FLAGS,
    }
    script = Path(__file__).with_name("run_fit.py")
    return subprocess.Popen(
        [sys.executable, str(script), str(place / "manifest.csv"), str(place / name), *changes],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=devices.WAIT)
    assert process.returncode == code, err[-3000:]
    return out, err


def lines(place: Path, name: str) -> list[dict]:
    path = place / name / "metrics.jsonl"
    return [json.loads(text) for text in path.read_text().splitlines()]


def losses(place: Path, name: str) -> dict[int, float]:
    """Training loss by step; every step has one line."""
    trained = [line for line in lines(place, name) if "loss" in line]
    assert len({line["step"] for line in trained}) == len(trained)
    return {line["step"]: line["loss"] for line in trained}


def held_out(place: Path, name: str) -> dict[int, float]:
    found = [line for line in lines(place, name) if "valid/loss" in line]
    assert len({line["step"] for line in found}) == len(found)
    return {line["step"]: line["valid/loss"] for line in found}


def interrupt(process: subprocess.Popen, number: signal.Signals, condition) -> None:
    """Sends the signal as soon as the condition holds."""
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(number)


def reached(place: Path, name: str, step: int):
    """A condition: step `step` stands in metrics.jsonl."""
    path = place / name / "metrics.jsonl"
    return lambda: path.exists() and f'"step": {step},' in path.read_text()


def unfinished_saves(folder: Path) -> set[Path]:
    return set(folder.glob("checkpoints/*orbax-checkpoint-tmp*"))


def checkpoints(folder: Path) -> set[int]:
    return {int(path.name) for path in folder.glob("checkpoints/*") if path.name.isdigit()}


@pytest.fixture(scope="module")
def whole(place):
    """Losses of the run that nobody disturbed: (training, held out)."""
    out, _ = finish(start(place, "whole"))
    assert f"done {STEPS}" in out
    trained, valid = losses(place, "whole"), held_out(place, "whole")
    assert list(trained) == list(range(1, STEPS + 1)) and list(valid) == [4, 8, 12, STEPS]
    assert len(set(trained.values())) == STEPS
    return trained, valid


def kill(place: Path, name: str, condition) -> str:
    """Starts a run and kills it when the condition holds; gives what it printed."""
    process = start(place, name)
    interrupt(process, signal.SIGKILL, condition)
    out, _ = finish(process, -signal.SIGKILL)
    return out


def newest(folder: Path) -> str:
    """What a start in this folder has to say."""
    return f"going on from the checkpoint of step {max(checkpoints(folder))}\n"


def test_sigkill_at_several_steps_changes_no_loss(place, whole):
    """One workdir, killed before its first save, after it, and after a restart from it."""
    folder = place / "killed"
    for step in (2, 5, 11):
        saved = checkpoints(folder)
        out = kill(place, folder.name, reached(place, folder.name, step))
        assert out.count("going on") == bool(saved)
        assert step <= max(losses(place, folder.name)) < STEPS  # something is left to do
    expected = newest(folder)
    out, _ = finish(start(place, folder.name))
    assert expected in out and f"done {STEPS}" in out
    assert (losses(place, folder.name), held_out(place, folder.name)) == whole


def test_sigkill_in_the_middle_of_a_save_changes_no_loss(place, whole):
    folder = place / "mid_save"
    for _ in range(3):  # a save may end between the look and the kill
        saved, remains = checkpoints(folder), unfinished_saves(folder)
        kill(place, folder.name, lambda old=remains: unfinished_saves(folder) - old)
        hit = unfinished_saves(folder) and checkpoints(folder) == saved
        if hit:
            break
    assert hit
    out, _ = finish(start(place, folder.name))
    assert f"done {STEPS}" in out and not unfinished_saves(folder)
    assert (losses(place, folder.name), held_out(place, folder.name)) == whole


def test_sigterm_saves_and_the_next_start_goes_on(place, whole):
    process = start(place, "term")
    interrupt(process, signal.SIGTERM, reached(place, "term", 6))
    out, _ = finish(process, 130)
    (last,) = checkpoints(place / "term") - {4, 8, 12}
    assert f"saved step {last}" in out and last >= 6
    expected = newest(place / "term")
    out, _ = finish(start(place, "term"))
    assert expected in out and f"step {last}\n" in expected
    trained, valid = whole
    assert losses(place, "term") == trained
    assert held_out(place, "term") == valid


def test_a_finished_run_has_nothing_to_do(place, whole):
    out, _ = finish(start(place, "whole"))
    assert f"done {STEPS}" in out and "going on" in out
    assert (losses(place, "whole"), held_out(place, "whole")) == whole


def test_another_config_in_the_same_workdir_is_refused(place, whole):
    process = start(place, "whole", "optimizer.learning_rate=0.5")
    _, err = finish(process, 1)
    assert "optimizer.learning_rate: 0.001 there, 0.5 now" in err and "steps" not in err
    assert "Traceback" not in err
    assert losses(place, "whole") == whole[0]
