"""Run by test_meshes.py on eight virtual devices: the same training on several meshes, as JSON.

Prints an object with "losses" and "grad_norms" (method -> mesh -> number of each step), "shards"
(mesh -> leaf -> share that a device holds), "uneven" (what a mesh of the wrong size says), "free"
(sizes of a mesh that takes the rest of the devices).
"""

import json
import sys

import jax
import numpy as np

from medalign_jax.core.errors import UserError
from medalign_jax.core.mesh import make_mesh, named_leaves, shardings
from medalign_jax.train.feed import put_batch
from medalign_jax.train.optimizer import OptimizerConfig, make_optimizer
from medalign_jax.train.step import compile_train_step, init_state, state_shardings
from tests import tiny_models as tiny

MESHES = {
    "one": {"data": 1},
    "data8": {"data": 8},
    "fsdp8": {"data": 1, "fsdp": 8},
    "mixed": {"data": 2, "fsdp": 2, "tensor": 2},
}
STEPS, BATCH = 5, 16
# Ten times the paper's. Adam moves parameters whose true gradient is 0 (CKA does not see a head's
# last bias) by the full rate in the direction of the rounding error: at 1e-3 that makes 3e-5.
RATE = 1e-4


def batches(online: bool) -> list[dict[str, np.ndarray]]:
    if not online:
        return [tiny.batch(BATCH, seed) for seed in range(STEPS)]
    teacher, made = tiny.teacher(), []
    for seed in range(STEPS):
        ids, mask = teacher.tokenize(tiny.texts(BATCH, seed))
        waveform = tiny.waveforms(BATCH, seed)
        made.append({"waveform": waveform, "text_ids": ids, "text_mask": mask})
    return made


def method_of(online: bool, mesh):
    """Cached: masking, dropout and augmentation. Online: the teacher over the mesh, no noise."""
    if online:
        side = tiny.student(augment=tiny.Augment())
        return tiny.acula(side, tiny.teacher(mesh), ssm_weight=0.0, dropout=0.0)
    return tiny.acula(dropout=0.2)


def train(online: bool, mesh, initial, chunks: int):
    """(loss, gradient norm) of each step, and the share of every leaf that one device holds."""
    method = method_of(online, mesh)
    optimizer, schedule = make_optimizer(
        OptimizerConfig(learning_rate=RATE, warmup_steps=0, weight_decay=0.01), initial, 100
    )
    state = init_state(initial, optimizer, seed=3)
    state = jax.device_put(state, state_shardings(state, method.sharding_rules, mesh))
    frozen = jax.device_put(method.frozen, shardings(method.frozen, method.frozen_rules, mesh))
    share = {name: share_of(leaf) for name, leaf in named_leaves(state.params).items()}
    share |= {f"teacher/{name}": share_of(leaf) for name, leaf in named_leaves(frozen).items()}
    moments = named_leaves(state.opt_state)
    share |= {f"moments/{name}": share_of(leaf) for name, leaf in moments.items() if leaf.ndim}
    step, lines = None, []
    for host in batches(online):
        batch = put_batch(host, mesh)
        if step is None:
            step = compile_train_step(
                method, optimizer, schedule, mesh, state, frozen, batch, chunks
            )
        state, metrics = step(state, frozen, batch)
        lines.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return lines, share


def share_of(leaf: jax.Array) -> float:
    return leaf.addressable_shards[0].data.size / leaf.size


def main() -> None:
    assert len(jax.devices()) == 8
    initial = jax.device_get(jax.jit(tiny.acula().init)(jax.random.key(0)))
    losses, norms, shards = {}, {}, {}
    for name, sizes in MESHES.items():
        count = int(np.prod(list(sizes.values())))
        mesh = make_mesh(**sizes, devices=jax.devices()[:count])
        # Two chunks in the noisy form: eight samples each, one for every device.
        for method, online, chunks in (("cached", False, 2), ("online", True, 1)):
            lines, share = train(online, mesh, initial, chunks)
            losses.setdefault(method, {})[name], norms.setdefault(method, {})[name] = zip(
                *lines, strict=True
            )
            shards.setdefault(name, {}).update(share)
    try:
        make_mesh(data=3, fsdp=2)
        uneven = ""
    except UserError as error:
        uneven = str(error)
    free = dict(make_mesh(fsdp=2, tensor=2).shape)
    found = {"losses": losses, "grad_norms": norms, "shards": shards}
    json.dump(found | {"uneven": uneven, "free": free}, sys.stdout)


if __name__ == "__main__":
    main()
