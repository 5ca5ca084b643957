"""HTS-AT (Chen et al. 2022, arXiv 2202.00874): a Swin transformer on a folded spectrogram.

    features -> norm of each mel bin -> time stretched -> folded into a square -> Swin -> mean

`OPERA_CT` computes what the published network computes (`Cola(encoder="htsat")` in
evelyn0414/OPERA). Time is stretched to a fixed length, so that an input of 251 frames costs as much
as one of 1024; the stretched spectrogram is cut into pieces that are stacked along the mel axis.
The audio tower of LAION-CLAP is the same network (transformers `ClapAudioModel`) with separate
query, key and value (`split_qkv`).

The norm of the mel bins uses its stored statistics always; an optimizer that decays weights has to
leave out `(mean|var)$`.

Shapes: B clips, T frames, M mel bins, S side of the square, F = S / M pieces, L tokens, W channels.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from medalign_jax.models.encoders.efficientnet import BatchNorm
from medalign_jax.models.layers.attention import BACKENDS
from medalign_jax.models.layers.swin_layers import SwinStage
from medalign_jax.models.layers.vit_layers import PatchEmbed, layer_norm, patchify

Intermediates = dict[str, jax.Array]

_CUBIC = -0.75  # the free number of bicubic interpolation, as PyTorch has it


@dataclasses.dataclass(frozen=True)
class HTSATConfig:
    """Sizes of an HTS-AT.

    Attributes:
      mels: mel bins of an input.
      spec_size: side of the square that the spectrogram is folded into; a multiple of `mels`.
      patch: side of a patch.
      embed_width: channels of the first stage; each further stage has twice as many.
      depths, heads: blocks, and heads of a block, of each stage.
      window: side of an attention window, in tokens.
      mlp_ratio: hidden width over that of a token.
      eps: of every LayerNorm and of the norm of the mel bins.
      split_qkv: query, key and value are three matrices instead of one.
      projection: width of COLA's projection (`medalign_jax.models.encoders.cola`).
      attention: back end, see `swin_layers.window_attention`.
      remat: recompute each block's activations in the backward pass instead of keeping them.
      dtype: of the computation; parameters, norms' statistics and the stretching are float32.
    """

    mels: int = 64
    spec_size: int = 256
    patch: int = 4
    embed_width: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (4, 8, 16, 32)
    window: int = 8
    mlp_ratio: int = 4
    eps: float = 1e-5
    split_qkv: bool = False
    projection: int = 512
    attention: str = "auto"
    remat: bool = False
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.heads):
            raise ValueError(f"depths {self.depths} and heads {self.heads} must be equally long")
        if self.spec_size % self.mels or self.mels % self.stride:
            raise ValueError(
                f"mels {self.mels} must divide spec_size {self.spec_size} and be a multiple of "
                f"{self.stride}, the side of a last token (patch * 2^(stages - 1))"
            )
        for stage, heads in enumerate(self.heads):
            side = self.spec_size // self.patch // 2**stage
            if side % min(self.window, side):
                raise ValueError(f"window {self.window} does not divide stage {stage} of {side}")
            if (width := self.embed_width * 2**stage) % heads:
                raise ValueError(f"stage {stage}: width {width} is not a multiple of {heads} heads")
        if self.attention not in BACKENDS:
            raise ValueError(f"attention {self.attention!r} is not one of {BACKENDS}")

    @property
    def pieces(self) -> int:
        """F, how many pieces of the spectrogram lie above each other in the square."""
        return self.spec_size // self.mels

    @property
    def frames(self) -> int:
        """Frames that the network works on; shorter inputs are stretched to as many."""
        return self.pieces * self.spec_size

    @property
    def width(self) -> int:
        """Channels of the feature."""
        return self.embed_width * 2 ** (len(self.depths) - 1)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return sum(self.depths)

    @property
    def layer_widths(self) -> tuple[int, ...]:
        """Channels of each block's output."""
        return tuple(
            self.embed_width * 2**stage for stage, n in enumerate(self.depths) for _ in range(n)
        )

    @property
    def prefix_tokens(self) -> int:
        """There is no class token."""
        return 0

    @property
    def stride(self) -> int:
        """Frames, and mel bins, from one of the last tokens to the next."""
        return self.patch * 2 ** (len(self.depths) - 1)

    @property
    def most_frames(self) -> int | None:
        """Most frames of an input; None for any number: longer ones are cut into crops."""
        return None

    def grid(self, frames: int) -> tuple[int, int]:
        """(rows, columns) of the last tokens in time and mel; equal for all lengths."""
        del frames  # all are stretched
        return self.frames // self.stride, self.mels // self.stride

    @property
    def footprint(self) -> tuple[int, int]:
        """(frames, mel bins) that a token stands for, in the stretched input (`HTSAT.stretch`)."""
        return self.stride, self.stride

    @property
    def mask_unit(self) -> tuple[int, int]:
        """Tokens that a masked-spectrogram loss hides together; they are coarse already."""
        return 1, 1


