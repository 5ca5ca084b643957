"""What a batch holds: the one list of names, shapes and types that data, methods and plans share.

B examples; K clips of S samples each; sequences of T (student), U (teacher) and P (prompt) tokens;
R response tokens; H channels of the text side; of a teacher whose states are cached D layers of
width W and J likeliest tokens. Arrays are numpy's on the host and JAX's in a step, or only their
shapes (`jax.ShapeDtypeStruct`) in a plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypedDict, get_type_hints

import jax
import numpy as np

Array = np.ndarray | jax.Array


class AudioBatch(TypedDict, total=False):
    """Recordings with what they are aligned with or classified as (`data.pipeline`)."""

    waveform: Annotated[Array, "B S", "float32"]
    length: Annotated[Array, "B", "int32"]  # samples of the recording in its clip
    index: Annotated[Array, "B", "int32"]  # into the data; -1 in rows that fill up
    text: Annotated[Array, "B H", "float32"]  # a report's vector, from the cache
    text_ids: Annotated[Array, "B L", "int32"]  # its tokens, for a teacher in the step
    text_mask: Annotated[Array, "B L", "bool"]
    report: Annotated[Array, "B M", "float32"]  # equal rows for equal reports
    label: Annotated[Array, "B", "int32"]


class QuestionBatch(TypedDict, total=False):
    """Questions with their recordings (`data.questions.batches`).

    `student_at` and `teacher_at` are the positions whose next token is that of the response.
    """

    index: Annotated[Array, "B", "int32"]  # into the data; -1 in rows that fill up
    waveform: Annotated[Array, "B K S", "float32"]
    samples: Annotated[Array, "B K", "int32"]  # of each clip; 0 where there is none
    student_ids: Annotated[Array, "B T", "int32"]  # right-padded
    student_mask: Annotated[Array, "B T", "bool"]
    student_at: Annotated[Array, "B R", "int32"]
    response_ids: Annotated[Array, "B R", "int32"]
    response_mask: Annotated[Array, "B R", "bool"]
    teacher_ids: Annotated[Array, "B U", "int32"]
    teacher_mask: Annotated[Array, "B U", "bool"]
    teacher_at: Annotated[Array, "B R", "int32"]
    prompt_ids: Annotated[Array, "B P", "int32"]  # left-padded, to generate from
    prompt_mask: Annotated[Array, "B P", "bool"]


class StoredTeacherBatch(QuestionBatch, total=False):
    """Questions with what a teacher said that does not run in the step (`teachers.state_cache`)."""

    # At the positions of the response.
    teacher_layers: Annotated[Array, "B D R W", "bfloat16"]
    teacher_last: Annotated[Array, "B R W", "bfloat16"]
    teacher_top_ids: Annotated[Array, "B R J", "int32"]
    teacher_top_log_probs: Annotated[Array, "B R J", "float32"]
    teacher_top_rest: Annotated[Array, "B R", "float32"]


def mismatches(batch: Mapping[str, Any], kind: type) -> list[str]:
    """In which arrays a batch differs from its kind, in words; [] where it agrees.

    Args:
      batch: name -> array, or shape and type of one.
      kind: `AudioBatch`, `QuestionBatch`, ...; arrays that it does not name are passed over.
    """
    hints, sizes, found = get_type_hints(kind, include_extras=True), {}, []
    for name in sorted(batch.keys() & hints.keys()):
        array, (dims, dtype) = batch[name], hints[name].__metadata__
        if len(array.shape) != len(dims.split()):
            found.append(f"{name} has shape {tuple(array.shape)}, not ({dims})")
            continue
        if np.dtype(array.dtype) != np.dtype(dtype):
            found.append(f"{name} is {array.dtype}, not {dtype}")
        for dim, size in zip(dims.split(), array.shape, strict=True):
            if sizes.setdefault(dim, size) != size:
                found.append(f"{name} has {dim} = {size}, where others have {sizes[dim]}")
    return found


def shapes(kind: type, sizes: Mapping[str, int]) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a kind of batch of which every size is given.

    Args:
      kind: `AudioBatch`, `QuestionBatch`, ...
      sizes: by the letters of its shapes, "B" and others.
    """
    found = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        dims, dtype = hint.__metadata__[0].split(), hint.__metadata__[1]
        if set(dims) <= sizes.keys():
            shape = tuple(sizes[dim] for dim in dims)
            found[name] = jax.ShapeDtypeStruct(shape, np.dtype(dtype))
    return found
