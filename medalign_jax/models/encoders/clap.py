"""CLAP (Wu et al. 2022, arXiv 2211.06687): the audio tower, and the sizes of the text tower.

    features -> HTS-AT -> mean of the tokens -> two dense layers

It computes what `laion/clap-htsat-fused` and `-unfused` compute in transformers. The towers share
no parameter and load alone: `Clap` as an encoder, and plain `Bert` with `clap_text_config` as a
teacher that is read by its hidden states.

The fused model also takes recordings longer than its 10 s: beside the whole, shrunk in time, it
takes three crops, which `AttentionalFusion` (Dai et al. 2021, arXiv 2009.14082) mixes into the
patch embedding. The crops' patches are three times as long, so that they fill the same map.

Shapes: B clips, T frames, M mel bins, S side of the folded square, W channels, P width of the
projection.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from medalign_jax.models.encoders.efficientnet import BatchNorm
from medalign_jax.models.encoders.htsat import HTSAT, HTSATConfig, fold, unfold
from medalign_jax.models.language.bert import BertConfig, read_bert
from medalign_jax.models.layers.vit_layers import Dense, PatchEmbed, patchify
from medalign_jax.models.upstream_config import ConfigReader, ModelConfigError

Intermediates = dict[str, jax.Array]

_CROPS = 3
# Left in both towers' published configs from before their classes were; nothing reads them.
_NEVER_READ = ("fusion_num_hidden_layers", "fusion_hidden_size", "projection_hidden_size")


@dataclasses.dataclass(frozen=True)
class ClapConfig(HTSATConfig):
    """Sizes of CLAP's audio tower: those of its HTS-AT, and of what is around it.

    `projection` is the width of the two last layers, so of the feature. An input has at most
    `frames` frames; the published front end gives 1001 of 1024.

    Attributes:
      fusion: takes the crops of longer recordings too (`Clap.embed_fused`).
      fusion_ratio: channels over hidden channels of the fusion.
      mark_longer: `embed` takes every clip for one that is longer than the model's 10 s, with four
        equal pictures. The published extractor marks one clip of a batch so where none is longer,
        by chance in a batch of several, and always that of a batch of one. By default it is not
        done, so that a clip's feature does not depend on its batch.
    """

    split_qkv: bool = True
    fusion: bool = False
    fusion_ratio: int = 4
    mark_longer: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mark_longer and not self.fusion:
            raise ValueError("mark_longer is for the fused model; this one has no fusion")
        side = self.spec_size // self.stride
        if side < self.window:
            raise ValueError(
                f"the last stage has {side}x{side} tokens, less than a window of {self.window}; "
                "the published network cannot run such sizes"
            )
        if self.fusion and not 1 <= self.fusion_ratio <= self.embed_width:
            raise ValueError(
                f"fusion_ratio must lie between 1 and embed_width {self.embed_width}, "
                f"got {self.fusion_ratio}"
            )

    @property
    def width(self) -> int:
        """Channels of the feature."""
        return self.projection

    @property
    def token_width(self) -> int:
        """Channels of the last tokens and of their mean."""
        return super().width

    @property
    def most_frames(self) -> int:
        """Most frames of an input."""
        return self.frames


CLAP_UNFUSED = ClapConfig()
CLAP_FUSED = ClapConfig(fusion=True)


@dataclasses.dataclass(frozen=True)
class ClapTextConfig(BertConfig):
    """Sizes of CLAP's text tower: a RoBERTa, and the width P of its projection."""

    vocab_size: int = 50265
    token_types: int = 1
    position_offset: int = 2
    projection: int = 512


CLAP_TEXT = ClapTextConfig()


