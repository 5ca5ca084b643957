"""Whisper's audio encoder (Radford et al. 2022, arXiv 2212.04356), any size.

Two convolutions over time, of which the second halves it, fixed sinusoidal positions, pre-norm
layers and a last LayerNorm: transformers' ``WhisperEncoder``. One token stands for 20 ms.

Whisper was trained on clips padded with silence to 30 s and attends to that silence. Two uses:

* as published: pad the waveform, give no `lengths`;
* clips of their own length: any T up to `config.frames`, and `lengths` where a batch is padded.
  What lies beyond a clip's length is then never read, so that its result is that of the clip
  alone. Whisper publishes no vector for a clip; `embed` takes the mean over valid tokens, as AcuLa
  does.

The pieces (`Stem`, `Block`, `run_blocks`) also make Qwen's towers (`qwen_omni_audio`).
Shapes: B clips, T frames, M mel bins, L tokens, W channels.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from medalign_jax.models.layers import convolution
from medalign_jax.models.layers.attention import attention
from medalign_jax.models.layers.layer_stack import scan_layers, stacked_init, use_weights
from medalign_jax.models.layers.vit_layers import Dense, UniformBlocks, gelu, layer_norm
from medalign_jax.models.upstream_config import ConfigReader

Intermediates = dict[str, jax.Array]


def check_sizes(config: Any) -> None:
    """Refuses sizes that make no encoder; shared by the configs of Whisper's family.

    Raises:
      ValueError: naming the size.
    """
    for name in ("mels", "frames", "width", "depth", "heads", "mlp_width"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    if config.width % config.heads or config.width % 2 or config.width < 4:
        raise ValueError(
            f"width {config.width} must be even, at least 4 and a multiple of {config.heads} heads"
        )


def check_frames(frames: int, least: int, most: int) -> int:
    """`frames`, if a model takes so many.

    Raises:
      ValueError: fewer than `least` or more than `most`.
    """
    if not least <= frames <= most:
        raise ValueError(f"input of {frames} frames; this model takes {least} to {most} frames")
    return frames


@dataclasses.dataclass(frozen=True)
class WhisperConfig(UniformBlocks):
    """Sizes of a Whisper encoder; the defaults are those of Whisper tiny.

    Attributes:
      mels: mel bins of an input.
      frames: most frames of an input (twice the length of the position table).
      width, depth, heads, mlp_width: of the layers.
      eps: of every LayerNorm.
      attention: back end, see `medalign_jax.models.layers.attention`.
      remat: recompute each layer's activations in the backward pass instead of keeping them.
      dtype: of the computation; parameters and the pooled output are float32.
    """

    mels: int = 80
    frames: int = 3000
    width: int = 384
    depth: int = 4
    heads: int = 6
    mlp_width: int = 1536
    eps: float = 1e-5
    attention: str = "auto"
    remat: bool = False
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.frames % 2:
            raise ValueError(f"frames must be even (two make a token), got {self.frames}")

    @property
    def footprint(self) -> tuple[int, int]:
        """(frames, mel bins) that one token stands for; 20 ms of all bins."""
        return (2, self.mels)

    @property
    def mask_unit(self) -> tuple[int, int]:
        """(rows, columns) of tokens to be hidden together: 0.24 s."""
        return (12, 1)

    def grid(self, frames: int) -> tuple[int, int]:
        """(rows, columns) of tokens of an input of so many frames; an odd last frame has its own.

        Raises:
          ValueError: no frames, or more than the position table has.
        """
        return (check_frames(frames, 1, self.frames) + 1) // 2, 1


TINY = WhisperConfig()
BASE = WhisperConfig(width=512, depth=6, heads=8, mlp_width=2048)
SMALL = WhisperConfig(width=768, depth=12, heads=12, mlp_width=3072)
MEDIUM = WhisperConfig(width=1024, depth=24, heads=16, mlp_width=4096)
LARGE_V3 = WhisperConfig(mels=128, width=1280, depth=32, heads=20, mlp_width=5120)

# Keys of a config.json that speak of the decoder, of generation, of training or of task heads.
_NOT_THE_ENCODER = (
    *("decoder_layers", "decoder_attention_heads", "decoder_ffn_dim", "decoder_layerdrop"),
    *("vocab_size", "max_target_positions", "median_filter_width"),
    *("suppress_tokens", "begin_suppress_tokens", "forced_decoder_ids", "alignment_heads"),
    *("use_weighted_layer_sum", "classifier_proj_size", "apply_spec_augment"),
    *("mask_time_prob", "mask_time_length", "mask_time_min_masks"),
    *("mask_feature_prob", "mask_feature_length", "mask_feature_min_masks"),
)


def whisper_config(config: Mapping[str, Any]) -> WhisperConfig:
    """Reads a published ``config.json`` of model type ``whisper``.

    Raises:
      ModelConfigError: for a missing or malformed value, or a feature that is not supported.
    """
    reader = ConfigReader(config)
    reader.only("model_type", ("whisper",), "whisper")
    reader.ignore(*_NOT_THE_ENCODER)
    sizes = read_encoder_sizes(reader)
    reader.finish()
    return WhisperConfig(**sizes)


def read_encoder_sizes(reader: ConfigReader) -> dict[str, int]:
    """The sizes that Whisper's encoder and its descendants share, as arguments of their configs.

    Raises:
      ModelConfigError: for a missing or malformed value, or another activation than GELU.
    """
    reader.only("activation_function", ("gelu",), "gelu")
    depth = reader.depth("encoder_layers")
    reader.only("num_hidden_layers", (depth, None), None)
    # Training only; and the scale, which the published encoders work out and do not apply.
    reader.ignore("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop")
    reader.ignore("init_std", "scale_embedding")
    reader.ignore("tie_word_embeddings")  # no encoder has any
    return {
        "mels": reader.integer("num_mel_bins"),
        "frames": 2 * reader.integer("max_source_positions", 1500),
        "width": reader.integer("d_model"),
        "depth": depth,
        "heads": reader.integer("encoder_attention_heads"),
        "mlp_width": reader.integer("encoder_ffn_dim"),
    }


def sinusoids(length: int, width: int) -> np.ndarray:
    """Fixed position table (length, width), float32: sines, then cosines, of position * rate.

    The width / 2 rates fall from 1 to 1/10000 in a geometric series. Exponents, rates and angles
    are rounded to float32 as in the published code; without that the entries of late positions
    would differ by up to 1e-4. Exponential and sine are exact (each library rounds its own way).
    """
    half = width // 2
    exponents = -np.float32(math.log(10_000) / (half - 1)) * np.arange(half, dtype=np.float32)
    rates = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = np.arange(length, dtype=np.float32)[:, None] * rates
    angles = angles.astype(np.float64)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


class Stem(nn.Module):
    """Two convolutions of three frames, the second with stride 2, each followed by GELU."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, features: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        """(B, T, M) to (B, ceil(T / 2), W).

        Args:
          features: log-mel.
          valid: (B, T) boolean; frames outside count as zeros to both convolutions, as those
            beyond the ends of a clip do. None: all are read.
        """
        convolve = functools.partial(
            nn.Conv, self.width, (3,), padding=1, dtype=self.dtype,
            conv_general_dilated=convolution.convolve,  # fast in accumulated batches too
        )  # fmt: skip
        x = _only(features.astype(self.dtype), valid)
        x = _only(gelu(convolve(name="conv1")(x)), valid)
        return gelu(convolve(strides=2, name="conv2")(x))


def _only(x: jax.Array, valid: jax.Array | None) -> jax.Array:
    return x if valid is None else jnp.where(valid[..., None], x, 0)


class Block(nn.Module):
    """Pre-norm transformer layer whose keys have no bias: ``WhisperEncoderLayer``."""

    heads: int
    mlp_width: int
    eps: float
    backend: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """(B, N, W) to (B, N, W); `mask` (B, N) boolean, True for tokens that may be seen."""
        width = x.shape[-1]
        normed = layer_norm(self.eps, self.dtype, "attention_norm")(x)
        x = x + Dense(width, self.dtype, name="out")(self._attend(normed, mask))
        hidden = layer_norm(self.eps, self.dtype, "mlp_norm")(x)
        hidden = gelu(Dense(self.mlp_width, self.dtype, name="fc1")(hidden))
        return x + Dense(width, self.dtype, name="fc2")(hidden)

    def _attend(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        width, by_head = x.shape[-1], (*x.shape[:2], self.heads, -1)
        flat = x.reshape(-1, width)  # as in `Dense`: faster gradients on a CPU
        q = Dense(width, self.dtype, name="query")(flat).reshape(by_head)
        k = nn.Dense(width, use_bias=False, dtype=self.dtype, name="key")(flat).reshape(by_head)
        v = Dense(width, self.dtype, name="value")(flat).reshape(by_head)
        seen = None if mask is None else mask[:, None, None, :]
        return attention(q, k, v, mask=seen, backend=self.backend).reshape(x.shape)


def block_of(config: Any) -> Block:
    """A detached layer of that config, for `stacked_init` and `run_blocks`."""
    return Block(
        config.heads, config.mlp_width, config.eps, config.attention, config.dtype, parent=None
    )


def run_blocks(
    config: Any,
    weights: Any,
    x: jax.Array,
    mask: jax.Array | None,
    layers: tuple[int, ...] | None,
    factors: Any = None,
    hook: Callable[[Any], Any] | None = None,
) -> tuple[jax.Array, dict[int, jax.Array]]:
    """Runs all layers as one scan.

    Args:
      config: a config of Whisper's family.
      weights: a layer's parameters, stacked on axis 0.
      x: (B, N, W) input of the first layer.
      mask: (B, N) boolean, True for tokens that may be seen, or None.
      layers: which outputs to keep, numbered from 0; None keeps all.
      factors, hook: low-rank factors of the weights, stacked too, and what a layer's weights go
        through: see `layer_stack.use_weights`.

    Returns:
      The last layer's output (B, N, W), and {layer: its output} as asked.

    Raises:
      ValueError: a layer that does not exist.
    """
    block = block_of(config)

    def step(x, layer):
        return block.apply({"params": use_weights(*layer, hook)}, x, mask)

    layers = tuple(range(config.depth)) if layers is None else layers
    if unknown := [i for i in layers if not 0 <= i < config.depth]:
        raise ValueError(f"layers {unknown} do not exist: this model has 0 to {config.depth - 1}")
    wanted = tuple(sorted({i + 1 for i in layers} | {config.depth}))
    step = jax.checkpoint(step) if config.remat else step
    states = scan_layers(step, (weights, factors), x, wanted)
    return states[config.depth], {i: states[i + 1] for i in sorted(set(layers))}


def valid_until(lengths: jax.Array, size: int) -> jax.Array:
    """(B,) lengths to (B, size) boolean, True at places below them."""
    return jnp.arange(size) < lengths[:, None]


def masked_mean(tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of (B, L, W) over the places where `mask` (B, L) is True, (B, W) float32; 0 of none."""
    # where, not a product: what padding holds may be infinite.
    total = jnp.where(mask[..., None], tokens.astype(jnp.float32), 0).sum(axis=1)
    return total / jnp.maximum(mask.sum(axis=1), 1)[:, None]


