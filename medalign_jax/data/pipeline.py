"""Batches of waveforms with grain: shuffled, sharded by process, resumable to the bit.

What a batch holds follows from the data set, the `BatchSpec` and the batch's number alone. Worker
processes, threads, the number of processes and restarts change nothing: every random choice is
drawn from (seed, position in the whole run), and the state of an iterator is a batch number.
"""

import hashlib
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Protocol

import grain
import numpy as np
from absl import flags

from medalign_jax.audio import clip
from medalign_jax.core.errors import UserError
from medalign_jax.data.recordings.dataset import AudioDataset

THREADS = 4  # that build batches ahead where there are no worker processes
_CROP, _EXTRAS, _ORDER = range(3)  # so that no two uses share random numbers

Extras = Callable[[int, np.random.Generator], dict[str, np.ndarray]]


class PipelineError(UserError):
    """A batch specification or iterator state that does not fit the data set or the machine."""


def check_numbers(spec: object, **least: int) -> None:
    """Refuses a specification with a number below the least, or with epochs below 1.

    Raises:
      PipelineError: naming the number.
    """
    for name, low in least.items():
        if getattr(spec, name) < low:
            raise PipelineError(f"{name} is {getattr(spec, name)}; it has to be at least {low}")
    if spec.epochs is not None and spec.epochs < 1:
        raise PipelineError(f"epochs is {spec.epochs}; give at least 1, or None for no end")


def check_rows(rows: range | None, batch_size: int) -> range:
    """The rows of each batch that this process holds, all by default.

    Raises:
      PipelineError: none, or one that is not of the batch.
    """
    rows = range(batch_size) if rows is None else rows
    if not rows or not 0 <= min(rows) <= max(rows) < batch_size:
        raise PipelineError(f"{rows} are not rows of batches of {batch_size}")
    return rows


@dataclass(frozen=True)
class BatchSpec:
    """What batches look like and in which order they come.

    Attributes:
      batch_size: recordings in a batch, over all processes.
      samples: length of every clip.
      pad: how shorter recordings are filled, see `audio.clip.fit`.
      random_crop: cut longer ones at a random place, drawn anew each time; else at the start.
      shuffle: a new order each epoch, the last partial batch dropped; else manifest order,
        the last batch filled up with zeros and index -1.
      one_per_subject: shuffled batches hold one recording each of different subjects, both
        drawn anew for each batch; a batch's recordings then differ by what their reports say
        and never by who was recorded.
      seed: of the order, the crops and the extras' generators.
      epochs: how many; None never ends.
      workers: processes that decode; 0 decodes in threads.
      prefetch: batches held ready (by each worker).
    """

    batch_size: int
    samples: int
    pad: str = "zero"
    random_crop: bool = True
    shuffle: bool = True
    one_per_subject: bool = False
    seed: int = 0
    epochs: int | None = None
    workers: int = 0
    prefetch: int = 2

    def __post_init__(self):
        check_numbers(self, batch_size=1, samples=1, seed=0, workers=0, prefetch=1)
        if self.pad not in clip.PADDINGS:
            raise PipelineError(f"unknown pad '{self.pad}'; there are {', '.join(clip.PADDINGS)}")
        if self.one_per_subject and not self.shuffle:
            raise PipelineError("one_per_subject draws batches at random: it goes with shuffle")

    def batches_per_epoch(self, records: int) -> int:
        """Batches of one epoch over so many recordings."""
        whole, rest = divmod(records, self.batch_size)
        return whole + (not self.shuffle and rest > 0)


