"""Typed configuration of a decoder-only language model, read from published ``config.json`` files.

``DecoderConfig`` holds what distinguishes the members of the family: Gemma-3 (and MedGemma), Llama
(and SmolLM2), Qwen2.5, Qwen3, and the text model inside Qwen2.5-Omni. One reader per model type
fills it; a setting that no reader knows is refused by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from medalign_jax.core.registry import Registry
from medalign_jax.models.language.decoder_rope import Rope, YarnScaling, read_rope
from medalign_jax.models.upstream_config import ConfigReader, ModelConfigError

_PLAIN = Rope()


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only language model.

    Attributes:
      sliding: for each layer, whether it sees only the last ``window`` tokens (itself included).
        Its length is the depth.
      rope: rotary embedding of the layers that see everything.
      local_rope: rotary embedding of the sliding layers.
      attention_scale: factor on the scores, e.g. ``head_dim ** -0.5``.
      embed_scale: factor on the token embeddings.
      activation: ``"gelu_tanh"`` (GeGLU) or ``"silu"`` (SwiGLU).
      norm_offset: norms multiply by ``norm_offset + scale``: 1 in Gemma, 0 elsewhere.
      post_norms: norms after attention and feed-forward too, before the residual sum.
      qk_norm: RMSNorm of each head's queries and keys.
      qkv_bias, out_bias, mlp_bias: biases on the query, key and value projections, on the one out
        of attention, and on the three of the feed-forward.
      tied: logits through the token embedding; otherwise through ``lm_head``.
      final_softcap: ``cap * tanh(logits / cap)``; None for none.
      final_norm: whether the last hidden state is normed; off in a truncated model.
      head: whether logits can be had; off in a model that is read for its hidden states only. It
        makes a difference to the parameters only where the head is not tied.
      padded_vocab: rows of the embedding and the head, of which those from ``vocab_size`` on are
        zeros, so that they can be divided over devices; None for as many as there are tokens.
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
    rope: Rope = _PLAIN
    local_rope: Rope = _PLAIN
    eps: float = 1e-6
    embed_scale: float = 1.0
    activation: str = "silu"
    norm_offset: float = 0.0
    post_norms: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied: bool = True
    final_softcap: float | None = None
    final_norm: bool = True
    head: bool = True
    padded_vocab: int | None = None

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ModelConfigError(
                f"{self.heads} attention heads are not a multiple of {self.kv_heads} key-value "
                "heads"
            )
        if self.head_dim % 2:
            raise ModelConfigError(f"rotary embeddings need an even head_dim, not {self.head_dim}")
        if any(self.sliding) and self.window is None:
            raise ModelConfigError("sliding-attention layers need a sliding_window; it is null")
        if self.vocab_rows < self.vocab_size:
            raise ModelConfigError(
                f"padded_vocab {self.padded_vocab} is less than the {self.vocab_size} tokens"
            )

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.sliding)

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding, those that fill up included."""
        return self.vocab_size if self.padded_vocab is None else self.padded_vocab

    def truncate(self, depth: int) -> "DecoderConfig":
        """The first ``depth`` layers: its last hidden state is this model's state ``depth``."""
        if depth == self.depth:
            return self
        return replace(self, sliding=self.sliding[:depth], final_norm=False, head=False)


_GEMMA_ROPES = ("default", "linear")


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
        sliding=_layer_types(reader, reader.depth("num_hidden_layers", 26)),
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
    return _named_layers(reader, types, depth)


def _named_layers(reader: ConfigReader, types: Any, depth: int) -> tuple[bool, ...]:
    """``layer_types`` as whether each layer slides."""
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
        where = f"{reader.where}: rope_scaling"
        return read_rope(scaling or {}, theta, where, kinds=_GEMMA_ROPES), Rope(local_theta)
    where = f"{reader.where}: rope_parameters"
    nested = ConfigReader(parameters, where)
    ropes = tuple(
        read_rope(nested.raw(kind, None) or {}, base, f"{where}.{kind}", kinds=_GEMMA_ROPES)
        for kind, base in (("full_attention", theta), ("sliding_attention", local_theta))
    )
    nested.finish()
    if scaling:
        raise ModelConfigError(
            f"{reader.where} has both rope_parameters and rope_scaling; keep one"
        )
    return ropes


