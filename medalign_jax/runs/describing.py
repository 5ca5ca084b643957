"""An audio language model describes recordings: prompt, batches, and what is not a description.

A description follows from the weights, the prompt and a key of the record's own (seed and id). The
batches are planned over all records, and one that was broken off is written again as a whole: after
a restart each text comes out of the very same computation.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from medalign_jax.audio.io import AudioError
from medalign_jax.core.errors import UserError
from medalign_jax.core.journal import Journal
from medalign_jax.core.mesh import batch_ways
from medalign_jax.core.progress import Progress
from medalign_jax.core.rounding import round_up
from medalign_jax.data.questions.batches import (
    QuestionBatchSpec,
    growing_edges,
    make_question_iterator,
)
from medalign_jax.data.questions.prompts import ExampleError, SequenceBuilder, Sequences
from medalign_jax.data.questions.question import Question
from medalign_jax.data.questions.source import QuestionData, clip_samples
from medalign_jax.evaluate.answering import features_of
from medalign_jax.language_model import LanguageModel
from medalign_jax.models.generate import generate
from medalign_jax.text.reasoning import STAGES, Stages

_PLACES = re.compile(r"\{(reasoning|question)\}")
_REFUSES = re.compile(r"(i'?m sorry|sorry|i (cannot|can't|am unable to)|as an ai)\b", re.IGNORECASE)
_REPEATS = 20  # words, of which fewer than a fifth differ


@dataclass(frozen=True)
class Prompting:
    """How a description is asked for; the block ``config.prompt``.

    Attributes:
      system: first turn; "" leaves it to the chat template.
      text: the task; ``{question}`` stands for the question.
      grounded: whether `notes` follow; a record without reasoning then fails.
      notes: with ``{reasoning}``.
      stages: of a reasoning trace in four, those that ``{reasoning}`` shows.
    """

    system: str
    text: str
    grounded: bool
    notes: str
    stages: tuple[str, ...]

    def __post_init__(self) -> None:
        known = tuple(name.lower() for name in STAGES)
        if not self.stages or not set(self.stages) <= set(known):
            raise UserError(f"config.prompt.stages are {self.stages}; they are of {known}")
        if self.grounded and "{reasoning}" not in self.notes:
            raise UserError("config.prompt.notes has no {reasoning} to ground a description in")

    def text_for(self, question: Question) -> str:
        """The user's turn, without the recordings.

        Raises:
          ExampleError: no reasoning to ground it in.
        """
        reasoning = question.reasoning
        if isinstance(reasoning, Stages):
            parts = (f"{name.capitalize()}: {getattr(reasoning, name)}" for name in self.stages)
            reasoning = "\n".join(parts)
        if self.grounded and not reasoning:
            raise ExampleError(
                question.id,
                "no reasoning to ground a description in; give it one, or describe without "
                "(prompt.grounded=False)",
            )
        texts = {"reasoning": reasoning or "", "question": question.question}
        whole = self.text + (self.notes if self.grounded else "")
        return _PLACES.sub(lambda found: texts[found[1]], whole)


@dataclass(frozen=True)
class Sampling:
    """How descriptions are written; the block ``config.generate``.

    Attributes:
      max_new_tokens: most tokens of a description.
      temperature, top_p: see `models.generate.generate`.
      batch_size: records at a time.
      min_words: a text of fewer describes nothing.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    batch_size: int
    min_words: int

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.max_new_tokens < 1 or self.min_words < 0:
            raise UserError(
                "config.generate: batch_size and max_new_tokens have to be at least 1, min_words 0"
            )


@dataclass(frozen=True)
class Plan:
    """What is to be described.

    Attributes:
      data: records with their prompts, shortest first; None where there are none.
      texts: the user's turn of each, by id.
      failed: id -> why there can be no description.
    """

    data: QuestionData | None
    texts: dict[str, str]
    failed: dict[str, str]


