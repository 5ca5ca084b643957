"""The command line: what is wrong is one line that says it, without a stack trace."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs import acula
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


# The command line itself means nothing.
_SPELT_WRONG = ("aling", "nonsense", "many", "demp", "nothing.py", "README.md", "wrokdir")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((CONFIG, "--config.loss.aling=cka"), ("aling", "--config.loss.aling=cka")),
        ((CONFIG, "--config.nonsense=1"), ("--config.nonsense=1",)),
        ((CONFIG, "--config.train.batch_size=many"), ("train.batch_size", "many")),
        (("--config=configs/acula.py:demp",), ("no variant 'demp'", "'demo'")),
        (("--config=configs/nothing.py",), ("configs/nothing.py", "no such file")),
        (("--config=README.md",), ("README.md is not a config", "Python file")),
        ((CONFIG, "--wrokdir=x"), ("wrokdir",)),
        ((CONFIG, "--config.data.manifest=nowhere/m.csv"), ("nowhere/m.csv", "no manifest")),
        (
            (CONFIG, "--config.data.manifest=gs://b/m"),
            ("manifest is gs://b/m", "mount"),
        ),
        ((CONFIG, "--workdir=s3://b/run"), ("workdir is s3://b/run", "not a local path")),
        ((CONFIG, "--config.method=guess"), ("'guess'", "acula", "pretrain")),
        (("--config=configs/distill.py",), ("data.questions is empty", ":demo")),
        ((CONFIG, "--config.loss.align=infonce"), ("'infonce'", "info_nce")),
        ((CONFIG, "--config.loss.align=info_nce"), ("equal width", "loss.text_head=mlp")),
        ((CONFIG, "--config.train.accumulate=7"), ("64", "multiple of train.accumulate 7")),
        (
            (CONFIG, "--config.encoder.name=whisper"),
            ("no setting", "--config.encoder.overrides={}"),
        ),
        ((CONFIG, "--config.train.steps=-5"), ("config.train.steps is -5", "from 0 on")),
    ],
    ids=lambda value: value[-1].split("=")[0] if isinstance(value[0], str) else None,
)
def test_a_wrong_command_is_named_in_one_line(tmp_path, arguments, words):
    workdir = tmp_path / "run"
    done = run(f"--workdir={workdir}", *arguments)
    assert done.returncode == (2 if any(w in arguments[-1] for w in _SPELT_WRONG) else 1)
    said = done.stderr.strip().splitlines()
    errors = [line for line in said if line.startswith("error:")]
    assert len(errors) == 1 and errors[0] == said[-1]
    assert all(word in errors[0] for word in words), errors[0]
    assert "Traceback" not in done.stderr + done.stdout
    assert not (workdir / "checkpoints").exists()


def test_a_start_waits_for_no_library_that_it_may_not_need():
    code = (
        "import sys; from medalign_jax.runs import acula, distill\n"
        "print({'torch', 'tensorflow', 'transformers', 'pandas', 'scipy.stats'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_a_config_has_to_be_given():
    done = run()
    assert done.returncode == 2
    assert done.stderr.startswith("error: name a --config") and "Traceback" not in done.stderr


def test_help_lists_the_keys_of_a_config_and_trains_nothing(tmp_path):
    done = run("--help", CONFIG, "--config.train.steps=7", f"--workdir={tmp_path / 'run'}")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--config.train.steps=7\n" in done.stdout and "--workdir" in done.stdout
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_not_a_config_is_named(tmp_path):
    path = tmp_path / "notes.py"
    path.write_text("these are notes")
    done = run(f"--config={path}")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "SyntaxError" in done.stderr and "notes.py" in done.stderr


def test_another_config_is_refused_and_restart_leaves_the_run_until_all_is_checked(tmp_path):
    """The keys that the run there did not have yet count as their defaults, if they have them."""
    workdir = tmp_path / "run"
    (workdir / "checkpoints" / "3").mkdir(parents=True)
    (workdir / "teacher_cache").mkdir()
    there = json.loads(acula.get_config("demo").to_json_best_effort())
    del there["evaluate"]["copies"], there["teacher"]["others"], there["optimizer"]["clip"]
    (workdir / "config.json").write_text(json.dumps({"config": there, "provenance": {}}))
    changes = ("--config.optimizer.clip=2.0", "--config.data.manifest=nowhere/m.csv")
    refused = run(f"--workdir={workdir}", CONFIG, *changes)
    said = refused.stderr[refused.stderr.index("error:") :].splitlines()
    assert said[0] == f"error: {workdir} holds a run with another config:"
    assert said[1] == "  optimizer.clip: 1.0 there, 2.0 now" and len(said) == 3
    assert "--restart" in said[2]
    for wrong in ((), ("--config.evaluate.map=none",)):  # data, then config
        anew = run(f"--workdir={workdir}", CONFIG, "--restart", *changes, *wrong)
        assert ("no manifest" if not wrong else "evaluate.map=none") in anew.stderr
        assert (workdir / "checkpoints" / "3").is_dir()
        assert not (workdir / "earlier_runs").exists()
