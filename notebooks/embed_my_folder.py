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
# # Embed my folder
#
# Recordings go in; for each one vector comes out that says how it sounds to an encoder. Then: a map of
# them, which of them are alike, and whether a few labels are enough to tell them apart, beside plain
# baselines and with intervals.
#
# Runs on a CPU in a few minutes. Set `FOLDER` to recordings of your own (wav, flac, ogg, mp3; on Colab
# upload them or mount a drive, the file browser is on the left). Empty, it makes simulated hearts.

# %% tags=["parameters"]
FOLDER = ""  # your recordings; "" simulates hearts
LABELS = (
    ""  # a table with columns audio_path and label (and subject_id, if you know it); "" has none
)
ENCODER, SOURCE = "whisper", "openai/whisper-base"  # `medalign models` lists what there is
COUNT = 240  # recordings to simulate

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("medalign_jax") is None:  # in a checkout: pip install .
    pip = [sys.executable, "-m", "pip", "install", "-q"]
    subprocess.run([*pip, "medalign-jax"], check=True)

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML, Audio, display

import medalign_jax
from medalign_jax.audio import read
from medalign_jax.evaluate.embedding_table import read_table
from medalign_jax.evaluate.projection import embedding_map
from medalign_jax.search.index import EmbeddingIndex


def medalign(command: str, *arguments: object) -> None:
    """A command of the package; stops the notebook if it fails."""
    subprocess.run(
        [sys.executable, "-m", "medalign_jax", command, *map(str, arguments)], check=True
    )


# %% [markdown]
# ## Recordings
# Simulated hearts (normal, or a systolic or diastolic murmur) have a known truth, so that what comes
# below can be judged. Two recordings are of one subject each; subjects are kept apart when anything is
# measured.

# %%
if not FOLDER:
    FOLDER = "simulated_hearts"
    if not Path(FOLDER).exists():
        medalign("simulate", "--out", FOLDER, "--count", COUNT, "--kinds", "heart", "--seconds", 5)
    LABELS = f"{FOLDER}/metadata.csv"

# %% [markdown]
# ## One vector for each
# `medalign embed` streams through any number of files. Files that cannot be read are named and skipped.
# With a table of labels its columns come along.

# %%
named = ["--manifest", LABELS] if LABELS else [FOLDER]
medalign(
    "embed", *named, "--encoder", ENCODER, "--checkpoint", SOURCE, "--out", "embeddings.parquet"
)
table = read_table("embeddings.parquet")
print(table.embeddings.shape, "and the columns", ", ".join(table.columns))

# %% [markdown]
# The same in Python, for waveforms that are no files:

# %%
encoder = medalign_jax.load_encoder(ENCODER, SOURCE)
print(encoder)
first = table.columns["audio_path"][0]
waveform = read(first, encoder.sample_rate)
vector = encoder.embed([waveform], encoder.sample_rate)
np.testing.assert_allclose(vector[0], table.embeddings[0], rtol=1e-3, atol=1e-3)
display(Audio(waveform, rate=encoder.sample_rate))

# %% [markdown]
# ## A map
# Two principal components. What lies near is alike to the encoder, which need not be what a clinician
# would call alike: the first components are often loudness, device or room.

# %%
placed = embedding_map(table.embeddings)
points, shares = placed.coordinates[0], placed.explained
labels = np.array(table.columns.get("label", ["recording"] * len(points)))
figure, axes = plt.subplots(figsize=(6, 5))
for name in sorted(set(labels)):
    axes.scatter(*points[labels == name].T, s=14, label=name)
axes.set(xlabel=f"{shares[0]:.0%} of the variance", ylabel=f"{shares[1]:.0%}", aspect="equal")
axes.legend()
plt.show()

# %% [markdown]
# ## What is like this one?

# %%
index = EmbeddingIndex.read("embeddings.parquet")
(hits,) = index.similar(vector, count=5)
for hit in hits:
    print(f"{hit.similarity:+.3f}  {Path(hit.path).name}  {hit.columns.get('label', '')}")

# %% [markdown]
# ## Do a few labels tell them apart?
# A linear probe on the fixed vectors, five folds by subject, with all labels and with 10 per class,
# beside what a constant answer and some 150 plain numbers of the spectrum reach. Only what is above
# those has been learnt by the encoder. (With `--encoder NAME=SOURCE` in place of the table the encoder
# with random weights stands there too; it takes as long as embedding everything once more.)

# %%
if LABELS:
    medalign(
        "evaluate", "--manifest", LABELS, "--encoder", f"{ENCODER}=embeddings.parquet",
        "--tasks", "label", "--folds", 5, "--per_class", 10, "--out", "measured",
    )  # fmt: skip

# %% [markdown]
# The page that it writes is one file, opens without a network, and its points can be heard:
# `measured/report.html`.

# %%
if LABELS:
    page = Path("measured/report.html").read_text()
    display(HTML(f"<p>{len(page) / 1e6:.1f} MB: open measured/report.html in a browser.</p>"))
