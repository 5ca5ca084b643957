"""Where a number comes from: versions, commit and devices."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

RECORDINGS = "recordings.jsonl"  # in a workdir: those of its data, with split and sound
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers")


def provenance() -> dict[str, Any]:
    """Versions, commit and devices of this process."""
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "git_commit": _git_commit(),
        "devices": f"{jax.device_count()} x {device.device_kind}",
        "processes": jax.process_count(),
    }


def provenance_rows(found: Mapping[str, Any], batch_size: int, parts: int) -> list[tuple[str, str]]:
    """What a run's page says of how it was trained, from `provenance()`; names and values."""
    commit, dirty, _ = str(found["git_commit"] or "unknown").partition("-dirty")
    return [
        ("batch", f"{batch_size}{f', in {parts} parts' if parts > 1 else ''}"),
        ("devices", str(found["devices"])),
        ("git commit", commit[:12] + (", with changes" if dirty else "")),
        ("versions", ", ".join(f"{name} {version}" for name, version in found["packages"].items())),
    ]


def _git_commit() -> str | None:
    """Commit of the code, with "-dirty" if it has changes; None outside a checkout."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
