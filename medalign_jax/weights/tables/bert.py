"""BERT: transformers' ``BertModel`` and the pre-training and task models around it.

RoBERTa has the same names below another prefix; so has CLAP's text tower, with the audio tower
(`weights/tables/clap.py`) beside it.
"""

from medalign_jax.weights.table import LINEAR, Ignore, Rule, Table

_LAYER = "{prefix}encoder.layer.{i}."

# upstream module of a layer -> place in the stacked layer
_DENSE = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "out",
    "intermediate.dense": "up",
    "output.dense": "down",
}
_NORMS = {"attention.output.LayerNorm": "attention_norm", "output.LayerNorm": "mlp_norm"}


def _norm(upstream: str, path: str) -> tuple[Rule, Rule]:
    # Checkpoints converted from the original release call them gamma and beta.
    return (
        Rule((f"{upstream}.weight", f"{upstream}.gamma"), f"{path}/scale"),
        Rule((f"{upstream}.bias", f"{upstream}.beta"), f"{path}/bias"),
    )


_RULES = (
    Rule("{prefix}embeddings.word_embeddings.weight", "word_embedding/embedding"),
    Rule("{prefix}embeddings.position_embeddings.weight", "position_embedding/embedding"),
    Rule("{prefix}embeddings.token_type_embeddings.weight", "token_type_embedding/embedding"),
    *_norm("{prefix}embeddings.LayerNorm", "embedding_norm"),
    *(Rule(f"{_LAYER}{up}.weight", f"layers/{to}/kernel", LINEAR) for up, to in _DENSE.items()),
    *(Rule(f"{_LAYER}{up}.bias", f"layers/{to}/bias") for up, to in _DENSE.items()),
    *(rule for up, to in _NORMS.items() for rule in _norm(f"{_LAYER}{up}", f"layers/{to}")),
)

_IGNORES = (
    Ignore("{prefix}embeddings.position_ids", "a counter 0..n, made anew"),
    Ignore("{prefix}embeddings.token_type_ids", "zeros, made anew"),
    Ignore("{prefix}pooler.*", "only hidden states are read"),
    Ignore("cls.*", "pre-training head"),
    Ignore("classifier.*", "task head"),
    Ignore("qa_outputs.*", "task head"),
    Ignore("lm_head.*", "RoBERTa's pre-training head"),
    Ignore("text_projection.*", "CLAP: only hidden states are read"),
    Ignore("audio_model.*", "CLAP's other tower"),
    Ignore("audio_projection.*", "CLAP's other tower"),
    Ignore("logit_scale_*", "CLAP's loss"),
)


_PREFIXES = ("", "bert.", "roberta.", "text_model.")


def table(kept: int, depth: int) -> Table:
    """The table of a BERT of ``depth`` layers of which the first ``kept`` are loaded."""
    above = tuple(
        Ignore(f"{{prefix}}encoder.layer.{layer}.*", "above the hidden layer that is read")
        for layer in range(kept, depth)
    )
    return Table("bert", _RULES, (*_IGNORES, *above), prefixes=_PREFIXES)


# Path regex -> mesh axes of the last dimensions (see core/mesh.py); first match wins.
SHARDING = (
    (r"word_embedding/embedding$", ("tensor", "fsdp")),
    (r"(position|token_type)_embedding/embedding$", (None, "fsdp")),
    (r"layers/(query|key|value|up)/kernel$", ("fsdp", "tensor")),
    (r"layers/(query|key|value|up)/bias$", ("tensor",)),
    (r"layers/(out|down)/kernel$", ("tensor", "fsdp")),
    (r"layers/(out|down)/bias$", ()),
    (r"norm/(scale|bias)$", ()),
)
