"""Run by test_processes.py: one tiny AcuLa run, in one of two processes or alone on two devices."""

import sys
from pathlib import Path

import jax

if __name__ == "__main__":
    sys.modules["torch"] = None  # TensorBoard's writer would import it, which takes seconds
    manifest, workdir, *process = sys.argv[1:]
    if process:
        address, number = process
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, num_processes=2, process_id=int(number))
    assert jax.device_count() == 2

    from medalign_jax.experiments import acula
    from tests.experiments.test_end_to_end import tiny

    config = tiny()
    config.data.manifest = manifest
    config.mesh.fsdp = 2
    config.supervised.enabled = False
    # How its vectors are measured does not depend on who embedded them.
    config.evaluate.update(
        {"probes": ("linear",), "per_class": 0, "baselines": ("majority", "random")}
    )
    acula.run(config, Path(workdir))
