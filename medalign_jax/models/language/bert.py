"""BERT encoder (Devlin et al. 2018, arXiv 1810.04805) as in transformers' ``BertModel``.

Post-norm layers, learned absolute positions, exact GELU. Only hidden states: the pooler and the
pre-training heads are not part of it. RoBERTa (Liu et al. 2019, arXiv 1907.11692) is the same
network but for where its positions begin.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from medalign_jax.models.layers.attention import attention
from medalign_jax.models.layers.layer_stack import normalise_layers, scan_layers, stacked_init
from medalign_jax.models.upstream_config import ConfigReader, ModelConfigError


@dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT encoder; the defaults are BERT-base's.

    ``position_offset`` is the row of the position table of the first token, above 0 in RoBERTa,
    which counts real tokens only; the table has ``max_positions`` more rows.
    """

    vocab_size: int = 30522
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    max_positions: int = 512
    token_types: int = 2
    eps: float = 1e-12
    position_offset: int = 0

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
    return read_bert(reader, BertConfig())


def roberta_config(config: Mapping[str, Any]) -> BertConfig:
    """Reads a published ``config.json`` of model type ``roberta``.

    Raises:
      ModelConfigError: for a missing or malformed value, or a feature that is not supported.
    """
    reader = ConfigReader(config)
    reader.only("model_type", ("roberta",), "roberta")
    return read_bert(reader, replace(BertConfig(), vocab_size=50265), roberta=True)


def read_bert(reader: ConfigReader, default: BertConfig, roberta: bool = False) -> BertConfig:
    """Reads what configs of BERT's kin have in common; the caller has checked the model type.

    Args:
      reader: of the config; closed here, so what the caller knows has to be read before.
      default: sizes where the config is silent.
      roberta: positions begin after the number of the padding token, and as many rows of the
        position table are never a token's.

    Raises:
      ModelConfigError: for a malformed value, or a feature that is not supported.
    """
    reader.only("hidden_act", ("gelu",), "gelu")
    reader.only("position_embedding_type", ("absolute",), "absolute")
    reader.only("is_decoder", (False,), False)
    reader.only("add_cross_attention", (False,), False)
    reader.ignore("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
    reader.ignore("tie_word_embeddings", "directionality")
    reader.ignore("pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers")
    reader.ignore("pooler_size_per_head", "pooler_type")
    offset = reader.integer("pad_token_id", 1) + 1 if roberta else 0
    result = BertConfig(
        vocab_size=reader.integer("vocab_size", default.vocab_size),
        width=reader.integer("hidden_size", default.width),
        depth=reader.depth("num_hidden_layers", default.depth),
        heads=reader.integer("num_attention_heads", default.heads),
        mlp_width=reader.integer("intermediate_size", default.mlp_width),
        max_positions=reader.integer("max_position_embeddings", default.max_positions) - offset,
        token_types=reader.integer("type_vocab_size", default.token_types),
        eps=reader.number("layer_norm_eps", default.eps),
        position_offset=offset,
    )
    reader.finish()
    if result.width % result.heads:
        raise ModelConfigError(
            f"{reader.where}: hidden_size {result.width} is not a multiple of "
            f"num_attention_heads {result.heads}"
        )
    if result.max_positions < 1:
        raise ModelConfigError(
            f"{reader.where}: pad_token_id leaves no position of max_position_embeddings for tokens"
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
          layers: hidden states to keep: 0 = embeddings, i = after layer i, -1 = last. Only the
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
        x = nn.Embed(c.vocab_size, c.width, name="word_embedding", **dtypes)(ids)
        x = x + nn.Embed(c.token_types, c.width, name="token_type_embedding", **dtypes)(
            jnp.zeros_like(ids)
        )
        rows = c.max_positions + c.position_offset
        positions = _positions(mask, c.position_offset)
        x = x + nn.Embed(rows, c.width, name="position_embedding", **dtypes)(positions)
        x = _norm(c, "embedding_norm", dtypes)(x)
        block = BertLayer(c, **dtypes, parent=None)
        weights = self.param("layers", stacked_init(block, c.depth), x[:1], mask[:1])
        states = scan_layers(lambda x, p: block.apply({"params": p}, x, mask), weights, x, wanted)
        return states[wanted[-1]], {"hidden_states": states}


def _positions(mask: jax.Array, offset: int) -> jax.Array:
    """Rows of the position table, (T,), or (B, T) in RoBERTa, where padding has no place."""
    if not offset:
        return jnp.arange(mask.shape[1])
    return jnp.where(mask, jnp.cumsum(mask, axis=1) + offset - 1, offset - 1)


def _norm(config: BertConfig, name: str, dtypes: dict[str, Any]) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=config.eps, use_fast_variance=False, name=name, **dtypes)
