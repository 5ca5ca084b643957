"""OPERA-GT and the ViT masked auto-encoders of its family (`medalign_jax.models.encoders.vit_mae`).

Upstream names are those of `MaskedAutoencoderViTMD` in evelyn0414/OPERA. With a plain decoder they
are those of facebookresearch/mae, which it was made from.
"""

from medalign_jax.weights.table import CONV2D, Rule, Table
from medalign_jax.weights.tables.lines import dense, norm


def _block(upstream: str, path: str) -> tuple[Rule, ...]:
    return (
        *norm(f"{upstream}.norm1", f"{path}/norm1"),
        *dense(f"{upstream}.attn.qkv", f"{path}/attn/qkv"),
        *dense(f"{upstream}.attn.proj", f"{path}/attn/proj"),
        *norm(f"{upstream}.norm2", f"{path}/norm2"),
        *dense(f"{upstream}.mlp.fc1", f"{path}/mlp/fc1"),
        *dense(f"{upstream}.mlp.fc2", f"{path}/mlp/fc2"),
    )


TABLE = Table(
    name="opera_gt",
    prefixes=("", "encoder.", "model."),
    rules=(
        Rule("{prefix}cls_token", "cls_token"),
        Rule("{prefix}mask_token", "mask_token"),
        Rule("{prefix}pos_embed", "pos_embed"),
        Rule("{prefix}decoder_pos_embed", "decoder_pos_embed"),
        Rule("{prefix}patch_embed.proj.weight", "patch_embed/kernel", CONV2D),
        Rule("{prefix}patch_embed.proj.bias", "patch_embed/bias"),
        *_block("blocks.{i}", "block{i}"),
        *norm("norm", "norm"),
        *dense("decoder_embed", "decoder_embed"),
        *_block("decoder_blocks.{i}", "decoder_block{i}"),
        # Windowed decoder only.
        Rule("{prefix}decoder_blocks.{i}.attn.tau", "decoder_block{i}/attn/tau"),
        *dense("decoder_blocks.{i}.attn.meta_mlp.fc1", "decoder_block{i}/attn/meta_mlp/fc1"),
        *dense("decoder_blocks.{i}.attn.meta_mlp.fc2", "decoder_block{i}/attn/meta_mlp/fc2"),
        *norm("decoder_norm", "decoder_norm"),
        *dense("decoder_pred", "decoder_pred"),
    ),
)

# Column-parallel into heads and hidden units, row-parallel out of them; the rest over fsdp.
SHARDING = (
    (r"(qkv|fc1)/kernel$", ("fsdp", "tensor")),
    (r"(qkv|fc1)/bias$", ("tensor",)),
    (r"(proj|fc2)/kernel$", ("tensor", "fsdp")),
    (r"patch_embed/kernel$", (None, "fsdp")),
    (r"(decoder_embed|decoder_pred)/kernel$", ("fsdp", None)),
    (r"(scale|bias)$", ()),
    (r"(cls_token|mask_token|pos_embed|tau)$", ()),
)
