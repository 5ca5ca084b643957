"""Generation against transformers, and its parts against their definitions."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from medalign_jax.models.generate import GenerationError, generate, nucleus, pad_left
from medalign_jax.models.language.decoder import Decoder, empty_cache
from medalign_jax.models.language.decoder_config import DECODER_CONFIGS, DecoderConfig
from medalign_jax.weights.load import load
from medalign_jax.weights.tables.decoder import table
from tests import devices

torch.set_num_threads(1)

VOCABULARY = 61
NEW = 14
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 64,
    "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            **SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1
        )
    ),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True)
    ),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            **SIZES, head_dim=16, sliding_window=4, sliding_window_pattern=2
        )
    ),
}
_CACHE = {}


def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(3, VOCABULARY, length).tolist() for length in (9, 1, 5, 7)]


@pytest.fixture
def pair(request, tmp_path_factory):
    """(model of transformers, ours, its parameters)."""
    name = request.param
    if name not in _CACHE:
        torch.manual_seed(4)
        upstream = MODELS[name]().eval()
        with torch.no_grad():
            # Else a tied head mostly repeats the last token, whatever the layers do.
            upstream.get_input_embeddings().weight.mul_(0.05)
        folder = tmp_path_factory.mktemp(name)
        upstream.save_pretrained(folder)
        config = upstream.config.to_dict()
        model = Decoder(DECODER_CONFIGS[config["model_type"]](config))
        _CACHE[name] = upstream, model, load(folder, table(model.config, 3), abstract(model))
    return _CACHE[name]


def abstract(model):
    ids, mask = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)
    return jax.eval_shape(model.init, jax.random.key(0), ids, mask)["params"]


def upstream_tokens(upstream, ids, mask, stop=None):
    with torch.no_grad():
        full = upstream.generate(
            torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long(), do_sample=False,
            max_new_tokens=NEW, eos_token_id=stop, pad_token_id=0, temperature=None, top_k=None,
            top_p=None,
        )  # fmt: skip
    return full[:, ids.shape[1] :].numpy()


@pytest.mark.parametrize("pair", MODELS, indirect=True)
def test_greedy_tokens_equal_transformers(pair):
    upstream, model, params = pair
    ids, mask = pad_left(prompts())
    got = generate(model, params, ids, mask, max_new_tokens=NEW)
    np.testing.assert_array_equal(got.tokens, upstream_tokens(upstream, ids, mask))
    assert np.asarray(got.mask).all()
    # No degenerate answers, which many a mistake would give too.
    assert len(np.unique(got.tokens)) > 8


@pytest.mark.parametrize("pair", ["gemma3"], indirect=True)
def test_stopped_texts_equal_transformers(pair):
    upstream, model, params = pair
    ids, mask = pad_left(prompts())
    free = np.asarray(generate(model, params, ids, mask, max_new_tokens=NEW).tokens)
    stops = [int(free[0, 3]), int(free[2, 6])]
    got = generate(model, params, ids, mask, max_new_tokens=NEW, stop_tokens=stops)
    expected = upstream_tokens(upstream, ids, mask, stop=stops)
    length = expected.shape[1]  # transformers ends when all texts have
    np.testing.assert_array_equal(np.asarray(got.tokens)[:, :length], expected)
    for row in range(4):
        ends = np.flatnonzero(np.isin(free[row], stops))
        written = ends[0] + 1 if ends.size else NEW
        np.testing.assert_array_equal(got.mask[row], np.arange(NEW) < written)
        assert not np.asarray(got.tokens)[row, written:].any()


def tiny(**changes) -> DecoderConfig:
    settings = {
        "vocab_size": VOCABULARY, "width": 16, "heads": 4, "kv_heads": 2, "head_dim": 8,
        "mlp_width": 24, "sliding": (True, False), "window": 3, "attention_scale": 8**-0.5,
        "max_positions": 40, "qk_norm": True,
    }  # fmt: skip
    return DecoderConfig(**settings | changes)


@pytest.fixture(scope="module")
def small():
    model = Decoder(tiny())
    ids, mask = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)
    return model, jax.jit(model.init)(jax.random.key(1), ids, mask)["params"]


def test_the_loop_ends_when_all_texts_have(small):
    """All steps but the first are counted by a callback inside the compiled loop."""
    model, params = small
    steps = []

    class Counted(Decoder):
        def extend(self, ids, mask, cache, start):
            jax.debug.callback(lambda: steps.append(1))
            return super().extend(ids, mask, cache, start)

    counted = Counted(model.config)
    got = generate(counted, params, [[5, 6]], np.ones((1, 2), bool), max_new_tokens=9)
    jax.effects_barrier()
    assert len(steps) == 9  # a prompt and 8 tokens; nothing is computed after the last one
    steps.clear()
    stop = int(got.tokens[0, 0])
    ended = generate(
        counted, params, [[5, 6]], np.ones((1, 2), bool), max_new_tokens=9, stop_tokens=[stop]
    )
    jax.effects_barrier()
    assert len(steps) == 1 and ended.mask.sum() == 1


def test_padding_and_neighbours_do_not_matter(small):
    model, params = small
    together = generate(model, params, *pad_left(prompts()), max_new_tokens=6).tokens
    for prompt, expected in zip(prompts()[1:3], together[1:3], strict=True):
        alone = generate(model, params, *pad_left([prompt]), max_new_tokens=6).tokens[0]
        np.testing.assert_array_equal(alone, expected)


def test_cached_steps_equal_a_whole_forward_pass(small):
    """Hidden states, one and three tokens at a time, within 1e-5."""
    model, params = small
    ids, mask = pad_left(prompts())
    whole, _ = jax.jit(model.apply)({"params": params}, ids, mask)
    cache = empty_cache(model.config, *ids.shape, jnp.float32)
    assert cache.key.shape == (2, 4, 9, 2, 8)
    extend = jax.jit(
        lambda ids, cache, start: model.apply(
            {"params": params}, ids, mask, cache, start, method="extend"
        )
    )
    parts = []
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        part, cache = extend(ids[:, start:stop], cache, start)
        parts.append(part)
    got = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(got[mask], whole[mask], rtol=0, atol=1e-5)


def test_bfloat16_and_a_padded_vocabulary(small):
    """Logits of bfloat16 lie within 0.05 of float32's, tokens are those of the vocabulary."""
    model, params = small
    narrow = Decoder(dataclasses.replace(model.config), dtype=jnp.bfloat16)
    ids, mask = pad_left(prompts())
    got = generate(narrow, params, ids, mask, max_new_tokens=4)
    first = logits_of(narrow, params, ids, mask)
    exact = logits_of(model, params, ids, mask)
    assert np.abs(first - exact).max() < 0.05
    np.testing.assert_array_equal(got.tokens[:, 0], first.argmax(-1))
    padded = Decoder(dataclasses.replace(model.config, padded_vocab=model.config.vocab_size + 3))
    wider = {
        **params,
        "embed": {"embedding": jnp.pad(params["embed"]["embedding"], ((0, 3), (0, 0)))},
    }
    np.testing.assert_array_equal(
        generate(padded, wider, ids, mask, max_new_tokens=4).tokens,
        generate(model, params, ids, mask, max_new_tokens=4).tokens,
    )


