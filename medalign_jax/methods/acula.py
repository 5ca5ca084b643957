"""AcuLa: aligning an audio encoder with a frozen language model's view of the reports.

waveform -> augment -> log-mel -+-> encoder -> pooled -> audio head --+
                                |                                    +-> 1 - CKA
report -> teacher (or its cache) ---------------------> text head ---+
                                +-> masked patches -> decoder -> reconstruction error

loss = align_weight * L_align + ssm_weight * L_SSM        (arXiv 2512.04847, section 3)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from medalign_jax import losses
from medalign_jax.core.batches import AudioBatch
from medalign_jax.core.errors import UserError
from medalign_jax.losses.alignments import ALIGNMENTS
from medalign_jax.methods.base import Encoded, Method, Tree
from medalign_jax.methods.self_supervised import SHARDING as TERM_SHARDING
from medalign_jax.methods.student import AudioStudent, embedding_health, split
from medalign_jax.models.layers.heads import ProjectionHead

HEADS = ("mlp", "none", "standardise")


@dataclass(frozen=True)
class AculaConfig:
    """What is aligned and how.

    Attributes:
      align: "cka", or another of `losses.alignments.ALIGNMENTS`.
      estimator: of CKA, see `losses.cka`.
      align_weight, ssm_weight: λ of the two terms.
      layers: encoder layers to align, -1 for the pooled output, n >= 0 for the mean over the tokens
        after block n; each has an audio head of its own and the loss is their mean.
      audio_head, text_head: "mlp"; "none" to align that side's embedding itself; "standardise" to
        align its features each divided by its deviation over the batch. CKA needs no equal widths;
        without an audio head it shapes the very geometry that a probe reads, where a head can do
        the alignment alone and leave the embedding as it was. CKA weighs directions by variance,
        and loudness may have nearly all of it: standardised, what a linear probe reads, every
        feature has a say.
      hidden, out, dropout: of the projection heads.
      temperature: of InfoNCE.
      options: of a loss of another package, as it reads them.
    """

    align: str = "cka"
    estimator: str = "unbiased"
    align_weight: float = 1.0
    ssm_weight: float = 1.0
    layers: tuple[int, ...] = (-1,)
    audio_head: str = "mlp"
    text_head: str = "mlp"
    hidden: int = 1024
    out: int = 512
    dropout: float = 0.2
    temperature: float = 0.07
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.align not in ALIGNMENTS:
            raise UserError(f"loss.align {self.align!r} is not one of {', '.join(ALIGNMENTS)}")
        if self.estimator not in losses.ESTIMATORS:
            raise UserError(
                f"loss.estimator {self.estimator!r} is not one of {', '.join(losses.ESTIMATORS)}"
            )
        for side in (self.audio_head, self.text_head):
            if side not in HEADS:
                raise UserError(f"a head is one of {', '.join(HEADS)}, not {side!r}")
        if not self.layers:
            raise UserError("loss.layers is empty; (-1,) aligns the pooled output")


class Acula(Method):
    """`batch`: "waveform" (B, S), and "text" (B, H) cached report embeddings.

    With a teacher in the step (`teacher.mode=online`), "text_ids" and "text_mask" (B, L) come
    instead, `frozen` holds the teacher's parameters and `teacher_apply` embeds them. For InfoNCE
    "report" (B, K) may say which recordings have the same report in whatever wording: equal rows.
    """

    select = ("valid/cka", "max")

    def __init__(
        self,
        student: AudioStudent,
        text_width: int,
        config: AculaConfig,
        sharding_rules: tuple,
        frozen: Tree | None = None,
        frozen_rules: tuple = ((r".*", ()),),
        teacher_apply: Callable[[Tree, jax.Array, jax.Array], jax.Array] | None = None,
    ):
        _check_layers(config.layers, student.module.config.depth)
        self.student, self.config, self.text_width = student, config, text_width
        if not config.align_weight:
            self.select = ("valid/loss", "min")  # reports have no say in what they do not train
        # First match wins: an encoder's rules must not catch the kernels of ours.
        self.sharding_rules = ((r"(^|/)heads/", ()), *TERM_SHARDING, *sharding_rules)
        self.frozen, self.frozen_rules = ({} if frozen is None else frozen), frozen_rules
        self._teacher_apply = teacher_apply
        self._head = ProjectionHead(config.hidden, config.out, config.dropout)

    def init(self, key: jax.Array) -> Tree:
        """The student's parameters and {"heads": {"audio_<layer>": ..., "text": ...}}."""
        student_key, head_key = jax.random.split(key)
        return self.student.init(student_key) | {"heads": self._heads(head_key)}

    def initial_params(self, key: jax.Array) -> Tree:
        """Loaded encoder and fresh heads."""
        student_key, head_key = jax.random.split(key)
        return self.student.initial(student_key) | {"heads": self._heads(head_key)}

    def _heads(self, key: jax.Array) -> Tree:
        widths = {}
        if self.config.text_head == "mlp":
            widths["text"] = self.text_width
        if self.config.audio_head == "mlp":
            sizes = self.student.module.config
            for layer in self.config.layers:
                widths[_audio(layer)] = sizes.width if layer == -1 else sizes.layer_widths[layer]
        return {
            name: self._head.init(jax.random.fold_in(key, i), jnp.zeros((1, width)))["params"]
            for i, (name, width) in enumerate(sorted(widths.items()))
        }

    def encode(self, params, frozen, batch: AudioBatch, keys, train: bool) -> Encoded:
        """Head outputs of both sides and the reconstruction error of each example."""
        feature_keys, mask_keys, audio_keys, text_keys = split(keys, 4)
        features = self.student.features(batch["waveform"], feature_keys, train)
        pooled, intermediates = self.student.embed(params, features)
        layers = {-1: pooled} if -1 in self.config.layers else {}
        layers |= {n: self.student.layer(intermediates, n) for n in self.config.layers if n >= 0}
        # Of what is aligned: where no term needs the last blocks they are not computed.
        coupled = {"watched": layers.get(-1, layers[max(layers)]), "audio": {}}
        for layer in self.config.layers:
            coupled["audio"][_audio(layer)] = self._project(
                params, _audio(layer), layers[layer], audio_keys, train
            )
        text = self._text(frozen, batch)
        # Else as the teacher gives it: equal texts have equal vectors.
        coupled["report"] = batch.get("report", text)
        coupled["text"] = self._project(params, "text", text, text_keys, train)
        if not self.config.ssm_weight:
            return Encoded(coupled, jnp.zeros(len(text)), {})
        error, coupled["term"] = self.student.self_supervised(params, features, mask_keys, train)
        metrics = {} if coupled["term"] else {"reconstruction": error}
        return Encoded(coupled, self.config.ssm_weight * error, metrics)

    def _text(self, frozen: Tree, batch: AudioBatch) -> jax.Array:
        if self._teacher_apply is None:
            return batch["text"].astype(jnp.float32)
        return jax.lax.stop_gradient(
            self._teacher_apply(frozen, batch["text_ids"], batch["text_mask"])
        )

    def _project(self, params, name: str, x, keys, train: bool) -> jax.Array:
        if name not in params["heads"]:
            return x.astype(jnp.float32)
        return self._head.apply({"params": params["heads"][name]}, x, keys if train else None)

    def couple(self, coupled, mask=None):
        """Alignment over the whole batch, mean over the aligned layers; CKA is always reported."""
        config = self.config
        sides = [_headed(config.audio_head, audio, mask) for audio in coupled["audio"].values()]
        text = _headed(config.text_head, coupled["text"], mask)
        loss_of = functools.partial(
            ALIGNMENTS[config.align], text=text, report=coupled["report"], mask=mask, options=config
        )
        align = sum(map(loss_of, sides)) / len(sides)
        score = sum(losses.cka(audio, text, mask=mask) for audio in sides) / len(sides)
        metrics = {"align": align, "cka": jax.lax.stop_gradient(score)}
        metrics |= embedding_health(coupled["watched"], mask)
        loss = self.config.align_weight * align
        if coupled.get("term"):
            metrics["contrast"] = self.student.term.couple(coupled["term"], mask)
            loss += self.config.ssm_weight * metrics["contrast"]
        return loss, metrics


def _headed(head: str, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """(B, W) as the loss takes it; standardised over the counted samples if that is the head."""
    if head != "standardise":
        return x
    weight = jnp.ones((len(x), 1)) if mask is None else mask.astype(jnp.float32)[:, None]
    count = jnp.maximum(weight.sum(), 1.0)
    x = jnp.where(weight > 0, x, 0.0)
    centred = (x - x.sum(0) / count) * weight
    variance = jnp.square(centred).sum(0) / count
    # A feature that hardly varies beside the others is rounding, not sound.
    return centred * jax.lax.rsqrt(variance + 1e-6 * variance.max() + 1e-30)


def _check_layers(layers: tuple[int, ...], depth: int) -> None:
    if lacking := [layer for layer in layers if not -1 <= layer < depth]:
        raise UserError(
            f"loss.layers names {lacking}; the encoder has {depth} blocks, 0 to {depth - 1}, and "
            "-1 for its pooled output"
        )
    if len(set(layers)) != len(layers):
        raise UserError(f"loss.layers {layers} names a layer twice")


def _audio(layer: int) -> str:
    return "audio_last" if layer == -1 else f"audio_{layer:02d}"
