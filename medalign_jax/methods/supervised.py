"""Fine-tuning of an audio encoder with class labels: the reference beside alignment."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from medalign_jax.core.batches import AudioBatch
from medalign_jax.methods.base import Encoded, Method, Tree
from medalign_jax.methods.self_supervised import SHARDING as TERM_SHARDING
from medalign_jax.methods.student import AudioStudent, embedding_health


class Supervised(Method):
    """Fine-tunes the encoder with class labels, as a reference for what alignment reaches.

    `batch` holds "waveform" (B, S) and "label" (B,) int32. Parameters: {"encoder", "classifier"}.
    """

    select = ("valid/cross_entropy", "min")

    def __init__(self, student: AudioStudent, classes: int, sharding_rules: tuple):
        self.student, self.classes = student, classes
        self.sharding_rules = (*sharding_rules, (r"classifier/", ()), *TERM_SHARDING)

    def init(self, key: jax.Array) -> Tree:
        """Random encoder, zero classifier."""
        return self.student.init(key) | {"classifier": self._classifier()}

    def initial_params(self, key: jax.Array) -> Tree:
        """Loaded encoder, zero classifier."""
        return self.student.initial(key) | {"classifier": self._classifier()}

    def _classifier(self) -> Tree:
        width = self.student.module.config.width
        return {"kernel": jnp.zeros((width, self.classes)), "bias": jnp.zeros((self.classes,))}

    def encode(self, params, frozen, batch: AudioBatch, keys, train: bool) -> Encoded:
        """Cross-entropy of each example under a linear classifier on the pooled embedding."""
        features = self.student.features(batch["waveform"], keys, train)
        pooled, _ = self.student.embed(params, features)
        logits = pooled @ params["classifier"]["kernel"] + params["classifier"]["bias"]
        chosen = jnp.take_along_axis(logits, batch["label"][:, None], axis=1)[:, 0]
        entropy = jax.nn.logsumexp(logits, axis=1) - chosen
        right = (logits.argmax(1) == batch["label"]).astype(jnp.float32)
        return Encoded({"pooled": pooled}, entropy, {"cross_entropy": entropy, "accuracy": right})

    def couple(self, coupled, mask=None):
        """No loss between samples; only the collapse signs."""
        return jnp.zeros((), jnp.float32), embedding_health(coupled["pooled"], mask)