def clap_config(config: Mapping[str, Any]) -> ClapConfig:
    """Reads a published ``config.json`` of model type ``clap`` or ``clap_audio_model``.

    Raises:
      ModelConfigError: for a missing or malformed value, or a feature that is not supported.
    """
    reader, projection = _tower(config, "audio")
    reader.only("hidden_act", ("gelu",), "gelu")
    reader.only("qkv_bias", (True,), True)
    reader.only("patch_embed_input_channels", (1,), 1)
    reader.only("flatten_patch_embeds", (True,), True)
    reader.only("enable_patch_layer_norm", (True,), True)
    # Only the norms within blocks follow this number upstream; the others always have 1e-5.
    reader.only("layer_norm_eps", (1e-5,), 1e-5)
    # "channel_map" is named upstream, but fails there; every other type makes the same module.
    reader.only("fusion_type", (None, "aff_2d"), None)
    reader.ignore("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate")
    reader.ignore("num_classes", "num_hidden_layers", "initializer_factor", "tie_word_embeddings")
    reader.ignore("enable_patch_fusion", *_NEVER_READ)
    sizes = {
        "mels": reader.integer("num_mel_bins", 64),
        "spec_size": reader.integer("spec_size", 256),
        "patch": _patch(reader),
        "embed_width": reader.integer("patch_embeds_hidden_size", 96),
        "depths": _integers(reader, "depths", (2, 2, 6, 2)),
        "heads": _integers(reader, "num_attention_heads", (4, 8, 16, 32)),
        "window": reader.integer("window_size", 8),
        "mlp_ratio": _whole(reader, "mlp_ratio", 4),
        "fusion": reader.flag("enable_fusion", False),
        "fusion_ratio": reader.integer("aff_block_r", 4),
        "projection": projection,
    }
    last = reader.integer("hidden_size", 768)
    reader.finish()
    try:
        result = ClapConfig(**sizes)
    except ValueError as error:
        raise ModelConfigError(f"{reader.where}: {error}") from error
    if result.token_width != last:
        raise ModelConfigError(
            f"{reader.where}: hidden_size is {last}, but patch_embeds_hidden_size "
            f"{result.embed_width} and {len(result.depths)} stages make {result.token_width}"
        )
    return result


def clap_text_config(config: Mapping[str, Any]) -> ClapTextConfig:
    """Reads a published ``config.json`` of model type ``clap`` or ``clap_text_model``.

    Raises:
      ModelConfigError: for a missing or malformed value, or a feature that is not supported.
    """
    reader, projection = _tower(config, "text")
    reader.ignore("initializer_factor", *_NEVER_READ)
    published = dataclasses.replace(CLAP_TEXT, max_positions=514)
    sizes = dataclasses.asdict(read_bert(reader, published, roberta=True))
    return ClapTextConfig(**sizes, projection=projection)


def _tower(config: Mapping[str, Any], tower: str) -> tuple[ConfigReader, int]:
    """A tower's part of a config, and the width of its projection."""
    reader, kind = ConfigReader(config), f"clap_{tower}_model"
    whole = reader.only("model_type", ("clap", kind), kind) == "clap"
    outer = reader
    if whole:
        reader.ignore("audio_config", "text_config", "logit_scale_init_value")
        reader.ignore("hidden_size", "num_hidden_layers", "initializer_factor")
        reader.ignore("tie_word_embeddings")
        inner = reader.raw(f"{tower}_config", None) or {}
        reader = ConfigReader(inner, f"{reader.where}: {tower}_config")
        reader.only("model_type", (kind,), kind)
        # Upstream overwrites the towers' own settings with those of the whole.
        reader.ignore("projection_dim", "projection_hidden_act")
    outer.only("projection_hidden_act", ("relu",), "relu")
    projection = outer.integer("projection_dim", 512)
    if whole:
        outer.finish()
    return reader, projection


def _patch(reader: ConfigReader) -> int:
    """Side of a patch; patches that are not square, or overlap, are refused."""
    sides = {}
    for key in ("patch_size", "patch_stride"):
        value = reader.raw(key, 4)
        pair = value if isinstance(value, list | tuple) else (value,)
        if not _are_integers(pair) or len(pair) > 2 or len(set(pair)) > 1:
            raise ModelConfigError(
                f"{reader.where}: {key}={value!r} is not supported; one positive integer is, or "
                "two equal ones"
            )
        sides[key] = pair[0]
    if sides["patch_stride"] != sides["patch_size"]:
        raise ModelConfigError(
            f"{reader.where}: patch_stride={sides['patch_stride']} is not supported "
            f"(supported: patch_size, {sides['patch_size']})"
        )
    return sides["patch_size"]


