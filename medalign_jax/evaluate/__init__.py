"""Evaluation: probes, retrieval, statistics, `evaluation.json` and the report page.

Plain arrays in, plain dataclasses out; nothing here knows a model or a data set.
"""

from medalign_jax.evaluate.results import Result, read_results, write_results
from medalign_jax.evaluate.statistics import Interval, auroc, bootstrap, paired_bootstrap

__all__ = [
    "Interval",
    "Result",
    "auroc",
    "bootstrap",
    "paired_bootstrap",
    "read_results",
    "write_results",
]
