"""CLAP at odd sizes, and its parameters."""

import jax
import jax.numpy as jnp
import transformers

from medalign_jax.models.encoders.clap import Clap, ClapConfig, ClapTextConfig
from medalign_jax.models.language.bert import Bert
from medalign_jax.weights.load import load
from medalign_jax.weights.tables import bert as bert_table
from medalign_jax.weights.tables import clap as clap_table

ODD_AUDIO = dict(
    window_size=4, num_mel_bins=8, spec_size=32, patch_embeds_hidden_size=24, hidden_size=48,
    depths=[2, 1], num_attention_heads=[2, 3], mlp_ratio=2.0, aff_block_r=5,
)  # fmt: skip
ODD_TEXT = dict(
    vocab_size=61, hidden_size=36, num_hidden_layers=3, num_attention_heads=3,
    intermediate_size=50, max_position_embeddings=22,
)  # fmt: skip


def small_config(fused: bool = False) -> transformers.ClapConfig:
    """Of a model of odd sizes."""
    return transformers.ClapConfig(
        text_config=ODD_TEXT, audio_config={**ODD_AUDIO, "enable_fusion": fused}, projection_dim=20
    )


def abstract_params(config: ClapConfig) -> dict:
    features = jax.ShapeDtypeStruct((1, config.frames, config.mels), jnp.float32)
    return jax.eval_shape(Clap(config).init, jax.random.key(0), features)["params"]


def abstract_text(model) -> dict:
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 2), jnp.bool)
    return jax.eval_shape(model.init, jax.random.key(0), ids, mask)["params"]


def load_audio(source, config: ClapConfig) -> dict:
    return load(source, clap_table.TABLE, abstract_params(config))


def load_text(source, config: ClapTextConfig, layers: int) -> dict:
    """The first layers of a text tower of so many layers, as many as the config has."""
    return load(source, bert_table.table(config.depth, layers), abstract_text(Bert(config)))
