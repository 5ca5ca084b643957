"""EfficientNet (Tan & Le 2019, arXiv 1905.11946) on log-mels: the encoder of OPERA-CE.

`OPERA_CE` computes what the published network computes (`Cola(encoder="efficientnet")` in
evelyn0414/OPERA, which wraps efficientnet_pytorch 0.7.1 B0), including three things that one would
not expect:

* a 3x3 convolution without padding turns the one channel into three;
* padding is fixed as if the image were 224x224: a convolution of stride 2 pads one less before
  than after, whatever the size;
* BatchNorm has eps 1e-3.

BatchNorm uses the stored statistics always; they are parameters without a gradient, and an
optimizer that decays weights has to leave out `(mean|var)$`.

Shapes: B clips, T frames, M mel bins, (R, V) rows in time and columns in mel of a map, C channels.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

Intermediates = dict[str, jax.Array]


class Stage(NamedTuple):
    """Equal blocks in a row; only the first one has the stride.

    Attributes:
      expand: channels inside a block over those of its input.
      kernel: side of the depthwise convolution.
      stride: of the first block.
      channels: of the output.
      repeats: number of blocks.
    """

    expand: int
    kernel: int
    stride: int
    channels: int
    repeats: int


B0 = (
    Stage(1, 3, 1, 16, 1),
    Stage(6, 3, 2, 24, 2),
    Stage(6, 5, 2, 40, 2),
    Stage(6, 3, 2, 80, 3),
    Stage(6, 5, 1, 112, 3),
    Stage(6, 5, 2, 192, 4),
    Stage(6, 3, 1, 320, 1),
)


@dataclasses.dataclass(frozen=True)
class EfficientNetConfig:
    """Sizes of an EfficientNet on log-mels.

    Attributes:
      frames: frames of the input that it was made for; the network takes any number from
        `least_frames`, longer ones too.
      mels: mel bins of an input.
      image_channels: output of the first convolution, the "colours".
      stem: channels of the first strided convolution.
      stages: of the body.
      width: channels of the last convolution, so of the feature.
      squeeze: hidden units of squeeze-and-excitation over the channels of the block's input.
      eps: of every BatchNorm.
      projection: width of COLA's projection (`medalign_jax.models.encoders.cola`).
      remat: recompute each block's activations in the backward pass instead of keeping them.
      dtype: of the computation; parameters are float32.
    """

    frames: int = 251
    mels: int = 64
    image_channels: int = 3
    stem: int = 32
    stages: tuple[Stage, ...] = B0
    width: int = 1280
    squeeze: float = 0.25
    eps: float = 1e-3
    projection: int = 512
    remat: bool = False
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        # A config file or an export gives plain tuples.
        object.__setattr__(self, "stages", tuple(Stage(*stage) for stage in self.stages))
        for stage in self.stages:
            if stage.kernel % 2 == 0 or stage.stride not in (1, 2) or stage.repeats < 1:
                raise ValueError(f"a stage needs an odd kernel and stride 1 or 2: {stage}")
        self.grid(self.frames)

    @property
    def blocks(self) -> tuple[Stage, ...]:
        """The stages spelled out, one entry (of one repeat) per block."""
        return tuple(
            stage._replace(stride=stage.stride if i == 0 else 1, repeats=1)
            for stage in self.stages
            for i in range(stage.repeats)
        )

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def layer_widths(self) -> tuple[int, ...]:
        """Channels of each block's output."""
        return tuple(block.channels for block in self.blocks)

    @property
    def prefix_tokens(self) -> int:
        """There is no class token."""
        return 0

    @property
    def stride(self) -> int:
        """Frames, and mel bins, from one token to the next."""
        return 2 ** (1 + sum(block.stride == 2 for block in self.blocks))

    @property
    def least_frames(self) -> int:
        """Fewest frames of an input: those that give one row."""
        return 2 + self.stride

    @property
    def most_frames(self) -> int | None:
        """Most frames of an input; None for any number."""
        return None

    def grid(self, frames: int) -> tuple[int, int]:
        """(rows, columns) of the last map for an input of so many frames.

        Raises:
          ValueError: nothing is left of a side.
        """
        # Every strided convolution gives floor(n / 2) of n.
        rows, columns = ((size - 2) // self.stride for size in (frames, self.mels))
        if rows < 1 or columns < 1:
            raise ValueError(
                f"an input of {frames} frames and {self.mels} mel bins is too small for this "
                f"network: at least {self.least_frames} of each"
            )
        return rows, columns

    @property
    def footprint(self) -> tuple[int, int]:
        """(frames, mel bins) of the stretch that a token stands for.

        Mel bins are shared out between the columns; 27 of 251 frames are left over at the end, and
        have no token of their own.
        """
        return self.stride, self.mels // self.grid(self.frames)[1]

    @property
    def mask_unit(self) -> tuple[int, int]:
        """Tokens that a masked-spectrogram loss hides together; they are coarse already."""
        return 1, 1


OPERA_CE = EfficientNetConfig()


class BatchNorm(nn.Module):
    """Normalisation of the last axis by stored statistics, x to (x - mean) / sqrt(var + eps).

    Then times `scale` and plus `bias`. `mean` and `var` get no gradient.
    """

    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
        inits = {"scale": ones, "bias": zeros, "mean": zeros, "var": ones}
        p = {name: self.param(name, init, x.shape[-1:]) for name, init in inits.items()}
        mean, var = (jax.lax.stop_gradient(p[name]) for name in ("mean", "var"))
        slope = p["scale"] * jax.lax.rsqrt(var + self.eps)
        offset = p["bias"] - mean * slope
        return x.astype(self.dtype) * slope.astype(self.dtype) + offset.astype(self.dtype)


def padding(kernel: int, stride: int) -> tuple[int, int]:
    """Zeros (before, after) each side of a map: those that suit a side of even length."""
    return (kernel - stride) // 2, (kernel - 1) // 2


def depthwise(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Convolution of each channel by itself.

    Args:
      x: (B, R, V, C).
      kernel: (k, k, 1, C).
      stride: 1 or 2.

    Returns:
      (B, floor(R / stride), floor(V / stride), C).
    """

    def on_cpu(x, kernel):
        return depthwise_sum(x, kernel, stride)

    def elsewhere(x, kernel):
        return depthwise_convolution(x, kernel, stride)

    return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=elsewhere)


def depthwise_convolution(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """`depthwise` as a grouped convolution, for accelerators."""
    side = padding(kernel.shape[0], stride)
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), (side, side), feature_group_count=x.shape[-1],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


def depthwise_sum(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """`depthwise` as a sum of shifted copies of the map, one weighted copy for each tap.

    XLA fuses them into one loop; its grouped convolution on a CPU is some fifty times slower.
    """
    side = padding(kernel.shape[0], stride)
    last_row, last_column = ((n // stride - 1) * stride + 1 for n in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), side, side, (0, 0)))
    taps = [
        x[:, i : i + last_row : stride, j : j + last_column : stride] * kernel[i, j, 0]
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    ]
    return sum(taps[1:], taps[0])


class Depthwise(nn.Module):
    """`depthwise` with its kernel."""

    size: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.he_normal()
        shape = (self.size, self.size, 1, x.shape[-1])
        kernel = self.param("kernel", init, shape, jnp.float32)
        return depthwise(x.astype(self.dtype), kernel.astype(self.dtype), self.stride)


class Block(nn.Module):
    """Inverted bottleneck with squeeze-and-excitation, (B, R, V, C) to a map of `stage.channels`.

    Source: efficientnet_pytorch `MBConvBlock`; its drop-connect acts in training only and is left
    out.
    """

    stage: Stage
    squeeze: float
    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        stage, width, skip = self.stage, x.shape[-1], x
        norm = {"eps": self.eps, "dtype": self.dtype}
        if stage.expand != 1:
            x = _pointwise(stage.expand * width, self.dtype, "expand_conv")(x)
            x = nn.silu(BatchNorm(**norm, name="bn0")(x))
        x = Depthwise(stage.kernel, stage.stride, self.dtype, name="depthwise_conv")(x)
        x = nn.silu(BatchNorm(**norm, name="bn1")(x))
        x = x * self._excitation(x, max(1, int(width * self.squeeze)))
        x = _pointwise(stage.channels, self.dtype, "project_conv")(x)
        x = BatchNorm(**norm, name="bn2")(x)
        return x + skip if x.shape == skip.shape and stage.stride == 1 else x

    def _excitation(self, x: jax.Array, hidden: int) -> jax.Array:
        """(B, 1, 1, C) in 0..1 from the mean over the map."""
        mean = jnp.mean(x.astype(jnp.float32), axis=(1, 2), keepdims=True)
        inner = nn.silu(nn.Dense(hidden, dtype=self.dtype, name="se_reduce")(mean))
        return nn.sigmoid(nn.Dense(x.shape[-1], dtype=self.dtype, name="se_expand")(inner))


def _pointwise(channels: int, dtype: Any, name: str) -> nn.Dense:
    init = nn.initializers.he_normal()
    return nn.Dense(channels, use_bias=False, dtype=dtype, kernel_init=init, name=name)


class EfficientNet(nn.Module):
    """The encoder; see the module's docstring."""

    config: EfficientNetConfig

    def setup(self) -> None:
        c = self.config
        conv = {"kernel_size": (3, 3), "dtype": c.dtype, "kernel_init": nn.initializers.he_normal()}
        self.cnn1 = nn.Conv(c.image_channels, padding="VALID", **conv)
        self.conv_stem = nn.Conv(
            c.stem, strides=2, padding=(padding(3, 2),) * 2, use_bias=False, **conv
        )
        self.bn0 = BatchNorm(c.eps, c.dtype)
        block = nn.remat(Block) if c.remat else Block
        self.blocks = [
            block(stage, c.squeeze, c.eps, c.dtype, name=f"block{i}")
            for i, stage in enumerate(c.blocks)
        ]
        self.conv_head = _pointwise(c.width, c.dtype, None)
        self.bn1 = BatchNorm(c.eps, c.dtype)

    def __call__(self, features: jax.Array) -> jax.Array:
        """Feature without intermediates; touches every parameter (for `init`)."""
        return self.embed(features)[0]

    def embed(self, features: jax.Array) -> tuple[jax.Array, Intermediates]:
        """Feature of whole clips.

        Args:
          features: (B, T, M) log-mel, T at least `config.least_frames`.

        Returns:
          (B, width) float32, the mean over the last map, and a dict with "stem" (B, N, C) before
          its activation, "block00" ... (B, N, C) after each block, and "tokens" (B, L, width), the
          last map; maps are flattened row by row (time-major).

        Raises:
          ValueError: a shape that the model does not take.
        """
        c = self.config
        if features.ndim != 3 or features.shape[2] != c.mels:
            raise ValueError(f"features must be (B, T, {c.mels}), got {features.shape}")
        c.grid(features.shape[1])
        x = self.bn0(self.conv_stem(self.cnn1(features[..., None].astype(c.dtype))))
        out = {"stem": _flat(x)}
        x = nn.silu(x)
        for i, block in enumerate(self.blocks):
            x = block(x)
            out[f"block{i:02d}"] = _flat(x)
        out["tokens"] = _flat(nn.silu(self.bn1(self.conv_head(x))))
        return jnp.mean(out["tokens"].astype(jnp.float32), axis=1), out


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1, x.shape[-1])
