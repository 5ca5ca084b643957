"""Freed memory stays with the process when asked to."""

import os
import platform
import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource, sys
from medalign_jax.core.host_memory import keep_host_memory
if sys.argv[1] == "keep":
    assert keep_host_memory()
import jax, jax.numpy as jnp
x = jnp.zeros((10 << 20,), jnp.float32)
add = jax.jit(lambda x: x + 1)
faults = []
for _ in range(80):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    add(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sum(faults[-20:]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_pages_are_faulted_in_once_and_kept():
    def faults(mode: str) -> int:
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", COUNT_FAULTS, mode]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return int(done.stdout)

    # A run writes 40 MiB, 10240 pages of 4 KiB. Kept memory settles within the first runs, because
    # small blocks in between first have to be freed, so look at the last 20.
    assert faults("give back") > 20 * 9000
    assert faults("keep") < 20 * 100
