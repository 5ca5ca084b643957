"""A run of two processes is the run of one with two devices: batches, losses, numbers, export."""

import json

import numpy as np
import pytest

from medalign_jax.train.metrics import read_metrics
from medalign_jax.weights.readers import open_safetensors
from tests import devices

pytestmark = pytest.mark.slow

COMMAND = ("-m", "medalign_jax.main", "--config=tests/runs/tiny_config.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Workdirs of a run of two processes with a device each, and of one process with two."""
    folder = tmp_path_factory.mktemp("processes")
    port = devices.free_port()
    command = [*COMMAND, "--config.mesh.fsdp=2"]
    flags = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
    two = [
        devices.start([*command, *flags, f"--workdir={folder / 'two'}", f"--process_id={n}"], 1)
        for n in (0, 1)
    ]
    for process in two:
        output, _ = process.communicate(timeout=devices.WAIT)
        assert process.returncode == 0, output[-4000:]
    devices.run(*command, f"--workdir={folder / 'one'}", devices=2)
    return folder / "two", folder / "one"


@pytest.mark.parametrize("stage", ["pretrain", "."])
def test_losses_agree(runs, stage):
    two, one = (read_metrics(run / stage / "metrics.jsonl") for run in runs)
    assert len(two) == len(one) >= 4
    for line, expected in zip(two, one, strict=True):
        assert line["step"] == expected["step"]
        for name in ("loss", "cka", "reconstruction", "valid/loss"):
            if name in expected:
                np.testing.assert_allclose(line[name], expected[name], rtol=0, atol=1e-5)


def test_numbers_agree(runs):
    two, one = (json.loads((run / "evaluation.json").read_text())["results"] for run in runs)
    assert [r["stage"] for r in two] == [r["stage"] for r in one]
    # Embeddings that differ in the sixth digit may swap two neighbours in a ranking.
    np.testing.assert_allclose([r["value"] for r in two], [r["value"] for r in one], atol=0.02)


def test_exports_agree(runs):
    two, one = (open_safetensors(run / "export" / "encoder.safetensors") for run in runs)
    assert two.keys() == one.keys()
    for name in one:
        np.testing.assert_allclose(two[name].read(), one[name].read(), atol=1e-4, err_msg=name)


def test_the_page_is_there(runs):
    assert (runs[0] / "report.html").stat().st_size > 10_000


def test_each_process_embeds_its_share(runs):
    """A file each, of every encoder."""
    two, one = (
        [len(list(folder.glob("*.safetensors"))) for folder in (run / "embeddings").iterdir()]
        for run in runs
    )
    assert len(two) == len(one) >= 3
    assert set(two) == {2} and set(one) == {1}