OPERA_CT = HTSATConfig()


@functools.cache
def cubic_matrix(length: int, frames: int) -> np.ndarray:
    """(frames, length) float32: bicubic interpolation of `length` samples at `frames` places.

    The places run from the first sample to the last (`align_corners`), beyond the ends the edge
    goes on, and a = -0.75 (Keys 1981; PyTorch's `interpolate`, where `jax.image` has a = -0.5 and
    half-pixel centres).
    """
    # In float32, as PyTorch: late places are off by 1e-6 of a sample, and rough inputs show it.
    place = np.arange(frames, dtype=np.float32) * np.float32((length - 1) / max(frames - 1, 1))
    first = np.floor(place).astype(int)
    matrix = np.zeros((frames, length))
    for tap in range(-1, 3):
        column = np.clip(first + tap, 0, length - 1)
        np.add.at(matrix, (np.arange(frames), column), _cubic(np.abs(place - first - tap)))
    matrix = matrix.astype(np.float32)
    matrix.setflags(write=False)
    return matrix


def _cubic(x: np.ndarray) -> np.ndarray:
    """Weight of a sample at distance x."""
    near = ((_CUBIC + 2) * x - (_CUBIC + 3)) * x * x + 1
    far = _CUBIC * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def stretch(features: jax.Array, frames: int) -> jax.Array:
    """Stretches time to `frames`, (B, T, M) to (B, frames, M) float32; T = frames stays as it is.

    Raises:
      ValueError: no frames, or more than `frames`.
    """
    length = features.shape[1]
    if not 1 <= length <= frames:
        raise ValueError(f"time can be stretched from 1 to {frames} frames, got {length}")
    if length == frames:
        return features
    # A product: XLA keeps it split over devices, and its gradient is one too.
    return jnp.einsum(
        "ft,btm->bfm", cubic_matrix(length, frames), features, precision=jax.lax.Precision.HIGHEST
    )