def plan_records(
    questions: Sequence[Question], builder: SequenceBuilder, prompting: Prompting, room: int
) -> Plan:
    """Prompts of all records that have no description yet, and why others get none.

    Args:
      questions: ids all different.
      builder: of the describing model.
      prompting: how it is asked.
      room: tokens that are to be written.
    """
    made: list[tuple[Question, Sequences]] = []
    texts, failed = {}, {}
    for question in questions:
        if question.description:
            continue
        try:
            if not question.audio:
                raise ExampleError(question.id, "no recording to describe")
            texts[question.id] = prompting.text_for(question)
            samples = [clip_samples(path) for path in question.audio]
            asked = replace(question, question=texts[question.id], choices=())
            prompt = builder.prompt(asked, samples, room)
        except (ExampleError, AudioError) as error:
            failed[question.id] = error.reason
            continue
        none = np.zeros(0, np.int32)
        sequences = Sequences(np.array(prompt, np.int32), None, none, np.array(samples, np.int32))
        made.append((question, sequences))
    made.sort(key=lambda pair: len(pair[1].prompt))  # like lengths together waste no steps
    data = None
    if made:
        data = QuestionData(*zip(*made, strict=True), (builder.student.pad_id, 0))
    return Plan(data, texts, failed)


def describe(
    model: LanguageModel,
    data: QuestionData,
    sampling: Sampling,
    seed: int,
    journal: Journal,
    mesh: Mesh,
) -> None:
    """Writes what is missing in the journal, batch by batch: {"id", "text", "ended"}.

    `ended` is whether the model itself came to an end within the tokens that it had.
    """
    ids = [question.id for question in data.questions]
    size = round_up(min(sampling.batch_size, len(ids)), batch_ways(mesh))
    edges = growing_edges(data)
    spec = QuestionBatchSpec(
        size, edges, prompts=True, samples=model.clip_samples, shuffle=False, epochs=1
    )
    missing = (place for place, id in enumerate(ids) if id not in journal.done)
    first = next(missing, None)
    if first is None:
        return
    batches = make_question_iterator(data, spec)
    batches.set_state(batches.get_state() | {"batch": first // size})
    progress = Progress(len(ids), "describing", "record", done=len(journal.done))
    try:
        for batch in batches:
            records = _written(model, batch, ids, sampling, seed, mesh)
            new = [record for record in records if record["id"] not in journal.done]
            journal.add(new)
            progress.advance(len(new))
    finally:
        batches.close()
        progress.close()


def _written(
    model: LanguageModel,
    batch: dict[str, np.ndarray],
    ids: Sequence[str],
    sampling: Sampling,
    seed: int,
    mesh: Mesh,
) -> list[dict[str, object]]:
    """The records of a batch."""
    tokenizer, filled = model.tokenizer, batch["index"] < 0
    batch["prompt_mask"][filled, -1] = True  # a prompt has to have a token
    named = ["" if index < 0 else ids[index] for index in batch["index"]]
    features, lengths = features_of(model.front_end, {k: jnp.asarray(v) for k, v in batch.items()})
    written = generate(
        model.module,
        model.params,
        batch["prompt_ids"],
        batch["prompt_mask"],
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        stop_tokens=(tokenizer.end_id,),
        pad_token=tokenizer.pad_id,
        key=record_keys(seed, named),
        mesh=mesh,
        features=features,
        lengths=lengths,
    )
    tokens, mask = np.asarray(written.tokens), np.asarray(written.mask)
    found = []
    for row in np.flatnonzero(~filled):
        own = tokens[row][mask[row]]
        ended = bool(own[-1] == tokenizer.end_id)
        found.append({"id": named[row], "text": tokenizer.decode(own).strip(), "ended": ended})
    return found


def record_keys(seed: int, ids: Sequence[str]) -> jax.Array:
    """A key (B,) for each record, from the seed and its id alone."""
    digests = [hashlib.blake2b(id.encode(), digest_size=8).digest() for id in ids]
    words = np.frombuffer(b"".join(digests), "<u4").reshape(-1, 2)
    return jax.vmap(_folded, (None, 0))(jax.random.key(seed), words)


def _folded(key: jax.Array, words: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(key, words[0]), words[1])


def why_unusable(text: str, min_words: int, special: Sequence[str] = ()) -> str:
    """Why a text is not a description; "" for one that is.

    Args:
      text: what the model wrote.
      min_words: fewer say nothing.
      special: tokens that may not stand in a text.
    """
    words = text.split()
    if not words:
        return "the model wrote nothing"
    start = repr(" ".join(words)[:60])
    if len(words) < min_words:
        return f"only {len(words)} words: {start}"
    if _REFUSES.match(text):
        return f"the model refuses: {start}"
    if len(words) >= _REPEATS and 5 * len({word.casefold() for word in words}) < len(words):
        return f"the text repeats itself: {start}"
    if found := sorted(token for token in special if token in text):
        return f"it holds the special token '{found[0]}'"
    return ""
