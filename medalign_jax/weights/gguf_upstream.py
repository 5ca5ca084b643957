"""GGUF files as if they were the published checkpoint that they were made from.

For the architectures of `_ARCHITECTURES` tensors have their upstream names and contents: what
llama.cpp's `convert_hf_to_gguf.py` did to them is undone, and `config` says what `config.json` did,
so that one mapping table serves both. Tensors of other architectures keep their GGUF names.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medalign_jax.core.rounding import round_up
from medalign_jax.weights.gguf import Header, read_header, stored_tensors
from medalign_jax.weights.lazy import LazyTensor, WeightError, WeightFile
from medalign_jax.weights.table import Index, Shape, full_index


def open_gguf(path: Path) -> WeightFile:
    """Tensors and config of a GGUF file; as published where the architecture is known.

    Raises:
      WeightError: damaged, cut short, one part of several, or of a tensor type that is not known.
    """
    header = read_header(path)
    if header.metadata.get("split.count", 0) not in (0, 1):
        raise WeightError(
            f"{path}: one of {header.metadata['split.count']} parts; join them first with "
            "llama.cpp's `llama-gguf-split --merge`"
        )
    if not header.tensors:
        raise WeightError(f"{path}: a GGUF file without tensors")
    tensors = stored_tensors(path, header)
    architecture = header.metadata.get("general.architecture")
    known = _ARCHITECTURES.get(architecture) if isinstance(architecture, str) else None
    if known is None:

        def refuse() -> dict[str, Any]:
            raise WeightError(
                f"{path}: architecture {architecture!r} is not known in GGUF "
                f"({', '.join(_ARCHITECTURES)} are); give config= or use safetensors files"
            )

        return WeightFile(tensors, refuse)
    settings = _Settings(path, architecture, header, tensors)
    return WeightFile(known.upstream(settings), lambda: known.config(settings.fresh()))


@dataclasses.dataclass(frozen=True)
class Shifted:
    """A tensor with a constant added, in float32."""

    tensor: LazyTensor
    by: float

    @property
    def shape(self) -> Shape:
        return self.tensor.shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    @property
    def origin(self) -> str:
        return self.tensor.origin

    def read(self, index: Index | None = None) -> np.ndarray:
        """See LazyTensor."""
        return self.tensor.read(index).astype(np.float32) + np.float32(self.by)


@dataclasses.dataclass(frozen=True)
class RotaryRows:
    """Rows of heads, from llama.cpp's rotary order to that of transformers.

    Rotary embedding turns pairs of rows of a head. llama.cpp lays the two of a pair side by side,
    transformers half a head apart.
    """

    tensor: LazyTensor
    width: int  # rows of a head

    @property
    def shape(self) -> Shape:
        return self.tensor.shape

    @property
    def dtype(self) -> np.dtype:
        return self.tensor.dtype

    @property
    def origin(self) -> str:
        return self.tensor.origin

    def read(self, index: Index | None = None) -> np.ndarray:
        """See LazyTensor. Reads whole heads."""
        rows, *rest = full_index(self.shape) if index is None else index
        head, place = np.divmod(np.arange(rows.start, rows.stop), self.width)
        half, pair = np.divmod(place, self.width // 2)
        first = rows.start // self.width * self.width
        last = round_up(rows.stop, self.width)
        return self.tensor.read((slice(first, last), *rest))[
            head * self.width + 2 * pair + half - first
        ]


class _Settings:
    """The metadata of one architecture, each key read once or refused at the end."""

    def __init__(
        self, path: Path, architecture: str, header: Header, tensors: Mapping[str, LazyTensor]
    ) -> None:
        self.path, self.architecture = path, architecture
        self.tensors = dict(tensors)
        self._header = header
        begin = f"{architecture}."
        self._left = {
            key.removeprefix(begin): value
            for key, value in header.metadata.items()
            if key.startswith(begin)
        }

    def fresh(self) -> "_Settings":
        """The same with nothing read yet."""
        return _Settings(self.path, self.architecture, self._header, self.tensors)

    def refuse(self, reason: str) -> WeightError:
        """An error that names the file."""
        return WeightError(f"{self.path}: {reason}")

    def raw(self, key: str, default: Any = None) -> Any:
        """The value as it stands."""
        return self._left.pop(key, default)

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self.raw(key, default)
        if type(value) is not int or value < 1:
            raise self.refuse(f"{self.architecture}.{key} is {value!r}, not a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number, as it was before it became a float32."""
        value = self.raw(key, default)
        if type(value) not in (int, float) or not 0 < value < 1e38:
            raise self.refuse(f"{self.architecture}.{key} is {value!r}, not a positive number")
        return float(str(np.float32(value)))

    def only(self, key: str, supported: Any, why: str) -> None:
        """Refuses any value but one, if there is one."""
        value = self.raw(key, supported)
        if value != supported:
            raise self.refuse(f"{self.architecture}.{key} is {value!r}, not {supported!r}: {why}")

    def finish(self) -> None:
        """Refuses what nobody read and is not switched off."""
        left = {key: value for key, value in self._left.items() if value}
        if left:
            named = ", ".join(f"{key}={str(value)[:60]}" for key, value in sorted(left.items()))
            raise self.refuse(f"{self.architecture} settings that are not supported: {named}")


