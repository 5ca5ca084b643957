"""AST: transformers' ``ASTModel`` and ``ASTForAudioClassification``.

The first name of each pair is the one of the published files (transformers writes it to this day),
the second the one that modules of transformers 5 have in memory.
"""

from medalign_jax.weights.table import LINEAR, Ignore, Permute, Rule, Table

_OLD, _NEW = "{prefix}encoder.layer.{i}.", "{prefix}layers.{i}."

# Place in a block -> upstream module in published files, and in memory.
_DENSE = {
    "attn/query": ("attention.attention.query", "attention.q_proj"),
    "attn/key": ("attention.attention.key", "attention.k_proj"),
    "attn/value": ("attention.attention.value", "attention.v_proj"),
    "attn/out": ("attention.output.dense", "attention.o_proj"),
    "mlp/fc1": ("intermediate.dense", "mlp.fc1"),
    "mlp/fc2": ("output.dense", "mlp.fc2"),
}
_NORMS = {"norm1": "layernorm_before", "norm2": "layernorm_after"}


def _dense(path: str, old: str, new: str) -> tuple[Rule, Rule]:
    return (
        Rule((f"{_OLD}{old}.weight", f"{_NEW}{new}.weight"), f"block{{i}}/{path}/kernel", LINEAR),
        Rule((f"{_OLD}{old}.bias", f"{_NEW}{new}.bias"), f"block{{i}}/{path}/bias"),
    )


def _norm(path: str, name: str) -> tuple[Rule, Rule]:
    return (
        Rule((f"{_OLD}{name}.weight", f"{_NEW}{name}.weight"), f"block{{i}}/{path}/scale"),
        Rule((f"{_OLD}{name}.bias", f"{_NEW}{name}.bias"), f"block{{i}}/{path}/bias"),
    )


_PATCH = "{prefix}embeddings.patch_embeddings.projection"

TABLE = Table(
    name="ast",
    prefixes=("", "audio_spectrogram_transformer."),
    rules=(
        Rule("{prefix}embeddings.cls_token", "cls_token"),
        Rule("{prefix}embeddings.distillation_token", "distillation_token"),
        Rule("{prefix}embeddings.position_embeddings", "position_embedding"),
        # (out, 1, mel, time) -> (time, mel, 1, out): upstream's image is the transposed one.
        Rule(f"{_PATCH}.weight", "patch_embed/kernel", Permute((3, 2, 1, 0))),
        Rule(f"{_PATCH}.bias", "patch_embed/bias"),
        *(rule for path, names in _DENSE.items() for rule in _dense(path, *names)),
        *(rule for path, name in _NORMS.items() for rule in _norm(path, name)),
        Rule("{prefix}layernorm.weight", "norm/scale"),
        Rule("{prefix}layernorm.bias", "norm/bias"),
    ),
    ignores=(Ignore("classifier.*", "head of the fine-tuning; features are read before it"),),
)

# Column-parallel into heads and hidden units, row-parallel out of them; the rest over fsdp.
SHARDING = (
    (r"(query|key|value|fc1)/kernel$", ("fsdp", "tensor")),
    (r"(query|key|value|fc1)/bias$", ("tensor",)),
    (r"(out|fc2)/kernel$", ("tensor", "fsdp")),
    (r"patch_embed/kernel$", (None, "fsdp")),
    (r"position_embedding$", (None, "fsdp")),
    (r"(scale|bias)$", ()),
    (r"(cls_token|distillation_token)$", ()),
)
