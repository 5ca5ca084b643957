"""Text generation: one jitted function, a key-value cache, and a loop that ends when all texts do.

Greedy, or sampled at a temperature from the smallest set of tokens that holds the probability
``top_p`` (nucleus sampling, Holtzman et al. 2019, arXiv 1904.09751). Prompts may hold audio where
the model takes it (`AudioLM`).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from medalign_jax.core.errors import UserError
from medalign_jax.core.mesh import shardings
from medalign_jax.models.audio_lm import AudioLM, check_placeholders
from medalign_jax.models.language.decoder import CACHE_SHARDING, Cache, Decoder, empty_cache
from medalign_jax.models.language.decoder_config import DecoderConfig


class GenerationError(UserError):
    """Prompts or settings of a generation that cannot be."""


class Generated(NamedTuple):
    """What was written after each prompt.

    Attributes:
      tokens: (B, N) int32; the stop token is among them, after it comes ``pad_token``.
      mask: (B, N) bool, True for tokens that were generated.
    """

    tokens: jax.Array
    mask: jax.Array


class _State(NamedTuple):
    """The loop: ``step`` tokens are written, the last of each text is not yet in the cache."""

    step: jax.Array
    tokens: jax.Array  # (B, N)
    mask: jax.Array  # (B, N)
    running: jax.Array  # (B,)
    cache: Cache


def pad_left(
    prompts: Sequence[Sequence[int]], pad_token: int = 0, length: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of token ids as ids (B, P) int32 and mask (B, P) bool, padded at the left.

    P is the longest prompt, or `length` where that is more.
    """
    length = max([length, *map(len, prompts)])
    ids = np.full((len(prompts), length), pad_token, np.int32)
    mask = np.zeros(ids.shape, bool)
    for row, prompt in enumerate(prompts):
        first = length - len(prompt)
        ids[row, first:], mask[row, first:] = prompt, True
    return ids, mask


def generate(
    model: Decoder | AudioLM,
    params: Any,
    ids: Any,
    mask: Any,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_tokens: Sequence[int] = (),
    pad_token: int = 0,
    key: jax.Array | None = None,
    mesh: Mesh | None = None,
    features: Any = None,
    lengths: Any = None,
    lora: Any = None,
) -> Generated:
    """Writes on after prompts of unequal length.

    Compiled once for each shape of the prompts and each ``max_new_tokens``.

    Args:
      model: the language model; it needs its head.
      params: its parameters, on a mesh or not.
      ids: (B, P) token ids.
      mask: (B, P) bool, True for a real token; padding at the left (``pad_left``).
      max_new_tokens: N, at most so many for each text.
      temperature: divides the logits; 0 takes the likeliest token.
      top_p: in (0, 1]: see above; 1 draws from all tokens.
      stop_tokens: a text ends with the first of these.
      pad_token: stands after the end of a text.
      key: for drawing, where the temperature is not 0: one for the batch, or keys (B,), one per
        text, which then does not depend on the others of its batch.
      mesh: lays the cache out over it: texts over (data, fsdp), key heads over tensor.
      features, lengths: of an ``AudioLM``: (B, K, F, M) and (B, K), the clips of each prompt in the
        order of its placeholders; None where no prompt has any.
      lora: low-rank factors, as collection "lora" of the model.

    Returns:
      See ``Generated``.

    Raises:
      GenerationError: for no prompt, an empty one, padding elsewhere than at the left, ids that
        the model does not have, more tokens than it has positions, audio for a text-only
        model, or settings out of range.
      AudioPromptError: for clips that are not those of a prompt's placeholders.
    """
    ids, mask = np.asarray(ids), np.asarray(mask)
    _check_prompts(ids, mask, model, max_new_tokens)
    _check_settings(temperature, top_p, key, len(ids))
    return _generate(
        model,
        _variables(params, lora),
        jnp.asarray(ids, jnp.int32),
        jnp.asarray(mask),
        _audio(model, ids, mask, features, lengths),
        jnp.asarray(list(stop_tokens), jnp.int32),
        jnp.float32(temperature),
        jnp.float32(top_p),
        key if temperature else jax.random.key(0),
        length=max_new_tokens,
        pad_token=pad_token,
        greedy=not temperature,
        whole=top_p == 1,
        mesh=mesh,
    )


