"""Configs of published audio language models, and their complete key lists at full size."""

import dataclasses
import json
import re
from collections.abc import Mapping

import jax
import numpy as np
import pytest
import torch
import transformers

from medalign_jax.core.mesh import make_mesh, shardings
from medalign_jax.models.audio_lm import (
    QWEN2_5_OMNI_3B,
    QWEN2_5_OMNI_7B,
    QWEN2_AUDIO_7B,
    audio_lm_config,
)
from medalign_jax.models.upstream_config import ModelConfigError
from medalign_jax.weights.lazy import WeightError
from medalign_jax.weights.load import load
from medalign_jax.weights.match import Problems, flatten, match
from medalign_jax.weights.tables.audio_lm import SHARDING, table
from tests.models import audio_lm_pairs as pairs

# As published on the Hub: what it leaves out are transformers' defaults.
QWEN2_AUDIO_JSON = {
    "architectures": ["Qwen2AudioForConditionalGeneration"],
    "audio_config": {
        "activation_dropout": 0.0, "activation_function": "gelu", "attention_dropout": 0.0,
        "d_model": 1280, "dropout": 0.0, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120,
        "encoder_layerdrop": 0.0, "encoder_layers": 32, "init_std": 0.02,
        "max_source_positions": 1500, "model_type": "qwen2_audio_encoder", "num_mel_bins": 128,
        "scale_embedding": False,
    },
    "audio_token_index": 151646, "ignore_index": -100, "model_type": "qwen2_audio",
    "text_config": {
        "bos_token_id": 151643, "eos_token_id": 151645, "intermediate_size": 11008,
        "max_position_embeddings": 8192, "model_type": "qwen2", "rms_norm_eps": 1e-05,
        "rope_theta": 10000, "sliding_window": 32768, "torch_dtype": "bfloat16",
        "use_mrope": False, "vocab_size": 156032,
    },
    "torch_dtype": "bfloat16", "transformers_version": "4.38.1", "vocab_size": 156032,
}  # fmt: skip
OMNI_3B_TEXT = {
    "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008,
    "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
    "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
}  # fmt: skip


def omni_3b():
    return transformers.Qwen2_5OmniThinkerConfig(
        text_config=OMNI_3B_TEXT, audio_config={"output_dim": 2048},
        vision_config={"out_hidden_size": 2048},
    )  # fmt: skip


def as_json(config):
    return json.loads(config.to_json_string())


