"""The forms in which releases of transformers wrote one and the same model.

Tests make their models with the release that is installed; users have files of older ones.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

State = Mapping[str, torch.Tensor]
Writer = Callable[[State, Path], None]

# What transformers 4's base class put into a dump of any config or part of one, by default.
BASE_4 = {
    "return_dict": True, "output_hidden_states": False, "output_attentions": False,
    "torchscript": False, "torch_dtype": None, "use_bfloat16": False, "tf_legacy_loss": False,
    "pruned_heads": {}, "tie_word_embeddings": True, "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False, "is_decoder": False, "cross_attention_hidden_size": None,
    "add_cross_attention": False, "tie_encoder_decoder": False, "max_length": 20, "min_length": 0,
    "do_sample": False, "early_stopping": False, "num_beams": 1, "num_beam_groups": 1,
    "diversity_penalty": 0.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0,
    "repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "num_return_sequences": 1,
    "output_scores": False, "return_dict_in_generate": False, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "remove_invalid_values": False,
    "exponential_decay_length_penalty": None, "suppress_tokens": None,
    "begin_suppress_tokens": None, "architectures": None, "finetuning_task": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "tokenizer_class": None, "prefix": None, "bos_token_id": None, "pad_token_id": None,
    "eos_token_id": None, "sep_token_id": None, "decoder_start_token_id": None,
    "task_specific_params": None, "problem_type": None, "_name_or_path": "",
}  # fmt: skip
# Whose classes set a default of their own.
_UNTIED_4 = ("llama", "qwen2", "qwen3", "qwen2_5_omni_text", "qwen2_5_omni_talker")


def sparse_4(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json of transformers 5 under the keys of 4.52."""
    made = {
        key: sparse_4(value) if key.endswith("_config") else value
        for key, value in config.items()
        if key not in ("rope_parameters", "layer_types", "dtype")
    }
    if "dtype" in config:
        made["torch_dtype"] = config["dtype"]
    if rope := config.get("rope_parameters"):
        made |= _rope_4(rope)
    if config.get("model_type") == "qwen2_5_omni_text":
        made["tie_word_embeddings"] = False  # 5 writes a `true` here that nothing reads
    if config.get("model_type") == "qwen2_5_omni_thinker":
        made.pop("tie_word_embeddings", None)
    if config.get("model_type", "").startswith("gemma3_text"):
        made["layer_types"] = config["layer_types"]
    return made


def _rope_4(rope: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of today's `rope_parameters`."""
    if "full_attention" in rope:
        local = rope["sliding_attention"]["rope_theta"]
        return {"rope_local_base_freq": local} | _rope_4(rope["full_attention"])
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    theta = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    plain = scaling == {"rope_type": "default"}
    return theta | {"rope_scaling": None if plain else scaling | {"type": scaling["rope_type"]}}


def full_4(config: dict[str, Any]) -> dict[str, Any]:
    """The same as a full dump: every part holds the base class's settings too."""
    own = sparse_4(config)
    base = BASE_4 | {"tie_word_embeddings": config.get("model_type") not in _UNTIED_4}
    parts = {key: full_4(config[key]) for key in own if key.endswith("_config")}
    return base | own | parts


def _safetensors(state: State, path: Path) -> None:
    whole = {name: tensor.clone().contiguous() for name, tensor in state.items()}
    safetensors.torch.save_file(whole, path, {"format": "pt"})


def _zip(state: State, path: Path) -> None:
    torch.save(dict(state), path)


def _legacy(state: State, path: Path) -> None:
    torch.save(dict(state), path, _use_new_zipfile_serialization=False)


def _single(write: Writer, name: str) -> Callable[[Path, State], set[str]]:
    def save(folder: Path, state: State) -> set[str]:
        write(state, folder / name)
        return {name}

    return save


def sharded(
    write: Writer, stem: str, suffix: str, index: str | None = None, shards: int = 3
) -> Callable[[Path, State], set[str]]:
    """A writer of shards and their index; it gives the names of the shards."""

    def save(folder: Path, state: State) -> set[str]:
        names, places = list(state), {}
        for number in range(min(shards, len(names))):
            shard = f"{stem}-{number + 1:05d}-of-{min(shards, len(names)):05d}{suffix}"
            part = {name: state[name] for name in names[number::shards]}
            write(part, folder / shard)
            places |= dict.fromkeys(part, shard)
        content = {"metadata": {"total_size": 0}, "weight_map": places}
        (folder / (index or f"{stem}{suffix}.index.json")).write_text(json.dumps(content))
        return set(places.values())

    return save


# How weights lie in a folder: writers (folder, state) -> names of the files that hold them.
FILES: dict[str, Callable[[Path, State], set[str]]] = {
    "safetensors": _single(_safetensors, "model.safetensors"),
    "safetensors shards": sharded(_safetensors, "model", ".safetensors"),
    "bin": _single(_zip, "pytorch_model.bin"),
    "bin shards": sharded(_zip, "pytorch_model", ".bin"),
    "bin of before 1.6": _single(_legacy, "pytorch_model.bin"),
    "bin shards of before 1.6": sharded(_legacy, "pytorch_model", ".bin"),
}
FLOAT32_SHARDS = sharded(
    _safetensors, "model.fp32", ".safetensors", "model.safetensors.index.fp32.json"
)
