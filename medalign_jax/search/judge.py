"""What labelled recordings say of a new one: probabilities that are calibrated, and when to look.

    judge = Judge.fit(embeddings, labels, subjects)
    judge(encoder.embed([waveform], 16_000))[0].possible       # ("normal",), or two to look at

A linear probe is fitted on all labelled recordings. How sure it may be is taken from the same probe
fitted without each subject in turn (five folds by subject): one temperature for its log-odds
(Guo et al. 2017), and one threshold such that the true label is among those named for 9 of 10
subjects (split conformal prediction over folds, Vovk 2015; every subject counts as one). Both hold
for recordings like those that were labelled: another device, place or kind of patient is not.
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
_LEAST = 1e-12  # probability


class JudgeError(UserError):
    """Labels that nothing can be learnt from."""


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What is said of one recording.

    Attributes:
      probabilities: class -> calibrated probability, most likely first.
      possible: classes that cannot be excluded at `COVERAGE`.
    """

    probabilities: dict[str, float]
    possible: tuple[str, ...]

    @property
    def unsure(self) -> bool:
        """Whether somebody should look: not exactly one class is possible."""
        return len(self.possible) != 1


@dataclasses.dataclass(frozen=True, eq=False)
class Judge:
    """A probe that knows how sure it may be.

    Attributes:
      model: fitted on all labelled recordings.
      classes: names, in the model's order.
      temperature: that its log-probabilities are divided by.
      least: smallest calibrated probability of a class that is possible.
      counts: class -> labelled recordings.
      subjects: how many subjects were labelled.
      accuracy: of recordings whose subject was left out.
    """

    model: LinearModel
    classes: tuple[str, ...]
    temperature: float
    least: float
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
        return cls(
            model, names, temperature, _least(own, groups),
            {name: int((numbers == c).sum()) for c, name in enumerate(names)},
            len(group), float((logs.argmax(axis=1) == numbers).mean()),
        )  # fmt: skip

    def __call__(self, embeddings: np.ndarray) -> list[Judgement]:
        """One judgement for each row of embeddings (M, D)."""
        rows = _tempered(_logs(self.model(np.asarray(embeddings))), self.temperature)
        return [self._judged(row) for row in rows]

    def _judged(self, row: np.ndarray) -> Judgement:
        order = np.argsort(-row, kind="stable")
        return Judgement(
            {self.classes[c]: float(row[c]) for c in order},
            tuple(self.classes[c] for c in order if row[c] >= self.least),
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


def _least(own: np.ndarray, groups: np.ndarray) -> float:
    """What the true class's probability reaches for `COVERAGE` of the subjects; 0 for too few."""
    weights = 1 / np.bincount(groups)[groups]
    order = np.argsort(-own)
    reached = np.cumsum(weights[order])
    needed = COVERAGE * (groups.max() + 2)  # one more subject: the new one
    at = np.searchsorted(reached, needed - 1e-9)
    return float(own[order[at]]) if at < len(own) else 0.0
