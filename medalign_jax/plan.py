"""Compiles the very training step for a machine that is not here: does it fit, what does it cost?

    medalign plan --config=configs/distill.py --topology=v5e:16x16 \\
        --config.mesh.fsdp=256 --config.train.batch_size=256 --max_gib=8

Nothing is downloaded and no array is made. TPUs need libtpu, GPUs JAX's CUDA plugin, in the
versions of requirements-plan.txt; neither needs the hardware. Exit code 0: the step fits; 1: it
does not, or the plan cannot be made.
"""

from __future__ import annotations

import math
import os
import re
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import flags, logging
from ml_collections import config_flags

from medalign_jax.core import config_command
from medalign_jax.core.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, e.g. configs/distill.py", lock_config=True
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "v5e:16x16, v5p:4x4x4, v6e:8x8, v4:..., h100:8, or cpu:8 (virtual devices)"
)
_MAX_GIB = flags.DEFINE_float("max_gib", None, "Most memory of a device; by default what it has")
_RESPONSE = flags.DEFINE_integer("response", 1024, "Tokens of the longest response")
_CLIPS = flags.DEFINE_integer("clips", 1, "Clips of a question, of config.data.max_seconds each")
_ATTENTION = flags.DEFINE_string(
    "attention",
    "",
    "Back end of the decoders' attention; by default splash on TPUs, blocked on GPUs (a run takes "
    "cuDNN's kernel there, which keeps no scores either and needs the card to compile), else xla",
)

# GiB that a program may use. The CUDA compiler does not refuse what is too large.
_CAPACITY = {"v4": 31.2, "v5e": 15.75, "v5p": 95.0, "v6e": 31.2, "h100": 79.1}

# What the compiler has to know of a card (NVIDIA H100 SXM5 80 GB; CUDA programming guide, data
# sheet). 228 KiB of shared memory per multiprocessor, 227 of them for one block.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 3352000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 cuda_compute_capability { major: 9 }
}
platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 7 } runtime_version { major: 12 minor: 8 }
"""

# XLA times the tiles of its own matrix kernels on a card; what it takes without one does not fit
# every product. cuBLAS has no such choice.
_OPTIONS = {"h100": {"xla_gpu_enable_triton_gemm": False}}

# So that libtpu neither asks the network for a TPU nor insists on being alone on this machine.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Topology(NamedTuple):
    """A machine: kind of its devices ("v5e", "h100", "cpu", ...) and the devices themselves."""

    kind: str
    devices: Sequence[Any]


def topology(name: str) -> Topology:
    """The devices of a named machine, for compiling only.

    Raises:
      UserError: a name that means nothing, or the compiler for it is not installed.
    """
    found = re.fullmatch(r"(v\d\w*|h100|cpu):(\d+(?:x\d+)*)", name or "")
    if not found:
        raise UserError(
            f"--topology={name} is not a machine; write v5e:16x16, v5p:4x4x4, v6e:8x8, h100:8 "
            "or cpu:8"
        )
    kind, shape = found.groups()
    try:
        return Topology(kind, _devices(kind, shape))
    except (RuntimeError, NotImplementedError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"no compiler for --topology={name} ({reason}). Is that a shape that exists, and are "
            "the packages there? pip install --no-deps -r requirements-plan.txt"
        ) from error


def _devices(kind: str, shape: str) -> Sequence[Any]:
    import jax
    from jax.experimental import topologies

    if kind == "cpu":
        return jax.devices()[: math.prod(map(int, shape.split("x")))]
    if kind == "h100":
        described = topologies.get_topology_desc(
            platform="cuda", target_config=_H100, topology=f"1x1x{shape}"
        )
    else:
        os.environ.update(_TPU_ENVIRONMENT)
        described = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape}")
    return described.devices


class Plan(NamedTuple):
    """What the compiler said.

    Attributes:
      memory: bytes of one device, see `train.cost.Memory`; None if it does not fit at all.
      refusal: why it does not compile; "" if it does.
      seconds: of compilation.
      flops: of matrix products, over all devices, in a step.
      messages: collectives by kind in the program's text.
    """

    memory: Any
    refusal: str
    seconds: float
    flops: float
    messages: dict[str, int]


def compile_plan(traced: Any, options: dict[str, Any] | None = None) -> Plan:
    """Compiles a traced step (`train.step.trace_train_step`) with the compiler's `options`."""
    import jax

    from medalign_jax.train import cost

    flops, begun = cost.matrix_flops(traced.jaxpr), time.monotonic()
    lowered = traced.lower()
    try:
        compiled = lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Plan(None, _short(str(error)), time.monotonic() - begun, flops, {})
    seconds = time.monotonic() - begun
    return Plan(cost.memory(compiled), "", seconds, flops, cost.messages(compiled.as_text()))


