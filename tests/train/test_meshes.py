"""Training does not depend on the mesh: 1 device and 8 virtual ones give the same losses."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests import devices

pytestmark = pytest.mark.slow

MESHES = ("data8", "fsdp8", "mixed")


@pytest.fixture(scope="module")
def outcome():
    return json.loads(devices.run(Path(__file__).with_name("run_meshes.py")))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("method", ["cached", "online"])
def test_losses_are_those_of_one_device(outcome, method, mesh):
    losses = outcome["losses"][method]
    assert len(losses["one"]) == 5 and len(set(losses["one"])) == 5
    np.testing.assert_allclose(losses[mesh], losses["one"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("method", ["cached", "online"])
def test_gradient_norms_are_those_of_one_device(outcome, method, mesh):
    """Adam hides a gradient of the wrong scale from the losses."""
    norms = outcome["grad_norms"][method]
    np.testing.assert_allclose(norms[mesh], norms["one"], rtol=1e-4)


@pytest.mark.parametrize("mesh", ["fsdp8", "mixed"])
def test_kernels_and_their_moments_are_really_sharded(outcome, mesh):
    share = outcome["shards"][mesh]
    expected = {"fsdp8": 1 / 8, "mixed": 1 / 4}[mesh]
    for block in ("block0", "decoder_block0"):
        for kernel in ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2"):
            name = f"encoder/{block}/{kernel}/kernel"
            assert share[name] == expected, name
            moments = [s for n, s in share.items() if n.startswith("moments/") and n.endswith(name)]
            assert moments == [expected, expected], name


@pytest.mark.parametrize("mesh", ["fsdp8", "mixed"])
def test_the_online_teacher_is_really_sharded(outcome, mesh):
    share = outcome["shards"][mesh]
    expected = {"fsdp8": 1 / 8, "mixed": 1 / 4}[mesh]
    for name in ("layers/query", "layers/up", "layers/down"):
        assert share[f"teacher/{name}/kernel"] == expected, name
    assert share["teacher/word_embedding/embedding"] == expected


def test_data_parallel_devices_hold_whole_parameters(outcome):
    assert set(outcome["shards"]["data8"].values()) == {1.0}


def test_a_mesh_of_the_wrong_size_says_so(outcome):
    assert "does not use 8 devices" in outcome["uneven"]
    assert outcome["free"] == {"data": 2, "fsdp": 2, "tensor": 2}
