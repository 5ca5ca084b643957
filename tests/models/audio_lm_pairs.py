"""Small random audio language models of transformers and ours with the same weights, and batches.

Rows have several clips of unequal length, one, or none, and texts of unequal length.
"""

import json
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from medalign_jax.models.audio_lm import AudioLM, AudioLMConfig, audio_lm_config, audio_token_count
from medalign_jax.weights.load import load
from medalign_jax.weights.tables.audio_lm import table
from tests.torch_models import shake

DEPTH, VOCABULARY, MELS, FRAMES, AUDIO = 3, 97, 7, 48, 90
START, END = 91, 92
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 36, "num_hidden_layers": DEPTH,
    "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 44,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
TOWER = {
    "num_mel_bins": MELS, "d_model": 24, "encoder_layers": 2, "encoder_attention_heads": 3,
    "encoder_ffn_dim": 40, "max_source_positions": FRAMES // 2,
}  # fmt: skip
VISION = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 36,
    "patch_size": 4, "fullatt_block_indexes": [0],
}  # fmt: skip
# Valid frames of the clips of each row: whole windows and parts, odd and even.
LENGTHS = np.array([[48, 20, 7], [41, 0, 0], [0, 0, 0], [29, 33, 0]], np.int32)


def omni(**changes) -> transformers.PreTrainedModel:
    """A thinker whose windows have 20 frames, of width 36 with six heads and three key heads."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 1]}
    return transformers.Qwen2_5OmniThinkerForConditionalGeneration(
        transformers.Qwen2_5OmniThinkerConfig(
            text_config=TEXT | {"rope_parameters": rope} | changes,
            audio_config=TOWER | {"n_window": 10, "output_dim": TEXT["hidden_size"]},
            vision_config=VISION,
            audio_token_index=AUDIO, audio_start_token_id=START, audio_end_token_id=END,
            image_token_index=93, video_token_index=94,
            vision_start_token_id=95, vision_end_token_id=96,
        )
    )  # fmt: skip


def qwen2_audio(**changes) -> transformers.PreTrainedModel:
    """A Qwen2-Audio for clips of up to 48 frames."""
    return transformers.Qwen2AudioForConditionalGeneration(
        transformers.Qwen2AudioConfig(
            text_config={"model_type": "qwen2", "rope_theta": 300.0} | TEXT | changes,
            audio_config={"model_type": "qwen2_audio_encoder"} | TOWER,
            audio_token_index=AUDIO,
        )
    )


MODELS = {"omni": omni, "qwen2_audio": qwen2_audio}


class Pair(NamedTuple):
    """One model twice."""

    upstream: transformers.PreTrainedModel
    model: AudioLM
    params: Any

    @property
    def config(self) -> AudioLMConfig:
        return self.model.config


def arrays(upstream) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in upstream.state_dict().items()}


def abstract(config: AudioLMConfig, **settings) -> Any:
    ids, mask = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)
    return jax.eval_shape(AudioLM(config, **settings).init, jax.random.key(0), ids, mask)["params"]


_CACHE: dict[str, Pair] = {}


def pair(name: str) -> Pair:
    """Made once per process."""
    if name not in _CACHE:
        torch.manual_seed(11)
        upstream = _sharpened(shake(MODELS[name](), seed=3))
        config = audio_lm_config(json.loads(upstream.config.to_json_string()))
        params = load(arrays(upstream), table(config), abstract(config))
        _CACHE[name] = Pair(upstream, AudioLM(config), params)
    return _CACHE[name]


def _sharpened(upstream):
    """Attention that looks somewhere, and audio that is loud beside the text."""
    with torch.no_grad():
        for name, weight in upstream.named_parameters():
            if re.search(r"language_model.*[qkvo]_proj\.weight", name):
                weight.mul_(2)
            if re.search(r"(audio_tower\.proj|projector\.linear)\.weight", name):
                weight.mul_(3)
    return upstream


class Batch(NamedTuple):
    ids: np.ndarray
    mask: np.ndarray
    features: np.ndarray
    lengths: np.ndarray


def batch(config: AudioLMConfig, side: str, lengths: np.ndarray = LENGTHS) -> Batch:
    """Rows padded at the "left" or "right"; clips stand between words, two of them side by side."""
    rng = np.random.default_rng(7)

    def words(count):
        return rng.integers(3, AUDIO, count).tolist()

    rows = []
    for row, frames in enumerate(lengths):
        tokens = words(2 + row)
        for clip in frames[frames > 0]:
            tokens += [START, *[AUDIO] * int(audio_token_count(config, clip)), END]
        rows.append(tokens + words(9 - 2 * row))
    width = max(map(len, rows)) + 1
    ids = np.full((len(rows), width), 0, np.int32)
    mask = np.zeros(ids.shape, bool)
    for row, tokens in enumerate(rows):
        place = slice(width - len(tokens), width) if side == "left" else slice(0, len(tokens))
        ids[row, place], mask[row, place] = tokens, True
    features = rng.standard_normal((*lengths.shape, FRAMES, MELS)).astype(np.float32)
    return Batch(ids, mask, features, lengths)


def upstream_inputs(data: Batch) -> dict[str, torch.Tensor]:
    """The batch as transformers takes it: the clips of all rows, one after another."""
    there = data.lengths > 0
    seen = np.arange(FRAMES) < data.lengths[there][:, None]
    return {
        "input_ids": torch.tensor(data.ids).long(),
        "attention_mask": torch.tensor(data.mask).long(),
        "input_features": torch.tensor(data.features[there]).transpose(1, 2),
        "feature_attention_mask": torch.tensor(seen).long(),
    }
