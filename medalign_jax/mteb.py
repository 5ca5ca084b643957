"""Runs the audio tasks of MTEB (MAEB, the massive audio embedding benchmark) on our encoders.

    import mteb
    from medalign_jax.mteb import MtebEncoder

    model = MtebEncoder(medalign_jax.load_encoder("opera_ct", "evelyn0414/OPERA:..."), "opera-ct")
    mteb.evaluate(model, mteb.get_tasks(modalities=["audio"]))

What MTEB asks of a model is `mteb.models.models_protocols.EncoderProtocol`. A `CommonSpace` takes
texts as well, for zero-shot tasks and retrieval. Needs the package `mteb`, which brings PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from medalign_jax.core.errors import UserError
from medalign_jax.encoder import Encoder
from medalign_jax.search.common_space import CommonSpace


class MtebEncoder:
    """An encoder, or one that was aligned, as MTEB calls it.

    Attributes:
      source: what embeds.
      name: "organization/name" for its tables; what has no organization is "medalign_jax/name".
      revision: of the weights; by default their hash.
    """

    def __init__(self, source: Encoder | CommonSpace, name: str, revision: str | None = None):
        """Names the model."""
        self.source = source
        self.name = name if "/" in name else f"medalign_jax/{name}"
        self.revision = revision

    @property
    def _encoder(self) -> Encoder:
        return self.source.encoder if isinstance(self.source, CommonSpace) else self.source

    def encode(self, inputs: Iterable[Mapping[str, Any]], **_: Any) -> np.ndarray:
        """(N, D) float32 of all items of all batches.

        Args:
          inputs: batches with "audio", a list of {"array": (samples,), "sampling_rate": Hz}, or
            with "text", a list of texts.
          **_: task, split and prompt, which change nothing here.

        Raises:
          UserError: texts for an encoder that was not aligned, or a batch with neither.
        """
        found = [self._batch(batch) for batch in inputs]
        return np.concatenate(found) if found else np.zeros((0, self._encoder.width), np.float32)

    def _batch(self, batch: Mapping[str, Any]) -> np.ndarray:
        if "audio" in batch:
            vectors = np.stack(list(self._encoder.stream(_sounds(batch["audio"]))))
            aligned = isinstance(self.source, CommonSpace)
            return self.source.meeting.sounds(vectors) if aligned else vectors
        if "text" not in batch:
            raise UserError(f"{self.name} takes audio and text, not {', '.join(batch)}")
        if not isinstance(self.source, CommonSpace):
            raise UserError(f"{self.name} has no words: load an aligned one with load_space")
        return self.source.embed_texts(list(batch["text"]))

    def similarity(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """(N, M) cosines of rows."""
        return _unit(a) @ _unit(b).T

    def similarity_pairwise(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """(N,) cosines of rows that belong together."""
        return np.sum(_unit(a) * _unit(b), axis=1)

    @property
    def mteb_model_meta(self) -> Any:
        """What MTEB prints of the model."""
        from mteb.models import ModelMeta

        aligned = isinstance(self.source, CommonSpace)
        settings = {key: None for key, field in ModelMeta.model_fields.items()
                    if field.is_required()}  # fmt: skip
        return ModelMeta(**settings | {
            "name": self.name, "revision": self.revision or self._encoder.identity(),
            "embed_dim": self._encoder.width, "modalities": ["audio", "text"][: 1 + aligned],
            "framework": [], "similarity_fn_name": "cosine", "languages": ["eng-Latn"],
        })  # fmt: skip


def _sounds(items: Iterable[Mapping[str, Any]]) -> Iterator[tuple[np.ndarray, int]]:
    for item in items:
        array = np.asarray(item["array"], np.float32)
        # Channels come first or last, whatever wrote the data set.
        mono = array if array.ndim == 1 else array.mean(axis=int(np.argmin(array.shape)))
        yield mono, int(item["sampling_rate"])


def _unit(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float32)
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(norm > 0, norm, 1)
