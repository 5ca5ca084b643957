"""Batches of questions: bucketed by length, shuffled, sharded by process, resumable to the batch.

An example is a row of its own, padded to the shape of its bucket, and never shares a row with
another: with the masks there is nothing through which attention could leak between examples. All
batches of a bucket have one shape, so a step compiles at most once per bucket; with one edge there
is one shape.

As in `data.pipeline`, whose iterator this uses, a batch follows from the data, the
`QuestionBatchSpec` and the batch's number alone.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import grain
import numpy as np

from medalign_jax.core.rounding import round_up
from medalign_jax.data.pipeline import BatchIterator, PipelineError, check_numbers, check_rows
from medalign_jax.data.questions.prompts import Sequences
from medalign_jax.data.questions.source import QuestionData

_ORDER = 7  # so that no two uses of a seed share random numbers

# Further arrays of an example, from its sequences (None in a row that fills up) and the number of
# response positions of its batch.
Extras = Callable[[Sequences | None, int], dict[str, np.ndarray]]


@dataclass(frozen=True)
class QuestionBatchSpec:
    """What batches of questions look like and in which order they come.

    Attributes:
      batch_size: examples in a batch, over all processes.
      edges: longest sequence of each bucket, ascending; () for one bucket of the longest.
        Lengths are the student's, prompt and response; of `prompts`, the prompt alone.
      prompts: left-padded prompts to generate from, in place of whole sequences.
      samples: S, of every clip; None for the longest of each bucket.
      shuffle: a new order each epoch, without the few examples, others each time, that fill no
        batch; else the order of the data, the last batch filled up with index -1.
      seed: of the order.
      epochs: how many; None never ends.
      workers: processes that decode; 0 decodes in threads.
      prefetch: batches held ready (by each worker).
      token_multiple, sample_multiple: shapes that the data decides are rounded up to these.
    """

    batch_size: int
    edges: tuple[int, ...] = ()
    prompts: bool = False
    samples: int | None = None
    shuffle: bool = True
    seed: int = 0
    epochs: int | None = None
    workers: int = 0
    prefetch: int = 2
    token_multiple: int = 8
    sample_multiple: int = 1600

    def __post_init__(self):
        object.__setattr__(self, "edges", tuple(int(edge) for edge in self.edges))
        check_numbers(self, batch_size=1, seed=0, workers=0, prefetch=1, token_multiple=1,
                      sample_multiple=1)  # fmt: skip
        if list(self.edges) != sorted(set(self.edges)) or min(self.edges, default=1) < 1:
            raise PipelineError(f"edges are {self.edges}; give lengths above 0, each longer")


@dataclass(frozen=True)
class Shape:
    """Lengths of a bucket's arrays; 0 for arrays that it does not have."""

    student: int
    teacher: int
    response: int
    prompt: int
    samples: int


def bucket_shapes(data: QuestionData, spec: QuestionBatchSpec) -> tuple[list[Shape], np.ndarray]:
    """The buckets' shapes, ascending in every length, and each example's bucket (N,).

    A bucket's shape holds the examples of all buckets before it.

    Raises:
      PipelineError: an example longer than the last edge, or a clip longer than `samples`.
    """
    lengths = _lengths(data)
    key = "prompt" if spec.prompts else "student"
    longest = int(lengths[key].max())
    edges = spec.edges or (round_up(longest, spec.token_multiple),)
    bucket = np.searchsorted(edges, lengths[key])
    if longest > edges[-1]:
        over = np.flatnonzero(bucket == len(edges))
        raise PipelineError(
            f"{len(over)} examples are longer than the last edge {edges[-1]} (question "
            f"'{data.questions[over[0]].id}' has {lengths[key][over[0]]} tokens, the longest "
            f"{longest}); add an edge, or build them with a smaller max_length"
        )
    if spec.samples is not None and lengths["samples"].max() > spec.samples:
        worst = int(lengths["samples"].argmax())
        raise PipelineError(
            f"question '{data.questions[worst].id}' has a clip of {lengths['samples'][worst]} "
            f"samples, longer than samples={spec.samples}; make it larger"
        )
    shapes = []
    for number, edge in enumerate(edges):
        inside = bucket <= number
        most = {name: int(n[inside].max(initial=0)) for name, n in lengths.items()}
        size = {name: round_up(n, spec.token_multiple) for name, n in most.items()}
        size["samples"] = spec.samples or round_up(most["samples"], spec.sample_multiple)
        unused = ("student", "teacher", "response") if spec.prompts else ("prompt",)
        shapes.append(Shape(**(size | {key: edge} | dict.fromkeys(unused, 0))))
    return shapes, bucket


