"""Next-token losses of student and teacher without a (batch, time, vocabulary) array.

The response is cut into chunks of positions. A scan computes the scores of one chunk at a time from
the last hidden states, reduces them to a number for each token, and forgets them; the backward pass
computes them again (`jax.checkpoint`). What a step holds of the vocabulary is therefore one chunk's
scores and, where a head learns, one gradient of its kernel, which the scan adds up in place.

Shapes: B rows, R response positions, c positions of a chunk, W channels, V tokens, k kept tokens.
A head is a function of hidden states, (B, c, W) -> scores (B, c, V), that closes over its
parameters (such as `Decoder.logits`, bound); gradients reach them. A head that gathers its kernel
over the mesh does so inside, so that the gathered kernel lives as long as one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from medalign_jax.core.errors import UserError
from medalign_jax.losses.chunked import map_chunks, sum_chunks
from medalign_jax.losses.divergences import JSD, LOG_ZERO, Divergence

Head = Callable[[jax.Array], jax.Array]


class TopK(NamedTuple):
    """A teacher's next-token distribution, cut down to its k likeliest tokens and a rest.

    ids: (B, R, k) int, the tokens.
    log_probs: (B, R, k), theirs, at the divergence's temperature and over the shared vocabulary.
    rest: (B, R), log-probability of all other tokens together. Kept, because 1 minus the sum of
      the others would be rounding error where the teacher is sure.

    The k + 1 are normalised anew when they are used, so they may be stored rounded.
    """

    ids: jax.Array
    log_probs: jax.Array
    rest: jax.Array


def next_token_losses(
    student_hidden: jax.Array,
    teacher: jax.Array | TopK | None,
    labels: jax.Array,
    *,
    student_head: Head,
    teacher_head: Head | None = None,
    divergence: Divergence = JSD,
    shared_vocab: int | None = None,
    chunk: int = 256,
) -> dict[str, jax.Array]:
    """Divergence and cross-entropy of each response token (L_txt's top layer, L_SFT).

    Against a `TopK` the divergence is that of k + 1 categories, the rest being one. Lumping can
    only lower an f-divergence (data processing inequality), so it is a lower bound of the live
    teacher's, equal to it for k = `shared_vocab`.

    Args:
      student_hidden: (B, R, W) states whose next token is the label. Must be finite everywhere.
      teacher: (B, R, W') hidden states, `TopK`, or None for the cross-entropy alone. Never
        differentiated, nor are the parameters of its head.
      labels: (B, R) int. Padding may hold anything; a label outside the student's vocabulary has
        a cross-entropy of NaN, which `masked_sum` passes over where it is masked.
      student_head, teacher_head: see the module; the latter with hidden states only.
      divergence: what to compare with.
      shared_vocab: number of leading tokens that mean the same on both sides. The divergence is
        over those, normalised to them; the cross-entropy is over all that the student's head has.
        None: both heads have the same number and share them all.
      chunk: most positions of a row whose scores exist at once.

    Returns:
      "cross_entropy" (B, R) float32, "correct" (B, R) bool (the label is the likeliest token, the
      first of equals), and, unless `teacher` is None, "divergence" (B, R) float32.

    Raises:
      UserError: shapes that do not fit, a vocabulary that is not shared, `chunk` below 1.
    """
    _check(student_hidden, teacher, labels, teacher_head)
    losses = _losses_of(student_head, teacher_head, divergence, shared_vocab)
    parts = (student_hidden, (teacher, labels))
    return map_chunks(lambda part: losses(*part), parts, chunk)


def next_token_sum(
    student_hidden: jax.Array,
    teacher: jax.Array | TopK | None,
    labels: jax.Array,
    weights: Mapping[str, jax.Array],
    *,
    student_head: Head,
    teacher_head: Head | None = None,
    divergence: Divergence = JSD,
    shared_vocab: int | None = None,
    chunk: int = 256,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weighted sum of `next_token_losses`, whose gradient needs no second computation.

    Args:
      weights: of each token, (B, R) float, for "divergence", "cross_entropy" or both. A token of
        weight 0 counts for nothing, whatever its label.
      the others: as of `next_token_losses`.

    Returns:
      The sum, (), float32; and what `next_token_losses` returns, without a gradient.

    Raises:
      UserError: as `next_token_losses`.
    """
    _check(student_hidden, teacher, labels, teacher_head)
    losses = _losses_of(student_head, teacher_head, divergence, shared_vocab)
    parts = (student_hidden, (teacher, labels))
    return sum_chunks(losses, *parts, weights, chunk)


def _losses_of(
    student_head: Head, teacher_head: Head | None, divergence: Divergence, shared_vocab: int | None
) -> Callable[[jax.Array, tuple], dict[str, jax.Array]]:
    """The losses of a chunk: of hidden states, and of what the teacher says and the labels."""

    def losses(hidden: jax.Array, others: tuple) -> dict[str, jax.Array]:
        theirs, targets = others
        scores = student_head(hidden).astype(jnp.float32)
        out = _label_losses(scores, targets)
        if theirs is None:
            return out
        if isinstance(theirs, TopK):
            ours = divergence.log_probs(_leading(scores, shared_vocab, "student"))
            return out | {"divergence": _lumped(divergence, ours, jax.lax.stop_gradient(theirs))}
        other = jax.lax.stop_gradient(teacher_head(jax.lax.stop_gradient(theirs)))
        value = vocabulary_divergence(scores, other, divergence, shared_vocab)
        return out | {"divergence": value}

    return losses


def top_k(
    hidden: jax.Array,
    head: Head,
    k: int,
    *,
    shared_vocab: int | None = None,
    temperature: float = 1.0,
    chunk: int = 256,
) -> TopK:
    """What `next_token_losses` needs of a teacher's last hidden states (B, R, W), to be stored.

    Args:
      hidden, head: the teacher's; see the module.
      k: tokens to keep, from 1 to the shared vocabulary.
      shared_vocab, temperature: those of the losses it is for; they cannot be changed afterwards.
      chunk: most positions of a row whose scores exist at once.

    Raises:
      UserError: `k`, `shared_vocab`, `temperature` or `chunk` out of range.
    """
    divergence = Divergence(temperature=temperature)

    def part(hidden: jax.Array) -> TopK:
        log_probs = divergence.log_probs(_leading(head(hidden), shared_vocab, "teacher"))
        if not 1 <= k <= log_probs.shape[-1]:
            raise UserError(
                f"teacher.top_k {k!r} is not a number of tokens from 1 to {log_probs.shape[-1]}"
            )
        # A sort stays on its device; lax.top_k has the partitioner gather the scores of all rows.
        ids = jnp.argsort(log_probs, axis=-1, descending=True)[..., :k]
        return TopK(ids, _pick(log_probs, ids), _rest(log_probs, ids))

    return map_chunks(part, hidden, chunk)


def vocabulary_divergence(
    student: jax.Array, teacher: jax.Array, divergence: Divergence, shared_vocab: int | None
) -> jax.Array:
    """Divergence (...) of scores (..., V) and (..., V') over the first `shared_vocab` tokens.

    Raises:
      UserError: a side has fewer tokens than that, or None is given and the sides differ.
    """
    if shared_vocab is None and student.shape[-1] != teacher.shape[-1]:
        raise UserError(
            f"the student has {student.shape[-1]} tokens and the teacher {teacher.shape[-1]}: set "
            "loss.shared_vocab to the number of leading tokens that mean the same to both"
        )
    student = _leading(student, shared_vocab, "student")
    return divergence.of_logits(student, _leading(teacher, shared_vocab, "teacher"))


def _check(hidden, teacher, labels, teacher_head) -> None:
    if hidden.ndim != 3 or labels.shape != hidden.shape[:2]:
        raise UserError(
            f"hidden states (B, R, W) need labels (B, R), got {hidden.shape} and {labels.shape}"
        )
    for leaf in jax.tree.leaves(teacher):
        if leaf.shape[:2] != labels.shape:
            raise UserError(
                f"the teacher's arrays must begin with (B, R) = {labels.shape}, got {leaf.shape}: "
                "its states have to be those of the same response tokens"
            )
    if teacher is not None and not isinstance(teacher, TopK) and teacher_head is None:
        raise UserError("a teacher's hidden states need teacher_head")


def _leading(scores: jax.Array, count: int | None, side: str) -> jax.Array:
    if count is None:
        return scores
    if not 1 <= count <= scores.shape[-1]:
        raise UserError(
            f"loss.shared_vocab is {count!r}, but the {side} has {scores.shape[-1]} tokens: give "
            "the number of leading tokens that both have"
        )
    return scores[..., :count]


def _label_losses(scores: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    entropy = jax.nn.logsumexp(scores, axis=-1) - _pick(scores, labels[..., None])[..., 0]
    return {"cross_entropy": entropy, "correct": jnp.argmax(scores, axis=-1) == labels}


def _pick(values: jax.Array, ids: jax.Array) -> jax.Array:
    """values (..., V) at ids (..., k); NaN, without a gradient, where there is no such token."""
    last = values.shape[-1] - 1
    picked = jnp.take_along_axis(values, jnp.clip(ids, 0, last), axis=-1)
    return jnp.where((ids >= 0) & (ids <= last), picked, jnp.nan)


def _rest(log_probs: jax.Array, ids: jax.Array) -> jax.Array:
    """Log-probability (B, c) of all of V tokens (B, c, V) but `ids` (B, c, k).

    `LOG_ZERO` where none is left.
    """
    # Row by row, from which the partitioner knows that no row is written from another device.
    mark = jax.vmap(jax.vmap(lambda row, at: row.at[at].set(True)))
    kept = mark(jnp.zeros(log_probs.shape, bool), ids)
    others = jnp.where(kept, LOG_ZERO, jnp.maximum(log_probs, LOG_ZERO))
    return jnp.maximum(jax.nn.logsumexp(others, axis=-1), LOG_ZERO)


def _lumped(divergence: Divergence, student: jax.Array, teacher: TopK) -> jax.Array:
    """Divergence (B, c) over k + 1 categories, of the student's log-probabilities (B, c, V)."""
    ours = jnp.concatenate(
        [_pick(student, teacher.ids), _rest(student, teacher.ids)[..., None]], axis=-1
    )
    theirs = jnp.concatenate([teacher.log_probs, teacher.rest[..., None]], axis=-1)
    return divergence.of_log_probs(ours, jax.nn.log_softmax(theirs.astype(jnp.float32), axis=-1))