class _Load:
    """Makes this process's rows of a batch out of (number of the batch, all its recordings)."""

    def __init__(self, dataset: AudioDataset, spec: BatchSpec, extras: Extras | None, rows: range):
        self.dataset, self.spec, self.extras, self.rows = dataset, spec, extras, rows

    def __call__(self, number: int, indices: np.ndarray) -> dict[str, np.ndarray]:
        first = number * self.spec.batch_size  # position in the whole run of the batch's row 0
        elements = [self._element(first + row, int(indices[row])) for row in self.rows]
        return {name: np.stack([e[name] for e in elements]) for name in elements[0]}

    def _element(self, position: int, index: int) -> dict[str, np.ndarray]:
        if index >= len(self.dataset):
            return self._filling(position)
        waveform = self.dataset.waveform(index)
        samples, start = self.spec.samples, 0
        if self.spec.random_crop and len(waveform) > samples:
            start = int(self._rng(_CROP, position).integers(len(waveform) - samples + 1))
        return {
            "waveform": clip.fit(waveform, samples, self.spec.pad, start=start),
            "length": np.int32(min(len(waveform), samples)),
            "index": np.int32(index),
            **self._extra(index, position),
        }

    def _rng(self, use: int, position: int) -> np.random.Generator:
        return np.random.default_rng((self.spec.seed, use, position))

    def _extra(self, index: int, position: int) -> dict[str, np.ndarray]:
        if self.extras is None:
            return {}
        found = self.extras(index, self._rng(_EXTRAS, position))
        if taken := {"waveform", "length", "index"} & found.keys():
            raise PipelineError(f"extras may not name an array {', '.join(sorted(taken))}")
        return {name: np.asarray(array) for name, array in found.items()}

    def _filling(self, position: int) -> dict[str, np.ndarray]:
        """Zeros in every array; recording 0 shows what arrays the extras are."""
        extra = {name: np.zeros_like(a) for name, a in self._extra(0, position).items()}
        empty = np.zeros(self.spec.samples, np.float32)
        return {"waveform": empty, "length": np.int32(0), "index": np.int32(-1), **extra}


class ReadingSpec(Protocol):
    """How batches are read ahead; nothing of their content."""

    workers: int
    prefetch: int


class BatchIterator(grain.DatasetIterator):
    """Batches from any batch number on; grain does the reading.

    `get_state()` is a small dict of numbers and text, the same for every process, that JSON can
    hold (grain's and Orbax's handlers write it as they do for any grain iterator). It can be set
    in an iterator with other workers, prefetch, epochs or process count.
    """

    def __init__(self, batches: grain.MapDataset, spec: ReadingSpec, identity: dict[str, object]):
        """`batches[k]` is this process's share of batch k."""
        super().__init__()
        self._batches, self._spec, self._identity = batches, spec, identity
        self._next, self._reading, self._end = 0, None, None

    def __len__(self) -> int:
        """Batches from the beginning to the end; a huge number if there is no end."""
        return len(self._batches)

    def __next__(self) -> dict[str, np.ndarray]:
        if self._next >= len(self._batches):
            raise StopIteration
        if self._reading is None:
            self._reading = self._read_from(self._next)
            # Also when Python ends: workers that outlive it complain at length.
            self._end = weakref.finalize(self, self._reading.close)
        try:
            batch = next(self._reading)
        except StopIteration:
            self.close()
            raise PipelineError(
                f"the readers ended at batch {self._next} of {len(self)}; this should not be: "
                "start again from the last checkpoint"
            ) from None
        except BaseException:
            self.close()  # asked again, the same batch is tried: none is passed over
            raise
        self._next += 1
        if self._spec.workers:  # out of shared memory, which ends with the worker
            batch = {name: np.array(array) for name, array in batch.items()}
        return batch

    def _read_from(self, number: int) -> grain.DatasetIterator:
        spec = self._spec
        batches = self._batches[number:]
        if spec.workers == 0:
            threads = min(THREADS, spec.prefetch)
            options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=spec.prefetch)
            return iter(batches.to_iter_dataset(options))
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # workers read grain's; a library parses no command line
        one = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        processes = grain.multiprocessing.MultiprocessingOptions(
            num_workers=spec.workers, per_worker_buffer_size=spec.prefetch
        )
        return iter(batches.to_iter_dataset(one).mp_prefetch(processes))

    def get_state(self) -> dict[str, object]:
        """The number of the next batch, and what it counts in."""
        return {"batch": self._next, **self._identity}

    def set_state(self, state: dict[str, object]) -> None:
        """Goes on after the batches that had been taken when `state` was.

        Raises:
          PipelineError: the state counts batches of other data or of another specification.
        """
        other = [
            f"{name} is {state.get(name)!r} in the state and {value!r} here"
            for name, value in self._identity.items()
            if state.get(name, value) != value  # earlier versions did not count in all of it
        ]
        number = state.get("batch")
        if other or not isinstance(number, int) or number < 0:
            raise PipelineError(
                "this state of the data pipeline does not fit: "
                f"{'; '.join(other) or f'batch is {number!r}'}. Resume with the data and the "
                "settings of the run that wrote it, or start a new run"
            )
        self.close()
        self._next, self._closed = number, False

    def close(self) -> None:
        """Ends threads and worker processes; iterating on starts them again."""
        if self._reading is not None:
            self._end()
            self._reading = None


