"""OPERA-GT's training step in bfloat16 on a card, ours beside `torch.compile`.

    python -m benchmarks.opera_gt_card [--batches 32,64,128] [--rounds 10]

The masked pass, the full pass, backward and AdamW of `benchmarks.opera_gt`, in one process, in
turns, from the same weights; the first losses are compared before anything is timed. Parameters are
float32, products bfloat16 (PyTorch: autocast, fused AdamW, the whole step but the optimizer
compiled). The card's rate is that of a bfloat16 product of large square matrices in the same run.
"""

from __future__ import annotations

import argparse
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import opera_gt
from benchmarks.turns import in_turns
from medalign_jax.architecture import architecture
from medalign_jax.train import cost
from medalign_jax.weights.load import export
from medalign_jax.weights.tables.opera_gt import TABLE


class OurStep:
    """The compiled update with its state."""

    def __init__(self, params: dict, batch: int):
        model = architecture("opera_gt", {"dtype": "bfloat16"}).module
        optimizer = optax.adamw(1e-5, weight_decay=0.01)

        def loss(params, features, noise):
            lost = model.apply({"params": params}, features, noise, method="reconstruct")[0]
            return lost.mean() + model.apply({"params": params}, features, method="embed")[0].mean()

        def update(params, moments, features, noise):
            value, gradient = jax.value_and_grad(loss)(params, features, noise)
            changes, moments = optimizer.update(gradient, moments, params)
            return optax.apply_updates(params, changes), moments, value.astype(jnp.float32)

        self.state = (jax.tree.map(jnp.copy, params), optimizer.init(params))
        self.inputs = tuple(jnp.asarray(x) for x in opera_gt.inputs(batch))
        lowered = jax.jit(update, donate_argnums=(0, 1)).lower(*self.state, *self.inputs)
        self.run = lowered.compile()
        self.peak = cost.memory(self.run).peak

    def __call__(self) -> float:
        """One update; the loss before it."""
        *state, value = self.run(*self.state, *self.inputs)
        self.state = tuple(state)
        return float(value)


def torch_step(tensors: dict[str, np.ndarray], batch: int):
    """The same in PyTorch on the card."""
    import torch

    from benchmarks.opera_gt_torch import TorchOperaGT

    card = "cuda" if torch.cuda.is_available() else "cpu"
    model = TorchOperaGT({name: torch.from_numpy(x) for name, x in tensors.items()}).to(card)
    features, noise = (torch.from_numpy(x).to(card) for x in opera_gt.inputs(batch))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01, fused=True)

    @torch.compile
    def loss(features, noise):
        with torch.autocast(card, torch.bfloat16):
            return model.reconstruct(features, noise) + model.embed(features).mean()

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        value = loss(features, noise)
        value.backward()
        optimizer.step()
        return value.item()

    return step


def matrix_product(size: int):
    """Ten bfloat16 products of two random matrices."""
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)
    product = jax.jit(jnp.dot)
    product(a, b)
    return lambda: jax.block_until_ready([product(a, b) for _ in range(10)])


def main() -> None:
    """Prints clips/s of both, their ratio, and the share of the card's rate."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batches", default="32,64,128")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--matrix", type=int, default=8192, help="rows of the product")
    parser.add_argument("--without_torch", action="store_true", help="time ours alone")
    options = parser.parse_args()
    module = architecture("opera_gt", {}).module
    features, noise = (jnp.asarray(x) for x in opera_gt.inputs(1))
    params = jax.jit(module.init)(jax.random.key(0), features, noise)["params"]
    tensors = export(jax.device_get(params), TABLE)
    product = matrix_product(options.matrix)
    for batch in map(int, options.batches.split(",")):
        steps = {"medalign_jax": OurStep(params, batch)}
        if not options.without_torch:
            steps["torch.compile"] = torch_step(tensors, batch)
        first = {name: [step() for _ in range(3)] for name, step in steps.items()}
        np.testing.assert_allclose(first["medalign_jax"], list(first.values())[-1], rtol=2e-2)
        taken = in_turns(steps | {"product": product}, options.rounds, settle=1)
        rate = 2 * options.matrix**3 * 10 / statistics.median(taken.pop("product"))
        flop = 1e9 * opera_gt.gflop(batch)["step"]
        for name, times in taken.items():
            seconds = statistics.median(times)
            print(
                f"batch {batch:4d} {name:14s} {batch / seconds:8.0f} clips/s  "
                f"{flop / seconds / 1e12:6.1f} TFLOP/s, {flop / seconds / rate:4.0%} of "
                f"{rate / 1e12:.0f}; first losses {', '.join(f'{x:.4f}' for x in first[name])}"
            )
        ours = taken.pop("medalign_jax")
        for name, times in taken.items():
            ratios = [b / a for a, b in zip(ours, times, strict=True)]
            print(f"batch {batch:4d} {name} / medalign_jax, time: {statistics.median(ratios):.2f} "
                  f"({min(ratios):.2f} to {max(ratios):.2f})")  # fmt: skip
        print(
            f"batch {batch:4d} compiler's peak memory {steps['medalign_jax'].peak / 2**30:.2f} GiB"
        )


if __name__ == "__main__":
    main()
