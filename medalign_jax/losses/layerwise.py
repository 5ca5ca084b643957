"""Layer-wise distillation: which layers pair, what projects them, how far they are apart.

arXiv 2509.18579 pairs the student's layers with the teacher's proportionally, has one learnable
projection W_i per pair, and calls the distance of hidden states a divergence (JSD). It leaves open
how hidden states become distributions, how W_i starts, and how halves round; what is written here
is our reading, and the configuration chooses between the forms.

Shapes: B rows, R positions, Ws and Wt channels of student and teacher, V tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from medalign_jax.core.errors import UserError
from medalign_jax.losses.chunked import map_chunks
from medalign_jax.losses.divergences import JSD, Divergence, generalised_jsd
from medalign_jax.losses.next_token import Head, vocabulary_divergence

HIDDEN_KINDS = ("jsd", "cosine", "mse")  # of `hidden_divergence`
LOGIT_LENS = "logit_lens"  # stands beside them where two frozen heads read the states

Pair = tuple[int, int]  # (student layer, teacher layer), both from 1

# Variation below this share of a vector's energy is the rounding error of a constant.
_CONSTANT = 1e-12


def layer_pairs(student_depth: int, teacher_depth: int, every: int = 1) -> tuple[Pair, ...]:
    """Layers to compare, last first.

    Student layer j of S pairs with teacher layer round(j T / S), halves rounded up and never below
    1, so that last pairs with last; of these every `every`-th is kept, counted from the last
    (k of the paper; S or more keeps the last alone). 28 and 36 layers with k = 7:
    (28, 36), (21, 27), (14, 18), (7, 9).

    Args:
      student_depth, teacher_depth: S and T. Layers are numbered from 1, as hidden states are
        whose number 0 is the embeddings.
      every: k.

    Raises:
      UserError: `every` or a depth below 1.
    """
    if student_depth < 1 or teacher_depth < 1:
        raise UserError(
            f"layers pair between models that have some, got {student_depth} and {teacher_depth}"
        )
    if every < 1:
        raise UserError(f"loss.every {every!r}: every k-th layer is compared, with k at least 1")
    return tuple(
        (j, max(1, (2 * j * teacher_depth + student_depth) // (2 * student_depth)))
        for j in range(student_depth, 0, -every)
    )


def pair_name(pair: Pair) -> str:
    """``pair_07_09``: the name of a pair's projection."""
    return f"pair_{pair[0]:02d}_{pair[1]:02d}"


def init_projections(
    key: jax.Array, pairs: tuple[Pair, ...], student_width: int, teacher_width: int
) -> dict[str, dict[str, jax.Array]]:
    """Projections from the teacher's width to the student's: a tree of their own.

    Equal widths start from the identity, which loses nothing and is right where the teacher shares
    the student's basis (a snapshot, a model of its family). Others start from independent normal
    numbers of variance 1 / Wt, which keeps the variance of channels. A pair's start depends on its
    student layer and not on which other pairs there are, so that ablations of k start alike.

    Returns:
      ``{"pair_07_09": {"kernel": (Wt, Ws) float32}, ...}``.

    Raises:
      UserError: no pairs.
    """
    if not pairs:
        raise UserError("no layers to project: layer-wise distillation needs at least one pair")

    def kernel(pair: Pair) -> jax.Array:
        if student_width == teacher_width:
            return jnp.eye(teacher_width, dtype=jnp.float32)
        shape = teacher_width, student_width
        return jax.random.normal(jax.random.fold_in(key, pair[0]), shape) * teacher_width**-0.5

    return {pair_name(pair): {"kernel": kernel(pair)} for pair in pairs}


def project(
    params: Mapping[str, Mapping[str, jax.Array]],
    pairs: tuple[Pair, ...],
    states: Mapping[int, jax.Array],
) -> dict[int, jax.Array]:
    """The teacher's hidden states in the student's width.

    Args:
      params: of `init_projections`.
      pairs: layers to project.
      states: teacher layer -> (B, R, Wt); never differentiated.

    Returns:
      student layer -> (B, R, Ws) float32. The product runs in the type of the states.

    Raises:
      UserError: a pair without projection, or a layer without states.
    """
    lacking = [pair_name(p) for p in pairs if pair_name(p) not in params or p[1] not in states]
    if lacking:
        raise UserError(
            f"no projection or no teacher states for {', '.join(lacking)}; there are "
            f"{sorted(params)} and teacher layers {sorted(states)}: loss.every and the teacher's "
            "cache must name the same layers"
        )
    return {
        ours: jnp.einsum(
            "brt,ts->brs",
            jax.lax.stop_gradient(states[theirs]),
            params[pair_name((ours, theirs))]["kernel"].astype(states[theirs].dtype),
            preferred_element_type=jnp.float32,
        )
        for ours, theirs in pairs
    }


