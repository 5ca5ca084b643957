"""Run by test_plan.py on eight virtual devices; prints JSON.

"losses" and "grad_norms": mesh -> number of each step of one distillation, whose models gather
their weights layer by layer. "shards": leaf -> share that a device holds under fsdp 8. "gathered":
shapes of all arrays that the compiled step of fsdp 8 gathers. "plan": what `medalign_jax.plan` says
of that very step from its shapes alone.
"""

import dataclasses
import json
import re
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from configs.distill import get_config
from medalign_jax import plan
from medalign_jax.core.mesh import make_mesh, named_leaves, shardings
from medalign_jax.methods.distill import Distill, DistillConfig
from medalign_jax.models.layers.sharded_weights import over_mesh
from medalign_jax.runs.distill import plan as distill_plan
from medalign_jax.runs.parts.distillation import audio_lm_student_of, text_teacher_of
from medalign_jax.train.feed import put_batch
from medalign_jax.train.optimizer import OptimizerConfig, make_optimizer
from medalign_jax.train.step import compile_train_step, init_state, state_shardings
from tests import distill_models

MESHES = {
    "one": {"data": 1},
    "fsdp8": {"data": 1, "fsdp": 8},
    "mixed": {"data": 2, "fsdp": 4},
}
STEPS, ROWS, RATE = 3, 8, 1e-4


def method_on(world: distill_models.World, mesh) -> Distill:
    student, teacher = (
        dataclasses.replace(
            model,
            module=over_mesh(model.module.clone(remat=model.takes_audio), mesh, model.sharding),
            params=jax.tree.map(jnp.asarray, model.params),
        )
        for model in (world.student, world.teacher)
    )
    return Distill(
        audio_lm_student_of(student),
        DistillConfig(every=2, chunk=3),
        text_teacher_of(teacher, world.builder),
    )


def train(world: distill_models.World, mesh):
    """(loss, gradient norm) of each step, the layout of the start, and the step's text."""
    method, host = method_on(world, mesh), world.batch(ROWS)
    params = method.initial_params(jax.random.key(0))
    optimizer, schedule = make_optimizer(
        OptimizerConfig(learning_rate=RATE, warmup_steps=0), params, 100
    )
    state = init_state(params, optimizer, seed=0)
    state = jax.device_put(state, state_shardings(state, method.sharding_rules, mesh))
    frozen = jax.device_put(method.frozen, shardings(method.frozen, method.frozen_rules, mesh))
    trees = {"params": state.params, "moments": state.opt_state, "frozen": frozen}
    leaves = {name: leaf for name, leaf in named_leaves(trees).items() if leaf.ndim > 1}
    share = {n: x.addressable_shards[0].data.size / x.size for n, x in leaves.items()}
    batch = put_batch(host, mesh)
    step = compile_train_step(method, optimizer, schedule, mesh, state, frozen, batch)
    lines = []
    for _ in range(STEPS):
        state, metrics = step(state, frozen, batch)
        lines.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return lines, share, step.as_text()


def planned(world: distill_models.World, folder: Path, mesh) -> dict:
    """The same step from config files."""
    config = get_config()
    for name in ("student", "teacher"):
        (folder / name).mkdir()
        text = json.dumps(getattr(world, name).config_json)
        (folder / name / "config.json").write_text(text)
        config[name].update({"source": str(folder / name), "dtype": "float32"})
    config.loss.update({"every": 2, "chunk": 3})
    config.train.batch_size = ROWS
    shapes = {name: array.shape for name, array in world.batch(ROWS).items()}
    lengths = distill_plan.Lengths(
        shapes["student_ids"][1], shapes["response_ids"][1], shapes["waveform"][2] / 16_000,
        shapes["waveform"][1],
    )  # fmt: skip
    found = plan.compile_plan(distill_plan.trace(config, mesh, lengths, "xla"))
    return found._asdict() | {"memory": found.memory._asdict()}


def main() -> None:
    assert len(jax.devices()) == 8
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world = distill_models.world(folder / "world", ROWS)
        losses, norms = {}, {}
        for mesh, sizes in MESHES.items():
            count = int(np.prod(list(sizes.values())))
            devices = make_mesh(**sizes, devices=jax.devices()[:count])
            lines, share, text = train(world, devices)
            losses[mesh], norms[mesh] = zip(*lines, strict=True)
            if mesh == "fsdp8":
                shards = share
                gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", text)
        whole = planned(world, folder, make_mesh(data=1, fsdp=8))
    found = {"losses": losses, "grad_norms": norms, "shards": shards, "plan": whole}
    json.dump(found | {"gathered": sorted(set(gathered))}, sys.stdout)


if __name__ == "__main__":
    main()