def _lengths(data: QuestionData) -> dict[str, np.ndarray]:
    rows = [
        (len(s.prompt), 0 if s.teacher_prompt is None else len(s.teacher_prompt), len(s.response),
         int(s.samples.max(initial=0)))
        for s in data.sequences
    ]  # fmt: skip
    prompt, teacher, response, samples = np.array(rows, np.int64).T
    return {"student": prompt + response, "teacher": teacher + response * data.has_teacher,
            "response": response, "prompt": prompt, "samples": samples}  # fmt: skip


def growing_edges(data: QuestionData) -> tuple[int, ...]:
    """`edges` that grow by a half: few shapes, little padding.

    Returns:
      64, 96, 160, 256, ... up to the longest sequence, of prompt and response.
    """
    longest = max(len(each.prompt) + len(each.response) for each in data.sequences)
    edges = [64]
    while edges[-1] < longest:
        edges.append(round_up(edges[-1] * 3 // 2, 32))
    return tuple(edges)


class _Plan:
    """Which examples and which bucket a batch is made of, from its number."""

    def __init__(self, bucket: np.ndarray, buckets: int, spec: QuestionBatchSpec):
        self.bucket, self.buckets, self.spec = bucket, buckets, spec
        self._epochs: dict[int, list[tuple[int, np.ndarray]]] = {}

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_epochs": {}}

    def batches_per_epoch(self) -> int:
        whole, rest = divmod(len(self.bucket), self.spec.batch_size)
        return whole + (not self.spec.shuffle and rest > 0)

    def batch(self, number: int) -> tuple[int, np.ndarray]:
        """The bucket, and the batch's examples (batch_size,), -1 where there is none."""
        epoch, place = divmod(number, self.batches_per_epoch())
        if not self.spec.shuffle:
            size = self.spec.batch_size
            rows = np.arange(place * size, (place + 1) * size)
            rows[rows >= len(self.bucket)] = -1
            return int(self.bucket[rows[rows >= 0]].max()), rows
        batches = self._epochs.get(epoch)
        if batches is None:  # two threads may both draw it: they draw the same
            batches = self._draw(epoch)
            self._epochs = {epoch: batches} | {
                e: b for e, b in self._epochs.items() if abs(e - epoch) == 1
            }
        return batches[place]

    def _draw(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """Some examples at random sit an epoch out, so that the others fill whole batches.

        What fills no batch of its bucket moves on to the next larger one, so none are lost there.
        """
        rng = np.random.default_rng((self.spec.seed, _ORDER, epoch))
        size, rest, batches = self.spec.batch_size, np.zeros(0, np.int64), []
        used = rng.permutation(len(self.bucket))[: self.batches_per_epoch() * size]
        for number in range(self.buckets):
            rows = np.concatenate([rest, used[self.bucket[used] == number]])
            whole = len(rows) // size * size
            batches += [(number, each) for each in rows[:whole].reshape(-1, size)]
            rest = rows[whole:]
        return [batches[n] for n in rng.permutation(len(batches))]


class _Load:
    """Makes this process's rows of a batch out of the batch's number."""

    def __init__(
        self, data: QuestionData, spec: QuestionBatchSpec, rows: range, extras: Extras | None
    ):
        self.data, self.spec, self.rows, self.extras = data, spec, rows, extras
        self.shapes, bucket = bucket_shapes(data, spec)
        self.plan = _Plan(bucket, len(self.shapes), spec)

    def __call__(self, number: int, _: int) -> dict[str, np.ndarray]:
        bucket, examples = self.plan.batch(number)
        shape = self.shapes[bucket]
        rows = [self._row(int(examples[row]), shape) for row in self.rows]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _row(self, index: int, shape: Shape) -> dict[str, np.ndarray]:
        sequences = self.data.sequences[index] if index >= 0 else None
        found = self._prompt(sequences, shape) if shape.prompt else self._whole(sequences, shape)
        if self.data.clips:
            found |= self._audio(index, shape.samples)
        if self.extras is not None:
            more = self.extras(sequences, shape.response)
            if taken := {"index", *found} & more.keys():
                raise PipelineError(f"extras may not name an array {', '.join(sorted(taken))}")
            found |= more
        return found | {"index": np.int32(index)}

    def _prompt(self, sequences: Sequences | None, shape: Shape) -> dict[str, np.ndarray]:
        ids = _NONE if sequences is None else sequences.prompt
        left = shape.prompt - len(ids)
        padded = np.pad(ids, (left, 0), constant_values=self.data.pad_ids[0])
        return {"prompt_ids": padded, "prompt_mask": np.arange(shape.prompt) >= left}

    def _whole(self, sequences: Sequences | None, shape: Shape) -> dict[str, np.ndarray]:
        arrays = {} if sequences is None else sequences.arrays()
        student, teacher = self.data.pad_ids
        found = _padded("student", arrays, shape.student, student)
        found |= _padded("response", arrays, shape.response, student)
        found["student_at"] = _to_length(arrays.get("student_at", _NONE), shape.response, 0)
        if self.data.has_teacher:
            found |= _padded("teacher", arrays, shape.teacher, teacher)
            found["teacher_at"] = _to_length(arrays.get("teacher_at", _NONE), shape.response, 0)
        return found

    def _audio(self, index: int, length: int) -> dict[str, np.ndarray]:
        waveform = np.zeros((self.data.clips, length), np.float32)
        samples = np.zeros(self.data.clips, np.int32)
        if index >= 0:
            lengths = self.data.sequences[index].samples
            samples[: len(lengths)] = lengths
            for clip, count in enumerate(lengths):
                waveform[clip, :count] = self.data.waveform(index, clip)
        return {"waveform": waveform, "samples": samples}


_NONE = np.zeros(0, np.int32)


def _padded(
    name: str, arrays: dict[str, np.ndarray], length: int, pad: int
) -> dict[str, np.ndarray]:
    ids = arrays.get(f"{name}_ids", _NONE)
    return {f"{name}_ids": _to_length(ids, length, pad),
            f"{name}_mask": np.arange(length) < len(ids)}  # fmt: skip


def _to_length(array: np.ndarray, length: int, fill: int) -> np.ndarray:
    return np.pad(array, (0, length - len(array)), constant_values=fill)


def make_question_iterator(
    data: QuestionData,
    spec: QuestionBatchSpec,
    rows: range | None = None,
    extras: Extras | None = None,
) -> BatchIterator:
    """Iterates over this process's share of every batch.

    Args:
      data: the questions.
      spec: what batches look like.
      rows: of each batch, those that this process holds (`core.mesh.local_rows`); all by
        default.
      extras: further arrays of an example, of one shape for all examples of a bucket; picklable
        where `spec.workers` is above 0.

    Returns:
      An iterator over dicts of b = len(rows) examples, with K clips of S samples, sequences of T
      and U tokens, responses of R tokens:
      "waveform" (b, K, S) float32 and "samples" (b, K) int32, 0 where there is no clip;
      "student_ids" (b, T) int32 and "student_mask" (b, T) bool, right-padded;
      "response_ids", "response_mask" (b, R), and "student_at" (b, R) int32, the position whose
      next token is that of the response; with a teacher also "teacher_ids", "teacher_mask"
      (b, U) and "teacher_at" (b, R); "index" (b,) int32 into `data`, -1 in rows that fill up.
      With `spec.prompts`: "prompt_ids" (b, P) and "prompt_mask", left-padded, in place of the
      sequences. Without any recording there is no waveform. The extras are added.

    Raises:
      PipelineError: too few examples for a batch when shuffled, extras with the name of an array
        above, or see `bucket_shapes`.
    """
    rows = check_rows(rows, spec.batch_size)
    identity = _identity(data, spec)
    if spec.workers:  # each worker has its own memory of waveforms
        data = data.with_cache(data.cache_bytes // spec.workers)
    load = _Load(data, spec, rows, extras)
    count = load.plan.batches_per_epoch()
    if not count:
        raise PipelineError(
            f"{len(data)} examples fill no batch of {spec.batch_size}; make batch_size smaller"
        )
    batches = grain.MapDataset.range(count).repeat(spec.epochs).map_with_index(load)
    return BatchIterator(batches, spec, identity)


def _identity(data: QuestionData, spec: QuestionBatchSpec) -> dict[str, object]:
    """What decides the content of a batch besides its number; as JSON gives it back."""
    free = ("epochs", "workers", "prefetch")
    fixed = {name: value for name, value in asdict(spec).items() if name not in free}
    fixed["edges"] = list(spec.edges)
    return {"examples": len(data), "tokens": data.fingerprint()} | fixed
