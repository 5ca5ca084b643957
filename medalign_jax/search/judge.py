"""What labelled recordings say of a new one: probabilities that are calibrated, and when to look.

    judge = Judge.fit(embeddings, labels, subjects)
    judge(encoder.embed([waveform], 16_000))[0].possible       # ("normal",), or two to look at

A linear probe is fitted on all labelled recordings. How sure it may be is taken from the same probe
fitted without each subject in turn (five folds by subject): one temperature for its log-odds
(Guo et al. 2017), and for each class a threshold such that it is named for 9 of 10 subjects who
have it (label-conditional conformal prediction over folds, Vovk 2015; every subject counts as one).
So a rare class is as safe as a common one: one of fewer than nine subjects is never excluded.

All of it holds for recordings like those that were labelled. One that is less like any of them than
95 of 100 labelled ones are like another subject's is said to be unlike.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
from scipy import optimize

from medalign_jax.core.errors import UserError
from medalign_jax.evaluate.folds import Fold, folds_by_subject
from medalign_jax.evaluate.probes.linear import LinearModel, fit_linear
from medalign_jax.evaluate.probes.problem import Problem
from medalign_jax.evaluate.tasks import Task

FOLDS = 5
COVERAGE = 0.9
_FAMILIAR = 0.95  # share of labelled subjects that are not to be called unlike
_LEAST = 1e-12  # probability


class JudgeError(UserError):
    """Labels that nothing can be learnt from."""


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What is said of one recording.

    Attributes:
      probabilities: class -> calibrated probability, most likely first.
      possible: classes that cannot be excluded at `COVERAGE`.
      unlike: whether it is unlike everything that was labelled; what is said then means little.
    """

    probabilities: dict[str, float]
    possible: tuple[str, ...]
    unlike: bool = False

    @property
    def unsure(self) -> bool:
        """Whether somebody should look: not exactly one class is possible, or it is unlike all."""
        return self.unlike or len(self.possible) != 1


@dataclasses.dataclass(frozen=True, eq=False)
class Judge:
    """A probe that knows how sure it may be.

    Attributes:
      model: fitted on all labelled recordings.
      classes: names, in the model's order.
      temperature: that its log-probabilities are divided by.
      least: (C,) smallest calibrated probability at which each class is possible.
      known: (N, D) unit vectors of the labelled recordings, standardised.
      near: cosine to the nearest of them below which a recording is unlike.
      counts: class -> labelled recordings.
      subjects: how many subjects were labelled.
      accuracy: of recordings whose subject was left out.
    """

    model: LinearModel
    classes: tuple[str, ...]
    temperature: float
    least: np.ndarray
    known: np.ndarray
    near: float
    counts: dict[str, int]
    subjects: int
    accuracy: float

    @classmethod
    def fit(
        cls, embeddings: np.ndarray, labels: Sequence[str], subjects: Sequence[Hashable]
    ) -> Judge:
        """Fits the probe.

        Args:
          embeddings: (N, D).
          labels: (N,) names; "" where there is none, which leaves the recording out.
          subjects: (N,) ids.

        Raises:
          JudgeError: fewer than two classes, or a class of fewer subjects than it takes to judge
            it from others.
        """
        known = np.array([i for i, label in enumerate(labels) if label], int)
        names = tuple(sorted({labels[i] for i in known}))
        if len(names) < 2:
            raise JudgeError(f"labels name {len(names)} class; it takes two to tell apart")
        x = np.asarray(embeddings)[known]
        of = [subjects[i] for i in known]
        numbers = np.array([names.index(labels[i]) for i in known], np.int32)
        _check_subjects(names, numbers, of)
        task = Task("label", "", "classification", numbers, names)
        folds = folds_by_subject(of, [task], min(FOLDS, len(set(of))))
        group = {name: i for i, name in enumerate(dict.fromkeys(of))}
        groups = np.array([group[name] for name in of])
        *held_out, model = _fitted(x, numbers, groups, folds, len(names))
        logs = np.zeros((len(x), len(names)))
        for fold, fitted in zip(folds, held_out, strict=True):
            logs[fold.test] = _logs(fitted(x[fold.test]))
        temperature = _temperature(logs, numbers)
        own = _tempered(logs, temperature)[np.arange(len(x)), numbers]
        least = [_reached(own[numbers == c], groups[numbers == c], COVERAGE)
                 for c in range(len(names))]  # fmt: skip
        unit = _unit(model.scaling(x))
        return cls(
            model, names, temperature, np.array(least), unit,
            _reached(_nearest_other(unit, groups), groups, _FAMILIAR, -2.0),
            {name: int((numbers == c).sum()) for c, name in enumerate(names)},
            len(group), float((logs.argmax(axis=1) == numbers).mean()),
        )  # fmt: skip

    def __call__(self, embeddings: np.ndarray) -> list[Judgement]:
        """One judgement for each row of embeddings (M, D)."""
        x = np.asarray(embeddings)
        rows = _tempered(_logs(self.model(x)), self.temperature)
        near = (_unit(self.model.scaling(x)) @ self.known.T).max(axis=1)
        return [self._judged(*each) for each in zip(rows, near, strict=True)]

    def _judged(self, row: np.ndarray, near: float) -> Judgement:
        order = np.argsort(-row, kind="stable")
        return Judgement(
            {self.classes[c]: float(row[c]) for c in order},
            tuple(self.classes[c] for c in order if row[c] >= self.least[c]),
            bool(near < self.near),
        )


