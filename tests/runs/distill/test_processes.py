"""A distillation of two processes, live and cached, is that of one process with two devices."""

import json
from pathlib import Path

import numpy as np
import pytest

from medalign_jax.train.metrics import read_metrics
from tests import devices

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("run_distill.py")
COMPARED = ("loss", "top", "layers", "acoustic", "cross_entropy", "valid/loss")


def finish(processes):
    for process in processes:
        output, _ = process.communicate(timeout=devices.WAIT)
        assert process.returncode == 0, output[-4000:]


@pytest.fixture(scope="module", params=["live", "cached"])
def runs(request, tmp_path_factory):
    """The mode, and the workdirs of two processes with a device each and of one with two."""
    mode, folder = request.param, tmp_path_factory.mktemp(request.param)
    address = f"127.0.0.1:{devices.free_port()}"
    finish([
        devices.start([SCRIPT, folder / f"data{n}", folder / "two", mode, address, n], devices=1)
        for n in (0, 1)
    ])  # fmt: skip
    finish([devices.start([SCRIPT, folder / "data", folder / "one", mode], devices=2)])
    return mode, folder / "two", folder / "one"


def test_losses_agree(runs):
    two, one = (read_metrics(run / "metrics.jsonl") for run in runs[1:])
    assert len(two) == len(one) >= 9
    assert set(COMPARED) <= set().union(*one)
    # The student starts as its snapshot: what is left of that term is rounding.
    assert max(run[0].pop("acoustic") for run in (two, one)) < 1e-9
    for line, expected in zip(two, one, strict=True):
        assert line["step"] == expected["step"]
        for name in COMPARED:
            if name in expected:
                np.testing.assert_allclose(line[name], expected[name], rtol=1e-5, err_msg=name)


def test_each_process_writes_its_part_of_the_cache(runs):
    """A file each."""
    mode, *workdirs = runs
    files = [list(run.glob("teacher_cache/*/states-*")) for run in workdirs]
    assert [len(each) for each in files] == ([2, 1] if mode == "cached" else [0, 0])


def test_answers_agree(runs):
    """Ranked and written, of batches that are narrower than the mesh."""
    two, one = (json.loads((run / "answers.json").read_text()) for run in runs[1:])
    assert two == one
    assert len(one["ranked"]) == len(one["written"]) >= 8 and any(one["written"].values())
