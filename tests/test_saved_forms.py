"""One model in every form in which it may lie on the Hub: the same parameters come out.

Forms are a generation of config.json, the names of the tensors, and the files that hold them; each
is served by a Hub on loopback and opened by its name there, as a user does. That a family computes
what transformers computes is tested where the family is.
"""

import dataclasses
import json
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers

from medalign_jax.encoder import load_encoder
from medalign_jax.language_model import load_language_model
from medalign_jax.teachers.teacher import load_teacher
from medalign_jax.testing import HashTokenizer
from tests import saved_forms
from tests.hub_server import point_client_at, running
from tests.models import audio_lm_pairs
from tests.test_published_folders import FAMILIES as ENCODERS
from tests.torch_models import shake

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 600,
}  # fmt: skip
BERT_SIZES = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Family:
    """How a family is made by transformers, and read here.

    Attributes:
      make: a small random model.
      read: from a source to parameters.
      older: changes a state into that of its oldest files.
    """

    make: Callable[[], transformers.PreTrainedModel]
    read: Callable[[str], Any]
    older: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = dict


def encoder(name):
    return Family(ENCODERS[name].make, lambda source: load_encoder(name, source).params)


def teacher(model, config, older=dict, **sizes):
    def make():
        return model(config(**sizes))

    def read(source):
        return load_teacher(source, tokenizer=HashTokenizer(96), max_tokens=16).params

    return Family(make, read, older)


def listener(kind):
    def read(source):
        return load_language_model(source, tokenizer=object()).params

    return Family(audio_lm_pairs.MODELS[kind], read)


def first_bert(state):
    """Names of the first conversions, and the counter that files had until 2023."""
    names = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
    made = {}
    for name, tensor in state.items():
        for new, old in names:
            name = name.replace(new, old)
        made[name] = tensor
    (top,) = {name.split("embeddings.")[0] for name in state if "word_embeddings" in name}
    return made | {f"{top}embeddings.position_ids": torch.arange(600)[None]}


def with_frequencies(state):
    """Rotary frequencies of each layer, which files had until 2023."""
    own = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    return state | own


def gemma3(**changes):
    text = SIZES | {"head_dim": 16, "sliding_window": 8} | changes
    return transformers.Gemma3Config(text_config=text, vision_config=VISION)


FAMILIES = {
    **{name: encoder(name) for name in ENCODERS},
    "omni": listener("omni"),
    "qwen2_audio_lm": listener("qwen2_audio"),
    "clap_text": teacher(lambda config: ENCODERS["clap"].make(), dict),
    "bert": teacher(
        transformers.BertForPreTraining, transformers.BertConfig, first_bert, **BERT_SIZES
    ),
    "roberta": teacher(
        transformers.RobertaForMaskedLM, transformers.RobertaConfig, first_bert, **BERT_SIZES
    ),
    "llama": teacher(
        transformers.LlamaForCausalLM, transformers.LlamaConfig, with_frequencies, **SIZES
    ),
    "qwen2": teacher(
        transformers.Qwen2ForCausalLM, transformers.Qwen2Config, with_frequencies, **SIZES
    ),
    "qwen3": teacher(transformers.Qwen3ForCausalLM, transformers.Qwen3Config, head_dim=16, **SIZES),
    "gemma3": teacher(transformers.Gemma3ForConditionalGeneration, gemma3),
}
# config, tensor names, files. Published names are those that transformers 4 had in memory too.
FORMS = {
    "5, its own names, bin": (dict, "memory", "bin"),
    "4, shards": (saved_forms.sparse_4, "published", "safetensors shards"),
    "4, full dump, bin of before 1.6": (saved_forms.full_4, "oldest", "bin of before 1.6"),
}


@dataclasses.dataclass
class Saved:
    family: Family
    config: dict
    states: dict[str, dict[str, torch.Tensor]]
    params: Any


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    family = FAMILIES[request.param]
    torch.manual_seed(0)
    model = shake(family.make())
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    published = saved_forms.safetensors.torch.load_file(folder / "model.safetensors")
    states = {
        "memory": model.state_dict(),
        "published": published,
        "oldest": family.older(published),
    }
    config = json.loads((folder / "config.json").read_text())
    return Saved(family, config, states, family.read(str(folder)))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_parameters(saved, form, tmp_path, monkeypatch):
    change, names, files = FORMS[form]
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(change(saved.config)))
    saved_forms.FILES[files](folder, saved.states[names])
    with running() as hub, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it is not a safetensors file
        point_client_at(hub, tmp_path / "cache", monkeypatch)
        hub.put("org/name", folder)
        params = saved.family.read("org/name")
    jax.tree.map(np.testing.assert_array_equal, params, saved.params)


def test_a_repository_of_2019_with_a_vocabulary_file_only(tmp_path, monkeypatch):
    """Bio_ClinicalBERT's layout: pytorch_model.bin of before 1.6, config.json and vocab.txt."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "chest", "pain", "##s", "no"]
    sizes = BERT_SIZES | {"vocab_size": len(words)}
    model = shake(transformers.BertForPreTraining(transformers.BertConfig(**sizes)))
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", **sizes}))
    (folder / "vocab.txt").write_text("\n".join(words))
    saved_forms.FILES["bin of before 1.6"](folder, first_bert(model.state_dict()))
    with running() as hub:
        point_client_at(hub, tmp_path / "cache", monkeypatch)
        hub.put("org/clinical", folder)
        for source in ("org/clinical", "org/clinical:pytorch_model.bin"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                found = load_teacher(source, max_tokens=16)
            ids, mask = found.tokenize(["no chest pains"])
            assert ids[0][mask[0]].tolist() == [2, 8, 5, 6, 7, 3]
        assert hub.fetched() == {"config.json", "vocab.txt", "pytorch_model.bin"}
    assert load_teacher(str(folder), max_tokens=16).identity == found.identity
