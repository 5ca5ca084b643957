"""Typed configuration of a decoder-only language model, read from published ``config.json`` files.

``DecoderConfig`` holds what distinguishes the members of the family (Gemma-3 today; Llama and Qwen
differ from it in these switches only); one reader a model type fills it. A setting that no reader
knows is refused by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from medalign_jax.models.upstream_config import ConfigReader, ModelConfigError


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base, and the factor by which positions are divided."""

    theta: float = 10_000.0
    factor: float = 1.0


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only language model.

    Attributes:
      sliding: For each layer, whether it sees only the last ``window`` tokens (itself included).
        Its length is the depth.
      rope: Rotary embedding of the layers that see everything.
      local_rope: Rotary embedding of the sliding layers.
      attention_scale: Factor on the scores, e.g. ``head_dim ** -0.5``.
      embed_scale: Factor on the token embeddings.
      activation: ``"gelu_tanh"`` (GeGLU) or ``"silu"`` (SwiGLU).
      norm_offset: Norms multiply by ``norm_offset + scale``: 1 in Gemma, 0 elsewhere.
      post_norms: Norms after attention and feed-forward too, before the residual sum.
      qk_norm: RMSNorm of each head's queries and keys.
      qkv_bias: Biases on the query, key and value projections.
      tied: Logits through the token embedding; otherwise through ``lm_head``.
      final_softcap: ``cap * tanh(logits / cap)``; None for none.
      final_norm: Whether the last hidden state is normed; off in a truncated model.
    """

    vocab_size: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    sliding: tuple[bool, ...]
    attention_scale: float
    max_positions: int
    window: int | None = None
    rope: Rope = Rope()
    local_rope: Rope = Rope()
    eps: float = 1e-6
    embed_scale: float = 1.0
    activation: str = "silu"
    norm_offset: float = 0.0
    post_norms: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    tied: bool = True
    final_softcap: float | None = None
    final_norm: bool = True

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ModelConfigError(
                f"{self.heads} attention heads are no multiple of {self.kv_heads} key-value heads"
            )
        if self.head_dim % 2:
            raise ModelConfigError(f"rotary embeddings need an even head_dim, not {self.head_dim}")
        if any(self.sliding) and self.window is None:
            raise ModelConfigError("sliding-attention layers need a sliding_window; it is null")

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.sliding)

    def truncate(self, depth: int) -> "DecoderConfig":
        """The first ``depth`` layers: its last hidden state is this model's state ``depth``."""
        if depth == self.depth:
            return self
        return replace(self, sliding=self.sliding[:depth], final_norm=False)


