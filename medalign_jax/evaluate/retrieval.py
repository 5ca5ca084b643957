"""Nearest class sentence and audio-report retrieval: by a fitted map, or as trained heads compare.

`sentences` puts the outcome of all folds together and names it.

CKA aligns the geometry of two spaces, not their coordinates: it is unchanged when one side is
rotated. Cosine between the outputs of the audio head and of the text head therefore means
something only where a coordinate-wise loss (InfoNCE, L2, cosine) trained them. For CKA, `fit_map`
finds the missing coordinates in closed form from *training pairs only*: an orthogonal map
(Procrustes, which keeps the geometry and so shows what the alignment itself achieved) or a ridge
regression (which may also rescale, and so measures alignment plus a linear fit). Say which one
was used beside every number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Literal, get_args

import numpy as np

from medalign_jax.core.errors import UserError
from medalign_jax.evaluate.statistics import hits

MapKind = Literal["none", "procrustes", "ridge"]
MAPS: tuple[str, ...] = get_args(MapKind)


class RetrievalError(UserError):
    """Embeddings that cannot be compared."""


@dataclasses.dataclass(frozen=True)
class Map:
    """Brings audio and text embeddings into one space: centred, then audio @ matrix.

    Attributes:
      kind: "none", "procrustes" or "ridge".
      audio_mean: (D_a,) mean of the training recordings; zeros for "none".
      text_mean: (D_t,) mean of the training reports; zeros for "none".
      matrix: (D_a, D_t), identity for "none".
    """

    kind: MapKind
    audio_mean: np.ndarray
    text_mean: np.ndarray
    matrix: np.ndarray

    def audio(self, embeddings: np.ndarray) -> np.ndarray:
        """(n, D_a) audio embeddings in the common space, (n, D_t)."""
        return (np.asarray(embeddings, np.float64) - self.audio_mean) @ self.matrix

    def text(self, embeddings: np.ndarray) -> np.ndarray:
        """(..., D_t) text embeddings in the common space."""
        return np.asarray(embeddings, np.float64) - self.text_mean


def fit_map(
    audio: np.ndarray, text: np.ndarray, kind: MapKind = "procrustes", ridge: float = 0.1
) -> Map:
    """Fits the map from audio to text embeddings on training pairs.

    Args:
      audio: (n, D_a) embeddings of training recordings.
      text: (n, D_t) embeddings of their reports, row by row.
      kind: "none" leaves both as they are; "procrustes" is the orthogonal map (of orthonormal
        columns or rows where widths differ) closest to the pairs, Schönemann 1966; "ridge" is
        linear regression with an l2 penalty.
      ridge: penalty of "ridge" in units of the mean variance of an audio coordinate.

    Raises:
      RetrievalError: shapes disagree, values are not finite, fewer than two pairs, widths that
        differ for "none", or an unknown kind.
    """
    audio, text = _check(audio, "audio", 2), _check(text, "text", 2)
    if len(audio) != len(text) or len(audio) < 2:
        raise RetrievalError(f"a map needs 2 or more pairs; got {len(audio)} and {len(text)} rows")
    widths = audio.shape[1], text.shape[1]
    if kind == "none":
        if widths[0] != widths[1]:
            raise RetrievalError(f'widths {widths} differ; fit a map instead of kind="none"')
        return Map(kind, np.zeros(widths[0]), np.zeros(widths[1]), np.eye(widths[0]))
    audio_mean, text_mean = audio.mean(axis=0), text.mean(axis=0)
    a, t = audio - audio_mean, text - text_mean
    if not a.any() or not t.any():
        raise RetrievalError("all embeddings of one side are the same: there is nothing to map")
    if kind == "procrustes":
        left, _, right = np.linalg.svd(a.T @ t, full_matrices=False)
        matrix = left @ right
    elif kind == "ridge":
        gram = a.T @ a
        penalty = ridge * np.trace(gram) / len(gram)
        matrix = np.linalg.solve(gram + penalty * np.eye(len(gram)), a.T @ t)
    else:
        raise RetrievalError(f"unknown map {kind!r}: none, procrustes or ridge")
    return Map(kind, audio_mean, text_mean, matrix)


@dataclasses.dataclass(frozen=True)
class NearestSentence:
    """Classes by the nearest class sentence.

    Attributes:
      scores: (n, C) cosine to each class; feed them to `statistics.auroc_statistic`.
      predicted: (n,) the class with the highest cosine, the first of equals.
    """

    scores: np.ndarray
    predicted: np.ndarray

    def hits(self, truth: np.ndarray) -> np.ndarray:
        """(n,) probability that the class named is the true one (n,); equals share it evenly."""
        return hits(truth, self.scores)


def nearest_sentence(
    audio: np.ndarray, class_text: np.ndarray, mapping: Map | None = None
) -> NearestSentence:
    """Classifies recordings by the nearest class sentence.

    With a map fitted on training pairs this is not zero-shot classification, since the pairs say
    which recordings go with which words.

    Args:
      audio: (n, D_a) embeddings of the audio head.
      class_text: (C, D_t), or (C, K, D_t) for K wordings per class: their unit vectors are
        averaged.
      mapping: from `fit_map`; None compares the embeddings as they are.

    Raises:
      RetrievalError: shapes disagree, values are not finite, or an embedding has no direction.
    """
    class_text = _check(class_text, "class text", 3 if np.ndim(class_text) == 3 else 2)
    audio, class_text = _mapped(_check(audio, "audio", 2), class_text, mapping)
    if class_text.ndim == 3:
        class_text = _unit(class_text, "class text").mean(axis=1)
    scores = _cosine(audio, class_text)
    return NearestSentence(scores, scores.argmax(axis=1))


@dataclasses.dataclass(frozen=True)
class Recall:
    """Retrieval in one direction, over n queries.

    Attributes:
      hits: for each k, (n,) probability that one of the k first is right (0 or 1 but for ties,
        which are broken evenly). Their mean is recall@k; feed them to
        `statistics.mean_statistic` for an interval.
      ranks: (n,) expected rank of the first right answer, from 1.
      chance: for each k, recall@k of a random order.
      median_rank: median of `ranks`.
      chance_rank: the same for a random order.
    """

    hits: dict[int, np.ndarray]
    ranks: np.ndarray
    chance: dict[int, float]
    median_rank: float
    chance_rank: float

    def recall(self, k: int) -> float:
        """Mean of `hits[k]`."""
        return float(self.hits[k].mean())


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Both directions, and the cosine matrix that they come from.

    Attributes:
      audio_to_report: one query per recording, among the distinct reports.
      report_to_audio: one query per recording's report, among all recordings; every recording
        with the same report is right.
      similarity: (n, U) cosine of recordings and distinct reports.
      reports: (U,) the text ids of the columns, in order of first appearance.
    """

    audio_to_report: Recall
    report_to_audio: Recall
    similarity: np.ndarray
    reports: tuple[Hashable, ...]


