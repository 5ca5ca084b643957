"""Weights of the reference fixtures, made by the rule in ../shared/fixtures/README.md."""

import dataclasses
import json
import math
import zlib
from pathlib import Path

import numpy as np

GAIN = np.float32(1.6)


@dataclasses.dataclass
class Published:
    """A fixture: expected outputs, and the tensors under their published names."""

    described: dict
    expected: dict[str, np.ndarray]
    tensors: dict[str, np.ndarray]


def published(shared: Path, name: str) -> Published:
    """Fixture `name`. What its network works out itself (`computed`) is zeros here."""
    described = json.loads((shared / "fixtures" / f"{name}.json").read_text())
    with np.load(shared / "fixtures" / f"{name}.npz") as file:
        expected = dict(file)
    tensors = {entry["name"]: value(entry) for entry in described["state_dict"]}
    return Published(described, expected, tensors)


def value(entry: dict) -> np.ndarray:
    """The tensor of one entry of the fixture's `state_dict`."""
    name, shape, rule = entry["name"], tuple(entry["shape"]), entry["rule"]
    if rule in ("computed", "zero_int"):
        return np.zeros(shape, entry["dtype"])
    z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    return {
        "small": lambda: np.float32(0.05) * z,
        "norm_weight": lambda: np.float32(1) + np.float32(0.05) * z,
        "running_var": lambda: np.float32(1) + np.float32(0.1) * np.abs(z),
        "fan_in": lambda: z / np.float32(math.sqrt(math.prod(shape[1:]))),
        "small_1d": lambda: np.float32(0.02) * z,
    }[rule]()


def with_gain(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The `gain16_*` weights: convolutions times 1.6, so that the input gets through."""
    return {name: x * GAIN if x.ndim == 4 else x for name, x in tensors.items()}


def noise(seed: int, batch: int, frames: int) -> np.ndarray:
    """(batch, frames, 64) input of the fixtures."""
    return np.random.default_rng(seed).random((batch, frames, 64), dtype=np.float32)


def structured(batch: int, frames: int, phase: float) -> np.ndarray:
    """(batch, frames, 64) sine pattern of the fixtures."""
    b, t, f = np.ogrid[:batch, :frames, :64]
    return (0.5 + 0.5 * np.sin(0.05 * (b + 1) * t + 0.2 * f + phase)).astype(np.float32)
