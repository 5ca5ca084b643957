"""A language model answers questions: by writing an answer, or by ranking the options.

Both go in batches of like length. What the answers are worth: `evaluate.answers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from medalign_jax import losses
from medalign_jax.core.errors import UserError
from medalign_jax.core.mesh import batch_sharding, batch_ways, on_host
from medalign_jax.core.rounding import round_up
from medalign_jax.data.questions.batches import (
    QuestionBatchSpec,
    growing_edges,
    make_question_iterator,
)
from medalign_jax.data.questions.prompts import SequenceBuilder
from medalign_jax.data.questions.question import Question
from medalign_jax.data.questions.source import QuestionData, open_questions
from medalign_jax.evaluate.answers import expand_options, rank_options
from medalign_jax.language_model import LanguageModel
from medalign_jax.models.generate import generate

Progress = Callable[[int], None]
Tree = Any


def write_answers(
    model: LanguageModel,
    questions: Sequence[Question],
    builder: SequenceBuilder,
    max_new_tokens: int,
    batch_size: int = 16,
    *,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> dict[str, str]:
    """What the model writes to each question, special tokens left out, by question id.

    Args:
      model: audio-conditioned, or text-only on descriptions, as `builder` has it.
      questions: N questions.
      builder: makes the prompts; its window has to hold the answer too.
      max_new_tokens: most tokens of an answer, which is the likeliest token at each.
      batch_size: questions at a time.
      mesh: spreads prompts and cache over devices.
      progress: called with the number of questions answered since the last call.

    Raises:
      UserError: a question that makes no prompt, or a prompt with too little room.
    """
    data = open_questions(questions, builder, max_bad_fraction=0.0)
    tokenizer, answers = model.tokenizer, {}
    # Numbers of questions in the batches' order; like lengths together waste no steps.
    order = sorted(range(len(data)), key=lambda i: len(data.sequences[i].prompt))
    longest = len(data.sequences[order[-1]].prompt) + max_new_tokens
    if longest > builder.max_length:
        raise UserError(
            f"question '{data.questions[order[-1]].id}': prompt and evaluate.max_new_tokens are "
            f"{longest} tokens, more than the window of {builder.max_length} (data.max_length)"
        )
    for batch in _batches(model, _sorted(data, order), batch_size, True, mesh):
        written = generate(
            model.module,
            model.params,
            batch["prompt_ids"],
            batch["prompt_mask"],
            max_new_tokens=max_new_tokens,
            stop_tokens=(tokenizer.end_id,),
            pad_token=tokenizer.pad_id,
            mesh=mesh,
            **_heard(model, batch),
        )
        tokens, mask = on_host(written.tokens), on_host(written.mask)
        real = np.flatnonzero(batch["index"] >= 0)
        for row in real:
            asked = data.questions[order[batch["index"][row]]]
            answers[asked.id] = tokenizer.decode(tokens[row][mask[row]])
        if progress:
            progress(len(real))
    return answers


def likeliest_options(
    model: LanguageModel,
    questions: Sequence[Question],
    builder: SequenceBuilder,
    batch_size: int = 16,
    *,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> dict[str, str]:
    """The option that is likeliest as a direct answer, by the sum of its tokens' log-probabilities.

    Args:
      model, questions, builder, mesh: as `write_answers`; every question has options.
      batch_size: options at a time.
      progress: called with the number of options weighed since the last call.

    Returns:
      By question id.

    Raises:
      UserError: a question without options, or one that makes no sequence.
    """
    data = open_questions(expand_options(questions), builder, max_bad_fraction=0.0)
    scores = []
    for batch in _batches(model, data, batch_size, False, mesh):
        real = batch["index"] >= 0
        scores.append(on_host(log_likelihood(model, batch, mesh))[real])
        if progress:
            progress(int(real.sum()))
    return rank_options(questions, np.concatenate(scores))


def log_likelihood(
    model: LanguageModel, batch: dict[str, np.ndarray], mesh: Mesh | None = None
) -> jax.Array:
    """Log-probability (B,) of each row's response, of a batch of whole sequences."""
    place = batch_sharding(mesh) if mesh is not None else None
    arrays = {k: jax.device_put(v, place) for k, v in batch.items() if not k.startswith("teacher")}
    return _log_likelihood(
        model.module, model.front_end if model.takes_audio else None, model.params, arrays
    )


@jax.jit(static_argnums=(0, 1))
def _log_likelihood(module, front_end, params, batch):
    variables = {"params": params}
    clip_inputs = () if front_end is None else features_of(front_end, batch)
    hidden, _ = module.apply(variables, batch["student_ids"], batch["student_mask"], *clip_inputs)
    found = losses.next_token_losses(
        jnp.take_along_axis(hidden, batch["student_at"][..., None], axis=1),
        None,
        batch["response_ids"],
        student_head=lambda x: module.apply(variables, x, method="logits"),
    )
    return -losses.masked_sum(found["cross_entropy"], batch["response_mask"])


def features_of(front_end: Any, batch: Tree) -> tuple[jax.Array | None, jax.Array | None]:
    """Features (B, K, F, M) and valid frames (B, K) of a batch's clips; None without any."""
    if "waveform" not in batch:
        return None, None
    rows, clips, samples = batch["waveform"].shape
    features = front_end(batch["waveform"].reshape(rows * clips, samples))
    return features.reshape(rows, clips, *features.shape[1:]), front_end.valid_frames(
        batch["samples"]
    )


def _heard(model: LanguageModel, batch: dict[str, np.ndarray]) -> dict[str, Any]:
    if not model.takes_audio:
        return {}
    features, lengths = features_of(model.front_end, {k: jnp.asarray(v) for k, v in batch.items()})
    return {"features": features, "lengths": lengths}


def _sorted(data: QuestionData, order: Sequence[int]) -> QuestionData:
    questions, sequences = data.questions, data.sequences
    return QuestionData(
        [questions[i] for i in order], [sequences[i] for i in order], data.pad_ids, data.problems
    )


def _batches(
    model: LanguageModel, data: QuestionData, size: int, prompts: bool, mesh: Mesh | None
) -> Iterator[dict[str, np.ndarray]]:
    """Batches in order, whose rows the devices of a mesh share evenly; rows that fill up the last,
    index -1, repeat its first."""
    size = round_up(min(size, len(data)), batch_ways(mesh))
    clip = model.clip_samples if model.takes_audio else None
    spec = QuestionBatchSpec(size, growing_edges(data), prompts, clip, shuffle=False, epochs=1)
    for batch in make_question_iterator(data, spec):
        index = batch.pop("index")
        real = (index >= 0).reshape(-1, 1)
        filled = {
            name: np.where(real.reshape(-1, *[1] * (array.ndim - 1)), array, array[:1])
            for name, array in batch.items()
        }
        yield filled | {"index": index}