def shapes_of(model_class, config) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model, by name; no memory is used."""
    with torch.device("meta"):
        model = model_class(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def renamed(shapes: Mapping[str, tuple[int, ...]], *changes: tuple[str, str]):
    """A key list with each name changed by the first pattern that it matches."""

    def change(name):
        hit = next((pair for pair in changes if re.match(pair[0], name)), ("", ""))
        return re.sub(*hit, name, count=1)

    made = {change(name): shape for name, shape in shapes.items()}
    assert len(made) == len(shapes) and made.keys() != shapes.keys()
    return made


def assert_fits(config, shapes):
    """The table gives every parameter tensors of the right shape, and every tensor its use."""
    leaves, _ = flatten(pairs.abstract(config))
    problems = Problems()
    found = match(table(config), shapes, {k: v.shape for k, v in leaves.items()}, problems)
    problems.raise_if_any("full-size key list")
    for path, slot in found.slots.items():
        expected = leaves[path].shape[1:] if slot.rule.stacked else leaves[path].shape
        assert {slot.rule.transform.target_shape(shapes[name]) for name in slot.names} == {expected}
    shardings(pairs.abstract(config), SHARDING, make_mesh(devices=jax.devices()[:1]))
    return sum(leaf.size for leaf in leaves.values())


def counted(shapes, pattern):
    return sum(int(np.prod(shape)) for name, shape in shapes.items() if re.match(pattern, name))


def check_omni(config, shapes):
    """As transformers 5 names its modules, as published, and the thinker of either by itself."""
    heard = r"thinker\.(model\.audio_tower\.(?!audio_bos)|model\.language_model\.|lm_head\.)"
    count = assert_fits(config, shapes)
    assert count == counted(shapes, heard)
    published = renamed(
        shapes,
        (r"thinker\.model\.language_model\.", "thinker.model."),
        (r"thinker\.model\.", "thinker."),
    )
    assert {"thinker.audio_tower.proj.weight", "thinker.lm_head.weight"} <= published.keys()
    assert assert_fits(config, published) == count
    for names in (shapes, published):
        alone = {name[8:]: each for name, each in names.items() if name.startswith("thinker.")}
        assert assert_fits(config, alone) == count
    return count


def test_the_whole_key_list_of_qwen2_5_omni_7b():
    config = transformers.Qwen2_5OmniConfig()
    assert audio_lm_config(as_json(config)) == QWEN2_5_OMNI_7B
    shapes = shapes_of(transformers.Qwen2_5OmniForConditionalGeneration, config)
    assert any(name.startswith("talker.") for name in shapes)
    assert any(name.startswith("token2wav.") for name in shapes)
    tower = check_omni(QWEN2_5_OMNI_7B, shapes) - 7_615_616_512  # the parameters of Qwen2.5-7B
    assert round(tower / 1e6, 1) == 639.6


def test_the_whole_key_list_of_the_thinker_of_qwen2_5_omni_3b():
    config = omni_3b()
    assert audio_lm_config(as_json(config)) == QWEN2_5_OMNI_3B
    shapes = shapes_of(transformers.Qwen2_5OmniThinkerForConditionalGeneration, config)
    check_omni(QWEN2_5_OMNI_3B, {f"thinker.{name}": shape for name, shape in shapes.items()})


def test_the_whole_key_list_of_qwen2_audio_7b():
    assert audio_lm_config(QWEN2_AUDIO_JSON) == QWEN2_AUDIO_7B
    config = transformers.Qwen2AudioConfig(**json.loads(json.dumps(QWEN2_AUDIO_JSON)))
    assert audio_lm_config(as_json(config)) == QWEN2_AUDIO_7B
    shapes = shapes_of(transformers.Qwen2AudioForConditionalGeneration, config)
    count = assert_fits(QWEN2_AUDIO_7B, shapes)
    assert count == counted(shapes, "")
    published = renamed(
        shapes,
        (r"lm_head", "language_model.lm_head"),
        (r"model\.language_model", "language_model.model"),
        (r"model\.", ""),
    )
    assert assert_fits(QWEN2_AUDIO_7B, published) == count


def test_a_checkpoint_that_does_not_fit_is_refused_by_name():
    pair = pairs.pair("omni")
    changed = pairs.arrays(pair.upstream)
    del changed["model.audio_tower.proj.bias"], changed["lm_head.weight"]
    changed["model.hearing.weight"] = np.zeros(2, np.float32)
    changed["model.layers.0.mlp.up_proj.weight"] = np.zeros((44, 36), np.float32)
    with pytest.raises(WeightError) as caught:
        load(changed, table(pair.config), pairs.abstract(pair.config))
    for words in (
        "missing: audio_tower.proj.bias", "missing: lm_head.weight", "unused: model.hearing.weight",
        "alternatives are both there: model.layers.0.mlp.up_proj.weight",
    ):  # fmt: skip
        assert words in str(caught.value)


def small(kind, **changes):
    config = as_json(pairs.MODELS[kind]().config)
    for path, value in changes.items():
        *outer, last = path.split("__")
        place = config
        for key in outer:
            place = place[key]
        place[last] = value
    return config


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "whisper"}, "model_type='whisper'"),
        ({"model_type": "qwen2_5_omni"}, "no 'thinker_config'"),
        (("omni", {"text_config__num_experts": 8}), "num_experts=8"),
        (("omni", {"audio_config__n_window_infer": 8}), "n_window_infer=8"),
        (("omni", {"router": 8}), "router=8"),
        (("omni", {"audio_config__output_dim": 32}), "32 channels, the language model 36"),
        (("omni", {"audio_token_index": 97}), "audio token 97 is not among the 97"),
        (("omni", {"text_config__rope_parameters": {"mrope_section": [1]}}), "mrope_section"),
        (("omni", {"text_config__rope_parameters": {}}), "mrope_section .* 6; it is .16, 24, 24"),
        (("qwen2_audio", {"router": 8}), "router=8"),
        (("qwen2_audio", {"text_config__use_mrope": True}), "use_mrope"),
        (("qwen2_audio", {"text_config__model_type": "qwen3"}), "model_type='qwen3'"),
        (("qwen2_audio", {"text_config__tie_word_embeddings": True}), "tie_word_embeddings"),
        (("qwen2_audio", {"audio_config__n_window": 8}), "n_window=8"),
        (("qwen2_audio", {"audio_config": 3}), "audio_config"),
        (("qwen2_audio", {"audio_token_index": "x"}), "audio_token_index"),
    ],
)
def test_unsupported_settings_are_refused_by_name(config, words):
    if isinstance(config, tuple):
        config = small(config[0], **config[1])
    with pytest.raises(ModelConfigError, match=words):
        audio_lm_config(config)


def test_a_whole_omni_reads_as_its_thinker():
    thinker = small("omni")
    whole = {"model_type": "qwen2_5_omni", "thinker_config": thinker, "talker_config": {"a": 1}}
    assert audio_lm_config(whole) == audio_lm_config(thinker) == pairs.pair("omni").config
    assert audio_lm_config(thinker).text.rope.sections == (1, 1, 1)
    with pytest.raises(ModelConfigError, match="kind 'omni'"):
        dataclasses.replace(audio_lm_config(thinker), kind="omni")
