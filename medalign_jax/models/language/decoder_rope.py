"""Rotary position embeddings and their stretched variants (Su et al. 2021, arXiv 2104.09864).

Pair i of a head turns by ``position * frequency_i``. Every variant that stretches the context
blends two frequencies, ``kept * f + (1 - kept) * f / factor`` with f = theta^(-2i/D); they differ
in how much of the original frequency each pair keeps.

Positions may have three axes (time, height, width), as in Qwen2.5-Omni (arXiv 2503.20215, section
2.2): each pair then turns by one of them. Where the axes are equal that is plain rotary embedding.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medalign_jax.models.upstream_config import ConfigReader, ModelConfigError

KINDS = ("default", "linear", "llama3", "yarn")
AXES = 3  # of a multimodal position: time, height, width


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1: pairs that turn more than ``high`` times in ``length`` tokens are kept as they
    are, those that turn less than ``low`` times are slowed, in between linearly."""

    low: float
    high: float
    length: int


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al. 2023, arXiv 2309.00071, section 3.2).

    Attributes:
      length: positions that the model was first trained on.
      fast, slow: turns in ``length`` tokens above which a pair is kept, below which it is slowed.
      amplitude: factor on cosine and sine, which tempers the attention (section 3.3).
      whole: whether the ends of the ramp between the two are rounded to whole pairs.
    """

    length: int
    fast: float
    slow: float
    amplitude: float
    whole: bool = True


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: its base, and how it is stretched.

    Attributes:
      theta: the base.
      factor: by how much the slowed pairs are slowed; without ``scaling`` that is all of them
        (linear position interpolation).
      scaling: which pairs keep how much of their speed.
      sections: for positions of three axes: how many pairs, in order, turn by the first, second,
        third, first ... axis (``mrope_section``). Empty for a model of one axis.
    """

    theta: float = 10_000.0
    factor: float = 1.0
    scaling: Llama3Scaling | YarnScaling | None = None
    sections: tuple[int, ...] = ()

    @property
    def amplitude(self) -> float:
        """Factor on cosine and sine."""
        return self.scaling.amplitude if isinstance(self.scaling, YarnScaling) else 1.0


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians per token of each pair: (head_dim / 2,) float32."""
    power = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = np.float32(1.0) / np.float32(rope.theta) ** power
    slowed = plain / np.float32(rope.factor)
    if rope.scaling is None:
        return slowed
    if isinstance(rope.scaling, Llama3Scaling):
        kept = _kept_llama3(rope.scaling, plain)
    else:
        kept = _kept_yarn(rope.scaling, rope.theta, head_dim)
    return (kept * plain + (1 - kept) * slowed).astype(np.float32)


def _kept_llama3(scaling: Llama3Scaling, plain: np.ndarray) -> np.ndarray:
    turns = scaling.length * plain / np.float32(2 * math.pi)
    return np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1).astype(np.float32)


def _kept_yarn(scaling: YarnScaling, theta: float, head_dim: int) -> np.ndarray:
    def pair_with(turns: float) -> float:
        """The (fractional) pair that turns so often in the original length."""
        return head_dim * math.log(scaling.length / (2 * math.pi * turns)) / (2 * math.log(theta))

    first, last = pair_with(scaling.fast), pair_with(scaling.slow)
    if scaling.whole:
        first, last = math.floor(first), math.ceil(last)
    # The upper bound counts channels, not pairs: so it is in every published implementation.
    first, last = max(first, 0), min(last, head_dim - 1)
    pairs = np.arange(head_dim // 2, dtype=np.float32)
    return 1 - np.clip((pairs - first) / max(last - first, 1e-3), 0, 1)


def rope_table(rope: Rope, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the turn of every token: twice (B, T, head_dim / 2) float32.

    Args:
      rope: the settings.
      head_dim: channels of a head.
      positions: (B, T) int, or (3, B, T) for the three axes of a rope with ``sections``.

    Raises:
      ValueError: for three axes and a rope that does not divide its pairs among them.
    """
    if positions.ndim == 3:
        if len(positions) != AXES or sum(rope.sections) != head_dim // 2:
            raise ValueError(
                f"positions {positions.shape} need {AXES} axes and a rope with sections that sum "
                f"up to {head_dim // 2} pairs; this one has {rope.sections}"
            )
        axis = np.repeat(np.arange(len(rope.sections)) % AXES, rope.sections)
        turning = jnp.moveaxis(positions[axis], 0, -1)
    else:
        turning = positions[..., None]
    angles = turning.astype(jnp.float32) * frequencies(rope, head_dim)
    return jnp.cos(angles) * rope.amplitude, jnp.sin(angles) * rope.amplitude


