"""CLAP's published names and settings, and those that are refused."""

import json

import jax
import numpy as np
import pytest
import torch
import transformers

from medalign_jax.models.encoders.clap import (
    CLAP_FUSED,
    CLAP_TEXT,
    CLAP_UNFUSED,
    ClapConfig,
    clap_config,
    clap_text_config,
)
from medalign_jax.models.upstream_config import ModelConfigError
from medalign_jax.weights import WeightError
from tests.models.clap_models import (
    load_audio,
    load_text,
    small_config,
)


def test_config_as_published():
    """Fields of laion/clap-htsat-fused's config.json that today's class does not write."""
    config = transformers.ClapConfig().to_dict()
    config["audio_config"] |= {
        "enable_fusion": True, "enable_patch_fusion": True, "fusion_num_hidden_layers": 2,
        "projection_hidden_size": 768, "patch_stride": [4, 4], "torchscript": False,
        "tie_word_embeddings": True, "projection_dim": 77, "cross_attention_hidden_size": None,
    }  # fmt: skip
    config["text_config"] |= {
        "fusion_hidden_size": 768, "fusion_num_hidden_layers": 2, "classifier_dropout": None,
        "position_embedding_type": "absolute", "use_cache": True, "initializer_range": 0.02,
    }  # fmt: skip
    assert clap_config(config) == CLAP_FUSED
    assert clap_text_config(config) == CLAP_TEXT


def published_tensors(fused: bool) -> dict[str, np.ndarray]:
    """Names, shapes and types of the published model, at full size without its memory."""
    config = transformers.ClapConfig(audio_config={"enable_fusion": fused})
    with torch.device("meta"):
        model = transformers.ClapModel(config)
    return {
        name: np.broadcast_to(np.float32(0) if x.is_floating_point() else np.int64(0), x.shape)
        for name, x in model.state_dict().items()
    }


@pytest.mark.parametrize(
    ("config", "keys", "audio", "size"),
    [(CLAP_UNFUSED, 447, 240, 28_191_000), (CLAP_FUSED, 477, 270, 28_206_120)],
)
def test_full_key_list_loads_strictly(config, keys, audio, size):
    tensors = published_tensors(config.fusion)
    assert len(tensors) == keys
    assert sum(name.startswith("audio_") for name in tensors) == audio
    params = load_audio(tensors, config)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == size
    tensors["audio_model.audio_encoder.surprise"] = np.zeros(1, np.float32)
    del tensors["audio_model.audio_encoder.layers.2.blocks.5.attention.self.query.bias"]
    with pytest.raises(WeightError, match="1 missing, 1 unused"):
        load_audio(tensors, config)


def test_full_key_list_loads_strictly_into_the_text_tower():
    tensors = published_tensors(True)
    params = load_text(tensors, CLAP_TEXT, 12)
    # RoBERTa's embeddings with their norm, and twelve layers of four projections, two layers of
    # the MLP and two norms.
    embeddings = (50_265 + 514 + 1 + 2) * 768
    layer = 4 * (768**2 + 768) + 2 * 768 * 3072 + 3072 + 768 + 4 * 768
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == embeddings + 12 * layer
    load_text(tensors, CLAP_TEXT.truncate(2), 12)
    del tensors["text_model.encoder.layer.11.output.dense.bias"]
    with pytest.raises(WeightError, match="1 missing"):
        load_text(tensors, CLAP_TEXT, 12)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"qkv_bias": False}, "qkv_bias"),
        ({"patch_stride": [2, 2]}, "patch_stride=2 is not supported"),
        ({"patch_size": [4, 2]}, r"patch_size=\[4, 2\]"),
        ({"patch_size": "4"}, "patch_size='4'"),
        ({"patch_embed_input_channels": 2}, "patch_embed_input_channels"),
        ({"flatten_patch_embeds": False}, "flatten_patch_embeds"),
        ({"enable_patch_layer_norm": False}, "enable_patch_layer_norm"),
        ({"fusion_type": "channel_map"}, "fusion_type"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps"),
        ({"mlp_ratio": 2.5}, "mlp_ratio=2.5"),
        ({"depths": 2}, "depths is 2"),
        ({"depths": [2, 1, 1]}, "equally long"),
        ({"depths": [2, True]}, "depths"),
        ({"num_mel_bins": 12}, "mels 12"),
        ({"window_size": 8}, "less than a window"),
        ({"hidden_size": 100}, "hidden_size is 100"),
        ({"enable_fusion": True, "aff_block_r": 25}, "fusion_ratio"),
        ({"absolute_positions": True}, "absolute_positions"),
        ({"model_type": "clap_text_model"}, "model_type"),
    ],
)
def test_unsupported_audio_settings_are_refused_by_name(change, named):
    config = json.loads(small_config().to_json_string())
    config["audio_config"] |= change
    with pytest.raises(ModelConfigError, match=named):
        clap_config(config)


def test_unsupported_settings_of_the_whole_are_refused_by_name():
    config = json.loads(small_config().to_json_string())
    for change, named in (
        ({"projection_hidden_act": "gelu"}, "projection_hidden_act"),
        ({"projection_dim": 0}, "projection_dim"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "clip"}, "model_type"),
        ({"audio_config": "htsat"}, "audio_config has to be a JSON object"),
    ):
        with pytest.raises(ModelConfigError, match=named):
            clap_config({**config, **change})
    text = {**config, "text_config": {**config["text_config"], "hidden_act": "gelu_new"}}
    with pytest.raises(ModelConfigError, match="text_config: hidden_act"):
        clap_text_config(text)


def test_sizes_that_make_no_network_are_refused():
    with pytest.raises(ValueError, match="less than a window"):
        ClapConfig(spec_size=128)
    with pytest.raises(ValueError, match="fusion_ratio"):
        ClapConfig(fusion=True, fusion_ratio=97)
