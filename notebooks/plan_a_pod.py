# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,-all
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Plan a pod
#
# Does the full-size step fit on machines that you do not have, and what does it cost? `medalign plan`
# compiles the very step that training runs, for a described machine: nothing is downloaded, no array is
# made, no accelerator is needed.
#
# For TPUs and NVIDIA cards it needs their compilers, 1.2 GB unpacked, in a folder of their own.

# %% tags=["parameters"]
TOPOLOGY = "v5e:16x16"  # also v5p:4x4x4, v6e:8x8, h100:8, or cpu:8, which needs no compiler
COMPILERS = True  # install them here, into .plan
FSDP, BATCH = 256, 256
MORE = []  # further arguments, such as "--config.data.max_length=512"

# %%
import importlib.util
import os
import subprocess
import sys

pip = [sys.executable, "-m", "pip", "install", "-q"]
if importlib.util.find_spec("medalign_jax") is None:  # in a checkout: pip install .
    subprocess.run([*pip, "medalign-jax"], check=True)
if COMPILERS and not os.path.isdir(".plan"):
    compilers = ["jax-cuda12-pjrt==0.10.2", "jax-cuda12-plugin==0.10.2", "libtpu==0.0.42.1"]
    subprocess.run([*pip, "--no-deps", "--target=.plan", *compilers], check=True)


def plan(*arguments: object) -> int:
    """`medalign plan`; 0: it fits, 1: it does not."""
    command = [sys.executable, "-m", "medalign_jax", "plan", *map(str, arguments)]
    path = os.pathsep.join([os.path.abspath(".plan"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": path}).returncode


# %% [markdown]
# ## Distillation of Qwen2.5-Omni-7B from Qwen3-8B
# Parameters, moments, the frozen teacher and snapshot, activations: per device, against what it has.

# %%
status = plan("--config=configs/distill.py", f"--topology={TOPOLOGY}", f"--config.mesh.fsdp={FSDP}",
              f"--config.train.batch_size={BATCH}", *MORE)  # fmt: skip
print("fits" if status == 0 else "does not fit")

# %% [markdown]
# ## What if?
# With low-rank factors there are no moments of the weights. `--max_gib` asks whether it stays below what
# you allow, `--attention` compares back ends, and any key of the config can be changed.

# %%
status = plan("--config=configs/distill.py:lora", f"--topology={TOPOLOGY}",
              f"--config.mesh.fsdp={FSDP}", f"--config.train.batch_size={BATCH}", *MORE)  # fmt: skip
print("fits" if status == 0 else "does not fit")