def token_positions(mask: jax.Array) -> jax.Array:
    """How many real tokens came before: (B, T) bool to (B, T) int32; padding has any number."""
    return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns each pair (i, i + D/2) of x (B, T, heads, D); cos and sin are (B, T, D/2)."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x.dtype)


def read_rope(
    settings: Mapping[str, Any],
    theta: float,
    where: str,
    *,
    kinds: tuple[str, ...] = KINDS,
    length: int | None = None,
    head_dim: int | None = None,
) -> Rope:
    """Reads ``rope_scaling`` or one entry of ``rope_parameters`` of a config.json.

    Args:
      settings: the JSON object.
      theta: base, where the object does not name one.
      where: what to call the object in messages.
      kinds: values of ``rope_type`` that are supported.
      length: positions of the first training, where the object does not say.
      head_dim: channels of a head of a model whose positions have three axes; None for one axis.

    Raises:
      ModelConfigError: for another kind, a missing or malformed value or an unknown key.
    """
    reader = ConfigReader(settings, where)
    sections = () if head_dim is None else _read_sections(reader, head_dim)
    # "mrope" is "default" with sections; "type" is what transformers called it before "rope_type".
    spoken = kinds if head_dim is None else (*kinds, "mrope")
    kind = reader.only("rope_type", spoken, reader.raw("type", "default"))
    reader.only("type", (*spoken, None), kind)
    reader.only("partial_rotary_factor", (1, None), None)
    theta = reader.number("rope_theta", theta)
    if kind in ("default", "mrope"):
        reader.only("factor", (1, None), None)
        rope = Rope(theta)
    elif kind == "linear":
        rope = Rope(theta, reader.number("factor"))
    elif kind == "llama3":
        rope = Rope(theta, reader.number("factor"), _read_llama3(reader, length))
    else:
        rope = Rope(theta, reader.number("factor"), _read_yarn(reader, length))
    reader.ignore("original_max_position_embeddings")
    reader.finish()
    return replace(rope, sections=sections)


def _read_sections(reader: ConfigReader, head_dim: int) -> tuple[int, ...]:
    """``mrope_section``; absent it is transformers' default, made for heads of 128 channels."""
    sections = reader.raw("mrope_section", [16, 24, 24])
    if not (
        isinstance(sections, list | tuple)
        and all(isinstance(size, int) and size >= 0 for size in sections)
        and sum(sections) == head_dim // 2
    ):
        raise ModelConfigError(
            f"{reader.where}: mrope_section has to sum up to half of head_dim {head_dim}; "
            f"it is {str(sections)[:100]}"
        )
    return tuple(sections)


def _read_llama3(reader: ConfigReader, length: int | None) -> Llama3Scaling:
    scaling = Llama3Scaling(
        low=reader.number("low_freq_factor"),
        high=reader.number("high_freq_factor"),
        length=reader.integer("original_max_position_embeddings", length),
    )
    if scaling.low >= scaling.high:
        raise ModelConfigError(
            f"{reader.where}: low_freq_factor {scaling.low} has to be less than high_freq_factor "
            f"{scaling.high}"
        )
    return scaling


def _read_yarn(reader: ConfigReader, length: int | None) -> YarnScaling:
    reader.only("mscale", (None, 0), None)
    reader.only("mscale_all_dim", (None, 0), None)
    factor = reader.number("factor")
    tempered = 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0
    return YarnScaling(
        length=reader.integer("original_max_position_embeddings", length),
        fast=reader.number("beta_fast", 32.0),
        slow=reader.number("beta_slow", 1.0),
        amplitude=reader.number("attention_factor", tempered),
        whole=reader.only("truncate", (True, False), True),
    )
