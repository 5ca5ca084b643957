"""One vector of a clip from its tokens, by more than their mean.

An encoder's tokens lie on a grid of time and frequency, and the mean over all of them forgets at
which frequency something was heard. Keeping the bands apart is what lets general audio models
overtake respiratory ones on OPERA's tasks (arXiv 2505.15307, 2504.18004).
"""

from __future__ import annotations

import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from medalign_jax.core.errors import UserError

POOLINGS = ("mean", "mean_std", "mean_max", "bands", "bands_mean_std")


def check_pooling(config: Any, pooling: str, layer: int | None) -> None:
    """Refuses a pooling or a layer that there is not.

    Args:
      config: of an encoder, see `medalign_jax.models`.
      pooling: one of `POOLINGS`.
      layer: a block, counted from 0 or, below 0, from the end; None for the last layer's tokens.

    Raises:
      UserError: what there is instead.
    """
    if pooling not in POOLINGS:
        raise UserError(f"unknown pooling {pooling!r}; there are {', '.join(POOLINGS)}")
    if layer is not None and not -config.depth <= layer < config.depth:
        raise UserError(
            f"there is no layer {layer}: the encoder has {config.depth} blocks, 0 to "
            f"{config.depth - 1} (or -{config.depth} to -1, from the end)"
        )


def embed_pooled(
    module: nn.Module, params: Any, features: jax.Array, *lengths: jax.Array, pooling: str = "mean",
    layer: int | None = None,
) -> jax.Array:  # fmt: skip
    """Embeds clips and pools their tokens.

    Args:
      module: an encoder, see `medalign_jax.models`.
      params: its parameters.
      features: (B, T, M) of its front end.
      lengths: (B,) valid frames, where the encoder takes them; tokens beyond do not count.
      pooling: "mean" (with no layer named it is the published feature, whatever that is made of),
        "mean_std" and "mean_max" over all tokens, "bands": the mean over time of each band of the
        token grid, low bands first, "bands_mean_std": those means, then the deviations over time.
      layer: block whose output is pooled, as `check_pooling` takes it. None: what `embed` calls
        "tokens", the last layer's (in some encoders before, in others after the last norm).

    Returns:
      (B, D) float32; D is a multiple of the width of a token.

    Raises:
      UserError: bands of an encoder, or of a layer, that has only one.
    """
    config = module.config
    check_pooling(config, pooling, layer)
    number = None if layer is None else layer % config.depth
    options = {}
    if "layers" in inspect.signature(type(module).embed).parameters:
        options["layers"] = () if number is None else (number,)
    feature, out = module.apply({"params": params}, features, *lengths, method="embed", **options)
    if pooling == "mean" and number is None:
        return feature
    tokens, name = out["tokens"], "the last layer"
    if number is not None:
        tokens, name = out[f"block{number:02d}"][:, config.prefix_tokens :], f"layer {layer}"
    tokens = tokens.astype(jnp.float32)
    mask = _mask(out.get("mask"), *tokens.shape[:2])
    if pooling.startswith("bands"):
        columns = _columns(config, features.shape[1], tokens.shape[1])
        if columns < 2:
            raise UserError(
                f"pooling {pooling!r} needs tokens of several frequency bands, and those of {name} "
                f"of this {type(module).__name__} have one band only; take mean_std or mean_max"
            )
        return _pool_bands(tokens, columns, pooling == "bands_mean_std")
    return _pool(tokens, mask, pooling)


def _pool(tokens: jax.Array, mask: jax.Array, pooling: str) -> jax.Array:
    """(B, N, W) and (B, N) -> (B, W or 2 W); zeros where no token is valid."""
    weight = mask.astype(jnp.float32)[..., None]
    count = jnp.maximum(weight.sum(axis=1), 1.0)
    mean = jnp.where(mask[..., None], tokens, 0.0).sum(axis=1) / count
    if pooling == "mean":
        return mean
    if pooling == "mean_max":
        highest = jnp.where(mask[..., None], tokens, -jnp.inf).max(axis=1)
        second = jnp.where(mask.any(axis=1, keepdims=True), highest, 0.0)
    else:
        away = jnp.where(mask[..., None], tokens - mean[:, None], 0.0)
        second = jnp.sqrt(jnp.square(away).sum(axis=1) / count)
    return jnp.concatenate([mean, second], axis=1)


def _pool_bands(tokens: jax.Array, columns: int, deviations: bool) -> jax.Array:
    """(B, R * C, W) in order of time, then band -> (B, C * W), or twice as many."""
    grid = tokens.reshape(tokens.shape[0], -1, columns, tokens.shape[2])
    parts = [grid.mean(axis=1)]
    if deviations:
        parts.append(grid.std(axis=1))
    return jnp.concatenate([part.reshape(len(tokens), -1) for part in parts], axis=1)


def _mask(mask: jax.Array | None, batch: int, tokens: int) -> jax.Array:
    """Which of a layer's tokens count, (B, N), from the mask of the last ones (B, L)."""
    if mask is None:
        return jnp.ones((batch, tokens), bool)
    # Blocks may have several tokens for each of the last ones, and one left over at the end.
    mask = jnp.repeat(mask, tokens // mask.shape[1], axis=1)
    return jnp.pad(mask, ((0, 0), (0, tokens - mask.shape[1])))


def _columns(config: Any, frames: int, tokens: int) -> int:
    """Bands of a layer with so many tokens.

    The last layer's grid is known. Earlier layers of a hierarchical encoder have 2, 4, ... times
    as many rows and columns, and less than one such step more where strides left something over.
    """
    if callable(config.grid):
        rows, columns = config.grid(frames)
    else:  # the table of positions may have another shape than the tokens
        columns = config.mels // config.patch_size[1]
        rows = tokens // columns
    times = 1
    while rows * times * columns * times <= tokens:
        for c in range(columns * times, (columns + 1) * times):
            if tokens % c == 0 and rows * times <= tokens // c < (rows + 1) * times:
                return c
        times *= 2
    return 1
