"""Baselines of a data set: what every encoder stands beside."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medalign_jax.core.errors import UserError
from medalign_jax.core.words import did_you_mean
from medalign_jax.data.recordings.dataset import AudioDataset
from medalign_jax.data.recordings.manifest import Row
from medalign_jax.evaluate.baselines import SpectralStatistics, constant, metadata_features
from medalign_jax.evaluate.context import check_metadata, context_columns, context_of
from medalign_jax.evaluate.embeddings import EmbeddingStore
from medalign_jax.evaluate.folds import Fold
from medalign_jax.evaluate.nearest_waveform import nearest_waveform
from medalign_jax.evaluate.probes import Problem
from medalign_jax.evaluate.stages import CONSTANT, METADATA, NEAREST, PLAIN, Guess, Stage
from medalign_jax.evaluate.suite import Suite
from medalign_jax.evaluate.tasks import Task

# random and ridge: see the callers, who have an encoder, and reports
BASELINES = ("majority", "metadata", "spectral", "nearest", "random", "ridge")

_OF_NUMBERS = (
    "the mean of the training answers; of all constants their median has the least absolute error"
)


def check_baselines(names: Sequence[str]) -> None:
    """Refuses a baseline that there is not.

    Raises:
      UserError: naming those that there are.
    """
    for name in names:
        if name not in BASELINES:
            raise UserError(
                f"unknown baseline {name!r}{did_you_mean(name, BASELINES)}; there are "
                f"{', '.join(BASELINES)}"
            )


def baseline_stages(
    suite: Suite,
    rows: Sequence[Row],
    names: Sequence[str],
    metadata: Sequence[str] = (),
    data: AudioDataset | None = None,
    store: EmbeddingStore | None = None,
) -> tuple[list[Stage], list[Guess]]:
    """The baselines of those names, as far as what is at hand allows.

    With several processes all have to call this.

    Args:
      suite: tasks and folds.
      rows: of the recordings.
      names: in `BASELINES`; "random" is an encoder, which the caller embeds.
      metadata: columns of circumstances beside those that are known.
      data: the recordings; None where there are only embeddings, so that nothing can be heard.
      store: keeps the spectral statistics.
    """
    check_baselines(names)
    stages, guesses = [], []
    if "majority" in names:
        guesses.append(Guess(CONSTANT, _constant, {"regression": _OF_NUMBERS}))
    if "metadata" in names and (stage := _metadata(suite, rows, metadata)):
        stages.append(stage)
    if data is not None and "spectral" in names:
        store = EmbeddingStore(None) if store is None else store
        found = store.embed({PLAIN: SpectralStatistics()}, data)[PLAIN]
        stages.append(suite.stage(PLAIN, found, role="baseline"))
    if data is not None and "nearest" in names:
        guesses.append(Guess(NEAREST, _Nearest(suite, data)))
    return stages, guesses


def _constant(task: Task, fold: Fold) -> np.ndarray:
    train, test = (rows[task.known[rows]] for rows in (fold.train, fold.test))
    groups = np.zeros(len(task.answers), np.int32)
    problem = Problem(task.answers, train, test, groups, len(task.classes))
    return constant(None, [problem])[0].scores


def _metadata(suite: Suite, rows: Sequence[Row], more: Sequence[str]) -> Stage | None:
    check_metadata(more, suite.options.tasks)
    columns = {name for row in rows for name in (*row.targets, *row.metadata)}
    named = [*context_columns(sorted(columns), suite.options.tasks), *more]
    features, names = metadata_features(context_of(rows, list(dict.fromkeys(named))))
    if not names:
        return None
    used = ", ".join(dict.fromkeys(name.partition(" ")[0] for name in names))
    return suite.stage(METADATA, features, role="baseline", notes=f"from {used}")


class _Nearest:
    """Answers of the recording whose waveform is most like it, among those of training."""

    def __init__(self, suite: Suite, data: AudioDataset):
        self._suite, self._data = suite, data
        self._found: dict[tuple[int, ...], np.ndarray] = {}

    def __call__(self, task: Task, fold: Fold) -> np.ndarray:
        """(m, C) shares of the nearest recordings' classes, or (m,) the mean of their numbers."""
        train, test = (rows[task.known[rows]] for rows in (fold.train, fold.test))
        of_row = np.empty(self._suite.count, int)
        for r, group in enumerate(self._suite.members):
            of_row[group] = r
        nearest = self._nearest(train, test)  # recording -> training recording
        answers = [task.answers[of_row[nearest[self._suite.members[r]]]] for r in test]
        if task.kind == "regression":
            return np.array([found.mean() for found in answers])
        counts = [np.bincount(found, minlength=len(task.classes)) for found in answers]
        return np.stack([count / count.sum() for count in counts])

    def _nearest(self, train: np.ndarray, test: np.ndarray) -> np.ndarray:
        """(N,) the training recording nearest to each recording of the test rows; -1 elsewhere."""
        key = (len(train), *train.tolist(), *test.tolist())
        if key not in self._found:
            fit, ask = (
                np.concatenate([self._suite.members[r] for r in rows]) for rows in (train, test)
            )
            index, _ = nearest_waveform(self._data.waveform, fit, ask, self._data.sample_rate)
            found = np.full(self._suite.count, -1)
            found[ask] = index
            self._found[key] = found
        return self._found[key]
