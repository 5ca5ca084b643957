"""The key lists of the published Qwen2-Audio and Qwen2.5-Omni, whole."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from medalign_jax.models.encoders.qwen_omni_audio import (
    QWEN2_5_OMNI_AUDIO,
    QWEN2_AUDIO,
    QwenAudio,
    qwen2_5_omni_audio_config,
    qwen2_audio_config,
)
from medalign_jax.weights.tables.qwen_omni_audio import (
    QWEN2_5_OMNI_TABLE,
    QWEN2_AUDIO_TABLE,
)
from tests.torch_models import check_shapes, hollow


def abstract_params(config):
    frames = min(config.frames, 400)
    features = jax.ShapeDtypeStruct((1, frames, config.mels), jnp.float32)
    return jax.eval_shape(QwenAudio(config).init, jax.random.key(0), features)["params"]


def renamed(names, *changes):
    """A key list with each name changed by the first pattern that it matches."""

    def change(name):
        for pattern, replacement in changes:
            if re.match(pattern, name):
                return re.sub(pattern, replacement, name)
        return name

    return {change(name): tensor for name, tensor in names.items()}


def test_the_whole_key_list_of_qwen2_audio():
    config = transformers.Qwen2AudioConfig(text_config={"model_type": "qwen2"})
    assert qwen2_audio_config(json.loads(config.to_json_string())) == QWEN2_AUDIO
    with torch.device("meta"):
        official = hollow(transformers.Qwen2AudioForConditionalGeneration(config))
    abstract = abstract_params(QWEN2_AUDIO)
    check_shapes(official, QWEN2_AUDIO_TABLE, abstract)
    published = renamed(
        official,
        (r"^lm_head", "language_model.lm_head"),
        (r"^model\.language_model", "language_model.model"),
        (r"^model\.", ""),
    )
    check_shapes(published, QWEN2_AUDIO_TABLE, abstract)
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(abstract)) == sum(
        tensor.size for name, tensor in official.items() if not re.match("lm_head|.*language", name)
    )


def test_the_whole_key_list_of_qwen2_5_omni():
    config = transformers.Qwen2_5OmniConfig()
    assert qwen2_5_omni_audio_config(json.loads(config.to_json_string())) == QWEN2_5_OMNI_AUDIO
    with torch.device("meta"):
        official = hollow(transformers.Qwen2_5OmniForConditionalGeneration(config))
    abstract = abstract_params(QWEN2_5_OMNI_AUDIO)
    check_shapes(official, QWEN2_5_OMNI_TABLE, abstract)
    published = renamed(
        official,
        (r"^thinker\.model\.language_model", "thinker.model"),
        (r"^thinker\.model\.", "thinker."),
    )
    check_shapes(published, QWEN2_5_OMNI_TABLE, abstract)
    thinker = {n[8:]: tensor for n, tensor in published.items() if n.startswith("thinker.")}
    check_shapes(thinker, QWEN2_5_OMNI_TABLE, abstract)
    tower = {n: t for n, t in published.items() if ".audio_tower." in n and "bos_eos" not in n}
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(abstract))
    assert count == sum(tensor.size for tensor in tower.values())
