"""OPERA-CE: an EfficientNet-B0 with COLA's projection (`medalign_jax.models.encoders.cola`).

Upstream names are those of `Cola(encoder="efficientnet")` in evelyn0414/OPERA, which wraps
efficientnet_pytorch.
"""

from medalign_jax.weights.table import CONV2D, Rule, Table
from medalign_jax.weights.tables.lines import COUNTER, POINTWISE, batch_norm
from medalign_jax.weights.tables.opera_ct import COLA

_NET = "encoder.efficientnet"


def _conv(upstream: str, path: str, transform=CONV2D) -> Rule:
    return Rule(f"{{prefix}}{upstream}.weight", f"{path}/kernel", transform)


def _bias(upstream: str, path: str) -> Rule:
    return Rule(f"{{prefix}}{upstream}.bias", f"{path}/bias")


def _block(upstream: str, path: str) -> tuple[Rule, ...]:
    return (
        # The first block does not expand.
        _conv(f"{upstream}._expand_conv", f"{path}/expand_conv", POINTWISE),
        *batch_norm(f"{upstream}._bn0", f"{path}/bn0"),
        _conv(f"{upstream}._depthwise_conv", f"{path}/depthwise_conv"),
        *batch_norm(f"{upstream}._bn1", f"{path}/bn1"),
        _conv(f"{upstream}._se_reduce", f"{path}/se_reduce", POINTWISE),
        _bias(f"{upstream}._se_reduce", f"{path}/se_reduce"),
        _conv(f"{upstream}._se_expand", f"{path}/se_expand", POINTWISE),
        _bias(f"{upstream}._se_expand", f"{path}/se_expand"),
        _conv(f"{upstream}._project_conv", f"{path}/project_conv", POINTWISE),
        *batch_norm(f"{upstream}._bn2", f"{path}/bn2"),
    )


TABLE = Table(
    name="opera_ce",
    prefixes=("", "model."),
    rules=(
        _conv("encoder.cnn1", "encoder/cnn1"),
        _bias("encoder.cnn1", "encoder/cnn1"),
        _conv(f"{_NET}._conv_stem", "encoder/conv_stem"),
        *batch_norm(f"{_NET}._bn0", "encoder/bn0"),
        *_block(f"{_NET}._blocks.{{i}}", "encoder/block{i}"),
        _conv(f"{_NET}._conv_head", "encoder/conv_head", POINTWISE),
        *batch_norm(f"{_NET}._bn1", "encoder/bn1"),
        *COLA,
    ),
    ignores=(COUNTER,),
)

# 5 million parameters: only what is large is spread.
SHARDING = (
    (r"expand_conv/kernel$", ("fsdp", "tensor")),
    (r"project_conv/kernel$", ("tensor", "fsdp")),
    (r"(^|/)(conv_head|g|linear)/kernel$", ("fsdp", None)),
    (r"(cnn1|conv_stem|depthwise_conv|se_reduce|se_expand)/kernel$", ()),
    (r"(scale|bias|mean|var)$", ()),
)
