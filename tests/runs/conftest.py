"""Runs of this folder compile their training steps, most of their time, as `tests.quick` says."""

import contextlib
import os
import shutil
from pathlib import Path

import filelock
import jax
import pytest

from medalign_jax.runs import acula
from tests.quick import OPTIONS
from tests.runs.tiny_config import tiny


@contextlib.contextmanager
def quick_steps():
    compiled = jax.stages.Lowered.compile

    def compile_quickly(self, compiler_options=None, **more):
        quick = OPTIONS if jax.default_backend() == "cpu" else {}  # others do not know them
        return compiled(self, quick | dict(compiler_options or {}), **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", compile_quickly)
        yield


@pytest.fixture(scope="module", autouse=True)
def all_quick():
    with quick_steps():
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Workdir of a tiny AcuLa run: made once, each process of the tests has a copy."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    workdir, done = root / "finished", root / "finished.done"
    with filelock.FileLock(root / "finished.lock"):
        if not done.exists():
            with quick_steps():  # a fixture of the session comes before those of a module
                acula.run(tiny(), workdir)
            done.touch()
        return Path(shutil.copytree(workdir, tmp_path_factory.mktemp("runs") / "acula"))