def logits_of(model, params, ids, mask):
    @jax.jit
    def last(params):
        hidden, _ = model.apply({"params": params}, ids, mask)
        return model.apply({"params": params}, hidden[:, -1], method="logits")

    return np.asarray(last(params))


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.75, 0.999])
def test_nucleus_equals_transformers(top_p):
    logits = 3 * np.random.default_rng(2).standard_normal((20, 50)).astype(np.float32)
    warper = transformers.TopPLogitsWarper(top_p)
    expected = torch.isfinite(warper(None, torch.tensor(logits))).numpy()
    got = np.asarray(nucleus(jnp.asarray(logits), top_p))
    np.testing.assert_array_equal(np.isfinite(got), expected)
    np.testing.assert_array_equal(got[expected], logits[expected])
    assert 20 <= expected.sum() < logits.size


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.5, 0.6)])
def test_drawn_tokens_have_the_distribution(small, temperature, top_p):
    """Chi-square of 8192 first tokens; a true distribution exceeds the bound once in 10,000."""
    from scipy.stats import chi2

    model, params = small
    count = 8192
    ids = np.tile(np.array([[7, 8, 9]], np.int32), (count, 1))
    mask = np.ones(ids.shape, bool)
    logits = logits_of(model, params, ids[:1], mask[:1])[0]
    wanted = np.asarray(jax.nn.softmax(nucleus(jnp.asarray(logits / temperature), top_p)), float)
    got = generate(
        model, params, ids, mask, max_new_tokens=1, temperature=temperature, top_p=top_p,
        key=jax.random.key(3),
    )  # fmt: skip
    drawn = np.bincount(np.asarray(got.tokens)[:, 0], minlength=VOCABULARY)
    assert not drawn[wanted == 0].any()
    # Rare tokens are taken together, so that every class is expected at least five times.
    order = np.argsort(wanted)
    rare = order[np.cumsum(wanted[order]) * count < 20]
    rest = np.setdiff1d(np.flatnonzero(wanted), rare)
    observed = np.append(drawn[rest], drawn[rare].sum())
    expected = np.append(wanted[rest], wanted[rare].sum()) * count
    observed, expected = observed[expected > 0], expected[expected > 0]
    assert len(observed) > 5
    statistic = ((observed - expected) ** 2 / expected).sum()
    assert statistic < chi2.isf(1e-4, len(observed) - 1)