def _integers(reader: ConfigReader, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
    value = reader.raw(key, default)
    if not _are_integers(value):
        raise ModelConfigError(
            f"{reader.where}: {key} is {value!r}; a list of positive integers is needed"
        )
    return tuple(value)


def _are_integers(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(type(each) is int and each > 0 for each in value)
    )


def _whole(reader: ConfigReader, key: str, default: int) -> int:
    value = reader.number(key, default)
    if value != int(value):
        raise ModelConfigError(f"{reader.where}: {key}={value} is not supported; a whole number is")
    return int(value)


class FusionBranch(nn.Module):
    """Two dense layers over channels, each with stored-statistics norm; ReLU between them."""

    hidden: int
    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        x = Dense(self.hidden, self.dtype, name="reduce")(x)
        x = nn.relu(BatchNorm(self.eps, self.dtype, name="norm1")(x))
        x = Dense(width, self.dtype, name="expand")(x)
        return BatchNorm(self.eps, self.dtype, name="norm2")(x)


class AttentionalFusion(nn.Module):
    """Mixes two maps channel by channel, (B, H, V, W) twice to (B, H, V, W).

    Each place takes twice the share w of the first map and twice 1 - w of the second, where w comes
    from the sum of both there and from its mean over the map. Source: Dai et al. 2021, "AFF";
    transformers' `ClapAudioAFFBlock`.
    """

    ratio: int
    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, first: jax.Array, second: jax.Array) -> jax.Array:
        total = first + second
        mean = jnp.mean(total.astype(jnp.float32), axis=(1, 2), keepdims=True).astype(self.dtype)
        hidden = total.shape[-1] // self.ratio
        here = FusionBranch(hidden, self.eps, self.dtype, name="local")(total)
        everywhere = FusionBranch(hidden, self.eps, self.dtype, name="global")(mean)
        share = nn.sigmoid(here + everywhere)
        return 2 * first * share + 2 * second * (1 - share)


