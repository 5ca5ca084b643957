"""Recordings and their reports: manifest checks, prepared data sets, batches, simulation.

`open_dataset` opens a manifest (CSV, JSONL, Parquet) or a folder written by
`python -m medalign_jax.data.prepare`; `make_iterator` turns it into batches.
"""

from medalign_jax.data.dataset import AudioDataset, concatenate, open_dataset
from medalign_jax.data.manifest import (
    Checked,
    ManifestError,
    Problem,
    Row,
    check,
    problem_table,
    read_manifest,
    write_problems,
)

__all__ = [
    "AudioDataset",
    "Checked",
    "ManifestError",
    "Problem",
    "Row",
    "check",
    "concatenate",
    "open_dataset",
    "problem_table",
    "read_manifest",
    "write_problems",
]
