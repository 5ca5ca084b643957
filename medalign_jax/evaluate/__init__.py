"""Evaluation: tasks, folds, probes, baselines, intervals and `evaluation.json`.

`suite` checks what is asked, `embeddings` embeds the recordings, `measure` compares the stages;
``python -m medalign_jax.evaluate`` does all of it with encoders that are there already.
"""

from medalign_jax.evaluate.intervals import interval, paired_interval
from medalign_jax.evaluate.results import Result, read_results, write_results
from medalign_jax.evaluate.statistics import Interval, auroc

__all__ = [
    "Interval",
    "Result",
    "auroc",
    "interval",
    "paired_interval",
    "read_results",
    "write_results",
]
