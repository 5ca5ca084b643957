"""Random parameters of a language model, whose shapes are those of published weights."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from medalign_jax.models.audio_lm import AudioLM


def initial_params(module: nn.Module, key: jax.Array) -> Any:
    """The parameters that a language model begins with; under `jax.eval_shape` their shapes.

    Args:
      module: `AudioLM`, or called with ids and mask as `Decoder` and `Bert` are.
      key: decides them; what the module is called with here does not.
    """
    ids, mask = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)
    if not isinstance(module, AudioLM):
        return module.init(key, ids, mask)["params"]
    features = jnp.zeros((1, 1, 4, module.config.audio.mels), jnp.float32)
    lengths = jnp.full((1, 1), 4, jnp.int32)
    return module.init(key, ids, mask, features, lengths)["params"]
