"""Embeds the recordings of a data set with several encoders, each recording decoded once.

    EmbeddingStore(folder).embed({"small": encoder, "spectral": SpectralStatistics()}, dataset)

What was embedded is kept in a folder (`embedding_shards`) by encoder and recording:

- An encoder is known by the hash of its parameters, sizes, front end, windows and pooling
  (`Encoder.identity`), so a workdir, its export and the encoder in memory are one.
- A recording is known by the hash of its file's bytes and of how much of it is read, not by its
  name: a file that is moved or renamed is found again without being decoded, one that is written
  anew in another format, cut or tagged is embedded anew. A recording of a prepared folder has no
  file of its own; it is known by its 16-bit samples, their scale and their rate.

Every encoder gets what it gets alone, from a data set opened at its own rate: a file is decoded
once at the rate that it has, and resampled from there for each rate that is needed. A prepared
folder holds samples at one rate, from which the encoders resample.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from medalign_jax.audio import io as audio_io
from medalign_jax.core.errors import UserError
from medalign_jax.core.progress import Progress
from medalign_jax.data.recordings.dataset import AudioDataset
from medalign_jax.data.recordings.records import sha256
from medalign_jax.data.recordings.sources import Clip, FileSource, quantise
from medalign_jax.evaluate import exchange
from medalign_jax.evaluate.embedding_shards import Shards

FORMAT = 1  # raised when the same recording and encoder give other numbers
_AHEAD = 32  # recordings decoded ahead of the encoders
_CHUNK = 256  # recordings that the encoders see in turn
_CHUNK_SAMPLES = 64 << 20  # at most so many samples in them


class Embedder(Protocol):
    """What the store takes: an `Encoder`, or `baselines.SpectralStatistics`.

    Attributes:
      sample_rate: of the waveforms that it wants, Hz.
      width: D.
    """

    sample_rate: int
    width: int

    def settings(self) -> dict[str, Any]:
        """For people; JSON-able."""
        ...

    def identity(self) -> str:
        """Hex hash of everything that decides an embedding."""
        ...

    def stream(self, recordings: Iterable[tuple[np.ndarray, int]]) -> Iterator[np.ndarray]:
        """(waveform, rate) pairs -> (D,) float32 each, in order."""
        ...


class EmbeddingStore:
    """A folder of embeddings.

    Args:
      folder: made when first written to; None keeps nothing.
      shard_recordings: recordings in a file, and at most
      shard_seconds: between two files: what a kill can cost.
    """

    def __init__(
        self,
        folder: str | Path | None,
        shard_recordings: int = 256,
        shard_seconds: float = 30.0,
    ):
        self._folder = None if folder is None else Path(folder)
        self._limits = (shard_recordings, shard_seconds)

    def embed(
        self, encoders: Mapping[str, Embedder], dataset: AudioDataset, progress: bool = True
    ) -> dict[str, np.ndarray]:
        """Embeddings of all recordings; what is missing is made and kept.

        With several processes each embeds a share, on its own devices, and all get the whole; all
        of them have to call this with the same encoders and recordings. They may share the folder.

        Args:
          encoders: by name. Two names of the same weights and settings are embedded once.
          dataset: N recordings.
          progress: show how far it is (on the first process).

        Returns:
          (N, D) float32 for each name, in the order of the data set.

        Raises:
          AudioError: a recording has become unreadable since it was checked.
          UserError: an encoder gives numbers that are not finite, lies on devices of several
            processes, or the folder cannot be used. What was finished before is kept.
        """
        _check_places(encoders)
        identities = {name: encoder.identity() for name, encoder in encoders.items()}
        recordings = _Recordings(dataset)
        keys = recordings.keys()
        numbers: dict[bytes, int] = {}
        for index, key in enumerate(keys):
            numbers.setdefault(key, index)
        made = {identities[name]: encoder for name, encoder in encoders.items()}
        shards = {i: self._shards(i, encoder) for i, encoder in made.items()}
        for shard in shards.values():
            shard.read(numbers)
            for text in shard.damaged:
                print(f"{text}: removed, its recordings are embedded again", flush=True)
        work = _Work(made, shards, recordings, numbers)
        exchange.all_or_none(lambda: work.run(progress), "embed its share of the recordings")
        for shard in shards.values():
            exchange.complete(shard.known, list(numbers))
        if not keys:
            return {name: np.zeros((0, e.width), np.float32) for name, e in encoders.items()}
        return {
            name: np.stack([shards[identity].known[key] for key in keys])
            for name, identity in identities.items()
        }

    def _shards(self, identity: str, encoder: Embedder) -> Shards:
        identity = hashlib.sha256(f"{FORMAT} {identity}".encode()).hexdigest()
        return Shards(self._folder, identity, encoder.settings(), encoder.width, *self._limits)


def _check_places(encoders: Mapping[str, Embedder]) -> None:
    for name, encoder in encoders.items():
        sharding = getattr(encoder, "sharding", None)
        if sharding is not None and not sharding.is_fully_addressable:
            raise UserError(
                f"encoder {name!r} is spread over devices of several processes; each process "
                "embeds its own share, so load it with mesh=make_mesh(devices=jax.local_devices())"
            )


class _Work:
    """What this process has to embed."""

    def __init__(
        self,
        encoders: Mapping[str, Embedder],
        shards: Mapping[str, Shards],
        recordings: _Recordings,
        numbers: Mapping[bytes, int],
    ):
        self._encoders, self._shards = encoders, shards
        self._recordings, self._numbers = recordings, numbers
        lacking = {i: exchange.lacking(shard.known, list(numbers)) for i, shard in shards.items()}
        every = set().union(*lacking.values())
        # One order for all encoders, so that a recording is decoded by one process only.
        ordered = [key for key in numbers if key in every]
        self._mine = ordered[jax.process_index() :: jax.process_count()]
        self._lacking = {i: lacks & set(self._mine) for i, lacks in lacking.items()}

    def run(self, progress: bool) -> None:
        """Embeds it, a chunk of recordings after another, with each encoder in turn."""
        total = sum(map(len, self._lacking.values()))
        show = progress and total and jax.process_index() == 0
        bar = Progress(total, "embedding", "embedding") if show else None
        try:
            for shard in self._shards.values():
                shard.start()
            for chunk in self._chunks():
                for identity in self._encoders:
                    for _ in self._embed(identity, chunk):
                        if bar is not None:
                            bar.advance()
        finally:  # what was finished is kept, whatever happened to the others
            for shard in self._shards.values():
                shard.flush()
            if bar is not None:
                bar.close()

    def _chunks(self) -> Iterator[list[tuple[bytes, dict[int, Clip]]]]:
        """The recordings as (key, clip by sample rate), decoded ahead in threads."""
        chunk, held = [], 0
        with ThreadPoolExecutor() as pool:
            waiting: deque = deque()
            for key in [*self._mine, *[None] * _AHEAD]:
                if key is not None:
                    waiting.append((key, pool.submit(self._clips, key)))
                if waiting and (key is None or len(waiting) > _AHEAD):
                    first, clips = waiting.popleft()
                    chunk.append((first, clips.result()))
                    held += sum(clip.samples.size for clip in chunk[-1][1].values())
                if len(chunk) >= _CHUNK or held >= _CHUNK_SAMPLES:
                    yield chunk
                    chunk, held = [], 0
        if chunk:
            yield chunk

    def _clips(self, key: bytes) -> dict[int, Clip]:
        wanted = {e.sample_rate for i, e in self._encoders.items() if key in self._lacking[i]}
        return self._recordings.clips(self._numbers[key], sorted(wanted))

    def _embed(
        self, identity: str, chunk: Sequence[tuple[bytes, dict[int, Clip]]]
    ) -> Iterator[bytes]:
        encoder, shard = self._encoders[identity], self._shards[identity]
        part = [(key, clips) for key, clips in chunk if key in self._lacking[identity]]
        rates = (self._recordings.rate(self._numbers[key], encoder.sample_rate) for key, _ in part)
        sounds = ((clips[r].waveform(), r) for (_, clips), r in zip(part, rates, strict=True))
        for (key, _), vector in zip(part, encoder.stream(sounds), strict=True):
            if not np.isfinite(vector).all():
                path = self._recordings.path(self._numbers[key])
                raise UserError(
                    f"{path}: the embedding of encoder {encoder.settings().get('name')!r} is not "
                    "finite; its weights or its precision (try float32) are at fault"
                )
            shard.add(key, np.asarray(vector, np.float32))
            yield key


class _Recordings:
    """Keys and clips of a data set's recordings."""

    def __init__(self, dataset: AudioDataset):
        self._dataset = dataset

    def path(self, index: int) -> str:
        return self._dataset.rows[index].audio_path

    def keys(self) -> list[bytes]:
        """What each recording is known by; with several processes each hashes a share."""
        mine = range(jax.process_index(), len(self._dataset), jax.process_count())
        table = np.zeros((len(self._dataset), 32), np.uint8)

        def hash_all() -> None:
            with ThreadPoolExecutor() as pool:
                for index, key in zip(mine, pool.map(self._key, mine), strict=True):
                    table[index] = np.frombuffer(key, np.uint8)

        exchange.all_or_none(hash_all, "read its share of the recordings")
        return [row.tobytes() for row in exchange.filled_in(table)]

    def _key(self, index: int) -> bytes:
        file = self._file(index)
        if file is None:
            clip = self._dataset.clip(index)
            content = hashlib.sha256(clip.samples.tobytes()).hexdigest()
            parts: list[Any] = [content, clip.scale, self._dataset.sample_rate]
        else:
            path, max_seconds = file
            try:
                parts = [sha256(path), max_seconds]
            except OSError as error:
                raise audio_io.AudioError(path, f"cannot be read ({error})") from error
        return hashlib.sha256(json.dumps(parts).encode()).digest()

    def rate(self, index: int, wanted: int) -> int:
        """The rate at which a recording is there for an encoder that wants some other."""
        return self._dataset.sample_rate if self._file(index) is None else wanted

    def clips(self, index: int, rates: Sequence[int]) -> dict[int, Clip]:
        """A recording at several rates; only at the data set's if it has no file."""
        file = self._file(index)
        if file is None or list(rates) == [self._dataset.sample_rate]:
            return {self._dataset.sample_rate: self._dataset.clip(index)}
        path, max_seconds = file
        own = audio_io.probe(path).sample_rate
        waveform = audio_io.read(path, own, max_seconds)
        return {rate: _resampled(waveform, own, rate, path) for rate in rates}

    def _file(self, index: int) -> tuple[str, float | None] | None:
        """Path of a recording, and how much of it is read; None where it is not a file."""
        cached, position = self._dataset._clips[index]
        source = cached.source
        if not isinstance(source, FileSource):
            return None
        return source.paths[position], source.max_seconds


def _resampled(waveform: np.ndarray, own: int, rate: int, path: str) -> Clip:
    """What `FileSource` gives at that rate."""
    waveform = audio_io.resample(waveform, own, rate, path)
    audio_io.check_waveform(waveform, path)
    return quantise(waveform)