def llama_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads the ``config.json`` of a Llama, from the second generation on, or of a SmolLM2.

    Raises:
      ModelConfigError: for a missing or malformed value, or a feature that is not supported.
    """
    reader = ConfigReader(config)
    reader.only("model_type", ("llama",), "llama")
    # The first only cuts products into slices, the others speak to other programs.
    reader.ignore("pretraining_tp", "is_llama_config", "transformers.js_config")
    reader.only("rope_interleaved", (False, None), False)
    bias = reader.flag("attention_bias", False)
    sizes = _plain_sizes(reader, vocab_size=32_000, mlp_width=11_008, max_positions=2048)
    return _plain_decoder(
        reader, sizes, qkv_bias=bias, out_bias=bias, mlp_bias=reader.flag("mlp_bias", False)
    )


def qwen2_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads the ``config.json`` of a Qwen2 or Qwen2.5 language model.

    Raises:
      ModelConfigError: for a missing or malformed value, or a feature that is not supported.
    """
    reader = ConfigReader(config)
    reader.only("model_type", ("qwen2",), "qwen2")
    reader.only("use_mrope", (False, None), False)
    sizes = _plain_sizes(reader, vocab_size=151_936, mlp_width=22_016, max_positions=32_768)
    return _plain_decoder(reader, sizes | _qwen_sliding(reader, sizes), qkv_bias=True)


def qwen3_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads the ``config.json`` of a dense Qwen3 language model.

    Raises:
      ModelConfigError: for a missing or malformed value, or a feature that is not supported.
    """
    reader = ConfigReader(config)
    reader.only("model_type", ("qwen3",), "qwen3")
    bias = reader.flag("attention_bias", False)
    sizes = _plain_sizes(
        reader, vocab_size=151_936, mlp_width=22_016, max_positions=32_768, head_dim=128
    )
    sizes |= _qwen_sliding(reader, sizes)
    return _plain_decoder(reader, sizes, qkv_bias=bias, out_bias=bias, qk_norm=True)


def qwen_omni_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads the text model of a Qwen2.5-Omni: the whole config, its thinker's or its text's.

    Its rotary positions have three axes (``Rope.sections``), which differ over pictures only.

    Raises:
      ModelConfigError: for a missing or malformed value, or a feature that is not supported.
    """
    kinds = ("qwen2_5_omni", "qwen2_5_omni_thinker", "qwen2_5_omni_text")
    reader = ConfigReader(config)
    kind = reader.only("model_type", kinds, None)
    if kind == "qwen2_5_omni":
        reader.ignore("talker_config", "token2wav_config")  # they turn text into speech
        reader.ignore("enable_audio_output", "enable_talker")
        reader.ignore("tie_word_embeddings", "hidden_size")  # of no part; some fine-tunes add them
        thinker = reader.raw("thinker_config")
        reader.finish()
        reader = ConfigReader(thinker, "config.json: thinker_config")
    if kind == "qwen2_5_omni_text":
        return _qwen_omni_text(reader, reader.flag("tie_word_embeddings", True))
    reader.only("model_type", kinds[1:2], kinds[1])
    text = ConfigReader(reader.raw("text_config"), f"{reader.where}: text_config")
    tied = _omni_tied(reader, text)
    reader.ignore("hidden_size")  # repeats text_config, in fine-tunes
    # The audio and vision towers, and the tokens that stand for it.
    reader.ignore("audio_config", "vision_config", "position_id_per_seconds", "seconds_per_chunk")
    reader.ignore("audio_token_index", "image_token_index", "video_token_index", "user_token_id")
    reader.ignore("audio_token_id", "image_token_id", "video_token_id", "init_std")
    reader.ignore("audio_start_token_id", "audio_end_token_id", "ignore_index")
    reader.ignore("vision_start_token_id", "vision_end_token_id", "vision_token_id")
    reader.finish()
    return _qwen_omni_text(text, tied)


def _omni_tied(thinker: ConfigReader, text: ConfigReader) -> bool:
    """Whether a thinker's head is tied.

    transformers 4 looks into ``text_config`` and 5 into the thinker's level; each writes its base
    class's ``true`` where it does not look. So one ``false`` decides, and no value means untied.
    """
    said = [part.flag("tie_word_embeddings", None) for part in (thinker, text)]
    return True in said and False not in said


def _qwen_omni_text(reader: ConfigReader, tied: bool) -> DecoderConfig:
    reader.only("model_type", ("qwen2_5_omni_text",), "qwen2_5_omni_text")
    reader.ignore("init_std", "tie_word_embeddings")  # the caller has read the second
    sizes = _plain_sizes(
        reader, vocab_size=152_064, mlp_width=18_944, max_positions=32_768,
        width=3584, depth=28, heads=28, kv_heads=4, theta=1_000_000.0, sections=True,
    )  # fmt: skip
    sizes |= _qwen_sliding(reader, sizes) | {"tied": tied}
    return _plain_decoder(reader, sizes, qkv_bias=True)


