"""Whether an encoder of ours was trained on what it is tested on.

A run's workdir lists the recordings of its data, each with its split, or with one per fold. Weights
in a workdir were trained on those of training and chosen on those of validation; weights that were
taken out of it say nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from medalign_jax.core.errors import UserError
from medalign_jax.core.provenance import RECORDINGS
from medalign_jax.data.recordings.dataset import AudioDataset
from medalign_jax.evaluate.suite import Suite

_DEEPEST = 4  # folders from the weights up to the workdir: fold_0/arms/x/export
_USED = frozenset({"train", "valid"})


def describe_trained(name: str, source: str, data: AudioDataset, suite: Suite) -> tuple[str, ...]:
    """A sentence where recordings are tested that an encoder was trained on; () where none is.

    Recordings are the same where they sound the same, sample for sample, or are the same file.

    Args:
      name: of the encoder.
      source: where its weights are, as `load_encoder` takes it.
      data: the recordings.
      suite: folds over them.

    Raises:
      UserError: the list of a workdir cannot be read.
    """
    used = frozenset(_used(source))
    if not used:
        return ()
    tested = np.unique(np.concatenate([fold.test for fold in suite.tested_folds()]))
    known = [
        i for i in tested.tolist()
        if data.sounds[i] in used or _place(data.rows[i].audio_path) in used
    ]  # fmt: skip
    if not known:
        return ()
    return (
        f"{name} was trained, or chosen, on {len(known)} of the {len(tested)} test recordings, "
        f"e.g. '{data.rows[known[0]].audio_path}': its results are too good.",
    )


def _used(source: str) -> Iterator[str]:
    """Sound and file of each recording that the weights were trained or chosen on."""
    weights = Path(source).expanduser().resolve()
    for workdir in (weights, *weights.parents[:_DEEPEST]):
        if (workdir / RECORDINGS).is_file() and (workdir / "config.json").is_file():
            break
    else:
        return
    fold = re.search(r"^fold_(\d+)", str(weights.relative_to(workdir)))
    for record in _records(workdir / RECORDINGS):
        splits = record.get("split", "").split(",")
        if fold and len(splits) > 1:
            splits = splits[int(fold[1]) :][:1]
        if _USED & set(splits):
            yield from (record["sound"], _place(record["name"]))


def _records(path: Path) -> list[dict[str, str]]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}, of a run whose encoder is measured: {error}") from error


def _place(path: str) -> str:
    return str(Path(path).resolve())
