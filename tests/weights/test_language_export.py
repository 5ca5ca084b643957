"""What is exported is a folder that transformers loads: no key missing, none unexpected."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
import transformers
from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import Qwen2_5OmniProcessor

from medalign_jax.language_model import (
    LanguageModel,
    abstract_params,
    build_module,
    load_language_model,
)
from medalign_jax.weights.load import save
from tests.models import audio_lm_pairs as pairs
from tests.text import chat_tokenizers as toy
from tests.text.test_chat_formats import MARKS
from tests.torch_models import shake

CLASSES = {
    "omni": transformers.Qwen2_5OmniThinkerForConditionalGeneration,
    "qwen2_audio": transformers.Qwen2AudioForConditionalGeneration,
}
BESIDE = {
    "preprocessor_config.json": {
        "feature_extractor_type": "WhisperFeatureExtractor", "feature_size": pairs.MELS,
        "image_processor_type": "Qwen2VLImageProcessor", "return_attention_mask": True,
    },
    "chat_template.json": {"chat_template": toy.PARTS_TEMPLATE},
    "generation_config.json": {"max_new_tokens": 7},
}  # fmt: skip


def as_transformers_loads(kind, folder):
    """Its tensors by name, after making sure that the folder holds exactly those."""
    model, found = CLASSES[kind].from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    return model, {name: tensor.numpy() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module", params=["omni", "whole omni", "qwen2_audio"])
def published(request, tmp_path_factory):
    """A random model as transformers writes it, with the files that are published beside it."""
    kind = request.param.split()[-1]
    folder = tmp_path_factory.mktemp(request.param)
    upstream = shake(pairs.MODELS[kind](), seed=1)
    upstream.save_pretrained(folder)
    toy.write_tokenizer(folder, (*toy.CHATML, *MARKS.values()), template=None)
    marked = transformers.AutoTokenizer.from_pretrained(folder, extra_special_tokens=MARKS)
    marked.save_pretrained(folder)
    for name, content in BESIDE.items():
        (folder / name).write_text(json.dumps(content))
    if request.param == "whole omni":
        make_whole(folder)
    return kind, upstream, folder


def make_whole(folder):
    """A thinker's folder as that of the whole model, with a talker and a vocoder."""
    thinker = json.loads((folder / "config.json").read_text())
    whole = {
        "model_type": "qwen2_5_omni", "thinker_config": thinker, "enable_audio_output": True,
        "talker_config": {"hidden_size": 4}, "token2wav_config": {"a": 1}, "dtype": "float32",
        "architectures": ["Qwen2_5OmniForConditionalGeneration"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(whole))
    from safetensors.numpy import load_file

    tensors = load_file(folder / "model.safetensors")
    tensors = {f"thinker.{name}": array for name, array in tensors.items()}
    more = {"talker.x": np.ones(3, np.float32), "token2wav.y": np.ones(2, np.float32)}
    save(folder / "model.safetensors", tensors | more)


def test_a_published_model_comes_back_whole(published, tmp_path):
    kind, upstream, folder = published
    loaded = load_language_model(str(folder))
    exported = loaded.save(tmp_path / "export")
    model, tensors = as_transformers_loads(kind, exported)
    expected = {name: tensor.numpy() for name, tensor in upstream.state_dict().items()}
    assert tensors.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(tensors[name], array, err_msg=name)
    text = model.config.get_text_config()
    assert text.hidden_size == pairs.TEXT["hidden_size"]
    again = load_language_model(str(exported))
    assert again.module.config == loaded.module.config and again.identity
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
    for name, content in BESIDE.items():
        assert json.loads((exported / name).read_text()) == content


def test_trained_numbers_are_what_transformers_gets(published, tmp_path):
    kind, _, folder = published
    loaded = load_language_model(str(folder))
    trained = loaded.with_params(jax.tree.map(lambda leaf: leaf + 1, loaded.params))
    _, tensors = as_transformers_loads(kind, trained.save(tmp_path / "export"))
    head = np.asarray(loaded.params["text"]["lm_head"]["kernel"]).T
    np.testing.assert_array_equal(tensors["lm_head.weight"], head + 1)
    seen = [name for name in tensors if ".visual." in name]
    before = dict(pairs.MODELS[kind]().state_dict()) if seen else {}
    assert all(tensors[name].shape == tuple(before[name].shape) for name in seen)
    assert len(seen) > 10 or kind == "qwen2_audio"


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_that_was_made_here_loads_without_a_key_invented(tmp_path, tied):
    config = json.loads(pairs.omni().config.to_json_string())
    del config["vision_config"]
    config["tie_word_embeddings"] = tied
    toy_tokenizer = load_tokenizer(tmp_path / "tokenizer")
    module, rng = build_module(config), np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), abstract_params(module)
    )
    made = LanguageModel(module, params, toy_tokenizer, config)
    model, tensors = as_transformers_loads("omni", made.save(tmp_path / "export"))
    embedding = np.asarray(params["text"]["embed"]["embedding"])
    np.testing.assert_array_equal(tensors["model.language_model.embed_tokens.weight"], embedding)
    assert np.array_equal(tensors["lm_head.weight"], embedding) == tied
    written = json.loads((tmp_path / "export" / "config.json").read_text())
    assert (
        written["model_type"] == "qwen2_5_omni_thinker" and written["vision_config"]["depth"] == 0
    )
    again = load_language_model(str(tmp_path / "export"))
    again = dataclasses.replace(again, config_json=config)
    as_transformers_loads("omni", again.save(tmp_path / "again"))
    ids = torch.tensor([[3, 4, 5]])
    assert torch.isfinite(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits).all()


def omni_processor(folder):
    """Qwen2.5-Omni's processor of what a folder holds; what it sees with needs torchvision."""
    template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        name = "check_argument_for_proper_class"
        patch.setattr(transformers.ProcessorMixin, name, lambda self, *_: None)
        return Qwen2_5OmniProcessor(None, None, extractor, tokenizer, template)


def load_tokenizer(folder):
    from medalign_jax.text.chat import ChatTokenizer

    return ChatTokenizer(toy.write_tokenizer(folder))


def test_the_processor_of_an_export_works(published, tmp_path):
    kind, _, folder = published
    exported = load_language_model(str(folder)).save(tmp_path / "export")
    if kind == "omni":
        processor = omni_processor(exported)
    else:
        processor = transformers.Qwen2AudioProcessor.from_pretrained(exported)
    turns = [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "Which?"}]}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert text == load_language_model(str(exported)).tokenizer.prompt("Which?", clips=1)
    wave = np.full(16_000, 0.1, np.float32)
    inputs = processor(text=text, audio=[wave], sampling_rate=16_000, return_tensors="pt")
    assert inputs["input_features"].shape[1] == pairs.MELS
    assert (inputs["input_ids"] == processor.audio_token_id).sum() == 25
