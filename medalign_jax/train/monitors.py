"""Watches the metrics for the failure signs that the AcuLa paper names, and says them in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from medalign_jax.core.errors import UserError

_VARIANCE = (
    "collapse: the variance of the audio embeddings is {now:.2g}, it began at {first:.2g}. "
    "Raise loss.ssm_weight or lower optimizer.learning_rate"
)
_RANK = (
    "collapse: the audio embeddings of a batch lie almost on one line (effective rank {now:.2f}, "
    "it began at {first:.2f}). Raise loss.ssm_weight"
)
_CKA = (
    "CKA is not rising: {now:.3f} after {step} steps, it began at {first:.3f}. Is the encoder "
    "pre-trained (alignment from scratch fails), are the reports varied, is "
    "optimizer.learning_rate too low?"
)
_RECONSTRUCTION = (
    "reconstruction diverges: {now:.4f}, its best was {best:.4f}. The encoder forgets its "
    "pre-training: raise loss.ssm_weight or lower optimizer.learning_rate"
)


class TrainingStoppedError(UserError):
    """The run cannot go on; the message names the last good checkpoint."""


class Monitors:
    """Feeds on logged metrics; each sign is reported once until it has gone away.

    Args:
      total_steps: planned length of the run; trends are judged after a fifth of it, at least 20
        steps.
    """

    def __init__(self, total_steps: int):
        self._patience = max(20, total_steps // 5)
        self._first: dict[str, float] = {}
        self._smooth: dict[str, float] = {}
        self._best_reconstruction = math.inf
        self._reported: set[str] = set()

    def check(self, step: int, metrics: dict[str, float], last_good: str) -> list[str]:
        """New warnings at this step.

        Raises:
          TrainingStoppedError: the loss or the gradient is not finite.
        """
        broken = [n for n in ("loss", "grad_norm") if not math.isfinite(metrics.get(n, 0.0))]
        if broken:
            raise TrainingStoppedError(
                f"step {step}: {' and '.join(broken)} became NaN or infinite, so training stopped. "
                f"The last good checkpoint is {last_good}. Lower optimizer.learning_rate or check "
                "the recordings, and begin anew with --restart or in another --workdir"
            )
        for name, value in metrics.items():
            self._first.setdefault(name, value)
            self._smooth[name] = 0.8 * self._smooth.get(name, value) + 0.2 * value
        error = self._smooth.get("reconstruction", math.inf)
        self._best_reconstruction = min(self._best_reconstruction, error)
        signs = dict(self._signs(step))
        warnings = [text for sign, text in signs.items() if sign not in self._reported]
        self._reported = set(signs)
        return warnings

    def replay(self, lines: Iterable[dict[str, Any]]) -> None:
        """Goes through the training lines of metrics.jsonl from before a restart, in silence."""
        for line in lines:
            if "loss" in line:
                numbers = {name: float(value) for name, value in line.items() if name != "step"}
                self.check(line["step"], numbers, "")

    def _signs(self, step: int) -> Iterator[tuple[str, str]]:
        now, first = self._smooth, self._first
        variance, rank = "embedding_variance", "effective_rank"
        if variance in now and now[variance] < 0.01 * first[variance]:
            yield variance, _VARIANCE.format(now=now[variance], first=first[variance])
        if rank in now and first[rank] > 2.0 and now[rank] < 1.2:
            yield rank, _RANK.format(now=now[rank], first=first[rank])
        if step >= self._patience and "cka" in now and now["cka"] < first["cka"] + 0.02:
            yield "cka", _CKA.format(now=now["cka"], first=first["cka"], step=step)
        if "reconstruction" in now:
            error = now["reconstruction"]
            if error > 1.5 * self._best_reconstruction:
                yield (
                    "reconstruction",
                    _RECONSTRUCTION.format(now=error, best=self._best_reconstruction),
                )
