"""What an encoder has to beat: nothing, metadata, plain statistics of the sound, random weights."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import soxr
from jax.sharding import Mesh

from medalign_jax.audio.spectral_statistics import STATISTICS, VERSION, spectral_statistics
from medalign_jax.core.errors import UserError
from medalign_jax.core.mesh import batch_sharding, batch_ways
from medalign_jax.core.rounding import power_of_two, round_up
from medalign_jax.core.words import finite_number, is_missing
from medalign_jax.encoder import Encoder
from medalign_jax.evaluate.context import holds_codes
from medalign_jax.evaluate.probes.problem import Prediction, Problem

RARE = 5  # words of fewer rows share a column
_OTHER = "(rare)"
_QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def majority(x: np.ndarray | None, problems: Sequence[Problem]) -> list[Prediction]:
    """A probe that looks at no feature: each class's share of the training rows.

    The class with the highest score is the majority's; all test rows have the same scores, so
    AUROC is 0.5.

    Args:
      x: not looked at; so that all probes are called alike.
      problems: of classes.

    Raises:
      ValueError: a regression, for which there is `mean`.
    """
    return [_share(problem) for problem in problems]


def mean(x: np.ndarray | None, problems: Sequence[Problem]) -> list[Prediction]:
    """A probe that looks at no feature: the mean of the training rows' numbers.

    It is the best constant for squared errors; for absolute ones, which `measure` reports, the
    median is, so that an encoder a little below this one in error may have learnt nothing.

    Args:
      x: not looked at.
      problems: regressions.

    Raises:
      ValueError: a problem of classes, for which there is `majority`.
    """
    return [_mean(problem) for problem in problems]


def constant(x: np.ndarray | None, problems: Sequence[Problem]) -> list[Prediction]:
    """`majority` for classes and `mean` for regressions."""
    return [_share(p) if p.classes else _mean(p) for p in problems]


def _share(problem: Problem) -> Prediction:
    if not problem.classes:
        raise ValueError("a regression has no majority; take the mean")
    known = np.asarray(problem.targets)[problem.train].astype(np.int64)
    share = np.bincount(known, minlength=problem.classes) / len(known)
    return Prediction(np.tile(share, (len(problem.test), 1)))


def _mean(problem: Problem) -> Prediction:
    if problem.classes:
        raise ValueError("classes have no mean; take the majority")
    value = np.asarray(problem.targets, np.float64)[problem.train].mean()
    return Prediction(np.full(len(problem.test), value))


def metadata_features(
    columns: Mapping[str, Sequence[str]], rare: int = RARE
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Numbers from whatever a manifest says of its rows: age, sex, device, site, ...

    A column whose values all read as numbers becomes one number, standardised, with 0 where it is
    missing, unless its name says that they are names (`context.holds_codes`): site 1, 2, 3. Any
    other column becomes one column of 0 and 1 for each word (capitals and blanks at the ends do
    not count). Words of fewer than `rare` rows share one, so that a column of names says nothing.
    Where values are missing a column of 0 and 1 says so. What is the same in all rows is left out.
    Only values are looked at, no label; scale and words are those of all rows.

    Args:
      columns: N texts each, by name; missing values are those of `words.is_missing`.
      rare: least rows for a word to have a column of its own.

    Returns:
      (N, M) float32, and the names of the M numbers ("age", "sex = f", "site missing").

    Raises:
      UserError: columns of different lengths.
    """
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(f"metadata columns have different numbers of rows: {lengths}")
    count = next(iter(lengths.values()), 0)
    features: dict[str, np.ndarray] = {}
    for name, values in columns.items():
        features |= _column(name, [_cell(value) for value in values], rare)
    kept = {name: column for name, column in features.items() if np.ptp(column) > 0}
    table = np.stack(list(kept.values()), axis=1) if kept else np.zeros((count, 0))
    return table.astype(np.float32), tuple(kept)


def _cell(value: str | None) -> str:
    return "" if is_missing(value) else str(value).strip().casefold()


def _column(name: str, cells: list[str], rare: int) -> dict[str, np.ndarray]:
    there = np.array([bool(cell) for cell in cells])
    if not there.any():
        return {}
    numbers = [None if holds_codes(name) else finite_number(cell) for cell in cells]
    if all(number is not None for number, known in zip(numbers, there, strict=True) if known):
        found = {name: _standardised(numbers, there)}
    else:
        found = _words(name, cells, rare)
    return found | {f"{name} missing": (~there).astype(np.float64)}


def _standardised(numbers: list[float | None], there: np.ndarray) -> np.ndarray:
    known = np.array([n for n, is_there in zip(numbers, there, strict=True) if is_there])
    column = np.zeros(len(numbers))
    column[there] = (known - known.mean()) / (known.std() or 1.0)
    return column


