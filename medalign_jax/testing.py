"""Stand-ins for what is published, for tests and benchmarks, of other packages too."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from medalign_jax.core.mesh import path_name
from medalign_jax.teachers.reading import Reading
from medalign_jax.teachers.teacher import ModelConfig, Teacher, unfilled
from medalign_jax.text.tokenizers import Tokenizer, TokenizerError


class HashTokenizer:
    """Words to ids by a checksum: for random models, which have no words of their own.

    Id 0 is padding, 1 begins a text, 2 ends it.
    """

    pad_id = 0

    def __init__(self, vocab_size: int):
        if vocab_size < 4:
            raise TokenizerError(f"a vocabulary of {vocab_size} leaves no id for a word")
        self._words = vocab_size - 3
        self.identity = f"hash-{vocab_size}"

    def encode(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        return [[1, *map(self._id, text.split()), 2][:max_tokens] for text in texts]

    def _id(self, word: str) -> int:
        return 3 + zlib.crc32(word.encode()) % self._words


def random_teacher(
    config: ModelConfig,
    seed: int = 0,
    *,
    reading: Reading | None = None,
    tokenizer: Tokenizer | None = None,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
) -> Teacher:
    """A teacher of the given shape with random weights.

    Args:
      config: e.g. ``decoder_config.GEMMA3_270M`` or ``decoder_config.QWEN2_5_7B``.
      seed: of the weights.
      reading, dtype, mesh: as in ``load_teacher``.
      tokenizer: by default words are hashed into the vocabulary.
    """
    model, abstract, reading = unfilled(config, reading or Reading(), dtype, mesh)
    neutral = 1.0 - getattr(config, "norm_offset", 0.0)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: _random_leaf(path_name(path), leaf, seed, neutral),
        abstract,
    )
    identity = hashlib.sha256(f"random {seed} {config}".encode()).hexdigest()
    return Teacher(
        model, params, tokenizer or HashTokenizer(config.vocab_size), reading, identity, mesh
    )


def _random_leaf(path: str, leaf: jax.ShapeDtypeStruct, seed: int, neutral: float) -> jax.Array:
    """Kernels and embeddings scaled to keep variance, norms that do nothing, no biases.

    Drawn on the host: the same numbers on any mesh and in any precision, and nothing to compile.
    """
    if path.endswith(("scale", "bias")):
        values = np.full(leaf.shape, neutral if path.endswith("scale") else 0.0, np.float32)
    else:
        fan_in = leaf.shape[-1] if path.endswith("embedding") else leaf.shape[-2]
        rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
        values = rng.standard_normal(leaf.shape, np.float32)
        values *= np.float32(fan_in**-0.5)
    values = values.astype(leaf.dtype)
    if leaf.sharding is None:
        return jnp.asarray(values)
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: values[index])
