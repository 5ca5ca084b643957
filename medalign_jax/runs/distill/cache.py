"""The cached textual teacher of a run: one pass over the questions, then read with every batch.

questions -> teacher sequences -> the teacher, batched by length -> states at the response tokens
                                                                            |
   training batches <- `StoredTeacher` (extras of the pipeline) <- FOLDER/last_layers_09_18_27

The pass goes on where it was stopped, to the file (`teachers.state_cache`). Every process of a run
writes the rows that its devices hold, and reads what all have written: the folder is shared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from medalign_jax import losses
from medalign_jax.core.errors import UserError
from medalign_jax.core.mesh import batch_sharding, local_rows
from medalign_jax.core.progress import Progress
from medalign_jax.data.questions.prompts import Sequences
from medalign_jax.data.questions.source import QuestionData
from medalign_jax.language_model import LanguageModel
from medalign_jax.methods.distill import Distill
from medalign_jax.methods.text_teacher import LAST, TOP_K, response_states
from medalign_jax.models.language.decoder import Decoder
from medalign_jax.teachers.state_cache import (
    Fingerprint,
    StateCache,
    StateCacheWriter,
    example_key,
    open_state_cache,
)
from medalign_jax.text.chat import ChatTokenizer

Tree = Any
NAMES = {
    "states": "teacher_layers",
    "last": "teacher_last",
    "ids": "teacher_top_ids",
    "log_probs": "teacher_top_log_probs",
    "rest": "teacher_top_rest",
}


@dataclass(frozen=True)
class StoredTeacher:
    """Extras of a batch (`data.questions.batches`): what the teacher said about an example.

    Gives, of R response positions, "teacher_layers" (P, R, W) unless no layer is kept, and
    "teacher_last" (R, W), or "teacher_top_ids", "teacher_top_log_probs" (R, k) and
    "teacher_top_rest" (R,); zeros in rows that fill up. Picklable.
    """

    cache: StateCache

    def __call__(self, sequences: Sequences | None, length: int) -> dict[str, np.ndarray]:
        """Raises StateCacheError for an example that the teacher has not seen."""
        key = None if sequences is None else _Example.of(sequences).key
        found = self.cache.batch([key], length)
        return {NAMES[name]: array[0] for name, array in found.items() if array.size}


def fingerprint_of(method: Distill, teacher: LanguageModel, top_k: int) -> Fingerprint:
    """What the method needs of a teacher, and which teacher it is.

    Args:
      method: with the teacher in form "last" or "top_k".
      teacher: the same.
      top_k: tokens to keep in form "top_k".

    Raises:
      UserError: a teacher of unknown weights, or `top_k` out of range.
    """
    if not teacher.identity:
        raise UserError(
            "teacher.mode=cached needs a teacher whose weights have a known hash, so that its "
            "cache is never taken for another's: load it from its files"
        )
    view = method.teacher
    top = {}
    if view.form == TOP_K:
        temperature = float(method.divergence.temperature)
        top = {"top_k": top_k, "vocabulary": view.shared_vocab, "temperature": temperature}
    return Fingerprint(
        teacher.identity,
        tokenizer_identity(teacher.tokenizer),
        view.stored_layers(method.teacher_layers),
        view.model.config.width,
        view.form,
        dtype=jnp.dtype(view.model.dtype).name,
        **top,
    )


def tokenizer_identity(tokenizer: ChatTokenizer) -> str:
    """Hex digest of what each id means; a prompt's wording is in the key of its example."""
    return hashlib.sha256(json.dumps(tokenizer.tokens()).encode()).hexdigest()


def folder_name(fingerprint: Fingerprint) -> str:
    """``last_layers_09_18_27``: all that the arms of one run may differ in."""
    head = fingerprint.form
    if fingerprint.form == TOP_K:
        head += f"_{fingerprint.top_k}_t{fingerprint.temperature:g}"
    layers = "_".join(f"{layer:02d}" for layer in fingerprint.layers)
    return f"{head}_layers_{layers}" if layers else head


def fill(
    folder: Path,
    fingerprint: Fingerprint,
    teacher: LanguageModel,
    data: Sequence[QuestionData],
    mesh: Mesh,
    batch_size: int,
    what: str = "distil",
) -> StoredTeacher:
    """Lets the teacher run over all questions that are not in the folder yet.

    Args:
      folder: one teacher's, see `folder_name`; all processes see it.
      fingerprint: of `fingerprint_of`.
      teacher: the text model, its parameters laid out on `mesh`.
      data: questions with the teacher's sequences.
      mesh: of the run.
      batch_size: examples at a time, over all devices.
      what: for the progress bar.

    Raises:
      StateCacheError: a folder of another teacher, naming what differs, or a damaged file.
      UserError: a batch that does not divide over the mesh, a sequence longer than the teacher's
        window, or processes that do not see the same folder.
    """
    local_rows(mesh, batch_size)  # which refuses a batch of another size
    examples = {e.key: e for e in map(_Example.of, (s for d in data for s in d.sequences))}
    longest, window = max(len(e.ids) for e in examples.values()), teacher.text.max_positions
    if longest > window:
        raise UserError(
            f"a teacher's sequence has {longest} tokens, and the teacher {window} positions: make "
            "data.max_length smaller"
        )
    with StateCacheWriter(folder, fingerprint, writer=jax.process_index()) as writer:
        missing = [examples[key] for key in writer.missing(examples)]
        _agree(len(missing), folder)
        progress = Progress(
            len(examples), f"{what}: teacher", "example", len(examples) - len(missing)
        )
        try:
            for count, found in _passes(teacher, fingerprint, missing, mesh, batch_size):
                for example, arrays in found:
                    writer.add(example.key, arrays)
                progress.advance(count)
        finally:
            progress.close()
    _agree(0, folder)  # nobody reads before all have written
    return StoredTeacher(open_state_cache(folder, fingerprint))


