"""What AcuLa can bring sounds and reports together by, all called alike: one line for each.

    loss(audio (B, P), text (B, Q), report (B, H), mask (B,) or None, options) -> ()

`report` is the text side as the teacher gives it, before any head; `options` are the keys of
`config.loss`. Losses of other packages have an entry point of the group
`medalign_jax.alignment_losses`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

from medalign_jax.core.registry import Registry
from medalign_jax.losses.cka import cka_loss
from medalign_jax.losses.contrastive import cosine_loss, info_nce_loss, l2_loss, same_rows


class Options(Protocol):
    """Of `methods.acula.AculaConfig`, what the losses here read."""

    estimator: str
    temperature: float
    options: Mapping[str, Any]  # of a loss of another package


Alignment = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None, Options], jax.Array]


def _cka(audio, text, report, mask, options):
    return cka_loss(audio, text, estimator=options.estimator, mask=mask)


def _info_nce(audio, text, report, mask, options):
    same = same_rows(jax.lax.stop_gradient(report))  # equal reports have equal vectors
    return info_nce_loss(audio, text, temperature=options.temperature, mask=mask, same=same)


def _cosine(audio, text, report, mask, options):
    return cosine_loss(audio, text, mask=mask)


def _l2(audio, text, report, mask, options):
    return l2_loss(audio, text, mask=mask)


ALIGNMENTS: Registry[Alignment] = Registry(
    "medalign_jax.alignment_losses",
    {"cka": _cka, "info_nce": _info_nce, "cosine": _cosine, "l2": _l2},
    Callable,
)
