"""Makes GGUF files as llama.cpp's converter does, from transformers models."""

from pathlib import Path

import gguf
import numpy as np


def convert(model, architecture: str, path: Path, kinds=None, **settings) -> None:
    """Writes a transformers decoder as a GGUF file.

    What `convert_hf_to_gguf.py` changes is changed: names, Gemma's norms (1 is added), the order of
    Llama's rows of queries and keys.

    Args:
      kinds: part of a GGUF name -> tensor type to quantise such tensors to; others stay float32.
      settings: more metadata of the architecture; `__` stands for `.`, None leaves a key out.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**_settings(config), **settings}.items():
        _write(writer, f"{architecture}.{key.replace('__', '.')}", value)
    arch = next(each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        if architecture == "gemma3" and name.endswith("norm.weight"):
            array = array + 1
        if architecture == "llama" and ".q_proj." in name:
            array = interleave(array, config.num_attention_heads)
        if architecture == "llama" and ".k_proj." in name:
            array = interleave(array, config.num_key_value_heads)
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        kind = next((kind for part, kind in (kinds or {}).items() if part in stored), None)
        if kind is not None and array.ndim > 1:
            writer.add_tensor(stored, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleave(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head, two halves -> pairs side by side."""
    halves = array.reshape(heads, 2, -1, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))


def _settings(config) -> dict:
    ropes = getattr(config, "rope_parameters", None) or {}
    rope = ropes.get("full_attention", ropes)
    found = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention__head_count": config.num_attention_heads,
        "attention__head_count_kv": config.num_key_value_heads,
        "attention__layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope__freq_base": float(rope["rope_theta"]),
    }
    if getattr(config, "head_dim", None):
        found |= {"attention__key_length": config.head_dim}
        found |= {"attention__value_length": config.head_dim}
    return found


def _write(writer, key: str, value) -> None:
    if value is None:
        return
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    add[type(value)](key, value)
