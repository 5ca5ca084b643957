"""AST, the Audio Spectrogram Transformer (Gong et al. 2021, arXiv 2104.01778).

A ViT/DeiT on overlapping patches of Kaldi's log-mel filter bank (`medalign_jax.audio.kaldi`), equal
to transformers' `ASTModel`. Upstream runs the patches of one mel row after the other; here time
comes first, as in all encoders of this library. Attention does not see the order, so that only the
position table has to be read transposed.

Shapes: B clips, T frames, M mel bins, L patch tokens, W channels.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from medalign_jax.models.layers.attention import attention
from medalign_jax.models.layers.vit_layers import Dense, Mlp, PatchEmbed, UniformBlocks, layer_norm
from medalign_jax.models.upstream_config import ConfigReader, ModelConfigError

Intermediates = dict[str, jax.Array]

_PREFIX = 2  # class token, distillation token


@dataclasses.dataclass(frozen=True)
class ASTConfig(UniformBlocks):
    """Sizes of an AST; the defaults are those of the published AudioSet models.

    Attributes:
      frames: most frames of an input; the position table is made for them.
      mels: mel bins of an input.
      patch: side of a patch, frames and mel bins.
      stride: (frames, mel bins) from one patch to the next.
      width, depth, heads, mlp_width: of the transformer.
      eps: of every LayerNorm.
      attention: back end, see `medalign_jax.models.layers.attention`.
      remat: recompute each block's activations in the backward pass instead of keeping them.
      dtype: of the computation; parameters and norms' statistics are float32.
    """

    prefix_tokens = _PREFIX

    frames: int = 1024
    mels: int = 128
    patch: int = 16
    stride: tuple[int, int] = (10, 10)
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    eps: float = 1e-12
    attention: str = "auto"
    remat: bool = False
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if min(self.frames, self.mels) < self.patch:
            raise ValueError(f"{self.frames}x{self.mels} holds no patch of side {self.patch}")
        if min(self.stride) < 1:
            raise ValueError(f"stride must be at least 1, got {self.stride}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of {self.heads} heads")

    @property
    def footprint(self) -> tuple[int, int]:
        """(frames, mel bins) from token to token; the patch reaches over into the next ones."""
        return self.stride

    @property
    def mask_unit(self) -> tuple[int, int]:
        """(rows, columns) of tokens that are hidden together: 0.2 s by 440 mel at stride 10."""
        return (2, 2)

    def grid(self, frames: int) -> tuple[int, int]:
        """(time rows, mel columns) of patches for an input of so many frames.

        Raises:
          ValueError: too few frames for one patch, or more than the position table has.
        """
        if not self.patch <= frames <= self.frames:
            raise ValueError(
                f"input of {frames} frames: this model takes {self.patch} to {self.frames}; "
                "cut it, as the front end does with pad_to"
            )
        rows, columns = (
            (size - self.patch) // step + 1
            for size, step in zip((frames, self.mels), self.stride, strict=True)
        )
        return rows, columns


# MIT/ast-finetuned-audioset-10-10-0.4593 and the other checkpoints "10-10" on AudioSet.
AST_AUDIOSET = ASTConfig()


def ast_config(config: Mapping[str, Any]) -> ASTConfig:
    """Reads a published ``config.json`` of model type ``audio-spectrogram-transformer``.

    Raises:
      ModelConfigError: for a missing or malformed value, or a feature that is not supported.
    """
    reader = ConfigReader(config)
    reader.only("model_type", ("audio-spectrogram-transformer",), "audio-spectrogram-transformer")
    reader.only("hidden_act", ("gelu",), "gelu")
    reader.only("qkv_bias", (True,), True)
    reader.ignore("hidden_dropout_prob", "attention_probs_dropout_prob")
    reader.ignore("tie_word_embeddings")  # it has none
    sizes = {
        "frames": reader.integer("max_length", 1024),
        "mels": reader.integer("num_mel_bins", 128),
        "patch": reader.integer("patch_size", 16),
        "stride": (reader.integer("time_stride", 10), reader.integer("frequency_stride", 10)),
        "width": reader.integer("hidden_size", 768),
        "depth": reader.depth("num_hidden_layers", 12),
        "heads": reader.integer("num_attention_heads", 12),
        "mlp_width": reader.integer("intermediate_size", 3072),
        "eps": reader.number("layer_norm_eps", 1e-12),
    }
    reader.finish()
    try:
        return ASTConfig(**sizes)
    except ValueError as error:
        raise ModelConfigError(f"{reader.where}: {error}") from error


class AST(nn.Module):
    """The encoder; see the module's docstring.

    Parameters: ``cls_token``, ``distillation_token``, ``position_embedding`` (trained; both
    tokens first, then mel rows of time columns as upstream), ``patch_embed``, ``block0`` ...,
    ``norm``.
    """

    config: ASTConfig

    @nn.compact
    def embed(self, features: jax.Array) -> tuple[jax.Array, Intermediates]:
        """Feature of whole clips.

        Args:
          features: (B, T, M) normalised log-mel. Upstream takes T = `config.frames` only (clips
            are filled up by the front end); shorter inputs use the first time steps of the
            position table.

        Returns:
          (B, W) float32, the mean of class and distillation token after the last norm
          (`ASTModel`'s `pooler_output`), and a dict with "patch_embed" (B, L, W), "embedded"
          (B, 2 + L, W) with tokens and positions, "block00" ... (B, 2 + L, W) after each block
          with the class and the distillation token first, "tokens" (B, L, W) before the last
          norm, and "normed" (B, 2 + L, W) after it (`last_hidden_state`, in our order).

        Raises:
          ValueError: a shape that the model does not take.
        """
        c = self.config
        if features.ndim != 3 or features.shape[2] != c.mels:
            raise ValueError(f"features must be (B, T, {c.mels}), got {features.shape}")
        grid = c.grid(features.shape[1])
        patches = overlapping_patches(features, c.patch, c.stride)
        out: Intermediates = {}
        out["patch_embed"] = PatchEmbed(c.width, (c.patch, c.patch), c.dtype, name="patch_embed")(
            patches
        )
        x = out["embedded"] = self._with_positions(out["patch_embed"], grid)
        block = nn.remat(ASTBlock) if c.remat else ASTBlock
        for i in range(c.depth):
            x = block(c, name=f"block{i}")(x)
            out[f"block{i:02d}"] = x
        out["tokens"] = x[:, _PREFIX:]
        out["normed"] = layer_norm(c.eps, c.dtype, "norm")(x)
        return jnp.mean(out["normed"][:, :_PREFIX].astype(jnp.float32), axis=1), out

    def __call__(self, features: jax.Array) -> tuple[jax.Array, Intermediates]:
        """As `embed`; touches every parameter."""
        return self.embed(features)

    def _with_positions(self, x: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """Puts the two tokens first and adds positions, (B, L, W) to (B, 2 + L, W)."""
        c = self.config
        rows, columns = c.grid(c.frames)
        draw = nn.initializers.normal(0.02)
        first = [
            self.param(name, draw, (1, 1, c.width), jnp.float32)
            for name in ("cls_token", "distillation_token")
        ]
        shape = (1, _PREFIX + rows * columns, c.width)
        table = self.param("position_embedding", draw, shape, jnp.float32)
        places = table[0, _PREFIX:].reshape(columns, rows, c.width)[:, : grid[0]]
        places = places.transpose(1, 0, 2).reshape(1, -1, c.width)
        head = jnp.concatenate(first, axis=1) + table[:, :_PREFIX]
        head = jnp.broadcast_to(head.astype(x.dtype), (x.shape[0], *head.shape[1:]))
        return jnp.concatenate([head, x + places.astype(x.dtype)], axis=1)


class ASTBlock(nn.Module):
    """Pre-norm transformer block with separate query, key and value, (B, N, W) to (B, N, W)."""

    config: ASTConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        attend = ASTAttention(c.heads, c.attention, c.dtype, name="attn")
        x = x + attend(layer_norm(c.eps, c.dtype, "norm1")(x))
        mlp = Mlp(c.mlp_width, c.dtype, name="mlp")
        return x + mlp(layer_norm(c.eps, c.dtype, "norm2")(x))


class ASTAttention(nn.Module):
    """Multi-head self-attention over all tokens, (B, N, W) to (B, N, W)."""

    heads: int
    backend: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        q, k, v = (
            Dense(width, self.dtype, name=name)(x).reshape(*x.shape[:-1], self.heads, -1)
            for name in ("query", "key", "value")
        )
        mixed = attention(q, k, v, backend=self.backend).reshape(x.shape)
        return Dense(width, self.dtype, name="out")(mixed)


def overlapping_patches(features: jax.Array, side: int, stride: tuple[int, int]) -> jax.Array:
    """Square patches at every `stride`: time rows of mel columns, each flattened time-major.

    Args:
      features: (B, T, M).
      side: of a patch, frames and mel bins.
      stride: (frames, mel bins) from one patch to the next.

    Returns:
      (B, rows * columns, side * side); what a last whole patch leaves over is lost.
    """
    batch, *sizes = features.shape
    frames, mels = (
        np.arange(0, size - side + 1, step)[:, None] + np.arange(side)
        for size, step in zip(sizes, stride, strict=True)
    )
    x = features[:, frames][..., mels]  # (B, rows, side, columns, side)
    return x.transpose(0, 1, 3, 2, 4).reshape(batch, -1, side * side)
