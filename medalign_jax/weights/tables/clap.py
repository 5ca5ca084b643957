"""CLAP: transformers' ``ClapModel`` and ``ClapAudioModelWithProjection``.

`TABLE` is the audio tower's (`models.encoders.clap.Clap`), fused or not, and leaves the text tower
out, which is loaded by `weights.tables.bert`.
"""

from medalign_jax.weights.table import CONV2D, LINEAR, Ignore, Rule, Table
from medalign_jax.weights.tables.lines import COUNTER, POINTWISE, batch_norm, dense, norm

_STAGES = 4
_AUDIO = "audio_model.audio_encoder"
_PATCH = f"{_AUDIO}.patch_embed"

_DENSE = {
    "attention.self.query": "attn/query",
    "attention.self.key": "attn/key",
    "attention.self.value": "attn/value",
    "attention.output.dense": "attn/proj",
    "intermediate.dense": "mlp/fc1",
    "output.dense": "mlp/fc2",
}


def _stage(upstream: str, path: str) -> tuple[Rule, ...]:
    block, to = f"{upstream}.blocks.{{i}}", f"{path}/block{{i}}"
    return (
        *norm(f"{block}.layernorm_before", f"{to}/norm1"),
        *(
            rule
            for name, place in _DENSE.items()
            for rule in dense(f"{block}.{name}", f"{to}/{place}")
        ),
        Rule(f"{block}.attention.self.relative_position_bias_table", f"{to}/attn/position_bias"),
        *norm(f"{block}.layernorm_after", f"{to}/norm2"),
        *norm(f"{upstream}.downsample.norm", f"{path}/downsample/norm"),
        Rule(
            f"{upstream}.downsample.reduction.weight",
            f"{path}/downsample/reduction/kernel",
            LINEAR,
        ),
    )


def _convolution(upstream: str, path: str, transform=CONV2D) -> tuple[Rule, Rule]:
    return (
        Rule(f"{upstream}.weight", f"{path}/kernel", transform),
        Rule(f"{upstream}.bias", f"{path}/bias"),
    )


def _fusion(branch: str, first: int) -> tuple[Rule, ...]:
    """A branch of the fusion, whose modules are numbered upstream."""
    upstream, path = f"{_PATCH}.fusion_model.{branch}_att", f"fusion/{branch}"
    return (
        *_convolution(f"{upstream}.{first}", f"{path}/reduce", POINTWISE),
        *batch_norm(f"{upstream}.{first + 1}", f"{path}/norm1"),
        *_convolution(f"{upstream}.{first + 3}", f"{path}/expand", POINTWISE),
        *batch_norm(f"{upstream}.{first + 4}", f"{path}/norm2"),
    )


TABLE = Table(
    name="clap",
    rules=(
        *batch_norm(f"{_AUDIO}.batch_norm", "encoder/batch_norm"),
        *_convolution(f"{_PATCH}.proj", "encoder/patch_embed"),
        *norm(f"{_PATCH}.norm", "encoder/patch_norm"),
        *(
            rule
            for stage in range(_STAGES)
            for rule in _stage(f"{_AUDIO}.layers.{stage}", f"encoder/stage{stage}")
        ),
        *norm(f"{_AUDIO}.norm", "encoder/norm"),
        *dense("audio_projection.linear1", "linear1"),
        *dense("audio_projection.linear2", "linear2"),
        # Fused model only.
        *_convolution(f"{_PATCH}.mel_conv2d", "mel_conv"),
        *_fusion("local", 0),
        *_fusion("global", 1),
    ),
    ignores=(
        COUNTER,
        Ignore(f"{_AUDIO}.layers.*.relative_position_index", "made anew"),
        Ignore("text_model.*", "the other tower"),
        Ignore("text_projection.*", "the other tower"),
        Ignore("logit_scale_a", "of the published loss"),
        Ignore("logit_scale_t", "of the published loss"),
    ),
)


# Column-parallel into heads and hidden units, row-parallel out of them; the rest over fsdp.
SHARDING = (
    (r"(query|key|value|fc1|linear1)/kernel$", ("fsdp", "tensor")),
    (r"(query|key|value|fc1|linear1)/bias$", ("tensor",)),
    (r"(proj|fc2|linear2)/kernel$", ("tensor", "fsdp")),
    (r"(patch_embed|mel_conv)/kernel$", (None, "fsdp")),
    (r"reduction/kernel$", ("fsdp", None)),
    (r"fusion/(local|global)/(reduce|expand)/kernel$", ()),
    (r"(scale|bias|mean|var|position_bias)$", ()),
)
