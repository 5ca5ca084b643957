"""Planning a step without its machine, and the step that reads sharded weights."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from configs.distill import get_config
from medalign_jax import plan
from medalign_jax.core.errors import UserError
from medalign_jax.core.mesh import make_mesh
from medalign_jax.language_model import abstract_params
from medalign_jax.models.audio_lm import QWEN2_5_OMNI_7B, AudioLM
from medalign_jax.models.language.decoder import Decoder
from medalign_jax.models.language.decoder_config import QWEN3_8B
from medalign_jax.runs.distill import plan as distill_plan
from medalign_jax.train import cost
from tests import devices, distill_models

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def outcome():
    return json.loads(devices.run(Path(__file__).with_name("sharded_distillation.py")))


@pytest.mark.parametrize("mesh", ["fsdp8", "mixed"])
def test_gathered_weights_give_the_losses_of_one_device(outcome, mesh):
    losses = outcome["losses"]
    assert len(losses["one"]) == 3 and len(set(losses["one"])) == 3
    np.testing.assert_allclose(losses[mesh], losses["one"], rtol=0, atol=1e-5)
    norms = outcome["grad_norms"]
    np.testing.assert_allclose(norms[mesh], norms["one"], rtol=1e-4)


def test_matrices_moments_and_frozen_trees_are_divided(outcome):
    for name, share in outcome["shards"].items():
        stays = name.endswith(("scale", "bias"))  # stacked over layers, which makes them matrices
        assert share == (1 if stays else 1 / 8), name


def test_one_layer_is_gathered_at_a_time(outcome):
    shapes = [tuple(map(int, text.split(","))) for text in outcome["gathered"] if text]
    width, depth = distill_models.STUDENT_WIDTH, distill_models.STUDENT_DEPTH
    assert (width, 32) in shapes  # a student's matrix of the feed-forward
    stacked = [s for s in shapes if len(s) == 3 and s[0] in (depth, distill_models.TEACHER_DEPTH)]
    assert not [s for s in stacked if s[1:] in ((width, 32), (32, width), (32, 48), (48, 32))]


def test_a_plan_is_the_step_that_runs(outcome):
    """Its arguments are the shards of state and frozen trees and the rows of the batch."""
    found = outcome["plan"]
    memory = cost.Memory(**found["memory"])
    assert found["refusal"] == "" and found["flops"] > 0
    assert memory.shared > 0.9 * memory.outputs  # the donated state
    assert memory.peak >= memory.arguments + memory.temporary
    assert found["messages"]["all-gather"] > 0


def test_planned_batches_have_the_arrays_of_real_ones(tmp_path):
    batch = distill_models.world(tmp_path, 4).batch(4)
    lengths = distill_plan.Lengths(64, 8, 0.4, clips=2)
    planned = distill_plan.planned_batch(4, lengths, make_mesh(devices=jax.devices()[:1]))
    assert planned.keys() == batch.keys()
    for name, array in batch.items():
        assert planned[name].dtype == array.dtype, name
        assert planned[name].ndim == array.ndim, name
        assert planned[name].shape[0] == len(array), name


@pytest.mark.parametrize(
    ("model", "billions"), [(AudioLM(QWEN2_5_OMNI_7B), 8.26), (Decoder(QWEN3_8B), 8.19)]
)
def test_planned_models_have_the_published_sizes(model, billions):
    leaves = jax.tree.leaves(abstract_params(model))
    assert sum(leaf.size for leaf in leaves) / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"student.source": "nobody/nothing"}, "'nobody/nothing'.*config.json"),
        ({"student.source": "Qwen/Qwen3-8B"}, "is not an audio language model"),
        ({"teacher.source": "Qwen/Qwen2.5-Omni-7B"}, "not a text model"),
        ({"teacher.mode": "cached"}, "live"),
    ],
)
def test_what_cannot_be_planned_is_named(changes, words):
    config = get_config()
    config.update_from_flattened_dict(changes)
    mesh = make_mesh(devices=jax.devices()[:1])
    with pytest.raises(UserError, match=words):
        distill_plan.planned_method(config, mesh, "xla")


def test_a_config_of_a_model_that_is_not_json_is_named(tmp_path):
    (tmp_path / "config.json").write_bytes(b'{"\xff"')
    config = get_config()
    config.student.source = str(tmp_path)
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        distill_plan.planned_method(config, make_mesh(devices=jax.devices()[:1]), "xla")


def test_an_uneven_batch_is_refused():
    mesh = jax.sharding.AbstractMesh((1, 3, 1), ("data", "fsdp", "tensor"))
    with pytest.raises(UserError, match="4 does not divide over 3 devices"):
        distill_plan.planned_batch(4, distill_plan.Lengths(8, 4, 1.0), mesh)


# --- machines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["v5litepod-16", "h100", "v5e:16by16", "", None])
def test_a_name_of_no_machine_is_refused(name):
    with pytest.raises(UserError, match="is not a machine; write v5e:16x16"):
        plan.topology(name)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("v5e:4x4", RuntimeError("JAX TPU support not installed")),
        ("h100:8", NotImplementedError("topology not implemented for cuda")),
    ],
)
def test_a_missing_compiler_is_named(monkeypatch, name, error):
    def absent(*_, **__):
        raise error

    monkeypatch.setattr(topologies, "get_topology_desc", absent)
    with pytest.raises(UserError, match=f"{error}.*requirements-plan.txt"):
        plan.topology(name)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the TPU compiler, is not installed (requirements-plan.txt)",
)
def test_a_step_compiles_for_tpus_that_are_not_here(tmp_path):
    world = distill_models.world(tmp_path / "world", 2)
    arguments = ["--config=configs/distill.py", "--topology=v5e:2x2", "--config.mesh.fsdp=4"]
    for name in ("student", "teacher"):
        (tmp_path / name).mkdir()
        text = json.dumps(getattr(world, name).config_json)
        (tmp_path / name / "config.json").write_text(text)
        arguments.append(f"--config.{name}.source={tmp_path / name}")
    arguments += ["--config.train.batch_size=4", "--config.data.max_length=128", "--response=16"]
    done = subprocess.run(
        [sys.executable, "-m", "medalign_jax.plan", *arguments, "--config.data.max_seconds=0.4"],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
        timeout=devices.WAIT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "fits 15.75 GiB" in done.stdout and "all-gather" in done.stdout


# --- costs ---------------------------------------------------------------------------------------


def test_repeated_products_count_as_often_as_they_run():
    def model(weights, x):
        def layer(x, w):
            x = jax.lax.cond(x[0, 0] > 0, lambda x: x @ w, lambda x: x, x)
            return jnp.tanh(x), None

        return jax.lax.scan(layer, x, weights)[0].sum()

    weights, x = jnp.zeros((5, 8, 8)), jnp.zeros((3, 8))
    once = 2 * 5 * 3 * 8 * 8
    assert cost.matrix_flops(jax.make_jaxpr(model)(weights, x)) == once
    # Backwards one product each for the weights and for the input.
    step = jax.jit(jax.value_and_grad(model, argnums=(0, 1)))
    assert cost.matrix_flops(step.trace(weights, x).jaxpr) == 3 * once


def test_a_convolution_counts_its_taps():
    x, kernel = jnp.zeros((2, 10, 4)), jnp.zeros((3, 4, 6))

    def convolve(x, kernel):
        numbers = ("NWC", "WIO", "NWC")
        return jax.lax.conv_general_dilated(x, kernel, (2,), "SAME", dimension_numbers=numbers)

    assert cost.matrix_flops(jax.make_jaxpr(convolve)(x, kernel)) == 2 * (2 * 5 * 6) * (3 * 4)


def test_messages_are_told_by_kind():
    text = """
      %ag = bf16[8,64]{1,0} all-gather(%p), dimensions={0}
      %start = (f32[4]{0}, f32[32]{0}) all-gather-start(%q), dimensions={0}
      %done = f32[32]{0} all-gather-done(%start)
      %ar = (f32[4]{0:T(128)}, f32[]) all-reduce(%a, %b), to_apply=%add
      %use = f32[4]{0} add(%all-reduce.1, %all-gather.2)
    """
    assert cost.messages(text) == {"all-gather": 2, "all-reduce": 1}


def test_the_report_says_whether_it_fits():
    memory = cost.Memory(3 * cost.GIB, 2 * cost.GIB, 2 * cost.GIB, 4 * cost.GIB, 0)
    made = plan.Plan(memory, "", 12.0, 8e12, {"all-gather": 3})
    text, fits = plan.report(made, 4, 8.0)
    assert fits and "7.00 GiB" in text and "fits 8 GiB" in text
    assert "2.0 TFLOP" in text and "3 all-gather" in text
    text, fits = plan.report(made, 4, 6.9)
    assert not fits and "does not fit 6.9 GiB" in text
    text, fits = plan.report(plan.Plan(None, "RESOURCE_EXHAUSTED: 22 GiB", 1.0, 1.0, {}), 4, 8.0)
    assert not fits and "22 GiB" in text
