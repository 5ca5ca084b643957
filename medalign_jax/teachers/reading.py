"""How the hidden states of a text become one vector."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from medalign_jax.core.errors import UserError

POOLINGS = ("mean", "last")


class TeacherError(UserError):
    """A teacher cannot be built as asked, or a text cannot be embedded."""


class OverlongWarning(UserWarning):
    """Texts were cut, so that what stands at their end does not count."""


@dataclass(frozen=True)
class Reading:
    """How a text is turned into a vector.

    Attributes:
      layer: hidden state, counted as in transformers: 0 = embeddings, -1 = last.
      pooling: ``"mean"`` over real tokens (special tokens included, padding never), or ``"last"``
        real token.
      max_tokens: a longer text is cut at the right, which `Teacher.embed` warns of.
      lowercase: whether texts are lower-cased first, as the alignment's recipe does.
      normalise: whether vectors are scaled to L2 norm 1.
    """

    layer: int = -1
    pooling: str = "mean"
    max_tokens: int = 128
    lowercase: bool = False
    normalise: bool = False

    def __post_init__(self):
        if self.pooling not in POOLINGS:
            raise TeacherError(f"pooling {self.pooling!r} is not one of {', '.join(POOLINGS)}")
        if self.max_tokens < 1:
            raise TeacherError(f"max_tokens has to be at least 1, not {self.max_tokens}")


def check_texts(texts: Sequence[str]) -> None:
    """Raises TeacherError naming the first entry that is not text or empty."""
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TeacherError(f"text {index} is {type(text).__name__}, not a string")
        if not text.strip():
            raise TeacherError(f"text {index} is empty: an embedding of nothing means nothing")


def pool(hidden: jax.Array, mask: jax.Array, pooling: str) -> jax.Array:
    """One vector per text: (N, L, H) and mask (N, L) -> (N, H); every row needs a real token."""
    if pooling == "mean":
        weights = mask.astype(hidden.dtype)[..., None]
        return jnp.sum(hidden * weights, axis=1) / jnp.sum(weights, axis=1)
    last = jnp.sum(mask, axis=1) - 1
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