def hidden_divergence(student: jax.Array, teacher: jax.Array, kind: str = "jsd") -> jax.Array:
    """How far hidden states are apart, position by position.

    Args:
      student: (B, R, W) hidden states, any float type; computed in float32.
      teacher: (B, R, W), already projected. Gradients reach it, that is, the projection.
      kind: "jsd", the Jensen-Shannon divergence (at most ln 2) between the softmax over channels of
        the two, each normalised to zero mean and unit variance over channels; "cosine", 1 minus
        the cosine of the two as they are; "mse", the mean over channels of the squared difference
        of the normalised two (0 to 4), normalised because scales differ between layers and models.

    Returns:
      (B, R) float32. A constant vector normalises to zeros, and a zero vector has cosine 0 with
      everything; both without a gradient.

    Raises:
      UserError: shapes that differ or an unknown kind.
    """
    if student.shape != teacher.shape:
        raise UserError(
            f"hidden states to compare are {student.shape} and {teacher.shape}: project the "
            "teacher's to the student's width, at the same positions"
        )
    student, teacher = student.astype(jnp.float32), teacher.astype(jnp.float32)
    if kind == "cosine":
        return 1.0 - (_unit(student) * _unit(teacher)).sum(-1)
    if kind not in HIDDEN_KINDS:
        raise UserError(f"loss.hidden {kind!r} is not one of {', '.join(HIDDEN_KINDS)}")
    student, teacher = _normalised(student), _normalised(teacher)
    if kind == "mse":
        return jnp.square(student - teacher).mean(-1)
    return generalised_jsd(jax.nn.log_softmax(student), jax.nn.log_softmax(teacher))


def logit_lens_divergence(
    student: jax.Array,
    teacher: jax.Array,
    *,
    student_head: Head,
    teacher_head: Head,
    divergence: Divergence = JSD,
    shared_vocab: int | None = None,
    chunk: int = 256,
) -> jax.Array:
    """Divergence of what the frozen heads read in hidden states of inner layers.

    The scores of a chunk of positions exist at a time, see `next_token`.

    Args:
      student: (B, R, Ws); teacher: (B, R, Wt). Gradients reach both: the teacher's may be projected
        states, read by the student's head.
      student_head, teacher_head: (B, c, width) -> scores (B, c, V), which should begin with the
        model's final norm. Parameters that they close over receive no gradient.
      divergence, shared_vocab, chunk: as in `next_token_losses`.

    Returns:
      (B, R) float32.

    Raises:
      UserError: positions that differ, a vocabulary that is not shared, `chunk` below 1.
    """
    if student.ndim != 3 or student.shape[:2] != teacher.shape[:2]:
        raise UserError(
            f"hidden states at the same positions (B, R, ...) are needed, got {student.shape} and "
            f"{teacher.shape}"
        )

    def part(states: tuple[jax.Array, jax.Array]) -> jax.Array:
        ours, theirs = _frozen(student_head, states[0]), _frozen(teacher_head, states[1])
        return vocabulary_divergence(ours, theirs, divergence, shared_vocab)

    return map_chunks(part, (student, teacher), chunk)


def masked_sum(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Sum (B,) float32 of values (B, R) where mask (B, R) is True.

    What is masked counts as 0 whatever it is, NaN and infinity included, and has no gradient.

    Raises:
      UserError: shapes that differ.
    """
    if values.shape != mask.shape:
        raise UserError(f"a mask has the shape of its values, got {values.shape} and {mask.shape}")
    return jnp.where(mask, values.astype(jnp.float32), 0.0).sum(-1)


def _frozen(head: Head, hidden: jax.Array) -> jax.Array:
    """The head's scores, without a gradient to what the head closes over."""
    pure, parameters = jax.closure_convert(head, hidden)
    return pure(hidden, *jax.lax.stop_gradient(parameters))


def _normalised(x: jax.Array) -> jax.Array:
    """Zero mean and unit variance over channels; zeros where a vector is constant."""
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    varies = variance > _CONSTANT * jnp.square(x).mean(-1, keepdims=True)
    # Replaced before the division, so that no NaN enters the gradient.
    scale = jax.lax.rsqrt(jnp.where(varies, variance, 1.0))
    return jnp.where(varies, centred * scale, 0.0)


def _unit(x: jax.Array) -> jax.Array:
    energy = jnp.square(x).sum(-1, keepdims=True)
    some = energy > 0.0
    return jnp.where(some, x * jax.lax.rsqrt(jnp.where(some, energy, 1.0)), 0.0)