@dataclass(frozen=True, eq=False)
class _Example:
    """A teacher's sequence (U,), and where in it the R response tokens are said next."""

    key: bytes
    ids: np.ndarray
    at: np.ndarray

    @classmethod
    def of(cls, sequences: Sequences) -> _Example:
        arrays = sequences.arrays()
        ids, at = arrays["teacher_ids"], arrays["teacher_at"]
        return cls(example_key(ids, at), ids, at)


def _passes(
    teacher: LanguageModel,
    fingerprint: Fingerprint,
    examples: Sequence[_Example],
    mesh: Mesh,
    size: int,
) -> Iterator[tuple[int, list[tuple[_Example, dict[str, np.ndarray]]]]]:
    """Batch by batch: how many examples, and those of this process with their arrays."""
    run = _make_pass(teacher.module, fingerprint, mesh)
    order = sorted(examples, key=lambda e: (len(e.ids), len(e.at)))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        batch = _padded(chosen, size, teacher)
        place = batch_sharding(mesh)
        arrays = {
            name: jax.make_array_from_callback(x.shape, place, lambda index, x=x: x[index])
            for name, x in batch.items()
        }
        rows = _own_rows(run(teacher.params, arrays))
        found = [(chosen[row], rows[row]) for row in sorted(rows) if row < len(chosen)]
        yield len(chosen), [(e, _cut(arrays, len(e.at), fingerprint)) for e, arrays in found]


def _make_pass(model: Decoder, fingerprint: Fingerprint, mesh: Mesh) -> Callable:
    """(parameters, batch) -> the arrays of a record, for B examples."""
    layers, depth = fingerprint.layers, model.config.depth

    def run(params: Tree, batch: Tree) -> Tree:
        states = response_states(model, params, batch, {*layers, depth})
        found = {"states": jnp.stack([states[i] for i in layers], 1)} if layers else {}
        last = states[depth]
        if fingerprint.form == LAST:
            found["last"] = last
            return jax.tree.map(lambda x: x.astype(jnp.bfloat16), found)
        found = jax.tree.map(lambda x: x.astype(jnp.bfloat16), found)
        top = losses.top_k(
            last,
            lambda hidden: model.apply({"params": params}, hidden, method="logits"),
            fingerprint.top_k,
            shared_vocab=fingerprint.vocabulary,
            temperature=fingerprint.temperature,
        )
        return found | top._asdict()

    return jax.jit(run, out_shardings=batch_sharding(mesh))


def _padded(chosen: Sequence[_Example], size: int, teacher: LanguageModel) -> dict[str, np.ndarray]:
    """A batch of `size` rows; the last example stands in rows that fill it up."""
    longest = min(_edge(max(len(e.ids) for e in chosen)), teacher.text.max_positions)
    positions = _edge(max(len(e.at) for e in chosen))
    ids = np.full((size, longest), teacher.tokenizer.pad_id, np.int32)
    mask, at = np.zeros((size, longest), bool), np.zeros((size, positions), np.int32)
    for row in range(size):
        example = chosen[min(row, len(chosen) - 1)]
        ids[row, : len(example.ids)] = example.ids
        mask[row, : len(example.ids)] = True
        at[row, : len(example.at)] = example.at
    return {"teacher_ids": ids, "teacher_mask": mask, "teacher_at": at}


def _edge(length: int) -> int:
    """32, 48, 64, 96, 128, ...: few shapes, little padding."""
    edge = 32
    while edge < length:
        edge = edge * 3 // 2 if edge & (edge - 1) == 0 else edge // 3 * 4
    return edge


def _own_rows(arrays: dict[str, jax.Array]) -> dict[int, dict[str, np.ndarray]]:
    """By row of the batch, what this process has to write; each row is one process's."""
    rows: dict[int, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        for shard in array.addressable_shards:
            if shard.replica_id == 0:
                first = shard.index[0].start or 0
                for row, values in enumerate(np.asarray(shard.data), first):
                    rows.setdefault(row, {})[name] = values
    return rows


def _cut(
    arrays: dict[str, np.ndarray], positions: int, fingerprint: Fingerprint
) -> dict[str, np.ndarray]:
    """The arrays of an example of so many response tokens."""
    states = arrays.get("states", np.zeros((0, positions, fingerprint.width), np.float32))
    cut = {name: array[:positions] for name, array in arrays.items() if name != "states"}
    return cut | {"states": states[:, :positions]}


def _agree(missing: int, folder: Path) -> None:
    """Waits for all processes; they have to see the same folder."""
    if jax.process_count() == 1:
        return
    found = np.asarray(multihost_utils.process_allgather(np.int32(missing))).tolist()
    if len(set(found)) > 1:
        raise UserError(
            f"the processes miss {found} examples of the teacher cache {folder}: teacher.cache has "
            "to be a folder that all of them see"
        )