@dataclasses.dataclass(frozen=True)
class _Architecture:
    """How GGUF differs from the published checkpoint.

    Attributes:
      norms: GGUF module of a layer -> upstream module.
      config: what `config.json` said.
      norm_shift: what the converter added to the weights of norms.
      rotary_pairs: whether it reordered the rows of queries and keys.
    """

    norms: Mapping[str, str]
    config: Callable[[_Settings], dict[str, Any]]
    norm_shift: float = 0.0
    rotary_pairs: bool = False

    def upstream(self, settings: _Settings) -> dict[str, LazyTensor]:
        """The tensors under their upstream names, with their upstream contents."""
        tensors: dict[str, LazyTensor] = {}
        for name, tensor in settings.tensors.items():
            if name == "rope_freqs.weight":  # made by the converter from the config; read there
                continue
            upstream = _upstream_name(name, self.norms)
            if upstream in tensors:
                raise settings.refuse(f"two tensors are {upstream}")
            if self.norm_shift and upstream.endswith("norm.weight"):
                tensor = Shifted(tensor, -self.norm_shift)
            if self.rotary_pairs and re.search(r"\.(q|k)_proj\.", upstream):
                tensor = RotaryRows(tensor, _head_width(settings, name, tensor))
            tensors[upstream] = tensor
        return tensors


def _upstream_name(name: str, norms: Mapping[str, str]) -> str:
    for begin, upstream in _TOP.items():
        if name.startswith(begin):
            return upstream + name.removeprefix(begin)
    match = re.fullmatch(r"blk\.(0|[1-9]\d*)\.(\w+)\.(weight|bias)", name)
    module = match and {**_DENSE, **norms}.get(match[2])
    return f"model.layers.{match[1]}.{module}.{match[3]}" if module else name


def _head_width(settings: _Settings, name: str, tensor: LazyTensor) -> int:
    width = _sizes(settings.fresh())["head_dim"]
    if width % 2 or tensor.shape[0] % width:
        text = f"tensor {name!r} has {tensor.shape[0]} rows, which are not heads of {width}"
        raise settings.refuse(text)
    return width


