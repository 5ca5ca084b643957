"""The self-supervised term that keeps what an encoder learnt before alignment, one of three.

`published`           the encoder's own masked reconstruction (ViT-MAE family, AudioMAE)
`masked_spectrogram`  a decoder of ours on any encoder's tokens (CLAP, AST, Whisper, Qwen, OPERA)
`cola`                OPERA-CT's and -CE's own contrastive objective: two crops of a recording
                      against the other recordings of the batch (Saeed et al. 2021)
`none`                nothing

A term takes features that the front end made, and a key for each example:

    encode(params, own, features, keys, train) -> (error (B,), coupled)    sample by sample
    couple(coupled, mask)                      -> loss                     all samples

`own` are parameters that the term brings along; they are trained and never exported.
"""

from __future__ import annotations

import abc
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from medalign_jax.core.errors import UserError
from medalign_jax.losses.contrastive import cola_logits, cola_loss
from medalign_jax.models.encoders.masked_spectrogram import MaskLayout, SpectrogramDecoder

Tree = Any
SHARDING = ((r"(^|/)term/", ()),)  # small: whole on each device
KINDS = ("published", "masked_spectrogram", "cola", "none")
# What the masked-spectrogram term asks of an encoder's config (`medalign_jax.models`).
_LAYOUT = ("grid", "footprint", "mask_unit", "dtype")


class Term(abc.ABC):
    """A self-supervised term of the loss; see the module's docstring."""

    def init(self, key: jax.Array) -> Tree:
        """Parameters that the term brings along; none by default."""
        return {}

    @abc.abstractmethod
    def encode(
        self, params: Tree, own: Tree, features: jax.Array, keys: jax.Array, train: bool
    ) -> tuple[jax.Array, Tree]:
        """(B, T, M) features and (B,) keys -> error (B,) float32, and what `couple` compares."""

    def couple(self, coupled: Tree, mask: jax.Array | None = None) -> jax.Array:
        """Loss between samples; 0 by default."""
        return jnp.zeros((), jnp.float32)


class Nothing(Term):
    """No term: what loss.ssm_weight=0 leaves."""

    def __init__(self, module: nn.Module, feature_shape: tuple[int, int]):
        del module, feature_shape

    def encode(self, params, own, features, keys, train):
        """Zeros (B,); nothing to couple."""
        return jnp.zeros(len(features), jnp.float32), {}


class Published(Term):
    """Masked reconstruction as the encoder itself has it."""

    def __init__(self, module: nn.Module, feature_shape: tuple[int, int]):
        self._module, self._tokens = module, module.config.tokens(feature_shape[0])
        shapes = (1, *feature_shape), (1, self._tokens)
        inputs = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
        embed = functools.partial(module.init, method="reconstruct")
        jax.eval_shape(embed, jax.random.key(0), *inputs)  # raises where it cannot

    def encode(self, params, own, features, keys, train):
        """Reconstruction error, each example masked by its own key; nothing to couple."""
        noise = jax.vmap(lambda key: jax.random.uniform(key, (self._tokens,)))(keys)
        error = self._module.apply({"params": params}, features, noise, method="reconstruct")[0]
        return error, {}