def _fitted(
    x: np.ndarray, numbers: np.ndarray, groups: np.ndarray, folds: Sequence[Fold], classes: int
) -> list[LinearModel]:
    """A model for each fold, then one of all rows, all with the penalty that this one chooses.

    Each with a penalty of its own would be sure of itself to another degree, and one temperature
    could not serve all.
    """
    x, last = np.concatenate([x, x[:1]]), len(x)  # a problem needs a row to test
    numbers, groups = np.append(numbers, numbers[0]), np.append(groups, groups.max() + 1)
    whole = Problem(numbers, np.arange(last), np.array([last]), groups, classes)
    (model,) = fit_linear(x, [whole])
    parts = [Problem(numbers, fold.train, fold.test, groups, classes) for fold in folds]
    return [*fit_linear(x, parts, [model.penalty]), model]


def _check_subjects(names: Sequence[str], numbers: np.ndarray, of: Sequence[Hashable]) -> None:
    pairs = {(int(c), subject) for c, subject in zip(numbers, of, strict=True)}
    counts = Counter(c for c, _ in pairs)
    if few := [names[c] for c, count in counts.items() if count < 2]:
        raise JudgeError(
            f"label {few[0]!r} is of one subject only: it cannot be judged from others; label more "
            "or leave it out"
        )


def _logs(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probabilities, _LEAST))


def _tempered(logs: np.ndarray, temperature: float) -> np.ndarray:
    scaled = logs / temperature
    weights = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def _temperature(logs: np.ndarray, numbers: np.ndarray) -> float:
    """Of the least cross-entropy of recordings whose subject was left out."""
    rows = np.arange(len(numbers))

    def loss(log: float) -> float:
        return -_logs(_tempered(logs, np.exp(log)))[rows, numbers].mean()

    return float(np.exp(optimize.minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _nearest_other(unit: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(N,) cosine to the nearest recording of another subject."""
    cosines = unit @ unit.T
    cosines[groups[:, None] == groups[None, :]] = -1.0
    return cosines.max(axis=1)


def _reached(values: np.ndarray, groups: np.ndarray, share: float, unknown: float = 0.0) -> float:
    """What the share of the subjects, and of one more, reach; `unknown` where they are too few.

    Every subject counts as one, in equal parts of its recordings.
    """
    _, number, counts = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.argsort(-values)
    reached = np.cumsum((1 / counts[number])[order])
    needed = share * (len(counts) + 1)
    at = np.searchsorted(reached, needed - 1e-9)
    return float(values[order[at]]) if at < len(values) else unknown
