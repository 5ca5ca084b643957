"""Gemma-3, text side: ``Gemma3ForCausalLM`` and ``Gemma3ForConditionalGeneration``.

The same tensors lie under one of four prefixes: ``model.`` (text only), ``language_model.model.``
(with a vision tower, as published), ``model.language_model.`` (with a vision tower, as transformers
5 names its modules) or none (a bare ``Gemma3TextModel``).
"""

from medalign_jax.weights.table import LINEAR, Ignore, Rule, Table

_LAYER = "{prefix}layers.{i}."

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
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "post_mlp_norm",
}

_RULES = (
    Rule("{prefix}embed_tokens.weight", "embed/embedding"),
    *(Rule(f"{_LAYER}{up}.weight", f"layers/{to}/kernel", LINEAR) for up, to in _DENSE.items()),
    *(Rule(f"{_LAYER}{up}.weight", f"layers/{to}/scale") for up, to in _NORMS.items()),
)
_FINAL_NORM = "{prefix}norm.weight"

_IGNORES = (
    Ignore("lm_head.weight", "tied", equal_to="{prefix}embed_tokens.weight"),
    Ignore("language_model.lm_head.weight", "tied", equal_to="{prefix}embed_tokens.weight"),
    *(
        Ignore(f"{prefix}{part}.*", "vision side; only text is read")
        for prefix in ("", "model.")
        for part in ("vision_tower", "multi_modal_projector")
    ),
)


def table(kept: int, depth: int) -> Table:
    """The table of a Gemma-3 of ``depth`` layers of which the first ``kept`` are loaded."""
    above = tuple(
        Ignore(f"{{prefix}}layers.{layer}.*", "above the hidden layer that is read")
        for layer in range(kept, depth)
    )
    final = (
        {"rules": (*_RULES, Rule(_FINAL_NORM, "final_norm/scale")), "ignores": _IGNORES}
        if kept == depth
        else {"rules": _RULES, "ignores": (*_IGNORES, *above, Ignore(_FINAL_NORM, "above it too"))}
    )
    prefixes = ("model.", "language_model.model.", "model.language_model.", "")
    return Table("gemma3", prefixes=prefixes, **final)


# Path regex -> mesh axes of the last dimensions (see train/mesh.py); first match wins.
SHARDING = (
    (r"embed/embedding$", ("tensor", "fsdp")),
    (r"lm_head/kernel$", ("fsdp", "tensor")),
    (r"layers/attention/(query|key|value)/kernel$", ("fsdp", "tensor")),
    (r"layers/attention/(query|key|value)/bias$", ("tensor",)),
    (r"layers/mlp/(gate|up)/kernel$", ("fsdp", "tensor")),
    (r"layers/(attention/out|mlp/down)/kernel$", ("tensor", "fsdp")),
    (r"norm/scale$", ()),
)
