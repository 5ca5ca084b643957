"""Decoders of the published sizes: every tensor of the published names has its place."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
import transformers

from medalign_jax.core.mesh import make_mesh, shardings
from medalign_jax.models.language import decoder_config
from medalign_jax.models.language.decoder import Decoder
from medalign_jax.models.language.decoder_config import DECODER_CONFIGS
from medalign_jax.weights.match import Problems, flatten, match
from medalign_jax.weights.tables.decoder import SHARDING, table


def abstract(config):
    ids, mask = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)
    return jax.eval_shape(Decoder(config).init, jax.random.key(0), ids, mask)["params"]


GEMMA_4B_UP = {
    "vision": {
        "hidden_size": 1152, "intermediate_size": 4304, "model_type": "siglip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 27, "image_size": 896, "patch_size": 14,
    },
    "rope": {"rope_type": "linear", "factor": 8.0},
}  # fmt: skip


def gemma_text(width, mlp, depth, heads, kv_heads, **more):
    return {
        "model_type": "gemma3_text", "hidden_size": width, "intermediate_size": mlp,
        "num_hidden_layers": depth, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "sliding_window": 1024, "rope_scaling": GEMMA_4B_UP["rope"], **more,
    }  # fmt: skip


def plain(kind, vocabulary, width, mlp, depth, heads, kv_heads, tied, **more):
    return {
        "model_type": kind, "vocab_size": vocabulary, "hidden_size": width,
        "intermediate_size": mlp, "num_hidden_layers": depth, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "tie_word_embeddings": tied, **more,
    }  # fmt: skip


def llama3_rope(factor):
    return {
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    }  # fmt: skip


GEMMA_27B = gemma_text(5376, 21504, 62, 32, 16, head_dim=128, query_pre_attn_scalar=168)
# Published sizes, and the number of parameters that is published or well known for them.
PUBLISHED = {
    "gemma-3-1b": (
        gemma_text(1152, 6912, 26, 4, 1, vocab_size=262_144, rope_scaling=None), 999_885_952,
    ),
    "gemma-3-4b": (gemma_text(2560, 10240, 34, 8, 4), 3_880_263_168),
    "gemma-3-12b": (gemma_text(3840, 15360, 48, 16, 8), 11_766_034_176),
    "gemma-3-27b": (GEMMA_27B, 27_009_346_304),
    "qwen2.5-0.5b": (plain("qwen2", 151_936, 896, 4864, 24, 14, 2, True), 494_032_768),
    "qwen2.5-7b": (plain("qwen2", 152_064, 3584, 18944, 28, 28, 4, False), 7_615_616_512),
    "qwen3-0.6b": (plain("qwen3", 151_936, 1024, 3072, 28, 16, 8, True), 596_049_920),
    "qwen3-8b": (plain("qwen3", 151_936, 4096, 12288, 36, 32, 8, False), 8_190_735_360),
    "llama-3.2-1b": (
        plain("llama", 128_256, 2048, 8192, 16, 32, 8, True, head_dim=64, **llama3_rope(32.0)),
        1_235_814_400,
    ),
    "llama-3.1-8b": (
        plain("llama", 128_256, 4096, 14336, 32, 32, 8, False, **llama3_rope(8.0)), 8_030_261_248,
    ),
    "smollm2-135m": (
        plain(
            "llama", 49_152, 576, 1536, 30, 9, 3, True, is_llama_config=True,
            rope_interleaved=False, rope_theta=100_000, **{"transformers.js_config": {"a": 1}},
        ),
        134_515_008,
    ),
}  # fmt: skip
CLASSES = {
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
}


def meta_shapes(config: Mapping[str, Any], names: tuple[str, str]) -> dict[str, tuple[int, ...]]:
    """Every tensor that transformers saves for a config, by name; no memory is used."""
    made = getattr(transformers, names[0])(**json.loads(json.dumps(config)))
    with torch.device("meta"):
        model = getattr(transformers, names[1])(made)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return {name: shape for name, shape in shapes.items() if name != "lm_head.weight"} | (
        {} if made.tie_word_embeddings else {"lm_head.weight": shapes["lm_head.weight"]}
    )


def assert_fits(config, shapes):
    """The table gives every parameter tensors of the right shape, and every tensor its use."""
    leaves, _ = flatten(abstract(config))
    problems = Problems()
    found = match(
        table(config, config.depth), shapes, {k: v.shape for k, v in leaves.items()}, problems
    )
    problems.raise_if_any("full-size key list")
    for path, slot in found.slots.items():
        expected = leaves[path].shape[1:] if slot.rule.stacked else leaves[path].shape
        assert {slot.rule.transform.target_shape(shapes[name]) for name in slot.names} == {expected}
    return sum(leaf.size for leaf in leaves.values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_complete_key_lists_of_published_sizes(name):
    published, parameters = PUBLISHED[name]
    kind = published["model_type"]
    config = DECODER_CONFIGS[kind](published)
    assert assert_fits(config, meta_shapes(published, CLASSES[kind])) == parameters
    shardings(abstract(config), SHARDING, make_mesh(devices=jax.devices()[:1]))


@pytest.mark.parametrize("name", ["gemma-3-4b", "gemma-3-12b", "gemma-3-27b"])
def test_complete_key_lists_with_a_vision_tower(name):
    text, parameters = PUBLISHED[name]
    published = {
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": GEMMA_4B_UP["vision"],
    }
    config = DECODER_CONFIGS["gemma3"](published)
    new = meta_shapes(published, ("Gemma3Config", "Gemma3ForConditionalGeneration"))
    assert sum(key.startswith("model.vision_tower.") for key in new) > 400
    assert assert_fits(config, new) == parameters
    old = {
        key.replace("model.language_model.", "language_model.model.")
        .replace("model.vision_tower.", "vision_tower.vision_model.")
        .replace("model.multi_modal_projector.", "multi_modal_projector."): shape
        for key, shape in new.items()
    }
    assert "language_model.model.norm.weight" in old and not set(old) & set(new)
    assert assert_fits(config, old) == parameters


@pytest.mark.parametrize(
    ("preset", "name"),
    [
        ("GEMMA3_4B", "gemma-3-4b"), ("QWEN2_5_7B", "qwen2.5-7b"), ("QWEN3_8B", "qwen3-8b"),
        ("SMOLLM2_135M", "smollm2-135m"),
    ],
)  # fmt: skip
def test_presets_have_the_published_sizes(preset, name):
    leaves = jax.tree.leaves(abstract(getattr(decoder_config, preset)))
    assert sum(leaf.size for leaf in leaves) == PUBLISHED[name][1]