def nucleus(logits: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """Logits (..., V) with -inf for every token outside the smallest set of probability ``top_p``.

    The likeliest token always stays.
    """
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    chance = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(chance, axis=-1) - chance  # of all that are likelier
    first = jnp.arange(logits.shape[-1]) == 0
    ranked = jnp.where((before < top_p) | first, ranked, -jnp.inf)
    return jnp.put_along_axis(logits, order, ranked, axis=-1, inplace=False)


@partial(jax.jit, static_argnames=("model", "length", "pad_token", "greedy", "whole", "mesh"))
def _generate(
    model,
    variables,
    ids,
    mask,
    audio,
    stops,
    temperature,
    top_p,
    key,
    *,
    length,
    pad_token,
    greedy,
    whole,
    mesh,
):
    batch, prompt = ids.shape
    # Columns to come count as real: whether they are seen is a matter of causality.
    seen = jnp.concatenate([mask, jnp.ones((batch, length), bool)], axis=1)

    def extend(ids, cache, start, **audio):
        bound = model.bind(variables)
        hidden, cache = bound.extend(ids, seen, _laid_out(cache, mesh), start, **audio)
        return bound.logits(hidden[:, -1:])[:, 0], cache

    def choose(logits, step):
        if greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        scaled = logits / temperature
        scaled = scaled if whole else nucleus(scaled, top_p)
        draw = jax.vmap(_draw, in_axes=(0, None, 0)) if key.ndim else _draw
        return draw(key, step, scaled).astype(jnp.int32)

    def write(state, logits, cache):
        token = choose(logits, state.step)
        token = jnp.where(state.running, token, pad_token)
        return _State(
            state.step + 1,
            jax.lax.dynamic_update_slice(state.tokens, token[:, None], (0, state.step)),
            jax.lax.dynamic_update_slice(state.mask, state.running[:, None], (0, state.step)),
            state.running & ~jnp.any(token[:, None] == stops, axis=1),
            cache,
        )

    def on(state):
        last = jax.lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1)
        return write(state, *extend(last, state.cache, prompt + state.step - 1))

    empty = empty_cache(_text_config(model), batch, prompt + length, model.dtype)
    start = _State(
        jnp.int32(0),
        jnp.full((batch, length), pad_token, jnp.int32),
        jnp.zeros((batch, length), bool),
        jnp.ones(batch, bool),
        empty,
    )
    start = write(start, *extend(ids, empty, 0, **audio))
    end = jax.lax.while_loop(lambda s: (s.step < length) & jnp.any(s.running), on, start)
    return Generated(end.tokens, end.mask)


def _draw(key: jax.Array, step: jax.Array, logits: jax.Array) -> jax.Array:
    """Tokens (...) of logits (..., V); another draw for each step."""
    return jax.random.categorical(jax.random.fold_in(key, step), logits)


def _laid_out(cache: Cache, mesh: Mesh | None) -> Cache:
    if mesh is None:
        return cache
    return jax.lax.with_sharding_constraint(cache, shardings(cache, CACHE_SHARDING, mesh))


def _text_config(model: Decoder | AudioLM) -> DecoderConfig:
    return model.config.text if isinstance(model, AudioLM) else model.config


def _variables(params: Any, lora: Any) -> dict[str, Any]:
    return {"params": params} if lora is None else {"params": params, "lora": lora}


def _audio(
    model: Decoder | AudioLM, ids: np.ndarray, mask: np.ndarray, features: Any, lengths: Any
) -> dict[str, jax.Array]:
    """Checked clips as keywords of ``extend`` and of the model's call."""
    if (features is None) != (lengths is None):
        raise GenerationError("features and lengths of the clips go together; one of them is None")
    if not isinstance(model, AudioLM):
        if features is not None:
            raise GenerationError("this model reads text only; give no features")
        return {}
    if features is not None and np.shape(features)[:2] != np.shape(lengths):
        raise GenerationError(
            f"features have to be (prompts, clips, frames, mels) and lengths (prompts, clips), not "
            f"{np.shape(features)} and {np.shape(lengths)}"
        )
    check_placeholders(ids, mask, lengths, model.config)
    if features is None:
        return {}
    return {"features": jnp.asarray(features), "lengths": jnp.asarray(lengths, jnp.int32)}


def _check_prompts(
    ids: np.ndarray, mask: np.ndarray, model: Decoder | AudioLM, length: int
) -> None:
    config = _text_config(model)
    _check_tokens(ids, mask, config)
    gaps = np.flatnonzero((mask[:, :-1] & ~mask[:, 1:]).any(axis=1))
    if gaps.size:
        raise GenerationError(
            f"prompt {gaps[0]} has padding after its first token; pad at the left (pad_left)"
        )
    if length < 1:
        raise GenerationError(f"max_new_tokens has to be at least 1, not {length}")
    longest = int(mask.sum(axis=1).max())
    if longest + length > config.max_positions:
        raise GenerationError(
            f"a prompt of {longest} tokens and {length} new ones are more than the model's "
            f"{config.max_positions} positions; shorten the prompt or max_new_tokens"
        )


def _check_tokens(ids: np.ndarray, mask: np.ndarray, config: DecoderConfig) -> None:
    if ids.ndim != 2 or ids.shape != mask.shape or not ids.size:
        raise GenerationError(
            f"prompts have to be (batch, length) ids and a mask of that shape with at least one "
            f"prompt, not {ids.shape} and {mask.shape}"
        )
    if mask.dtype != bool:
        raise GenerationError(f"the mask has to be boolean, not {mask.dtype}")
    empty = np.flatnonzero(~mask.any(axis=1))
    if empty.size:
        raise GenerationError(f"prompt {empty[0]} is empty: there is nothing to write on from")
    if ids[mask].min() < 0 or ids[mask].max() >= config.vocab_size:
        raise GenerationError(
            f"prompts hold token ids {ids[mask].min()} to {ids[mask].max()}, but the vocabulary "
            f"has {config.vocab_size}: the tokenizer belongs to another model"
        )
    if not config.head:
        raise GenerationError("this model was built without its head, so it has no logits")


def _check_settings(temperature: float, top_p: float, key: jax.Array | None, rows: int) -> None:
    if not temperature >= 0 or temperature == float("inf"):
        raise GenerationError(f"temperature has to be 0 or a positive number, not {temperature}")
    if not 0 < top_p <= 1:
        raise GenerationError(f"top_p has to be above 0 and at most 1, not {top_p}")
    if temperature and key is None:
        raise GenerationError(f"drawing at temperature {temperature} needs key=jax.random.key(...)")
    typed = key is None or jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if temperature and not (typed and key.shape in ((), (rows,))):
        raise GenerationError(
            f"key is {key.dtype} {key.shape} for {rows} prompts; give one jax.random.key(...), or "
            "one for each prompt"
        )
