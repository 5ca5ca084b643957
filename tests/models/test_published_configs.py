"""A config.json means the same in every form in which releases of transformers wrote it."""

import json

import pytest
import transformers

from medalign_jax.language_model import build_module
from medalign_jax.models import audio_lm
from medalign_jax.models.encoders import ast, clap, qwen_omni_audio, whisper
from medalign_jax.models.language import bert, decoder_config
from medalign_jax.models.upstream_config import ModelConfigError
from tests import saved_forms

FORMS = {
    "transformers 5": lambda config: config,
    "transformers 4": saved_forms.sparse_4,
    "transformers 4, full dump": saved_forms.full_4,
}
ROPE = {"rope_type": "default", "mrope_section": [16, 24, 24]}


def gemma3():
    text = {"hidden_size": 64, "num_hidden_layers": 8, "sliding_window": 16}
    return transformers.Gemma3Config(text_config=text)


def omni(**thinker):
    # rope_scaling as published: today's class would leave mrope_section out.
    thinker = {"text_config": {"rope_parameters": ROPE}} | thinker
    return transformers.Qwen2_5OmniConfig(thinker_config=thinker, enable_audio_output=False)


READERS = {
    "ast": (transformers.ASTConfig, ast.ast_config),
    "bert": (transformers.BertConfig, bert.bert_config),
    "clap audio": (transformers.ClapConfig, clap.clap_config),
    "clap text": (transformers.ClapConfig, clap.clap_text_config),
    "gemma3": (gemma3, decoder_config.gemma3_config),
    "gemma3 text": (transformers.Gemma3TextConfig, decoder_config.gemma3_config),
    "llama": (transformers.LlamaConfig, decoder_config.llama_config),
    "qwen2": (transformers.Qwen2Config, decoder_config.qwen2_config),
    "qwen2 audio": (transformers.Qwen2AudioConfig, audio_lm.audio_lm_config),
    "qwen2 audio tower": (transformers.Qwen2AudioConfig, qwen_omni_audio.qwen2_audio_config),
    "qwen3": (transformers.Qwen3Config, decoder_config.qwen3_config),
    "omni": (omni, audio_lm.audio_lm_config),
    "omni text": (omni, decoder_config.qwen_omni_config),
    "omni tower": (omni, qwen_omni_audio.qwen2_5_omni_audio_config),
    "roberta": (transformers.RobertaConfig, bert.roberta_config),
    "whisper": (transformers.WhisperConfig, whisper.whisper_config),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", READERS)
def test_every_form_of_a_config_reads_alike(family, form):
    make, read = READERS[family]
    config = json.loads(make().to_json_string())
    assert read(FORMS[form](config)) == read(config)


@pytest.mark.parametrize("dump", ["omni_diff_dump_4.52.json", "omni_full_dump_4.52.json"])
def test_qwen2_5_omni_as_transformers_4_52_writes_it(shared, dump):
    config = json.loads((shared / "inputs" / dump).read_text())
    assert audio_lm.audio_lm_config(config) == audio_lm.QWEN2_5_OMNI_7B
    assert audio_lm.audio_lm_config(config["thinker_config"]) == audio_lm.QWEN2_5_OMNI_7B
    assert build_module(config).config == audio_lm.QWEN2_5_OMNI_7B
    tower = qwen_omni_audio.QWEN2_5_OMNI_AUDIO
    assert qwen_omni_audio.qwen2_5_omni_audio_config(config) == tower
    text = decoder_config.qwen_omni_config(config)
    assert text == audio_lm.QWEN2_5_OMNI_7B.text and not text.tied
    # As some fine-tunes have it; it repeats what text_config says.
    assert audio_lm.audio_lm_config(config | {"hidden_size": 3584}) == audio_lm.QWEN2_5_OMNI_7B


def test_both_towers_of_clap_as_published(shared):
    config = json.loads((shared / "inputs" / "clap_fused_real_config.json").read_text())
    assert clap.clap_config(config) == clap.CLAP_FUSED
    assert clap.clap_text_config(config) == clap.CLAP_TEXT


@pytest.mark.parametrize(
    ("thinker", "text", "tied"),
    [
        (True, False, False),  # transformers 4.52, a full dump
        (False, True, False),  # transformers 5
        (None, False, False),  # as published
        (None, None, False),
        (None, True, True),  # transformers 4, tied
        (True, True, True),  # both, tied
        (True, None, True),
    ],
)
def test_whose_word_on_a_tied_head_of_qwen2_5_omni_counts(thinker, text, tied):
    config = json.loads(omni().to_json_string())
    for part, word in (
        (config["thinker_config"], thinker),
        (config["thinker_config"]["text_config"], text),
    ):
        part.pop("tie_word_embeddings")
        if word is not None:
            part["tie_word_embeddings"] = word
    assert audio_lm.audio_lm_config(config).text.tied is tied


def test_qwen2_audio_ties_by_its_text_part_alone():
    config = json.loads(transformers.Qwen2AudioConfig().to_json_string())
    read = audio_lm.audio_lm_config(config)
    wider = config | {"tie_word_embeddings": True, "hidden_size": 4096}
    assert audio_lm.audio_lm_config(wider) == read and not read.text.tied
    config["text_config"]["tie_word_embeddings"] = True
    with pytest.raises(ModelConfigError, match="text_config: tie_word_embeddings=True"):
        audio_lm.audio_lm_config(config)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", READERS)
def test_a_feature_is_refused_in_every_form_and_part(family, form):
    make, read = READERS[family]
    config = FORMS[form](json.loads(make().to_json_string()))
    part = {"clap audio": "audio_config", "clap text": "text_config"}.get(family)
    (config[part] if part else config)["router_mode"] = "two"
    if family in ("qwen2 audio tower", "omni tower"):  # they read their own part only
        config.get("thinker_config", config)["audio_config"]["router_mode"] = "two"
    with pytest.raises(ModelConfigError, match="router_mode=two"):
        read(config)


@pytest.mark.parametrize("family", sorted({*READERS} - {"clap audio"}))  # one depth per stage
def test_no_depth_is_believed_that_no_model_has(family):
    """What is made for each layer would be made before any weights are looked at."""
    make, read = READERS[family]
    whole = json.loads(make().to_json_string())
    for config in (whole, *(part for part in whole.values() if isinstance(part, dict))):
        for part in (config, *(part for part in config.values() if isinstance(part, dict))):
            for key in ("num_hidden_layers", "encoder_layers"):
                part |= {key: 10**12} if key in part else {}
    with pytest.raises(ModelConfigError, match="no model has more layers than 10000"):
        read(whole)


@pytest.mark.parametrize("family", sorted(READERS))
def test_no_size_is_believed_that_no_axis_can_have(family):
    make, read = READERS[family]
    whole = json.loads(make().to_json_string())

    def enlarge(config):
        for key, value in config.items():
            if isinstance(value, dict):
                enlarge(value)
            elif key in ("vocab_size", "hidden_size", "d_model", "patch_embeds_hidden_size"):
                config[key] = 10**20

    enlarge(whole)
    with pytest.raises(ModelConfigError, match="no model has sizes above 2147483647"):
        read(whole)
