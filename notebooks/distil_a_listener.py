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
# # Distil a listener
#
# An audio language model hears but reasons badly; a text-only model reasons well but is deaf. Source-
# and layer-wise distillation (arXiv 2509.18579) puts recordings into words for the text model and lets
# the audio model learn from its next-token distribution and its layers, while a frozen copy of the audio
# model holds its hearing where the sound comes in.
#
# Here both are tiny and made on the spot, so that all of it takes a few minutes on a CPU: this shows that
# the method works as published and what it costs, not how well a full-size model would do.

# %% tags=["parameters"]
READING = 3000  # textual questions that the teacher learns from
STUDENT_STEPS = 400
TEACHER_STEPS = 300
STEPS = 150  # of each distillation
TEST = 80  # recordings that questions are asked about

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("medalign_jax") is None:  # in a checkout: pip install .
    pip = [sys.executable, "-m", "pip", "install", "-q"]
    subprocess.run([*pip, "medalign-jax"], check=True)

from pathlib import Path

from IPython.display import Audio, display

import medalign_jax
from medalign_jax.audio import read
from medalign_jax.evaluate.results import read_results


def medalign(command: str, *arguments: object) -> None:
    """A command of the package; stops the notebook if it fails."""
    subprocess.run(
        [sys.executable, "-m", "medalign_jax", command, *map(str, arguments)], check=True
    )


# %% [markdown]
# ## Two ways to learn from the same traces
# 60 recordings with reasoning, 40 % of it with a wrong conclusion. `sft` is fine-tuning on those traces
# alone; `layers + acoustic` adds the text teacher (which reads what is on the recording and does not
# follow a wrong trace) and the acoustic one.

# %%
RUN = "listener"
medalign(
    "train", "--config=configs/distill.py:demo", f"--workdir={RUN}", "--config.seeds=(3,)",
    '--config.arms={"sft": {"text_weight": 0.0, "acoustic_weight": 0.0}, "layers + acoustic": {}}',
    f"--config.stages.student.steps={STUDENT_STEPS}",
    f"--config.stages.teacher.steps={TEACHER_STEPS}",
    f"--config.train.steps={STEPS}", f"--config.world.test={TEST}", f"--config.world.texts={READING}",
)  # fmt: skip

# %% [markdown]
# ## What was learnt, and what was lost
# `reasoning` asks for four stages and an answer, `plain` for an answer, `acoustic` for the recorder's
# noise, which no trace mentions: what the student forgets there it has forgotten of hearing. One seed:
# the intervals do not cover what another seed would have given (`docs/distillation.md` has three).

# %%
results, _ = read_results(f"{RUN}/evaluation.json")
for r in results:
    if r.metric == "accuracy" or r.metric.endswith("accuracy"):
        interval = "" if r.ci_low is None else f"({100 * r.ci_low:.0f} to {100 * r.ci_high:.0f})"
        print(f"{r.task:10} {r.stage:34} {100 * r.value:5.1f} % {interval}")

# %% [markdown]
# ## Ask it
# The export of an arm loads under the names of Qwen2.5-Omni, here and in `transformers`.

# %%
if not Path("hearts").exists():
    medalign("simulate", "--out", "hearts", "--count", 2, "--kinds", "heart", "--seconds", 2,
             "--seed", 5)  # fmt: skip
path = sorted(Path("hearts/audio").iterdir())[0]
display(Audio(read(path, 16_000), rate=16_000))
export = sorted(Path(RUN).glob("arms/layers*/export"))[0]
model = medalign_jax.load_language_model(export, dtype="float32")
print(model)
print(model.answer("Is there a murmur?", path, choices=["yes", "no"], max_new_tokens=72))