class Clap(nn.Module):
    """The audio tower with its projection; see the module's docstring.

    Parameters: ``encoder`` (an HTS-AT), ``linear1``, ``linear2``, and with fusion ``mel_conv`` and
    ``fusion``.
    """

    config: ClapConfig

    def setup(self) -> None:
        c = self.config
        self.encoder = HTSAT(c)
        self.linear1 = Dense(c.projection, c.dtype)
        self.linear2 = Dense(c.projection, c.dtype)
        if c.fusion:
            self.mel_conv = PatchEmbed(c.embed_width, (c.patch, _CROPS * c.patch), c.dtype)
            self.fusion = AttentionalFusion(c.fusion_ratio, c.eps, c.dtype)

    def __call__(self, features: jax.Array) -> jax.Array:
        """Feature without intermediates; touches every parameter (for `init`)."""
        if not self.config.fusion:
            return self.embed(features)[0]
        pictures = jnp.repeat(features[:, None], 1 + _CROPS, axis=1)
        return self.embed_fused(pictures, jnp.zeros(len(features), bool))[0]

    def stretch(self, features: jax.Array) -> jax.Array:
        """What the network works on: (B, T, M) to (B, `config.frames`, M); see `HTSAT.stretch`."""
        return self.encoder.stretch(features)

    def embed(self, features: jax.Array) -> tuple[jax.Array, Intermediates]:
        """Feature of clips that the model sees whole.

        Args:
          features: (B, T, M) decibels, T at most `config.frames`; shorter ones are stretched.
            The fused model looks at them as at clips that are not longer, unless
            `config.mark_longer`.

        Returns:
          (B, P) float32, not normalised: `audio_embeds` of transformers'
          `ClapAudioModelWithProjection`. And the dict of `HTSAT.embed` with "pooled" (B, W), the
          mean of the tokens, and "normalised" (B, P), the feature with length 1, which is what
          `ClapModel.get_audio_features` returns.

        Raises:
          ValueError: a shape that the model does not take.
        """
        c = self.config
        if features.ndim != 3 or features.shape[2] != c.mels:
            raise ValueError(f"features must be (B, T, {c.mels}), got {features.shape}")
        self._check_length(features.shape[1])
        if c.mark_longer:
            pictures = jnp.repeat(features[:, None], 1 + _CROPS, axis=1)
            return self.embed_fused(pictures, jnp.ones(len(features), bool))
        pooled, out = self.encoder.embed(features)
        return self._project(pooled, out)

    def embed_fused(
        self, pictures: jax.Array, longer: jax.Array
    ) -> tuple[jax.Array, Intermediates]:
        """Feature of recordings of any length, by the fused model.

        Args:
          pictures: (B, 4, T, M) decibels, T at most `config.frames`: the whole recording shrunk to
            T frames, then three crops of it (`ClapMel.pictures`).
          longer: (B,) bool; where it is False only the first picture is looked at, as in `embed`.

        Returns:
          As `embed`; "fused" (B, L, W) is the patch embedding after fusion, before its norm.

        Raises:
          ValueError: a shape that the model does not take, or a model without fusion.
        """
        self._check_pictures(pictures, longer)
        c, tower = self.config, self.encoder
        x = tower.batch_norm(pictures.reshape(-1, *pictures.shape[2:]))
        images = fold(tower.stretch(x), c.pieces).reshape(*pictures.shape[:2], *2 * (c.spec_size,))
        out = {"image": images[:, 0]}
        side = c.spec_size // c.patch
        whole = tower.patch_embed(patchify(images[:, 0], (c.patch, c.patch)))
        whole = whole.reshape(-1, side, side, c.embed_width)
        mixed = self.fusion(whole, self._crops(images[:, 1:]))
        x = jnp.where(longer[:, None, None, None], mixed, whole)
        out["fused"] = unfold(x, c.pieces)
        x = tower.patch_norm(x)
        out["patch_embed"] = unfold(x, c.pieces)
        return self._project(self._encode(x, out), out)

    def _encode(self, x: jax.Array, out: Intermediates) -> jax.Array:
        """Stages of the HTS-AT on embedded patches, and the mean over its tokens (B, W)."""
        c, count = self.config, 0
        for i, stage in enumerate(self.encoder.stages):
            x, blocks = stage(x)
            for block in blocks:
                out[f"block{count:02d}"] = unfold(block, c.pieces)
                count += 1
            out[f"stage{i}"] = unfold(x, c.pieces)
        out["tokens"] = unfold(self.encoder.norm(x), c.pieces)
        return jnp.mean(out["tokens"].astype(jnp.float32), axis=1)

    def _crops(self, images: jax.Array) -> jax.Array:
        """Folded crops (B, 3, S, S) side by side on one map (B, S / patch, S / patch, W).

        Patches three times as long as wide leave 21 of 64 columns to each crop; columns that are
        left over at the end are 0.
        """
        c = self.config
        rows = c.spec_size // c.patch
        columns = rows // _CROPS
        patch = c.patch, _CROPS * c.patch
        seen = images[..., : columns * patch[1]].reshape(-1, c.spec_size, columns * patch[1])
        x = self.mel_conv(patchify(seen, patch))
        x = x.reshape(-1, _CROPS, rows, columns, c.embed_width).swapaxes(1, 2)
        x = x.reshape(-1, rows, _CROPS * columns, c.embed_width)
        return jnp.pad(x, ((0, 0), (0, 0), (0, rows - x.shape[2]), (0, 0)))

    def _project(self, pooled: jax.Array, out: Intermediates) -> tuple[jax.Array, Intermediates]:
        feature = self.linear2(nn.relu(self.linear1(pooled))).astype(jnp.float32)
        return feature, out | {"pooled": pooled, "normalised": _normalised(feature)}

    def _check_length(self, frames: int) -> None:
        if not 1 <= frames <= self.config.frames:
            raise ValueError(
                f"this model takes 1 to {self.config.frames} frames, got {frames}; cut longer "
                "recordings into windows, or shrink them (ClapMel.pictures, for the fused model)"
            )

    def _check_pictures(self, pictures: jax.Array, longer: jax.Array) -> None:
        if not self.config.fusion:
            raise ValueError(
                "this CLAP was made without fusion (config.fusion is False); use `embed`"
            )
        if pictures.ndim != 4 or (pictures.shape[1], pictures.shape[3]) != (4, self.config.mels):
            raise ValueError(
                f"pictures must be (B, 4, T, {self.config.mels}), got {pictures.shape}"
            )
        if longer.shape != pictures.shape[:1]:
            raise ValueError(f"longer must be {pictures.shape[:1]}, got {longer.shape}")
        self._check_length(pictures.shape[2])


def _normalised(feature: jax.Array) -> jax.Array:
    """Each row with length 1; 0 stays 0, with a finite gradient."""
    square = jnp.sum(jnp.square(feature), axis=-1, keepdims=True)
    return feature * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
