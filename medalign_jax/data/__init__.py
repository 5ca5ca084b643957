"""Recordings with their reports, questions about them, and the batches of both.

`open_dataset` opens a manifest (CSV, JSONL, Parquet) or a folder written by
`medalign prepare`; `pipeline.make_iterator` turns it into batches.
"""

from medalign_jax.data.recordings.dataset import AudioDataset, concatenate, open_dataset
from medalign_jax.data.recordings.manifest import (
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
