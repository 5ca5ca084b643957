"""Decoder-only language models: Gemma-3, Llama, Qwen2.5, Qwen3, and Qwen2.5-Omni's text model.

They name their tensors alike and differ in which of them they have, which the parameters of the
model say by themselves. The same tensors lie under one of several prefixes: ``model.`` (text only),
``language_model.model.`` and ``model.language_model.`` (with a vision tower: as published, and as
transformers 5 names its modules), ``thinker.model.`` (Qwen2.5-Omni) or none (a bare model).
"""

from medalign_jax.models.language.decoder_config import DecoderConfig
from medalign_jax.weights.table import LINEAR, Ignore, PadAxis, Rule, Table, Transform, chain

_LAYER = "{prefix}layers.{i}."
_PREFIXES = (
    "model.",
    "language_model.model.",
    "model.language_model.",
    "thinker.model.",
    "thinker.model.language_model.",
    "language_model.",
    "",
)
_HEADS = ("lm_head.weight", "language_model.lm_head.weight", "thinker.lm_head.weight")
_EMBEDDING = "{prefix}embed_tokens.weight"
_FINAL_NORM = "{prefix}norm.weight"

# upstream module of a layer -> place in the stacked layer
_DENSE = {
    "self_attn.q_proj": "attention/query",
    "self_attn.k_proj": "attention/key",
    "self_attn.v_proj": "attention/value",
    "self_attn.o_proj": "attention/out",
    "mlp.gate_proj": "mlp/gate",
    "mlp.up_proj": "mlp/up",
    "mlp.down_proj": "mlp/down",
}
_NORMS = {
    "self_attn.q_norm": "attention/query_norm",
    "self_attn.k_norm": "attention/key_norm",
    "input_layernorm": "attention_norm",
}
# One upstream name, two meanings.
_TWO_NORMS = {"post_attention_layernorm": "mlp_norm"}
_FOUR_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "post_mlp_norm",
}

_IGNORES = (
    Ignore("{prefix}*rotary_emb.inv_freq", "frequencies, made anew"),
    *(
        Ignore(f"{prefix}{part}.*", "vision side; only text is read")
        for prefix in ("", "model.")
        for part in ("vision_tower", "multi_modal_projector")
    ),
    *(
        Ignore(f"{prefix}{part}.*", "audio and vision towers; only text is read")
        for prefix in ("", "model.", "thinker.", "thinker.model.")
        for part in ("audio_tower", "visual")
    ),
    Ignore("talker.*", "the talker; only text is read"),
    Ignore("token2wav.*", "the talker's vocoder; only text is read"),
)


def table(config: DecoderConfig, depth: int) -> Table:
    """The table of a model.

    Args:
      config: the part of it that is loaded, e.g. truncated or without its head.
      depth: layers of the whole model.
    """
    above = tuple(
        Ignore(f"{{prefix}}layers.{layer}.*", "above the hidden layer that is read")
        for layer in range(config.depth, depth)
    )
    rules = [*body(config)]
    ignores = [*_IGNORES, *above]
    if not config.final_norm:
        ignores.append(Ignore(_FINAL_NORM, "above the hidden layer that is read"))
    if config.tied:
        ignores += [Ignore(head, "tied", equal_to=_EMBEDDING) for head in _HEADS]
    elif config.head:
        rules.append(head(config, _HEADS))
    else:
        ignores += [Ignore(head, "only hidden states are read") for head in _HEADS]
    return Table("decoder", tuple(rules), tuple(ignores), _PREFIXES)


def body(config: DecoderConfig) -> tuple[Rule, ...]:
    """The lines of a model without those of its head."""
    norms = _NORMS | (_FOUR_NORMS if config.post_norms else _TWO_NORMS)
    return (
        Rule(_EMBEDDING, "embed/embedding", *_padding(config, 0)),
        *(Rule(f"{_LAYER}{up}.weight", f"layers/{to}/kernel", LINEAR) for up, to in _DENSE.items()),
        *(Rule(f"{_LAYER}{up}.bias", f"layers/{to}/bias") for up, to in _DENSE.items()),
        *(Rule(f"{_LAYER}{up}.weight", f"layers/{to}/scale") for up, to in norms.items()),
        *((Rule(_FINAL_NORM, "final_norm/scale"),) if config.final_norm else ()),
    )


def head(config: DecoderConfig, names: tuple[str, ...]) -> Rule:
    """The line of a head that is not tied, published under one of the names."""
    return Rule(names, "lm_head/kernel", chain(LINEAR, *_padding(config, 1)))


def _padding(config: DecoderConfig, axis: int) -> tuple[Transform, ...]:
    if config.vocab_rows == config.vocab_size:
        return ()
    return (PadAxis(axis, config.vocab_size, config.vocab_rows),)


# Path regex -> mesh axes of the last dimensions (see core/mesh.py); first match wins.
SHARDING = (
    (r"embed/embedding$", ("tensor", "fsdp")),
    (r"lm_head/kernel$", ("fsdp", "tensor")),
    (r"layers/attention/(query|key|value)/kernel$", ("fsdp", "tensor")),
    (r"layers/attention/(query|key|value)/bias$", ("tensor",)),
    (r"layers/mlp/(gate|up)/kernel$", ("fsdp", "tensor")),
    (r"layers/mlp/(gate|up)/bias$", ("tensor",)),
    (r"layers/(attention/out|mlp/down)/kernel$", ("tensor", "fsdp")),
    (r"layers/(attention/out|mlp/down)/bias$", ()),
    (r"norm/scale$", ()),
)
