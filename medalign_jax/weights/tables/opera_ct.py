"""OPERA-CT: an HTS-AT with COLA's projection (`medalign_jax.models.encoders.cola`).

Upstream names are those of `Cola(encoder="htsat")` in evelyn0414/OPERA.
"""

from medalign_jax.weights.table import CONV2D, LINEAR, Ignore, Rule, Table
from medalign_jax.weights.tables.lines import COUNTER, batch_norm, dense, norm

_STAGES = 4


COLA = (
    *dense("g", "g"),
    *norm("layer_norm", "layer_norm"),
    Rule("{prefix}linear.weight", "linear/kernel", LINEAR),
)


def _block(upstream: str, path: str) -> tuple[Rule, ...]:
    return (
        *norm(f"{upstream}.norm1", f"{path}/norm1"),
        Rule(
            f"{{prefix}}{upstream}.attn.relative_position_bias_table", f"{path}/attn/position_bias"
        ),
        *dense(f"{upstream}.attn.qkv", f"{path}/attn/qkv"),
        *dense(f"{upstream}.attn.proj", f"{path}/attn/proj"),
        *norm(f"{upstream}.norm2", f"{path}/norm2"),
        *dense(f"{upstream}.mlp.fc1", f"{path}/mlp/fc1"),
        *dense(f"{upstream}.mlp.fc2", f"{path}/mlp/fc2"),
    )


def _stage(upstream: str, path: str) -> tuple[Rule, ...]:
    return (
        *_block(f"{upstream}.blocks.{{i}}", f"{path}/block{{i}}"),
        *norm(f"{upstream}.downsample.norm", f"{path}/downsample/norm"),
        Rule(
            f"{{prefix}}{upstream}.downsample.reduction.weight",
            f"{path}/downsample/reduction/kernel",
            LINEAR,
        ),
    )


_HTSAT = "encoder.encoder.htsat"

TABLE = Table(
    name="opera_ct",
    prefixes=("", "model."),
    rules=(
        *batch_norm(f"{_HTSAT}.bn0", "encoder/batch_norm"),
        Rule(f"{{prefix}}{_HTSAT}.patch_embed.proj.weight", "encoder/patch_embed/kernel", CONV2D),
        Rule(f"{{prefix}}{_HTSAT}.patch_embed.proj.bias", "encoder/patch_embed/bias"),
        *norm(f"{_HTSAT}.patch_embed.norm", "encoder/patch_norm"),
        *(
            rule
            for stage in range(_STAGES)
            for rule in _stage(f"{_HTSAT}.layers.{stage}", f"encoder/stage{stage}")
        ),
        *norm(f"{_HTSAT}.norm", "encoder/norm"),
        *COLA,
    ),
    ignores=(
        COUNTER,
        Ignore(f"{{prefix}}{_HTSAT}.spectrogram_extractor.*", "its inputs are log-mels already"),
        Ignore(f"{{prefix}}{_HTSAT}.logmel_extractor.*", "its inputs are log-mels already"),
        Ignore(f"{{prefix}}{_HTSAT}.layers.*.relative_position_index", "made anew"),
        Ignore(f"{{prefix}}{_HTSAT}.layers.*.attn_mask", "made anew"),
        Ignore(f"{{prefix}}{_HTSAT}.tscam_conv.*", "head of AudioSet's classes, not trained"),
        Ignore(f"{{prefix}}{_HTSAT}.head.*", "head of AudioSet's classes, not trained"),
    ),
)

# Column-parallel into heads and hidden units, row-parallel out of them; the rest over fsdp.
SHARDING = (
    (r"(qkv|query|key|value|fc1)/kernel$", ("fsdp", "tensor")),
    (r"(qkv|query|key|value|fc1)/bias$", ("tensor",)),
    (r"(proj|fc2)/kernel$", ("tensor", "fsdp")),
    (r"patch_embed/kernel$", (None, "fsdp")),
    (r"(^|/)(reduction|g|linear)/kernel$", ("fsdp", None)),
    (r"(scale|bias|mean|var|position_bias)$", ()),
)