def _words(name: str, cells: list[str], rare: int) -> dict[str, np.ndarray]:
    counts = Counter(cell for cell in cells if cell)
    words = [w if counts[w] >= rare else _OTHER if w else "" for w in cells]
    return {
        f"{name} = {word}": np.array([w == word for w in words], np.float64)
        for word in sorted(set(words) - {""})
    }


def random_encoder(encoder: Encoder, seed: int = 0) -> Encoder:
    """The same architecture, front end, windows and mesh with random weights.

    Args:
      encoder: whose weights are not looked at, only their places.
      seed: of the weights.
    """
    module = encoder.architecture.module
    features = jnp.zeros((1, module.config.frames, module.config.mels), jnp.float32)
    # Runs once, so on a CPU it is not worth optimising: compiling takes a quarter of the time.
    options = _QUICK if jax.default_backend() == "cpu" else None
    init = jax.jit(module.init, compiler_options=options)
    params = init(jax.random.key(seed), features)["params"]
    places = jax.tree.map(lambda leaf: getattr(leaf, "sharding", None), encoder.params)
    return encoder.with_params(jax.tree.map(jax.device_put, params, places))


class SpectralStatistics:
    """`audio.spectral_statistics.spectral_statistics` of recordings, with the face of an `Encoder`.

    So an `EmbeddingStore` takes it beside encoders, and keeps its numbers. Recordings of like
    length share a batch, filled up to a power of two of seconds.

    Attributes:
      sample_rate: at which the numbers are taken, Hz.
      names: of the numbers.
      width: how many there are.
      sharding: of a batch over a mesh; None without one.
    """

    names = STATISTICS
    width = len(STATISTICS)

    def __init__(self, sample_rate: int = 16_000, mesh: Mesh | None = None):
        """With a mesh a batch is spread over its devices."""
        self.sample_rate = sample_rate
        self.sharding = None if mesh is None else batch_sharding(mesh)
        self._ways = batch_ways(mesh)

    def settings(self) -> dict[str, Any]:
        """What decides the numbers; JSON-able."""
        return {
            "name": "spectral statistics",
            "version": VERSION,
            "sample_rate": self.sample_rate,
        }

    def identity(self) -> str:
        """Hex SHA-256 of `settings`."""
        return hashlib.sha256(json.dumps(self.settings()).encode()).hexdigest()

    def embed(self, waveforms: Sequence[np.ndarray], sample_rate: int) -> np.ndarray:
        """N waveforms (samples,) of one rate -> (N, width) float32.

        Raises:
          UserError: a recording that is empty, not 1-D or holds NaN; names its index.
        """
        rows = list(self.stream((w, sample_rate) for w in waveforms))
        return np.stack(rows) if rows else np.zeros((0, self.width), np.float32)

    def stream(self, recordings: Iterable[tuple[np.ndarray, int]]) -> Iterator[np.ndarray]:
        """(waveform, sample rate) pairs as they come; yields (width,) float32 each, in order."""
        waiting: list[np.ndarray] = []
        held = 0
        for index, (waveform, rate) in enumerate(recordings):
            waiting.append(self._checked(index, waveform, rate))
            held += len(waiting[-1])
            if len(waiting) >= 256 or held >= 1200 * self.sample_rate:
                yield from self._drain(waiting)
                waiting, held = [], 0
        yield from self._drain(waiting)

    def _checked(self, index: int, waveform: np.ndarray, rate: int) -> np.ndarray:
        waveform = np.asarray(waveform)
        if waveform.ndim != 1 or waveform.size < 2 or not np.isfinite(waveform).all():
            raise UserError(
                f"recording {index} must be a finite float array (samples,) with at least 2 "
                f"samples, got {waveform.dtype} {waveform.shape}"
            )
        waveform = waveform.astype(np.float32)
        if rate != self.sample_rate:
            waveform = soxr.resample(waveform, rate, self.sample_rate, quality="HQ")
        return waveform

    def _drain(self, waveforms: list[np.ndarray]) -> Iterator[np.ndarray]:
        found = np.empty((len(waveforms), self.width), np.float32)
        buckets: dict[int, list[int]] = {}
        for index, waveform in enumerate(waveforms):
            seconds = -(-len(waveform) // self.sample_rate)
            buckets.setdefault(power_of_two(seconds), []).append(index)
        for seconds, rows in buckets.items():
            size = round_up(max(1, min(32, 256 // seconds)), self._ways)
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                samples = seconds * self.sample_rate
                found[part] = self._batch([waveforms[i] for i in part], size, samples)
        yield from found

    def _batch(self, waveforms: list[np.ndarray], size: int, samples: int) -> np.ndarray:
        batch, lengths = np.zeros((size, samples), np.float32), np.ones(size, np.int32)
        for row, waveform in enumerate(waveforms):
            batch[row, : len(waveform)] = waveform
            lengths[row] = len(waveform)
        batch, lengths = jax.device_put((batch, lengths), self.sharding)
        return np.asarray(spectral_statistics(batch, lengths, self.sample_rate))[: len(waveforms)]