def make_iterator(
    dataset: AudioDataset,
    spec: BatchSpec,
    extras: Extras | None = None,
    rows: range | None = None,
) -> BatchIterator:
    """Iterates over this process's share of every batch.

    Args:
      dataset: the recordings.
      spec: what batches look like.
      extras: further arrays of a recording, from its index and a generator of its own;
        picklable where `spec.workers` is above 0.
      rows: of each batch, those that this process holds (`core.mesh.local_rows`); all by
        default.

    Returns:
      An iterator over dicts of b = len(rows) recordings:
      "waveform" (b, samples) float32, "length" (b,) int32, samples of the recording in the
      clip, not counting padding, "index" (b,) int32 into `dataset`, and the extras (b, ...).

    Raises:
      PipelineError: the batch size is above the number of recordings (of subjects, where
        each gives one) when shuffled, or a row is not of the batch.
    """
    records = len(dataset)
    rows = check_rows(rows, spec.batch_size)
    used = spec.batches_per_epoch(records) * spec.batch_size
    if used == 0:
        raise PipelineError(
            f"{records} recordings fill no batch of {spec.batch_size}; make batch_size smaller"
        )
    if spec.workers:  # each worker has its own memory of waveforms
        dataset = dataset.with_cache(dataset.cache_bytes // spec.workers)
    load = _Load(dataset, spec, extras, rows)
    if spec.one_per_subject:
        number = grain.MapDataset.range(used // spec.batch_size).repeat(spec.epochs)
        batches = number.map_with_index(_OnePerSubject(dataset, spec))
    else:
        batches = _order(records, used, spec)
    return BatchIterator(batches.map_with_index(load), spec, _identity(dataset, spec))


def _order(records: int, used: int, spec: BatchSpec) -> grain.MapDataset:
    """Indices (B,) of each batch: every epoch takes each recording once."""
    indices = grain.MapDataset.range(used)
    if spec.shuffle:
        # Grain counts its seed up by one each epoch: mixed first, or seed 1 would be seed 0 an
        # epoch later.
        order = int(np.random.SeedSequence((spec.seed, _ORDER)).generate_state(1)[0])
        indices = grain.MapDataset.range(records).shuffle(seed=order)[:used]
    return indices.repeat(spec.epochs).batch(spec.batch_size, drop_remainder=True)


class _OnePerSubject:
    """Draws the indices (B,) of a batch from its number: subjects first, then a recording each."""

    def __init__(self, dataset: AudioDataset, spec: BatchSpec):
        found: dict[str, list[int]] = {}
        for index, row in enumerate(dataset.rows):
            found.setdefault(row.subject_id or f"row {row.row}", []).append(index)
        self._members, self._spec = [np.array(group) for group in found.values()], spec
        if len(found) < spec.batch_size:
            raise PipelineError(
                f"one_per_subject: {len(found)} subjects fill no batch of {spec.batch_size}; make "
                "batch_size smaller"
            )

    def __call__(self, number: int, _: int) -> np.ndarray:
        rng = np.random.default_rng((self._spec.seed, _ORDER, number))
        drawn = rng.choice(len(self._members), self._spec.batch_size, replace=False)
        return np.array([rng.choice(self._members[subject]) for subject in drawn])


def _identity(dataset: AudioDataset, spec: BatchSpec) -> dict[str, object]:
    """What decides the content of a batch besides its number."""
    free = ("epochs", "workers", "prefetch")
    pairs = zip(dataset.sounds, dataset.rows, strict=True)
    grouped = spec.one_per_subject  # else it does not matter who was recorded
    lines = "".join(f"{sound} {row.subject_id * grouped}\n" for sound, row in pairs)
    shape = {name: value for name, value in asdict(spec).items() if name not in free}
    digest = hashlib.blake2b(lines.encode(), digest_size=16).hexdigest()
    return {"records": len(dataset), **shape, "digest of the recordings": digest}