def _plain_sizes(
    reader: ConfigReader,
    *,
    vocab_size: int,
    mlp_width: int,
    max_positions: int,
    width: int = 4096,
    depth: int = 32,
    heads: int = 32,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    theta: float = 10_000.0,
    sections: bool = False,
) -> dict[str, Any]:
    """Sizes of a decoder with one rotary embedding; arguments are the defaults upstream."""
    width = reader.integer("hidden_size", width)
    heads = reader.integer("num_attention_heads", heads)
    if reader.raw("head_dim", head_dim) is None:
        if width % heads:
            raise ModelConfigError(
                f"{reader.where}: hidden_size {width} is not a multiple of num_attention_heads "
                f"{heads}, and there is no head_dim"
            )
        head_dim = width // heads
    else:
        head_dim = reader.integer("head_dim", head_dim)
    many = reader.raw("num_key_value_heads", kv_heads) is None
    max_positions = reader.integer("max_position_embeddings", max_positions)
    rope = _one_rope(reader, theta, max_positions, head_dim if sections else None)
    if isinstance(rope.scaling, YarnScaling):
        # Published with the length before stretching.
        max_positions = max(max_positions, int(rope.factor * rope.scaling.length))
    return {
        "vocab_size": reader.integer("vocab_size", vocab_size),
        "width": width,
        "heads": heads,
        "kv_heads": heads if many else reader.integer("num_key_value_heads", kv_heads),
        "head_dim": head_dim,
        "mlp_width": reader.integer("intermediate_size", mlp_width),
        "sliding": (False,) * reader.depth("num_hidden_layers", depth),
        "attention_scale": head_dim**-0.5,
        "max_positions": max_positions,
        "rope": rope,
        "local_rope": rope,
        "eps": reader.number("rms_norm_eps", 1e-6),
        "tied": reader.flag("tie_word_embeddings", False),
    }


def _plain_decoder(
    reader: ConfigReader, sizes: Mapping[str, Any], **switches: bool
) -> DecoderConfig:
    reader.only("hidden_act", ("silu",), "silu")
    reader.ignore("attention_dropout")
    reader.finish()
    return DecoderConfig(**sizes, **switches)


def _one_rope(reader: ConfigReader, theta: float, length: int, sectioned: int | None) -> Rope:
    """``rope_parameters``, or the older ``rope_scaling`` and ``rope_theta``.

    ``sectioned`` is the head_dim of a model whose positions have three axes, else None.
    """
    theta = reader.number("rope_theta", theta)
    older, newer = reader.raw("rope_scaling", None), reader.raw("rope_parameters", None)
    if older and newer:
        raise ModelConfigError(
            f"{reader.where} has both rope_parameters and rope_scaling; keep one"
        )
    where = f"{reader.where}: {'rope_parameters' if newer else 'rope_scaling'}"
    return read_rope(newer or older or {}, theta, where, length=length, head_dim=sectioned)


def _qwen_sliding(reader: ConfigReader, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen's windows: in the layers from ``max_window_layers`` on, or as ``layer_types`` says."""
    depth = len(sizes["sliding"])
    reader.ignore("sliding_window", "max_window_layers")  # mean nothing unless they are used
    window = None
    if reader.flag("use_sliding_window", False) and reader.raw("sliding_window", 4096) is not None:
        window = reader.integer("sliding_window", 4096)
    types = reader.raw("layer_types", None)
    if types is not None:
        return {"sliding": _named_layers(reader, types, depth), "window": window}
    if window is None:
        return {}
    # Not `integer`, which refuses 0: the very first layer slides.
    first = reader.raw("max_window_layers", 28)
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise ModelConfigError(f"{reader.where}: max_window_layers is {first!r}, not a number >= 0")
    return {"sliding": tuple(layer >= first for layer in range(depth)), "window": window}


# model_type of config.json -> its reader. The tensors are named as in weights/tables/decoder.py.
DECODER_CONFIGS: Registry[Callable[[Mapping[str, Any]], DecoderConfig]] = Registry(
    "medalign_jax.language_models",
    {
        "gemma3": gemma3_config,
        "gemma3_text": gemma3_config,
        "llama": llama_config,
        "qwen2": qwen2_config,
        "qwen2_5_omni": qwen_omni_config,
        "qwen2_5_omni_text": qwen_omni_config,
        "qwen2_5_omni_thinker": qwen_omni_config,
        "qwen3": qwen3_config,
    },
    Callable,
)

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

# The language model of google/gemma-3-4b-it and google/medgemma-4b-it
GEMMA3_4B = gemma3_config(
    {
        "vocab_size": 262_208,
        "hidden_size": 2560,
        "intermediate_size": 10_240,
        "num_hidden_layers": 34,
        "sliding_window": 1024,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
)

# Qwen/Qwen2.5-7B-Instruct
QWEN2_5_7B = qwen2_config(
    {
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_theta": 1_000_000.0,
    }
)

# Qwen/Qwen3-8B
QWEN3_8B = qwen3_config(
    {
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "max_position_embeddings": 40_960,
        "rope_theta": 1_000_000.0,
    }
)

# HuggingFaceTB/SmolLM2-135M
SMOLLM2_135M = llama_config(
    {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100_000.0,
        "tie_word_embeddings": True,
    }
)
