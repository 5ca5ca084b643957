"""Masked-reconstruction pre-training of an audio encoder: the stage before alignment."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from medalign_jax.core.batches import AudioBatch
from medalign_jax.methods.base import Encoded, Method, Tree
from medalign_jax.methods.self_supervised import SHARDING as TERM_SHARDING
from medalign_jax.methods.student import AudioStudent, split


class Pretrain(Method):
    """The student's self-supervised term alone (OPERA-GT's objective; He et al. 2022).

    `batch` holds "waveform" (B, S). Parameters: those of the student.
    """

    select = ("valid/loss", "min")

    def __init__(self, student: AudioStudent, sharding_rules: tuple):
        self.student = student
        self.sharding_rules = (*sharding_rules, *TERM_SHARDING)

    def init(self, key: jax.Array) -> Tree:
        """Random parameters."""
        return self.student.init(key)

    def initial_params(self, key: jax.Array) -> Tree:
        """Loaded parameters where the student has some."""
        return self.student.initial(key)

    def encode(self, params, frozen, batch: AudioBatch, keys, train: bool) -> Encoded:
        """The term's error of each example, and what it compares across samples."""
        feature_keys, mask_keys = split(keys, 2)
        features = self.student.features(batch["waveform"], feature_keys, train)
        error, coupled = self.student.self_supervised(params, features, mask_keys, train)
        return Encoded(coupled, error, {"reconstruction": error} if not coupled else {})

    def couple(self, coupled, mask=None):
        """The term's loss between samples, if it has one."""
        loss = self.student.term.couple(coupled, mask) if coupled else jnp.zeros(())
        return loss, {"contrast": loss} if coupled else {}
