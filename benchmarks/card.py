"""What the accelerator of this machine does: its name, versions, and the rates that others need.

    python -m benchmarks.card

Rates of products of large square matrices and of a copy within its memory; and how far a float32
product is from float64, which shows whether the card rounds float32 products (TF32).
"""

from __future__ import annotations

import importlib.metadata
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.turns import seconds

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "torch")


def rate(size: int, dtype, precision=None, repeats: int = 10) -> float:
    """Floating-point operations per second of (size, size) products."""
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (size, size), dtype) for key in keys)
    product = jax.jit(lambda a, b: jnp.dot(a, b, precision=precision))
    product(a, b).block_until_ready()
    taken = [
        seconds(lambda: jax.block_until_ready([product(a, b) for _ in range(repeats)]))
        for _ in range(5)
    ]
    return 2 * size**3 * repeats / statistics.median(taken)


def copied(gib: float) -> float:
    """Bytes read and written per second by adding 1 to a large array."""
    x = jnp.zeros(int(gib * 2**28), jnp.float32)
    add = jax.jit(lambda x: x + 1)
    add(x).block_until_ready()
    return (
        2
        * x.nbytes
        / statistics.median(seconds(lambda: add(x).block_until_ready()) for _ in range(5))
    )


def rounding(precision) -> float:
    """Relative error of a float32 product (Frobenius norm)."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((512, 512)).astype(np.float32) for _ in range(2))
    exact = a.astype(np.float64) @ b.astype(np.float64)
    found = np.asarray(jnp.dot(a, b, precision=precision), np.float64)
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def main() -> None:
    """Prints all of it."""
    card = jax.devices()[0]
    on_card = card.platform != "cpu"
    print(f"{card.device_kind} ({card.platform}), {jax.device_count()} of them")
    for name in PACKAGES:
        try:
            print(f"{name} {importlib.metadata.version(name)}", end="  ")
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} is not installed", end="  ")
    size = 8192 if on_card else 512
    print()
    for name, dtype, precision in (
        ("bfloat16", jnp.bfloat16, None),
        ("float32, default", jnp.float32, None),
        ("float32, highest", jnp.float32, "highest"),
    ):
        print(f"products, {name}: {rate(size, dtype, precision) / 1e12:.1f} TFLOP/s")
    print(f"copy: {copied(4.0 if on_card else 0.1) / 1e12:.2f} TB/s read and written")
    print(f"error of a float32 product: {rounding(None):.0e} by default, "
          f"{rounding('highest'):.0e} highest")  # fmt: skip


if __name__ == "__main__":
    main()
