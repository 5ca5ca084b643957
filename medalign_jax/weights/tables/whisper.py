"""Whisper's encoder in transformers' ``WhisperModel`` and the models around it."""

from medalign_jax.weights.table import CONV1D, LINEAR, Ignore, Rule, Table
from medalign_jax.weights.tables.lines import norm

# upstream module of a layer -> place in the stacked layer
_DENSE = {
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "self_attn.out_proj": "out",
    "fc1": "fc1",
    "fc2": "fc2",
}
_NORMS = {"self_attn_layer_norm": "attention_norm", "final_layer_norm": "mlp_norm"}


# Stem and layers, which Qwen's towers share.
BODY = (
    *(
        rule
        for name in ("conv1", "conv2")
        for rule in (
            Rule(f"{{prefix}}{name}.weight", f"stem/{name}/kernel", CONV1D),
            Rule(f"{{prefix}}{name}.bias", f"stem/{name}/bias"),
        )
    ),
    *(
        Rule(f"{{prefix}}layers.{{i}}.{up}.weight", f"layers/{to}/kernel", LINEAR)
        for up, to in _DENSE.items()
    ),
    *(
        Rule(f"{{prefix}}layers.{{i}}.{up}.bias", f"layers/{to}/bias")
        for up, to in _DENSE.items()
        if to != "key"  # published without one
    ),
    *(rule for up, to in _NORMS.items() for rule in norm(f"layers.{{i}}.{up}", f"layers/{to}")),
)
POSITIONS = Rule("{prefix}embed_positions.weight", "pos_embed")

TABLE = Table(
    name="whisper",
    # WhisperForConditionalGeneration, WhisperModel, WhisperEncoder
    prefixes=("model.encoder.", "encoder.", ""),
    rules=(*BODY, POSITIONS, *norm("layer_norm", "norm")),
    ignores=(
        Ignore("model.decoder.*", "only the encoder is read"),
        Ignore("decoder.*", "only the encoder is read"),
        Ignore("proj_out.weight", "the decoder's head"),
        Ignore("projector.*", "task head"),
        Ignore("classifier.*", "task head"),
        Ignore("layer_weights", "task head"),
    ),
)

# Column-parallel into heads and hidden units, row-parallel out of them; the rest over fsdp.
SHARDING = (
    (r"layers/(query|key|value|fc1)/kernel$", ("fsdp", "tensor")),
    (r"layers/(query|key|value|fc1)/bias$", ("tensor",)),
    (r"layers/(out|fc2)/kernel$", ("tensor", "fsdp")),
    (r"layers/(out|fc2)/bias$", ()),
    (r"stem/conv[12]/kernel$", (None, None, "fsdp")),
    (r"stem/conv[12]/bias$", ()),
    (r"norm/(scale|bias)$", ()),
    (r"pos_embed$", ()),
)
