"""The textual teacher of a distillation: it runs in the step, or batches bring its outputs.

Shapes: B rows, R response tokens, W channels of the teacher, P of its layers, k kept tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from medalign_jax import losses
from medalign_jax.core.errors import UserError
from medalign_jax.models.language.decoder import Decoder
from medalign_jax.models.language.decoder_head import DecoderHead, head_params

Tree = Any
LIVE, LAST, TOP_K = "live", "last", "top_k"
FORMS = (LIVE, LAST, TOP_K)


class TeacherOutputs(NamedTuple):
    """What a teacher gives at the response tokens; no gradient passes.

    layers: hidden states (B, R, W) by layer.
    last: what its next-token distributions come from: (B, R, W), `TopK`, or None if not asked for.
    """

    layers: dict[int, jax.Array]
    last: jax.Array | losses.TopK | None


@dataclass(frozen=True)
class TextTeacher:
    """The frozen text model.

    Attributes:
      model: Linen module.
      params: its parameters; a cached teacher needs those of its head at most.
      sharding: table of its parameters.
      shared_vocab: tokens, from 0 on, that mean the same to teacher and student.
      form: "live" runs it. Else batches bring its outputs (see `teachers.state_cache`):
        "teacher_layers" (B, P, R, W) of `stored_layers`, and its last hidden states "teacher_last"
        (B, R, W) ("last") or "teacher_top_ids", "teacher_top_log_probs" (B, R, k) and
        "teacher_top_rest" (B, R) ("top_k").
    """

    model: Decoder
    params: Tree
    sharding: tuple
    shared_vocab: int
    form: str = LIVE

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise UserError(f"a teacher's form {self.form!r} is not one of {', '.join(FORMS)}")

    @property
    def depth(self) -> int:
        """Layers, which is the number of the last hidden state."""
        return self.model.config.depth

    def needed_params(self, lens: bool, top: bool) -> Tree:
        """The parameters that a step reads; an empty tree for none.

        Args:
          lens: whether the head reads hidden states of inner layers.
          top: whether next-token distributions are asked for.
        """
        if self.form == LIVE:
            return self.params
        reads = lens or (top and self.form == LAST)
        return head_params(self.model.config, self.params) if reads else {}

    def stored_layers(self, layers: Iterable[int]) -> tuple[int, ...]:
        """Of the layers that are compared, those that a cache keeps besides the last state."""
        return tuple(sorted(set(layers) - ({self.depth} if self.form == LAST else set())))

    def outputs(
        self, params: Tree, batch: Tree, layers: Iterable[int], top: bool
    ) -> TeacherOutputs:
        """Hidden states of `layers` (1 to depth) and, if `top`, next tokens.

        Raises:
          UserError: a cached teacher whose states the batch has not.
        """
        layers = set(layers)
        if self.form == LIVE:
            wanted = layers | ({self.depth} if top else set())
            states = response_states(self.model, params, batch, wanted)
            last = states[self.depth] if top else None
        else:
            states, last = self._stored(batch, self.stored_layers(layers), top)
        return jax.lax.stop_gradient(
            TeacherOutputs({layer: states[layer] for layer in layers}, last)
        )

    def _stored(self, batch: Tree, layers: tuple[int, ...], top: bool) -> tuple[dict, Any]:
        # In the teacher's own precision, so that what follows is computed as with a live one.
        dtype = self.model.dtype
        states = {}
        if layers:
            kept = _of(batch, "teacher_layers")
            states = {layer: kept[:, i].astype(dtype) for i, layer in enumerate(layers)}
        if self.form == LAST:
            states[self.depth] = _of(batch, "teacher_last").astype(dtype)
            return states, states[self.depth] if top else None
        names = [f"teacher_top_{field}" for field in losses.TopK._fields]
        return states, losses.TopK(*(_of(batch, name) for name in names)) if top else None

    def scores(self, params: Tree, hidden: jax.Array, normed: bool = True) -> jax.Array:
        """Next-token scores of hidden states; `normed` if they are past the final norm."""
        model = self.model
        head = DecoderHead(model.config, model.dtype, model.param_dtype, model.access)
        return head.apply({"params": params}, hidden, normed, method="lens")


def response_states(
    model: Decoder, params: Tree, batch: Tree, layers: Iterable[int]
) -> dict[int, jax.Array]:
    """Runs a text model over "teacher_ids", "teacher_mask" (B, U).

    Args:
      layers: 1 to depth.

    Returns:
      By layer the hidden states (B, R, W) at "teacher_at" (B, R).
    """
    ids, mask = batch["teacher_ids"], batch["teacher_mask"]
    _, out = model.apply({"params": params}, ids, mask, layers=tuple(sorted(layers)))
    return {i: at_positions(x, batch["teacher_at"]) for i, x in out["hidden_states"].items()}


def at_positions(states: jax.Array, places: jax.Array) -> jax.Array:
    """(B, T, W) at (B, R) positions -> (B, R, W)."""
    return jnp.take_along_axis(states, places[..., None], axis=1)


def _of(batch: Tree, name: str) -> jax.Array:
    if name not in batch:
        raise UserError(
            f"a cached teacher, but the batch has no {name!r}: give its batches the states of the "
            "cache (`extras` of make_question_iterator)"
        )
    return batch[name]
