"""The command line: what is wrong is one line that says it, without a stack trace."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import devices

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "--config=configs/acula.py:demo"


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "medalign_jax.main", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=devices.WAIT,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((CONFIG, "--config.loss.aling=cka"), ("aling", "--config.loss.aling=cka")),
        ((CONFIG, "--config.nonsense=1"), ("--config.nonsense=1",)),
        ((CONFIG, "--config.train.batch_size=many"), ("train.batch_size", "many")),
        (("--config=configs/acula.py:demp",), ("no variant 'demp'", "'demo'")),
        (("--config=configs/nothing.py",), ("configs/nothing.py", "No such file")),
        ((CONFIG, "--wrokdir=x"), ("wrokdir",)),
        ((CONFIG, "--config.data.manifest=nowhere/m.csv"), ("nowhere/m.csv", "no manifest")),
        ((CONFIG, "--config.method=guess"), ("'guess'", "acula", "pretrain")),
        ((CONFIG, "--config.train.steps=-5"), ("config.train.steps is -5", "from 0 on")),
    ],
    ids=lambda value: value[-1].split("=")[0] if isinstance(value[0], str) else None,
)
def test_a_wrong_command_is_named_in_one_line(tmp_path, arguments, words):
    workdir = tmp_path / "run"
    done = run(f"--workdir={workdir}", *arguments)
    assert done.returncode == 1
    said = done.stderr.strip().splitlines()
    errors = [line for line in said if line.startswith("error:")]
    assert len(errors) == 1 and errors[0] == said[-1]
    assert all(word in errors[0] for word in words), errors[0]
    assert "Traceback" not in done.stderr + done.stdout
    assert not (workdir / "checkpoints").exists()


def test_a_config_has_to_be_given():
    done = run()
    assert done.returncode == 1
    assert done.stderr.startswith("error: flag --config") and "Traceback" not in done.stderr