def gemma3_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads a Gemma-3 ``config.json``, text-only or with a vision tower, old keys or new.

    Absent keys have the defaults of transformers' ``Gemma3TextConfig``, on which the published
    multimodal configs rely.

    Raises:
      ModelConfigError: for a missing or malformed value, or a feature that is not supported.
    """
    outer = ConfigReader(config)
    if outer.only("model_type", ("gemma3", "gemma3_text"), "gemma3_text") == "gemma3_text":
        return _gemma3_text(outer)
    text = outer.raw("text_config")
    # These describe the vision side, which a text teacher does not have.
    outer.ignore("vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index")
    outer.ignore("image_token_index", "boi_token_id", "eoi_token_id", "image_token_id")
    outer.only("tie_word_embeddings", (True,), True)
    outer.finish()
    return _gemma3_text(ConfigReader(text, "config.json: text_config"))


def _gemma3_text(reader: ConfigReader) -> DecoderConfig:
    reader.only("model_type", ("gemma3_text",), "gemma3_text")
    reader.only("hidden_activation", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
    reader.only("hidden_act", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
    reader.only("attention_bias", (False,), False)
    reader.only("attn_logit_softcapping", (None,), None)
    reader.only("use_bidirectional_attention", (False, None), False)
    reader.only("tie_word_embeddings", (True,), True)
    reader.ignore("attention_dropout")
    width = reader.integer("hidden_size", 2304)
    softcap = reader.raw("final_logit_softcapping", None)
    rope, local_rope = _ropes(reader)
    result = DecoderConfig(
        vocab_size=reader.integer("vocab_size", 262_208),
        width=width,
        heads=reader.integer("num_attention_heads", 8),
        kv_heads=reader.integer("num_key_value_heads", 4),
        head_dim=reader.integer("head_dim", 256),
        mlp_width=reader.integer("intermediate_size", 9216),
        sliding=_layer_types(reader, reader.integer("num_hidden_layers", 26)),
        attention_scale=reader.number("query_pre_attn_scalar", 256) ** -0.5,
        max_positions=reader.integer("max_position_embeddings", 131_072),
        window=reader.integer("sliding_window", 4096),
        rope=rope,
        local_rope=local_rope,
        eps=reader.number("rms_norm_eps", 1e-6),
        embed_scale=width**0.5,
        activation="gelu_tanh",
        norm_offset=1.0,
        post_norms=True,
        qk_norm=True,
        final_softcap=None if softcap is None else reader.number("final_logit_softcapping"),
    )
    reader.finish()
    return result


def _layer_types(reader: ConfigReader, depth: int) -> tuple[bool, ...]:
    """Which layers slide: ``layer_types`` where given, else every n-th sees all."""
    # transformers 4.5x wrote the pattern with a leading underscore beside layer_types.
    pattern = reader.integer("sliding_window_pattern", reader.raw("_sliding_window_pattern", 6))
    types = reader.raw("layer_types", None)
    if types is None:
        return tuple((layer + 1) % pattern != 0 for layer in range(depth))
    known = ("sliding_attention", "full_attention")
    if not isinstance(types, list) or len(types) != depth or any(t not in known for t in types):
        raise ModelConfigError(
            f"{reader.where}: layer_types has to name {depth} layers, each one of {known}; "
            f"it is {str(types)[:200]}"
        )
    return tuple(kind == "sliding_attention" for kind in types)


def _ropes(reader: ConfigReader) -> tuple[Rope, Rope]:
    """Global and local rotary settings, from ``rope_parameters`` or the older separate keys."""
    theta = reader.number("rope_theta", 1_000_000.0)
    local_theta = reader.number("rope_local_base_freq", 10_000.0)
    scaling = reader.raw("rope_scaling", None)
    parameters = reader.raw("rope_parameters", None)
    if parameters is None:
        return _rope(scaling or {}, theta, f"{reader.where}: rope_scaling"), Rope(local_theta)
    where = f"{reader.where}: rope_parameters"
    nested = ConfigReader(parameters, where)
    ropes = (
        _rope(nested.raw("full_attention", None) or {}, theta, f"{where}.full_attention"),
        _rope(
            nested.raw("sliding_attention", None) or {}, local_theta, f"{where}.sliding_attention"
        ),
    )
    nested.finish()
    if scaling:
        raise ModelConfigError(
            f"{reader.where} has both rope_parameters and rope_scaling; keep one"
        )
    return ropes


def _rope(settings: Mapping[str, Any], theta: float, where: str) -> Rope:
    reader = ConfigReader(settings, where)
    # "type" is what transformers called it before "rope_type".
    kind = reader.only("rope_type", ("default", "linear"), reader.raw("type", "default"))
    reader.only("type", ("default", "linear"), kind)
    theta = reader.number("rope_theta", theta)
    factor = reader.number("factor") if kind == "linear" else reader.only("factor", (1, None), None)
    reader.finish()
    return Rope(theta, factor or 1.0)


DECODER_CONFIGS: Mapping[str, Callable[[Mapping[str, Any]], DecoderConfig]] = {
    "gemma3": gemma3_config,
    "gemma3_text": gemma3_config,
}

# google/gemma-3-270m
GEMMA3_270M = gemma3_config(
    {
        "vocab_size": 262_144,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "sliding_window": 512,
        "max_position_embeddings": 32_768,
    }
)