def check_input(config: Any, features: jax.Array, lengths: jax.Array | None) -> None:
    """Refuses shapes that an encoder of Whisper's family does not take.

    Raises:
      ValueError: saying what was given and what is taken.
    """
    if features.ndim != 3 or features.shape[2] != config.mels:
        raise ValueError(f"features must be (B, T, {config.mels}), got {features.shape}")
    config.grid(features.shape[1])
    if lengths is None:
        return
    if lengths.shape != features.shape[:1] or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"lengths must be ({features.shape[0]},) integers, valid frames of each clip; "
            f"got {lengths.shape} {lengths.dtype}"
        )


class Whisper(nn.Module):
    """The encoder; see the module's docstring.

    Parameters: ``stem/conv1``, ``stem/conv2``, the fixed table ``pos_embed`` (loaded and exported;
    no gradient reaches it), ``layers/...`` stacked over depth, and ``norm``.
    """

    config: WhisperConfig

    def setup(self) -> None:
        c = self.config
        self.stem = Stem(c.width, c.dtype)
        self.pos_embed = self.param(
            "pos_embed", lambda _: jnp.asarray(sinusoids(c.frames // 2, c.width))
        )
        example = jnp.zeros((1, 1, c.width), c.dtype)
        self.layers = self.param("layers", stacked_init(block_of(c), c.depth), example)
        self.norm = layer_norm(c.eps, c.dtype)

    def __call__(self, features: jax.Array) -> jax.Array:
        """Pooled output; touches every parameter (for `init`)."""
        return self.embed(features, layers=())[0]

    def embed(
        self,
        features: jax.Array,
        lengths: jax.Array | None = None,
        layers: tuple[int, ...] | None = None,
    ) -> tuple[jax.Array, Intermediates]:
        """Mean over the valid tokens of the encoder's output.

        Args:
          features: (B, T, M) log-mel of `WhisperMel`; T from 1 to `config.frames`.
          lengths: (B,) integers, valid frames of each clip; what lies beyond is not read. None: all
            T frames are. A clip of no frames gets zeros.
          layers: which blocks' outputs to hand back, numbered from 0; None for all. Under jit an
            output that nobody reads costs nothing; to read a few of many, name them.

        Returns:
          (B, W) float32, and a dict with "stem" (B, L, W) (positions added), "block00" ...
          (B, L, W), "tokens" (B, L, W) after the last LayerNorm (``last_hidden_state``), and
          "mask" (B, L), True for valid tokens; others hold nothing of use.

        Raises:
          ValueError: a shape that the model does not take, or a layer that it does not have.
        """
        c = self.config
        check_input(c, features, lengths)
        valid = None if lengths is None else valid_until(lengths, features.shape[1])
        x = self.stem(features, valid)
        x = x + jax.lax.stop_gradient(self.pos_embed)[: x.shape[1]].astype(x.dtype)
        out: Intermediates = {"stem": x}
        # A token is valid if its first frame is.
        mask = None if valid is None else valid[:, ::2]
        x, kept = run_blocks(c, self.layers, x, mask, layers)
        out |= {f"block{i:02d}": state for i, state in kept.items()}
        out["tokens"] = self.norm(x)
        out["mask"] = jnp.ones(x.shape[:2], bool) if mask is None else mask
        return masked_mean(out["tokens"], out["mask"]), out

    def tokens(
        self, features: jax.Array, lengths: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The sequence that Whisper's decoder attends to.

        Args:
          features, lengths: as in `embed`.

        Returns:
          (B, L, W) of `config.dtype` and (B, L) boolean, True for valid tokens.

        Raises:
          ValueError: as `embed`.
        """
        out = self.embed(features, lengths, layers=())[1]
        return out["tokens"], out["mask"]