def retrieve(
    audio: np.ndarray,
    text: np.ndarray,
    text_ids: Sequence[Hashable],
    mapping: Map | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> Retrieval:
    """Ranks reports for recordings and recordings for reports by cosine.

    Recordings that share a report are equally right answers to it, and a report counts once
    however many recordings have it.

    Args:
      audio: (n, D_a) embeddings of the audio head.
      text: (n, D_t) embeddings of each recording's report.
      text_ids: (n,) the reports' texts, or any id that is equal for equal texts.
      mapping: from `fit_map`, fitted on other pairs; None compares embeddings as they are.
      ks: sizes of the lists for recall@k.

    Raises:
      RetrievalError: as `nearest_sentence`, or lengths differ.
    """
    audio, text = _check(audio, "audio", 2), _check(text, "text", 2)
    if not len(audio) == len(text) == len(text_ids):
        raise RetrievalError(
            f"recordings, reports and ids differ in number: {len(audio)}, {len(text)}, "
            f"{len(text_ids)}"
        )
    first: dict[Hashable, int] = {}
    for i, name in enumerate(text_ids):
        first.setdefault(name, i)
    column = {name: j for j, name in enumerate(first)}
    own = np.array([column[name] for name in text_ids])
    audio, text = _mapped(audio, text[list(first.values())], mapping)
    similarity = _cosine(audio, text)  # (n, U)
    right = own[:, None] == np.arange(len(first))
    return Retrieval(
        _recall(similarity, right, ks),
        _recall(similarity.T[own], right.T[own], ks),
        similarity,
        tuple(first),
    )


def _recall(similarity: np.ndarray, right: np.ndarray, ks: Sequence[int]) -> Recall:
    """Recall of queries (rows) among items (columns), each row with one right item or more."""
    best = np.where(right, similarity, -np.inf).max(axis=1, keepdims=True)
    above = (similarity > best).sum(axis=1)
    tied_right = ((similarity == best) & right).sum(axis=1)
    tied_wrong = ((similarity == best) & ~right).sum(axis=1)
    n_right, n_wrong = right.sum(axis=1), (~right).sum(axis=1)
    ranks = above + (tied_right + tied_wrong + 1) / (tied_right + 1)
    hits = {k: _hit_probability(k - above, tied_right, tied_wrong) for k in ks}
    chance = {k: float(_hit_probability(k + 0 * above, n_right, n_wrong).mean()) for k in ks}
    chance_rank = float(np.median((n_right + n_wrong + 1) / (n_right + 1)))
    return Recall(hits, ranks, chance, float(np.median(ranks)), chance_rank)


def _hit_probability(places: np.ndarray, right: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """Probability that the first `places` of a random order of the items hold a right one."""
    miss = np.ones(len(places))
    for i in range(int(max(0, places.max()))):
        left = np.maximum(right + wrong - i, 1)
        factor = np.maximum(wrong - i, 0) / left
        miss = np.where(i < places, miss * factor, miss)
    return 1 - miss


def _mapped(audio: np.ndarray, text: np.ndarray, mapping: Map | None):
    if mapping is not None:
        if (audio.shape[-1], text.shape[-1]) != mapping.matrix.shape:
            raise RetrievalError(
                f"the map is of widths {mapping.matrix.shape}; embeddings are "
                f"{audio.shape[-1]} and {text.shape[-1]} wide"
            )
        audio, text = mapping.audio(audio), mapping.text(text)
    if audio.shape[-1] != text.shape[-1]:
        raise RetrievalError(
            f"audio is {audio.shape[-1]} wide, text {text.shape[-1]}; fit a map first"
        )
    return audio, text


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    # Rounded, so that equal vectors tie whatever order the matrix product adds in.
    return np.round(_unit(a, "audio") @ _unit(b, "text").T, 12)


def _unit(x: np.ndarray, name: str) -> np.ndarray:
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    if np.any(norm == 0):
        row = np.argwhere(norm[..., 0] == 0)[0].tolist()
        raise RetrievalError(f"{name} embedding {row} is zero and has no direction")
    return x / norm


def _check(x: np.ndarray, name: str, ndim: int) -> np.ndarray:
    x = np.asarray(x, np.float64)
    if x.ndim != ndim or not x.size:
        raise RetrievalError(f"{name} embeddings have {ndim} axes, none empty; got {x.shape}")
    if not np.all(np.isfinite(x)):
        row = np.argwhere(~np.isfinite(x))[0].tolist()
        raise RetrievalError(f"{name} embedding {row[0]} is not finite")
    return x
