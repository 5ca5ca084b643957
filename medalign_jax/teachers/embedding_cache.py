"""Embeddings of texts on disk: computed once, read by every later run.

Layout::

    FOLDER/<fingerprint, 16 digits>/
      teacher.json                       what the embeddings depend on, for people
      <sha256 of the content>.safetensors    "texts" (n, 32) uint8, "embeddings" (n, H) float32

A teacher's fingerprint covers weights, tokeniser, layer, pooling, token limit, lower-casing and
precision; a text is its sha256. A shard is written whole under a temporary name, then renamed, and
its name is the hash of its content. So a process that is killed leaves at most a temporary file,
processes that write at the same time do not meet, and damage to a shard is noticed on reading.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError
from safetensors.numpy import load as parse_safetensors
from safetensors.numpy import save as to_safetensors

from medalign_jax.core.errors import UserError
from medalign_jax.core.files import write_whole
from medalign_jax.teachers.reading import OverlongWarning
from medalign_jax.teachers.teacher import Teacher

SHARD_TEXTS = 1024


class CacheError(UserError):
    """A file of the cache is damaged."""


class EmbeddingCache:
    """A folder of embeddings.

    Args:
      folder: made when first written to.
      shard_texts: texts computed between two writes: what a kill can cost.
    """

    def __init__(self, folder: str | Path, shard_texts: int = SHARD_TEXTS):
        self.folder = Path(folder)
        self._shard_texts = shard_texts

    def embeddings(
        self,
        teacher: Teacher,
        texts: Sequence[str],
        batch_size: int = 32,
        progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """Embeddings of texts in their order; what is missing is computed and written.

        Texts that are cut are for the caller to speak of, of all at once: ``teacher.overlong``.

        Args:
          teacher: the frozen model.
          texts: N texts, of which many may be equal.
          batch_size: texts per batch of the teacher.
          progress: called with (texts computed, texts to compute) after each shard.

        Returns:
          (N, H) float32.

        Raises:
          CacheError: if a file of the cache is damaged, naming it.
          TeacherError: for an empty text, naming its index.
        """
        teacher.check_texts(texts)
        folder = self.folder / teacher.fingerprint[:16]
        keys = [hashlib.sha256(text.encode()).digest() for text in texts]
        wanted = dict(zip(keys, texts, strict=True))
        known = _read(folder, teacher, wanted)
        missing = _missing(wanted, known)
        for start in range(0, len(missing), self._shard_texts):
            part = missing[start : start + self._shard_texts]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", OverlongWarning)
                vectors = teacher.embed([wanted[key] for key in part], batch_size)
            _write(folder, teacher, part, vectors)
            known.update(zip(part, vectors, strict=True))
            if progress:
                progress(start + len(part), len(missing))
        if not keys:
            return np.empty((0, teacher.width), np.float32)
        return np.stack([known[key] for key in keys])


def _missing(wanted: dict[bytes, str], known: dict[bytes, np.ndarray]) -> list[bytes]:
    """Keys to compute; with several processes, those that any of them lacks, so all go together."""
    lacks = np.array([key not in known for key in wanted], bool)
    if jax.process_count() > 1:
        lacks = np.asarray(multihost_utils.process_allgather(lacks)).any(axis=0)
    return [key for key, lack in zip(wanted, lacks, strict=True) if lack]


def _read(folder: Path, teacher: Teacher, wanted: dict[bytes, str]) -> dict[bytes, np.ndarray]:
    """The wanted embeddings that the folder has."""
    known: dict[bytes, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        texts, vectors = _read_shard(path, teacher.width)
        rows = {texts[row].tobytes(): row for row in range(len(texts))}
        known.update((key, vectors[row]) for key, row in rows.items() if key in wanted)
    return known


def _read_shard(path: Path, width: int) -> tuple[np.ndarray, np.ndarray]:
    advice = f"delete {path} and start again: its embeddings will be computed anew"
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != path.stem:
        raise CacheError(f"damaged embedding cache: {path} does not match its checksum; {advice}")
    try:
        tensors = parse_safetensors(content)
        texts, vectors = tensors["texts"], tensors["embeddings"]
    except (SafetensorError, KeyError) as error:
        raise CacheError(
            f"{path} is not a shard of an embedding cache ({error}); {advice}"
        ) from error
    if texts.shape != (len(vectors), 32) or vectors.shape != (len(texts), width):
        raise CacheError(
            f"{path} has texts {texts.shape} and embeddings {vectors.shape}, expected (n, 32) and "
            f"(n, {width}); {advice}"
        )
    return texts, vectors


def _write(folder: Path, teacher: Teacher, keys: Sequence[bytes], vectors: np.ndarray) -> None:
    if not np.isfinite(vectors).all():
        raise CacheError(
            f"teacher {teacher.identity[:16]} gives embeddings that are not finite; nothing of "
            "this batch was cached. Its weights or its precision (try float32) are at fault"
        )
    texts = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), 32)
    content = to_safetensors({"texts": texts, "embeddings": np.ascontiguousarray(vectors)})
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / "teacher.json"
    if not settings.exists():
        write_whole(settings, json.dumps(teacher.settings, indent=1).encode())
    write_whole(folder / f"{hashlib.sha256(content).hexdigest()}.safetensors", content)
