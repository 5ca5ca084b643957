"""BERT encoder (Devlin et al. 2018, arXiv 1810.04805) as in transformers' ``BertModel``.

Post-norm layers, learned absolute positions, exact GELU. Only hidden states: the pooler and the
pre-training heads are not part of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from medalign_jax.models.attention import attention
from medalign_jax.models.layer_stack import normalise_layers, scan_layers, stacked_init
from medalign_jax.models.upstream_config import ConfigReader, ModelConfigError


@dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT encoder; the defaults are BERT-base's."""

    vocab_size: int = 30522
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    max_positions: int = 512
    token_types: int = 2
    eps: float = 1e-12

    def truncate(self, depth: int) -> "BertConfig":
        """The same model with the first ``depth`` layers only."""
        return self if depth == self.depth else replace(self, depth=depth)


def bert_config(config: Mapping[str, Any]) -> BertConfig:
    """Reads a published ``config.json`` of model type ``bert``.

    Raises:
      ModelConfigError: for a missing or malformed value, or a feature that is not supported.
    """
    reader = ConfigReader(config)
    reader.only("model_type", ("bert",), "bert")
    reader.only("hidden_act", ("gelu",), "gelu")
    reader.only("position_embedding_type", ("absolute",), "absolute")
    reader.only("is_decoder", (False,), False)
    reader.only("add_cross_attention", (False,), False)
    reader.ignore("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
    reader.ignore("tie_word_embeddings", "directionality")
    reader.ignore("pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers")
    reader.ignore("pooler_size_per_head", "pooler_type")
    result = BertConfig(
        vocab_size=reader.integer("vocab_size", 30522),
        width=reader.integer("hidden_size", 768),
        depth=reader.integer("num_hidden_layers", 12),
        heads=reader.integer("num_attention_heads", 12),
        mlp_width=reader.integer("intermediate_size", 3072),
        max_positions=reader.integer("max_position_embeddings", 512),
        token_types=reader.integer("type_vocab_size", 2),
        eps=reader.number("layer_norm_eps", 1e-12),
    )
    reader.finish()
    if result.width % result.heads:
        raise ModelConfigError(
            f"config.json: hidden_size {result.width} is no multiple of "
            f"num_attention_heads {result.heads}"
        )
    return result


class BertLayer(nn.Module):
    """One post-norm layer: (B, T, W), key mask (B, T) -> (B, T, W)."""

    config: BertConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        c = self.config
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        heads = (*x.shape[:-1], c.heads, c.width // c.heads)
        q, k, v = (
            nn.Dense(c.width, name=name, **dtypes)(x).reshape(heads)
            for name in ("query", "key", "value")
        )
        mixed = attention(q, k, v, mask=mask[:, None, None, :]).reshape(x.shape)
        x = _norm(c, "attention_norm", dtypes)(x + nn.Dense(c.width, name="out", **dtypes)(mixed))
        hidden = nn.gelu(nn.Dense(c.mlp_width, name="up", **dtypes)(x), approximate=False)
        return _norm(c, "mlp_norm", dtypes)(x + nn.Dense(c.width, name="down", **dtypes)(hidden))


class Bert(nn.Module):
    """The encoder.

    Parameters: ``word_embedding``, ``position_embedding``, ``token_type_embedding`` (each
    ``/embedding``), ``embedding_norm/{scale,bias}`` and ``layers/...`` stacked over depth.
    """

    config: BertConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, ids: jax.Array, mask: jax.Array, layers: tuple[int, ...] = (-1,)
    ) -> tuple[jax.Array, dict[str, dict[int, jax.Array]]]:
        """Hidden states of token ids; all tokens have type 0.

        Args:
          ids: (B, T) int32, T at most ``max_positions``.
          mask: (B, T) bool, True for a real token.
          layers: Hidden states to keep: 0 = embeddings, i = after layer i, -1 = last. Only the
            layers up to the deepest of them run.

        Returns:
          The deepest hidden state asked for, (B, T, width), and
          ``{"hidden_states": {index from 0: (B, T, width)}}`` with all that were asked for.
        """
        c = self.config
        if ids.shape[1] > c.max_positions:
            raise ValueError(f"{ids.shape[1]} tokens; this model has {c.max_positions} positions")
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        wanted = normalise_layers(layers, c.depth)
        positions = jnp.arange(ids.shape[1])
        x = nn.Embed(c.vocab_size, c.width, name="word_embedding", **dtypes)(ids)
        x = x + nn.Embed(c.token_types, c.width, name="token_type_embedding", **dtypes)(
            jnp.zeros_like(ids)
        )
        x = x + nn.Embed(c.max_positions, c.width, name="position_embedding", **dtypes)(positions)
        x = _norm(c, "embedding_norm", dtypes)(x)
        block = BertLayer(c, **dtypes, parent=None)
        weights = self.param("layers", stacked_init(block, c.depth), x[:1], mask[:1])
        states = scan_layers(lambda x, p: block.apply({"params": p}, x, mask), weights, x, wanted)
        return states[wanted[-1]], {"hidden_states": states}


def _norm(config: BertConfig, name: str, dtypes: dict[str, Any]) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=config.eps, use_fast_variance=False, name=name, **dtypes)