def test_keys_decide_what_is_drawn(small):
    model, params = small
    draw = lambda seed: np.asarray(  # noqa: E731
        generate(
            model, params, *pad_left(prompts()), max_new_tokens=8, temperature=1.0,
            key=jax.random.key(seed),
        ).tokens
    )  # fmt: skip
    np.testing.assert_array_equal(draw(0), draw(0))
    assert (draw(0) != draw(1)).any()


def test_other_settings_do_not_compile_again(small):
    from medalign_jax.models.generate import _generate

    model, params = small
    ids, mask = pad_left(prompts())
    options = {"max_new_tokens": 3, "key": jax.random.key(0)}
    generate(model, params, ids, mask, temperature=0.7, top_p=0.9, stop_tokens=[4], **options)
    before = _generate._cache_size()
    generate(model, params, ids, mask, temperature=0.9, top_p=0.5, stop_tokens=[9], **options)
    assert _generate._cache_size() == before


@pytest.mark.parametrize(
    ("ids", "mask", "options", "message"),
    [
        (np.zeros((0, 4)), np.zeros((0, 4), bool), {}, "at least one prompt"),
        ([[1, 2]], [[True]], {}, "mask of that shape"),
        ([[1, 2]], [[1, 1]], {}, "boolean"),
        ([[1, 2], [0, 0]], [[True, True], [False, False]], {}, "prompt 1 is empty"),
        ([[1, 2], [3, 0]], [[True, True], [True, False]], {}, "prompt 1 has padding after"),
        ([[1, 61]], [[True, True]], {}, "vocabulary has 61"),
        ([[1, 2]], [[True, True]], {"max_new_tokens": 0}, "at least 1"),
        ([[1, 2]], [[True, True]], {"max_new_tokens": 39}, "40 positions"),
        ([[1, 2]], [[True, True]], {"temperature": -1.0}, "temperature"),
        ([[1, 2]], [[True, True]], {"top_p": 0.0}, "top_p"),
        ([[1, 2]], [[True, True]], {"temperature": 1.0}, "needs key"),
    ],
)
def test_what_cannot_be_is_named(small, ids, mask, options, message):
    model, params = small
    with pytest.raises(GenerationError, match=message):
        generate(model, params, ids, np.asarray(mask), **{"max_new_tokens": 2} | options)


def test_a_model_without_a_head_cannot_write(small):
    model = Decoder(dataclasses.replace(small[0].config, head=False))
    with pytest.raises(GenerationError, match="without its head"):
        generate(model, small[1], [[1]], np.ones((1, 1), bool), max_new_tokens=1)


@pytest.mark.slow
def test_sharded_over_meshes_equals_unsharded():
    """On 8 virtual devices, which have to be there before JAX starts; see the script."""
    devices.run(Path(__file__).with_name("sharded_decoder.py"))
