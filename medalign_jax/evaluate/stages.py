"""What is measured, and how: stages, baselines that guess, settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from medalign_jax.core.errors import UserError
from medalign_jax.evaluate.folds import Fold
from medalign_jax.evaluate.probes import PROBES
from medalign_jax.evaluate.tasks import Task

PLAIN = "spectral statistics"  # the baseline that every encoder is held against
METADATA = "metadata"
CONSTANT = "majority or mean"
NEAREST = "nearest training waveform"
BASELINE_STAGES = frozenset({PLAIN, METADATA, CONSTANT, NEAREST})  # no other stage is called so
BY_RIDGE = ", reports by ridge"  # after a stage's name: a linear map to the reports' vectors
RANDOM = ", random weights"  # after an encoder's name: its architecture before any training
MINUS = " minus "  # between the names of two stages: the difference of their results


@dataclasses.dataclass(frozen=True)
class Stage:
    """Features of the same N recordings.

    Attributes:
      name: "before", "after", an encoder, a control, a baseline.
      features: (N, D), or one (N, D) per fold where a model was trained on each.
      role: "encoder", "control", "baseline" or "reference"; decides what it is compared with.
      notes: anything a reader must know of it.
    """

    name: str
    features: np.ndarray | tuple[np.ndarray, ...]
    role: str = "encoder"
    notes: str = ""

    def of(self, fold: int) -> np.ndarray:
        """(N, D) for the probes of a fold."""
        return self.features[fold] if isinstance(self.features, tuple) else self.features


@dataclasses.dataclass(frozen=True)
class Guess:
    """A baseline that predicts without a probe.

    Attributes:
      name: "majority", "nearest training waveform", ...
      predict: of a task and a fold: scores (m, C) of the fold's known test recordings, or (m,)
        numbers; None where it has nothing to say of the task.
      notes: kind of task -> anything a reader must know of it.
    """

    name: str
    predict: Callable[[Task, Fold], np.ndarray | None]
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How it is measured.

    Attributes:
      probes: names in `probes.PROBES`; the first one is the headline.
      per_class: labels of each class in the few-label probe; 0 leaves it out.
      draws: draws of few labels.
      seeds: seeds of probes that start at random.
    """

    probes: tuple[str, ...] = ("linear",)
    per_class: int = 10
    draws: int = 20
    seeds: int = 5

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.probes) - set(PROBES)):
            raise UserError(f"unknown probe {unknown[0]!r}; there are {', '.join(PROBES)}")
        if twice := [p for p in self.probes if self.probes.count(p) > 1]:
            raise UserError(f"the probe {twice[0]!r} is named twice; name it once")
        if not self.probes or min(self.draws, self.seeds) < 1 or self.per_class < 0:
            raise UserError("evaluation takes a probe, one draw and one seed at least")

    @property
    def kinds(self) -> tuple[str, ...]:
        """Probes with all labels and with few, as `Result.kind` names them."""
        few = [f"{probe}_{self.per_class}_labels" for probe in self.probes if self.per_class]
        return (*self.probes, *few)
