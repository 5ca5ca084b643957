"""Audio towers of Qwen2-Audio (arXiv 2407.10759) and Qwen2.5-Omni (arXiv 2503.20215).

Both are Whisper large-v3's encoder, whose output is averaged over pairs of tokens (40 ms each),
normed, and projected to the width of the language model: transformers' ``Qwen2AudioEncoder`` with
``Qwen2AudioMultiModalProjector``, and ``Qwen2_5OmniAudioEncoder``. They see time differently:

* Qwen2-Audio attends over the whole clip, with stored positions. Its convolutions read what lies
  beyond a clip's length (the features of the padding), while attention and pooling do not: so the
  published numbers need waveforms padded to 30 s with zeros before the front end.
* Qwen2.5-Omni cuts a clip into windows of ``2 n_window`` frames (2 s). Convolutions and attention
  stay inside a window, and positions begin anew in each, so cost grows linearly with length. What
  lies beyond a clip's length is never read.

`QwenAudio.tokens` gives the very sequence that the language model receives. For a vector of a clip,
which neither publishes, `embed` takes the mean of the normed tokens before the projection.
Shapes: B clips, T frames, M mel bins, N tokens of the layers, L pooled tokens, W channels, H width
of the language model.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from medalign_jax.models.encoders.whisper import (
    Stem,
    block_of,
    check_frames,
    check_input,
    check_sizes,
    masked_mean,
    read_encoder_sizes,
    run_blocks,
    sinusoids,
    valid_until,
)
from medalign_jax.models.layers.layer_stack import low_rank, stacked_init, through
from medalign_jax.models.layers.vit_layers import Dense, UniformBlocks, layer_norm
from medalign_jax.models.upstream_config import ConfigReader, ModelConfigError

Intermediates = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class QwenAudioConfig(UniformBlocks):
    """Sizes of an audio tower; the defaults are those of Qwen2-Audio-7B.

    Attributes:
      mels: mel bins of an input.
      frames: most frames of an input: the length of the stored position table, or, with windows,
        which know no limit, what the published front end cuts a clip to.
      width, depth, heads, mlp_width: of the layers.
      output_width: H, of the language model; None for a tower without projection.
      n_window: half the frames of a window; None to see the whole clip at once.
      eps: of every LayerNorm.
      attention: back end, see `medalign_jax.models.layers.attention`.
      remat: recompute each layer's activations in the backward pass instead of keeping them.
      dtype: of the computation; parameters and the pooled output are float32.
    """

    mels: int = 128
    frames: int = 3000
    width: int = 1280
    depth: int = 32
    heads: int = 20
    mlp_width: int = 5120
    output_width: int | None = 4096
    n_window: int | None = None
    eps: float = 1e-5
    attention: str = "auto"
    remat: bool = False
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.frames % 2:
            raise ValueError(f"frames must be even (two make a token), got {self.frames}")
        for name in ("output_width", "n_window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 or None, got {value}")

    @property
    def footprint(self) -> tuple[int, int]:
        """(frames, mel bins) that one pooled token stands for; 40 ms of all bins."""
        return (4, self.mels)

    @property
    def mask_unit(self) -> tuple[int, int]:
        """(rows, columns) of tokens to be hidden together: 0.24 s."""
        return (6, 1)

    def grid(self, frames: int) -> tuple[int, int]:
        """(rows, columns) of pooled tokens of an input of so many frames.

        Three frames left over make a token, fewer are lost.

        Raises:
          ValueError: too few frames for a token, or more than `frames`.
        """
        return pooled_tokens(check_frames(frames, 3, self.frames)), 1


QWEN2_AUDIO = QwenAudioConfig()
QWEN2_5_OMNI_AUDIO = QwenAudioConfig(frames=30_000, output_width=3584, n_window=100)


def pooled_tokens(frames):
    """Tokens that the language model gets for so many frames (an int or integer array)."""
    return (frames + 1) // 2 // 2


def qwen2_audio_config(config: Mapping[str, Any]) -> QwenAudioConfig:
    """Reads the ``config.json`` of Qwen2-Audio, or its ``audio_config`` alone.

    The width of the language model comes from ``text_config``, where transformers leaves out
    Qwen2's default; a bare ``audio_config`` makes a tower without projection. Of the outer keys
    only these two parts are read: the others speak of the language model.

    Raises:
      ModelConfigError: for a missing or malformed value, or a feature that is not supported.
    """
    outer = ConfigReader(config)
    kind = outer.only("model_type", ("qwen2_audio", "qwen2_audio_encoder"), "qwen2_audio_encoder")
    if kind == "qwen2_audio_encoder":
        return _tower(outer, kind, output_width=None)
    text = ConfigReader(outer.raw("text_config", {}) or {}, "config.json: text_config")
    width = text.integer("hidden_size", 4096)
    audio = ConfigReader(outer.raw("audio_config"), "config.json: audio_config")
    return _tower(audio, "qwen2_audio_encoder", output_width=width)


def qwen2_5_omni_audio_config(config: Mapping[str, Any]) -> QwenAudioConfig:
    """Reads the ``config.json`` of Qwen2.5-Omni, of its thinker, or its ``audio_config`` alone.

    Raises:
      ModelConfigError: for a missing or malformed value, or a feature that is not supported.
    """
    reader = ConfigReader(config)
    bare = "qwen2_5_omni_audio_encoder"
    kind = reader.only("model_type", ("qwen2_5_omni", "qwen2_5_omni_thinker", bare), bare)
    if kind == "qwen2_5_omni":
        reader = ConfigReader(reader.raw("thinker_config"), "config.json: thinker_config")
    if kind != bare:
        reader = ConfigReader(reader.raw("audio_config"), f"{reader.where}: audio_config")
    n_window = reader.integer("n_window", 100)
    width = reader.integer("output_dim", 3584)
    result = _tower(reader, bare, output_width=width, n_window=n_window)
    positions = result.frames // 2
    if positions < n_window:
        raise ModelConfigError(
            f"{reader.where}: a window of n_window={n_window} tokens needs as many positions, "
            f"max_source_positions is {positions}"
        )
    return dataclasses.replace(result, frames=QWEN2_5_OMNI_AUDIO.frames)


def _tower(reader: ConfigReader, model_type: str, **settings: Any) -> QwenAudioConfig:
    reader.only("model_type", (model_type,), model_type)
    sizes = read_encoder_sizes(reader)
    reader.finish()
    return QwenAudioConfig(**sizes, **settings)


class QwenAudio(nn.Module):
    """The tower; see the module's docstring.

    Parameters: ``stem/conv1``, ``stem/conv2``, ``layers/...`` stacked over depth, ``norm``,
    ``proj`` where there is a projection, and without windows the fixed table ``pos_embed`` (loaded
    and exported; no gradient reaches it). With windows that table is worked out. Low-rank factors
    for kernels of ``layers`` and ``proj`` may be given as collection "lora" (`layer_stack`).

    Attributes:
      config: sizes.
      layer_weights: what a layer's weights go through inside the scan, see `layer_stack`.
    """

    config: QwenAudioConfig
    layer_weights: Callable[[Any], Any] | None = None

    def setup(self) -> None:
        c = self.config
        self.stem = Stem(c.width, c.dtype)
        if c.n_window is None:
            self.pos_embed = self.param(
                "pos_embed", lambda _: jnp.asarray(sinusoids(c.frames // 2, c.width))
            )
        example = jnp.zeros((1, 1, c.width), c.dtype)
        self.layers = self.param("layers", stacked_init(block_of(c), c.depth), example)
        self.norm = layer_norm(c.eps, c.dtype)
        if c.output_width is not None:
            self.proj = Dense(c.output_width, c.dtype)

    def __call__(self, features: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Pooled and projected output; touches every parameter (for `init`)."""
        pooled, out = self.embed(features, layers=())
        return pooled, out.get("projected")

    def embed(
        self,
        features: jax.Array,
        lengths: jax.Array | None = None,
        layers: tuple[int, ...] | None = None,
    ) -> tuple[jax.Array, Intermediates]:
        """Mean over the valid tokens of the tower's output.

        Args:
          features: (B, T, M) log-mel of `WhisperMel`; T from 3 to `config.frames`.
          lengths: (B,) integers, valid frames of each clip (`WhisperMel.valid_frames`); None: all T
            are. See the module's docstring for what is read beyond. A clip of fewer than 3 frames
            gets zeros.
          layers: which blocks' outputs to hand back, numbered from 0; None for all. Under jit an
            output that nobody reads costs nothing; to read a few of many, name them.

        Returns:
          (B, W) float32, and a dict with "stem" (B, N, W) (positions added), "block00" ...
          (B, N, W) with N = ceil(T / 2), "tokens" (B, L, W) pooled by pairs and normed,
          "projected" (B, L, H) what the language model sees, if there is a projection, and "mask"
          (B, L), True for valid tokens; others hold nothing of use.

        Raises:
          ValueError: a shape that the model does not take, or a layer that it does not have.
        """
        check_input(self.config, features, lengths)
        frames = features.shape[1]
        run = self._whole if self.config.n_window is None else self._windows
        x, out = run(features, lengths, layers)
        x = x[:, : 2 * pooled_tokens(frames)]
        pairs = x.reshape(x.shape[0], -1, 2, x.shape[2])
        out["tokens"] = self.norm((pairs[:, :, 0] + pairs[:, :, 1]) / 2)
        if self.config.output_width is not None:
            out["projected"] = self.proj(out["tokens"])
            if (factors := self._low_rank()["proj"]) is not None:
                out["projected"] += through(out["tokens"], factors["kernel"])
        if lengths is None:
            lengths = jnp.full(features.shape[:1], frames)
        out["mask"] = valid_until(pooled_tokens(lengths), out["tokens"].shape[1])
        return masked_mean(out["tokens"], out["mask"]), out

    def tokens(
        self, features: jax.Array, lengths: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The sequence that the language model receives in place of its audio tokens.

        Args:
          features, lengths: as in `embed`.

        Returns:
          (B, L, H) of `config.dtype` and (B, L) boolean, True for valid tokens.

        Raises:
          ValueError: as `embed`, or a tower without projection.
        """
        if self.config.output_width is None:
            raise ValueError(
                "this tower has no projection to a language model: set output_width, and load a "
                "whole model's weights; or read embed's 'tokens'"
            )
        out = self.embed(features, lengths, layers=())[1]
        return out["projected"], out["mask"]

    def _whole(
        self, features: jax.Array, lengths: jax.Array | None, layers: tuple[int, ...] | None
    ) -> tuple[jax.Array, Intermediates]:
        """Qwen2-Audio's layers: (B, N, W) and the intermediates up to them."""
        x = self.stem(features)
        x = x + jax.lax.stop_gradient(self.pos_embed)[: x.shape[1]].astype(x.dtype)
        mask = None if lengths is None else valid_until((lengths + 1) // 2, x.shape[1])
        last, kept = self._run_layers(x, mask, layers)
        return last, {"stem": x} | {f"block{i:02d}": state for i, state in kept.items()}

    def _windows(
        self, features: jax.Array, lengths: jax.Array | None, layers: tuple[int, ...] | None
    ) -> tuple[jax.Array, Intermediates]:
        """Qwen2.5-Omni's layers: windows are examples of their own. Returns as `_whole`."""
        batch, frames, mels = features.shape
        window = min(2 * self.config.n_window, frames + frames % 2)
        count = -(-frames // window)
        features = jnp.pad(features, ((0, 0), (0, count * window - frames), (0, 0)))
        valid = None
        if lengths is not None or count * window > frames:
            ends = jnp.full(batch, frames) if lengths is None else jnp.minimum(lengths, frames)
            valid = valid_until(ends, count * window).reshape(-1, window)
        x = self.stem(features.reshape(-1, window, mels), valid)
        x = x + sinusoids(window // 2, self.config.width).astype(x.dtype)
        mask = None if valid is None else valid[:, ::2]
        last, kept = self._run_layers(x, mask, layers)

        def joined(x):
            return x.reshape(batch, -1, x.shape[2])[:, : (frames + 1) // 2]

        blocks = {f"block{i:02d}": joined(state) for i, state in kept.items()}
        return joined(last), {"stem": joined(x)} | blocks

    def _run_layers(self, x: jax.Array, mask: jax.Array | None, layers: tuple[int, ...] | None):
        factors = self._low_rank()["layers"]
        return run_blocks(self.config, self.layers, x, mask, layers, factors, self.layer_weights)

    def _low_rank(self) -> dict[str, Any]:
        return low_rank(self, "layers", *(() if self.config.output_width is None else ("proj",)))
