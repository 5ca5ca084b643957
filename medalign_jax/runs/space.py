"""Exports where sounds and words meet: `search.common_space` of each model of an AcuLa run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from medalign_jax.core.seals import seal
from medalign_jax.evaluate.retrieval import RetrievalError, fit_map
from medalign_jax.runs.alignment import Aligned, Run
from medalign_jax.runs.arms import Arm
from medalign_jax.search.common_space import AUDIO, TEXT, Heads, Meeting, remove_space

_TEACHER = ("source", "layer", "pooling", "max_tokens", "lowercase", "dtype")  # of config.teacher


def incomparable(config: ConfigDict, arms: Sequence[Arm]) -> str:
    """Why sounds and texts would not be compared as they were aligned; "" where they would."""
    candidates = [arm.name for arm in arms if arm.role == "candidate"]
    if candidates:  # one is chosen in each fold
        return f"candidates ({', '.join(candidates)}) may have other teachers and heads"
    for side in ("audio_head", "text_head"):
        if config.loss[side] == "standardise":  # over each batch
            return f"loss.{side}=standardise has no map for a single sound or text"
    return ""


def export_spaces(
    run: Run, arms: Sequence[Arm], aligned: Sequence[Aligned], embedded: Sequence[np.ndarray]
) -> None:
    """Beside the exported encoder of each fold, where sounds and texts can be compared and the last
    layer, which embeddings show, was aligned.

    Args:
      run: what was run.
      arms: its alignments.
      aligned: the run's own alignment, one per fold.
      embedded: (N, D) of all recordings, one per fold.
    """
    config = run.config
    if incomparable(config, arms) or -1 not in tuple(config.loss.layers):
        for part in run.parts:
            remove_space(part.folder / "export")
        return
    texts = run.texts(config)
    means = texts.means(run.reports)
    for part, outcome, vectors in zip(run.parts, aligned, embedded, strict=True):
        rows = part.fold.train
        reports = tuple(dict.fromkeys(run.reports.texts[i][0] for i in rows))
        of_reports = texts.vectors[[texts.row[text] for text in reports]]
        heads = Heads(config.loss.hidden, config.loss.out, outcome.heads)
        pairs, words = means[rows], of_reports
        if outcome.whitening is not None:
            pairs, words = outcome.whitening(pairs), outcome.whitening(words)
        folder = part.folder / "export"
        try:
            mapping = fit_map(heads(AUDIO, vectors[rows]), heads(TEXT, pairs), config.evaluate.map)
        except RetrievalError as error:
            print(f"{part.what}nothing is exported for search by words: {error}", flush=True)
            remove_space(folder)
            continue
        teacher = {name: config.teacher[name] for name in _TEACHER}
        meeting = Meeting(
            mapping, heads, outcome.whitening, reports, mapping.text(heads(TEXT, words)),
            teacher | {"fingerprint": texts.teacher.fingerprint}, texts.teacher.width, len(rows),
        )  # fmt: skip
        meeting.save(folder)
        seal(folder)