class MaskedSpectrogram(Term):
    """Masked-spectrogram modelling with our decoder (`models.encoders.masked_spectrogram`)."""

    def __init__(self, module: nn.Module, feature_shape: tuple[int, int], ratio: float = 0.6):
        self._module = module
        picture = jax.ShapeDtypeStruct((1, *feature_shape), jnp.float32)
        self._shape = jax.eval_shape(self._picture, picture).shape[1:]
        config = module.config
        layout = MaskLayout(config.grid(self._shape[0]), config.footprint, config.mask_unit, ratio)
        self._layout = layout
        self._decoder = SpectrogramDecoder(layout, self._shape[1], dtype=config.dtype)

    def init(self, key: jax.Array) -> Tree:
        """The decoder's parameters."""
        picture = jnp.zeros((1, *self._shape), jnp.float32)
        embed = functools.partial(self._module.init_with_output, method="embed")
        (_, intermediates), _ = jax.eval_shape(embed, key, picture)
        tokens = jnp.zeros(intermediates["tokens"].shape, jnp.float32)
        return self._decoder.init(key, picture, tokens)["params"]

    def _picture(self, features: jax.Array) -> jax.Array:
        """What an encoder that stretches its input makes of it, else the input itself."""
        if not hasattr(self._module, "stretch"):
            return features
        return self._module.apply({}, features, method="stretch")

    def encode(self, params, own, features, keys, train):
        """Error of the hidden parts (B,), each example masked by its own key."""
        noise = jax.vmap(lambda key: jax.random.uniform(key, (self._layout.units,)))(keys)
        hidden = self._layout.hidden(noise)
        picture = self._picture(features)
        seen = self._decoder.apply({"params": own}, picture, hidden, method="hide")
        _, intermediates = self._module.apply({"params": params}, seen, method="embed")
        predicted = self._decoder.apply({"params": own}, intermediates["tokens"], method="predict")
        error = self._decoder.apply({"params": own}, picture, predicted, hidden, method="error")
        return error, {}


class Cola(Term):
    """Two random crops of each recording have to find each other in the batch.

    The encoder brings the published projection (`project_pair`). The loss needs at least two
    samples, and compares those of the whole effective batch.
    """

    def __init__(self, module: nn.Module, feature_shape: tuple[int, int], crop: float = 0.5):
        if not hasattr(module, "project_pair"):
            raise UserError(
                f"loss.ssm=cola is the objective of OPERA-CT and OPERA-CE; {type(module).__name__} "
                "was not published with it: set loss.ssm=masked_spectrogram"
            )
        self._module, self._frames = module, int(feature_shape[0] * crop)

    def encode(self, params, own, features, keys, train):
        """No error of single samples; both crops' projections (B, P) to compare."""
        room = features.shape[1] - self._frames

        def crops(feature: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            starts = jax.random.randint(key, (2,), 0, room + 1)
            return tuple(
                jax.lax.dynamic_slice_in_dim(feature, start, self._frames) for start in starts
            )

        crop_keys, dropout_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        first, second = jax.vmap(crops)(features, crop_keys)
        query, key = self._module.apply(
            {"params": params}, first, second, dropout_keys if train else None,
            method="project_pair",
        )  # fmt: skip
        return jnp.zeros(features.shape[0]), {"query": query, "key": key}

    def couple(self, coupled, mask=None):
        """Cross-entropy over each row of the products, its own recording being the answer."""
        error = cola_loss(cola_logits(coupled["query"], coupled["key"]), mask)
        return error.mean() if mask is None else error.sum() / jnp.maximum(mask.sum(), 1)


def make_term(kind: str, module: nn.Module, feature_shape: tuple[int, int]) -> Term:
    """The term of that name for an encoder.

    Raises:
      UserError: unknown kind, or one that the encoder does not have.
    """
    name = type(module).__name__
    if kind not in KINDS:
        raise UserError(f"the self-supervised term {kind!r} is not one of {', '.join(KINDS)}")
    if kind == "published" and not hasattr(module, "reconstruct"):
        raise UserError(
            f"{name} was published without a reconstruction head: set loss.ssm=masked_spectrogram"
        )
    lacking = [part for part in _LAYOUT if not hasattr(module.config, part)]
    if kind == "masked_spectrogram" and lacking:
        raise UserError(
            f"loss.ssm=masked_spectrogram: the config of {name} lacks {', '.join(lacking)} (see "
            "medalign_jax.models); add them, or leave the term out with loss.ssm_weight=0"
        )
    made = {
        "published": Published,
        "masked_spectrogram": MaskedSpectrogram,
        "cola": Cola,
        "none": Nothing,
    }
    try:
        return made[kind](module, feature_shape)
    except ValueError as error:
        raise UserError(f"loss.ssm={kind}: {error}") from error
