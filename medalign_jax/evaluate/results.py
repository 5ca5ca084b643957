"""`evaluation.json`: what was measured, on what, with which interval.

Schema: `{"provenance": {...}, "results": [{"task", "dataset", "kind", "stage", "metric",
"value", "ci_low", "ci_high", "n_train", "n_test", "seeds", "notes"}]}`, UTF-8, no NaN.
"""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medalign_jax.core.errors import UserError
from medalign_jax.core.files import write_text
from medalign_jax.evaluate.statistics import Interval

LOWER_IS_BETTER = frozenset({"mae"})  # metrics that are errors


class ResultsError(UserError):
    """A result that must not be written, or a file that does not hold results."""


@dataclasses.dataclass(frozen=True)
class Result:
    """One measured number.

    Attributes:
      task: what is asked, for example "diagnosis".
      dataset: name of the data set.
      kind: how it is asked: "linear", "linear_10_labels", "nearest_sentence", "retrieval", ...
      stage: "before", "after", or the name of an ablation or reference.
      metric: "auroc", "mae", "accuracy", "recall@1", ...
      value: the number, finite.
      ci_low: lower end of its 95 % interval over subjects; None with `ci_high` where
        there is no interval, and `notes` then says why.
      ci_high: upper end.
      n_train: training recordings used, those of a fitted map included.
      n_test: test recordings.
      seeds: seeds, or numbers of the draws, that the value is averaged over.
      notes: anything a reader must know.
    """

    task: str
    dataset: str
    kind: str
    stage: str
    metric: str
    value: float
    ci_low: float | None
    ci_high: float | None
    n_train: int
    n_test: int
    seeds: tuple[int, ...] = (0,)
    notes: str = ""

    def __post_init__(self) -> None:
        where = self.key
        for name in ("task", "dataset", "kind", "stage", "metric"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ResultsError(f"result {where}: {name} is empty or not a text")
        counts = [self.n_train, self.n_test, *self._seeds()]
        if any(isinstance(n, bool) or not isinstance(n, numbers.Integral) for n in counts):
            raise ResultsError(f"result {where}: n_train, n_test and seeds are whole numbers")
        object.__setattr__(self, "seeds", tuple(map(int, self.seeds)))
        if not isinstance(self.notes, str):
            raise ResultsError(f"result {where}: notes is {self.notes!r}, not a text")
        for name in ("value", "ci_low", "ci_high"):
            self._check_number(name)
        if (self.ci_low is None) != (self.ci_high is None):
            raise ResultsError(f"result {where}: one end of the interval is missing")
        if self.ci_low is None and not self.notes:
            raise ResultsError(f"result {where}: no interval; say why in notes")
        if self.ci_low is not None and self.ci_low > self.ci_high:
            raise ResultsError(f"result {where}: interval {self.ci_low} > {self.ci_high}")
        if self.n_train < 0 or self.n_test < 1:
            raise ResultsError(f"result {where}: n_train {self.n_train}, n_test {self.n_test}")

    def _seeds(self) -> Sequence[Any]:
        if isinstance(self.seeds, str) or not isinstance(self.seeds, Sequence | range):
            raise ResultsError(f"result {self.key}: seeds is {self.seeds!r}, not a list of numbers")
        return self.seeds

    def _check_number(self, name: str) -> None:
        number = getattr(self, name)
        if number is None and name != "value":
            return
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ResultsError(f"result {self.key}: {name} is {number!r}, not a number")
        if not math.isfinite(number):
            raise ResultsError(
                f"result {self.key}: {name} is {number}; a score that is not defined is left "
                "out and named, not written as a number"
            )

    @property
    def key(self) -> str:
        """Task, data set, kind, stage and metric: unique in a file."""
        return "/".join(map(str, (self.task, self.dataset, self.kind, self.stage, self.metric)))

    @classmethod
    def of(cls, interval: Interval, **fields: Any) -> Result:
        """A result whose value and interval belong together."""
        return cls(value=interval.value, ci_low=interval.low, ci_high=interval.high, **fields)


def write_results(
    path: str | os.PathLike, results: Sequence[Result], provenance: Mapping[str, Any]
) -> None:
    """Writes `evaluation.json` in one step: a reader sees the old file or the whole new one.

    Raises:
      ResultsError: two results with the same key, or provenance that JSON cannot hold.
    """
    _check_unique(results)
    content = {
        "provenance": dict(provenance),
        "results": [dataclasses.asdict(result) for result in results],
    }
    try:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ResultsError(f"provenance cannot be written as JSON: {error}") from error
    write_text(path, text)


def read_results(path: str | os.PathLike) -> tuple[list[Result], dict[str, Any]]:
    """Reads `evaluation.json`; returns results and provenance.

    Raises:
      ResultsError: not JSON, not this schema, or a value that a result may not have.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ResultsError(f"cannot read results from {path}: {error}") from error
    if not isinstance(content, dict) or set(content) != {"provenance", "results"}:
        raise ResultsError(f'{path} is not an object of "provenance" and "results"')
    if not isinstance(content["results"], list) or not isinstance(content["provenance"], dict):
        raise ResultsError(f'{path}: "results" is not a list, or "provenance" not an object')
    names = {field.name for field in dataclasses.fields(Result)}
    results = []
    for i, row in enumerate(content["results"]):
        if not isinstance(row, dict) or set(row) != names:
            odd = set(row) ^ names if isinstance(row, dict) else row
            raise ResultsError(f"{path}: result {i} lacks or has unknown fields: {odd}")
        results.append(Result(**row))
    _check_unique(results)
    return results, content["provenance"]


def _check_unique(results: Sequence[Result]) -> None:
    seen: set[str] = set()
    for result in results:
        if result.key in seen:
            raise ResultsError(f"two results {result.key}")
        seen.add(result.key)
