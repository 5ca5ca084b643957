"""Exports where sounds and words meet: `search.common_space` of each model of an AcuLa run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medalign_jax.core.seals import seal
from medalign_jax.evaluate.retrieval import RetrievalError, fit_map
from medalign_jax.runs.alignment import Aligned, Run
from medalign_jax.search.common_space import AUDIO, TEXT, Heads, Meeting, remove_space

_TEACHER = ("source", "layer", "pooling", "max_tokens", "lowercase", "dtype")  # of config.teacher


def export_spaces(run: Run, aligned: Sequence[Aligned], embedded: Sequence[np.ndarray]) -> None:
    """Beside the exported encoder of each fold; nothing where another layer than the last was
    aligned, which embeddings do not show.

    Args:
      run: what was run.
      aligned: the run's own alignment, one per fold.
      embedded: (N, D) of all recordings, one per fold.
    """
    config = run.config
    if -1 not in tuple(config.loss.layers):
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
