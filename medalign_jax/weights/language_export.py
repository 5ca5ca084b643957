"""What a folder needs beside trained weights so that transformers loads a language model from it.

Of Qwen2.5-Omni the thinker is written, which takes audio and writes text: its talker and its
vocoder are not trained here, and would be as large again. transformers' class of the thinker has
parts that are not even read here: a vision tower, and in the audio tower an embedding that no
forward pass uses. They are taken over from the source as they are. Where that has none (a model
that was made here), the smallest that the class can be made with stand in, filled with zeros; then
no image is to be given to the model, as before.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from medalign_jax.models.audio_lm import AudioLMConfig
from medalign_jax.weights.source import WeightSource

Tensors = dict[str, np.ndarray]

_UNREAD = re.compile(r"(thinker\.)?(model\.)?(?P<name>visual\..+|audio_tower\.audio_bos_eos_.+)")
_MARKS = "audio_tower.audio_bos_eos_token.weight"
_BLIND = {
    "model_type": "qwen2_5_omni_vision_encoder", "depth": 0, "hidden_size": 16, "num_heads": 1,
    "intermediate_size": 16, "patch_size": 2, "temporal_patch_size": 1, "in_channels": 1,
    "spatial_merge_size": 1, "fullatt_block_indexes": [],
}  # fmt: skip


def for_transformers(
    config: Any,
    config_json: Mapping[str, Any],
    tensors: Tensors,
    source: WeightSource | None,
) -> tuple[dict[str, Any], Tensors]:
    """A config.json and tensors that transformers' class has all of, and no other.

    Args:
      config: of the module.
      config_json: that it was built from.
      tensors: the trained ones by their upstream names.
      source: of the untrained weights; None for a model that was made here.
    """
    if not isinstance(config, AudioLMConfig):
        return dict(config_json), tensors
    if config.kind == "qwen2_audio":
        return {"architectures": ["Qwen2AudioForConditionalGeneration"], **config_json}, tensors
    return _thinker(config, config_json, tensors, source or {})


def _thinker(
    config: AudioLMConfig,
    config_json: Mapping[str, Any],
    tensors: Tensors,
    source: Mapping[str, Any],
) -> tuple[dict[str, Any], Tensors]:
    trained = {name.removeprefix("thinker."): array for name, array in tensors.items()}
    found = {match["name"]: name for name in source if (match := _UNREAD.fullmatch(name))}
    vision = any(name.startswith("visual.blocks.") for name in found)
    unread = {
        name: source[upstream].read()
        for name, upstream in found.items()
        if vision or not name.startswith("visual.")
    }
    made = dict(config_json.get("thinker_config", config_json))
    if not vision:
        made["vision_config"] = {**_BLIND, "out_hidden_size": config.text.width}
        unread |= _blind_tower(config.text.width)
    unread.setdefault(_MARKS, np.zeros((2, config.text.width), np.float32))
    tied = {"tie_word_embeddings": config.text.tied}  # at both levels: each release reads another
    made |= {
        "model_type": "qwen2_5_omni_thinker",
        "architectures": ["Qwen2_5OmniThinkerForConditionalGeneration"],
        "text_config": {**made["text_config"], **tied},
        **tied,
    }
    kept = ("torch_dtype", "dtype", "transformers_version")
    return {key: config_json[key] for key in kept if key in config_json} | made, trained | unread


def _blind_tower(width: int) -> Tensors:
    """Tensors of the vision tower of `_BLIND`, which has no layers."""
    inner, patch = _BLIND["hidden_size"], _BLIND["patch_size"]
    shapes = {
        "patch_embed.proj.weight": (inner, 1, 1, patch, patch),
        "merger.ln_q.weight": (inner,),
        "merger.mlp.0.weight": (inner, inner),
        "merger.mlp.0.bias": (inner,),
        "merger.mlp.2.weight": (width, inner),
        "merger.mlp.2.bias": (width,),
    }
    return {f"visual.{name}": np.zeros(shape, np.float32) for name, shape in shapes.items()}