def _short(reason: str) -> str:
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    return " ".join(lines[:3])[:400]


def report(plan: Plan, devices: int, limit: float) -> tuple[str, bool]:
    """The plan as text, and whether it fits `limit` GiB per device."""
    from medalign_jax.train.cost import GIB

    if plan.memory is None:
        return f"does not fit: {plan.refusal}", False
    parts = {
        "arguments": plan.memory.arguments,
        "outputs": plan.memory.outputs,
        "shared with arguments": -plan.memory.shared,
        "temporary": plan.memory.temporary,
    }
    fits = plan.memory.peak <= limit * GIB
    sent = ", ".join(f"{count} {kind}" for kind, count in plan.messages.items()) or "none"
    lines = [
        f"peak memory per device {plan.memory.peak / GIB:8.2f} GiB  "
        f"({'fits' if fits else 'does not fit'} {limit:g} GiB)",
        *(f"  {name:<21}{size / GIB:8.2f} GiB" for name, size in parts.items()),
        f"  compiler's own peak  {plan.memory.reported / GIB:8.2f} GiB",
        f"matrix products        {plan.flops / devices / 1e12:8.1f} TFLOP per device and step",
        f"messages in the text   {sent}",
        f"compile time           {plan.seconds:8.1f} s",
    ]
    return "\n".join(lines), fits


def main() -> int:
    """Plans the config's step for --topology; returns 0 if it fits.

    Raises:
      UserError: no or an unknown topology, or a step that cannot be planned.
    """
    logging.set_verbosity(logging.WARNING)
    import jax

    if not _TOPOLOGY.value:
        raise UserError("name a --topology, e.g. --topology=v5e:16x16; see --help")
    jax.config.update("jax_platforms", "cpu")  # this process computes nothing
    # What is kept of a program for a machine that is not here could not be read back.
    jax.config.update("jax_enable_compilation_cache", False)
    if (_TOPOLOGY.value or "").startswith("cpu:"):
        jax.config.update("jax_num_cpu_devices", int(_TOPOLOGY.value.removeprefix("cpu:")))
    text, fits = plan_config(_CONFIG.value)
    print(text)
    return 0 if fits else 1


def plan_config(config: Any) -> tuple[str, bool]:
    """The report on a config for the flags of this command, and whether it fits."""
    from medalign_jax.core.mesh import make_mesh
    from medalign_jax.runs.distill import plan as distill_plan

    if config.method != "distill":
        raise UserError(f"plans are made for config.method distill, not {config.method!r}")
    where = topology(_TOPOLOGY.value)
    mesh = make_mesh(**config.mesh.to_dict(), devices=where.devices)
    lengths = distill_plan.Lengths(
        config.data.max_length, _RESPONSE.value, config.data.max_seconds, _CLIPS.value
    )
    attention = _ATTENTION.value or _attention(where.kind)
    traced = distill_plan.trace(config, mesh, lengths, attention)
    limit = _MAX_GIB.value or _CAPACITY.get(where.kind, math.inf)
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    made = compile_plan(traced, _OPTIONS.get(where.kind))
    text, fits = report(made, len(where.devices), limit)
    head = f"{_TOPOLOGY.value}: {sizes}, batch {config.train.batch_size}, attention {attention}"
    return f"{head}\n{text}", fits


def _attention(kind: str) -> str:
    if kind.startswith("v"):
        return "splash"
    return "xla" if kind == "cpu" else "blocked"


def command() -> int:
    """Reads the flags of `sys.argv`; returns the exit status."""
    return config_command.run(main, __doc__)


if __name__ == "__main__":
    sys.exit(command())