def _sizes(settings: _Settings) -> dict[str, Any]:
    """What all decoders have; keys of `config.json`."""
    width, heads = settings.integer("embedding_length"), settings.integer("attention.head_count")
    head_dim = settings.integer("attention.key_length", width // heads)
    why = "heads have one width, and all of it is rotated"
    settings.only("attention.value_length", head_dim, why)
    settings.only("rope.dimension_count", head_dim, why)
    embedding = settings.tensors.get("token_embd.weight")
    if embedding is None:
        raise settings.refuse("has no tensor token_embd.weight")
    settings.only("vocab_size", embedding.shape[0], "token_embd.weight says otherwise")
    return {
        "vocab_size": embedding.shape[0],
        "hidden_size": width,
        "intermediate_size": settings.integer("feed_forward_length"),
        "num_hidden_layers": settings.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": settings.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": settings.integer("context_length"),
        "rms_norm_eps": settings.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in settings.tensors,
    }


def _linear_scaling(settings: _Settings) -> dict[str, Any] | None:
    kind = settings.raw("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise settings.refuse(f"rotary scaling {kind!r} is not read from GGUF files")
    factor = settings.number("rope.scaling.factor", 1.0)
    return {"rope_type": "linear", "factor": factor} if kind == "linear" else None


def _gemma3_config(settings: _Settings) -> dict[str, Any]:
    config = _sizes(settings) | {
        "model_type": "gemma3_text",
        "rope_theta": settings.number("rope.freq_base", 1e6),
        "rope_local_base_freq": settings.number("rope.freq_base_swa", 1e4),
        "rope_scaling": _linear_scaling(settings),
        "sliding_window": settings.integer("attention.sliding_window"),
        "sliding_window_pattern": settings.integer("attention.sliding_window_pattern", 6),
    }
    # llama.cpp knows the 27B by its depth; it alone has another scale of the scores.
    largest = config["num_hidden_layers"] == 62
    scale = config["hidden_size"] // config["num_attention_heads"]
    config["query_pre_attn_scalar"] = scale if largest else config["head_dim"]
    softcap = settings.raw("final_logit_softcapping")
    settings.finish()
    return config | ({"final_logit_softcapping": softcap} if softcap else {})


def _llama_config(settings: _Settings) -> dict[str, Any]:
    config = _sizes(settings) | {
        "model_type": "llama",
        "rope_theta": settings.number("rope.freq_base", 1e4),
        "rope_scaling": _linear_scaling(settings),
        "attention_bias": "blk.0.attn_q.bias" in settings.tensors,
    }
    factors = settings.tensors.get("rope_freqs.weight")
    if factors is not None:
        config["rope_scaling"] = _llama3_scaling(settings, factors.read(), config["rope_theta"])
    settings.finish()
    return config


def _llama3_scaling(settings: _Settings, factors: np.ndarray, theta: float) -> dict[str, Any]:
    """Llama 3's rotary scaling, of which the file has the resulting factors only.

    All published models of the family share three of its four numbers; the fourth is the largest
    factor. Whether that explains the others is checked.
    """
    scaling = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    turns = (
        scaling["original_max_position_embeddings"]
        / (2 * np.pi)
        * theta ** (-np.arange(factors.size) / factors.size)
    )
    blend = np.clip((turns - 1.0) / (4.0 - 1.0), 0, 1)
    expected = 1 / ((1 - blend) / scaling["factor"] + blend)
    if factors.ndim != 1 or not np.allclose(factors, expected, rtol=1e-4):
        raise settings.refuse("rope_freqs.weight is not the rotary scaling of Llama 3")
    return scaling


def _qwen_config(settings: _Settings) -> dict[str, Any]:
    config = _sizes(settings) | {
        "model_type": settings.architecture,
        "rope_theta": settings.number("rope.freq_base", 1e6),
        "rope_scaling": _linear_scaling(settings),
    }
    settings.finish()
    return config


# Beginning of a GGUF name -> of the upstream name.
_TOP = {
    "token_embd.": "model.embed_tokens.",
    "output_norm.": "model.norm.",
    "output.": "lm_head.",
}
# GGUF module of a layer -> upstream module.
_DENSE = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
}
_LLAMA_NORMS = {"ffn_norm": "post_attention_layernorm"}
_GEMMA3_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_ARCHITECTURES = {
    "gemma3": _Architecture(_GEMMA3_NORMS, _gemma3_config, norm_shift=1.0),
    "llama": _Architecture(_LLAMA_NORMS, _llama_config, rotary_pairs=True),
    "qwen2": _Architecture(_LLAMA_NORMS, _qwen_config),
    "qwen3": _Architecture(_LLAMA_NORMS, _qwen_config),
}
