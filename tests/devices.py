"""Starts Python in a process of its own: virtual devices have to be there before JAX starts."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.quick import FLAGS

ROOT = Path(__file__).resolve().parent.parent
WAIT = 900  # seconds: a process that hangs, not one on a machine that is busy


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environment(devices: int, quick: bool = True) -> dict[str, str]:
    """Variables for so many CPU devices; `quick` as in `tests.quick`."""
    flags = f"--xla_force_host_platform_device_count={devices} {FLAGS if quick else ''}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def start(arguments: Sequence[object], devices: int, **options) -> subprocess.Popen:
    """Runs `python ARGUMENTS` without waiting; its output is piped, errors among it."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], env=environment(devices, **options),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def run(*arguments: object, devices: int = 8, **options) -> str:
    """Runs `python ARGUMENTS` on virtual devices; what it printed, once it has succeeded."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment(devices, **options),
        cwd=ROOT, capture_output=True, text=True, timeout=WAIT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    return done.stdout