def fold(features: jax.Array, pieces: int) -> jax.Array:
    """(B, T, M) to the image (B, pieces * M, T / pieces): row piece * M + mel, column frame."""
    batch, frames, mels = features.shape
    x = features.reshape(batch, pieces, frames // pieces, mels).swapaxes(2, 3)
    return x.reshape(batch, pieces * mels, frames // pieces)


def unfold(tokens: jax.Array, pieces: int) -> jax.Array:
    """Tokens of a folded image, (B, R, V, W), to (B, L, W) in order of time, then mel."""
    batch, rows, columns, width = tokens.shape
    x = tokens.reshape(batch, pieces, rows // pieces, columns, width).swapaxes(2, 3)
    return x.reshape(batch, rows * columns, width)


def crop_starts(frames: int, length: int) -> tuple[int, ...]:
    """First frames of the crops whose features stand for an input of so many frames.

    One crop up to `length` frames. Beyond, every half length while more than one frame is left
    over, as published: the end is not seen (1026 to 1537 frames give the first 1024 only), and one
    frame too many gives no crop at all.

    Raises:
      ValueError: for length + 1 frames.
    """
    if frames <= length:
        return (0,)
    starts = tuple(range(0, frames - length - 1, length // 2))
    if not starts:
        raise ValueError(
            f"{frames} frames: the published rule for inputs of more than {length} frames makes "
            f"no crop of exactly {frames}; cut the input to {length} frames"
        )
    return starts


class HTSAT(nn.Module):
    """The encoder; see the module's docstring."""

    config: HTSATConfig

    def setup(self) -> None:
        c = self.config
        self.batch_norm = BatchNorm(c.eps, jnp.float32)
        self.patch_embed = PatchEmbed(c.embed_width, (c.patch, c.patch), c.dtype)
        self.patch_norm = layer_norm(c.eps, c.dtype)
        self.stages = [self._stage(i) for i in range(len(c.depths))]
        self.norm = layer_norm(c.eps, c.dtype)

    def _stage(self, i: int) -> nn.Module:
        c = self.config
        block = {
            "heads": c.heads[i], "window": c.window, "mlp_ratio": c.mlp_ratio, "eps": c.eps,
            "backend": c.attention, "split_qkv": c.split_qkv, "dtype": c.dtype,
        }  # fmt: skip
        merge = i < len(c.depths) - 1
        return SwinStage(c.depths[i], merge, c.remat, block, name=f"stage{i}")

    def __call__(self, features: jax.Array) -> jax.Array:
        """Feature without intermediates; touches every parameter (for `init`)."""
        return self.embed(features)[0]

    def stretch(self, features: jax.Array) -> jax.Array:
        """What the network works on: (B, T, M) to (B, `config.frames`, M) float32.

        `embed` gives the same for the stretched input as for the input itself, since the norm of
        the mel bins and the stretching commute. Works without parameters.
        """
        return stretch(features, self.config.frames)

    def embed(self, features: jax.Array) -> tuple[jax.Array, Intermediates]:
        """Feature of whole clips.

        Args:
          features: (B, T, M) log-mel of any length. More than `config.frames` frames are cut into
            crops (`crop_starts`), and all that is returned is the mean over the crops.

        Returns:
          (B, width) float32, and a dict with "image" (B, S, S), "patch_embed" (B, L, W), "block00"
          ... (B, L, W) after each block, "stage0" ... (B, L, W) after each stage with its merging,
          and "tokens" (B, L, width) after the last norm, whose mean is the feature. Tokens are in
          order of time, then mel (see `config.grid`), not of the folded image.

        Raises:
          ValueError: a shape that the model does not take.
        """
        c = self.config
        if features.ndim != 3 or features.shape[2] != c.mels or not features.shape[1]:
            raise ValueError(f"features must be (B, T, {c.mels}), got {features.shape}")
        starts = crop_starts(features.shape[1], c.frames)
        crops = [features[:, start : start + c.frames] for start in starts]
        out = self._embed(jnp.stack(crops, axis=1).reshape(-1, *crops[0].shape[1:]))
        if len(starts) > 1:
            out = {
                name: jnp.mean(x.reshape(-1, len(starts), *x.shape[1:]), axis=1)
                for name, x in out.items()
            }
        return jnp.mean(out["tokens"].astype(jnp.float32), axis=1), out

    def _embed(self, features: jax.Array) -> Intermediates:
        """Intermediates of crops (B, T, M) of at most `config.frames` frames."""
        c = self.config
        features = self.batch_norm(features)
        out = {"image": fold(self.stretch(features), c.pieces)}
        side = c.spec_size // c.patch
        patches = patchify(out["image"], (c.patch, c.patch))
        x = self.patch_norm(self.patch_embed(patches)).reshape(-1, side, side, c.embed_width)
        out["patch_embed"] = unfold(x, c.pieces)
        count = 0
        for i, stage in enumerate(self.stages):
            x, blocks = stage(x)
            for block in blocks:
                out[f"block{count:02d}"] = unfold(block, c.pieces)
                count += 1
            out[f"stage{i}"] = unfold(x, c.pieces)
        out["tokens"] = unfold(self.norm(x), c.pieces)
        return out
