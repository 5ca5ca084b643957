"""In how many directions embeddings vary: one that has collapsed has little for a probe to find."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from medalign_jax.evaluate.stages import Stage


def effective_rank(embeddings: np.ndarray) -> float:
    """Participation ratio (Σλ)² / Σλ² of the covariance's eigenvalues, as training logs it.

    Args:
      embeddings: (N, D), finite.

    Returns:
      From 1, all on one line, to min(N - 1, D); 0 where all are equal.
    """
    x = np.asarray(embeddings, np.float64)
    x = x - x.mean(0)
    gram = x @ x.T if x.shape[0] < x.shape[1] else x.T @ x
    total = np.square(gram).sum()
    return float(np.trace(gram) ** 2 / total) if total > 0 else 0.0


def ranks_of(stages: Sequence[Stage]) -> dict[str, float]:
    """Stage -> effective rank of all its rows, the recordings or subjects that are measured.

    Where each fold has a model of its own, the mean over the models.
    """
    ranks = {}
    for stage in stages:
        models = stage.features if isinstance(stage.features, tuple) else (stage.features,)
        ranks[stage.name] = round(float(np.mean([effective_rank(each) for each in models])), 2)
    return ranks


def describe_ranks(ranks: Mapping[str, float]) -> str:
    """A sentence for the screen and the page; "" where there is no stage."""
    if not ranks:
        return ""
    each = "; ".join(f"{name}: {rank:.1f}" for name, rank in ranks.items())
    return f"Directions in which the embeddings vary (effective rank): {each}."
