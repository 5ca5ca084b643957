"""Generation with audio in the prompt, against transformers."""

import jax
import numpy as np
import pytest
import torch

from medalign_jax.models.audio_lm import AudioPromptError
from medalign_jax.models.generate import GenerationError, generate
from tests.models import audio_lm_pairs as pairs

NEW = 12
BOTH = pytest.mark.parametrize("name", pairs.MODELS)


def upstream_tokens(upstream, data):
    with torch.no_grad():
        full = upstream.generate(
            **pairs.upstream_inputs(data), do_sample=False, max_new_tokens=NEW, eos_token_id=None,
            pad_token_id=0, temperature=None, top_k=None, top_p=None,
        )  # fmt: skip
    return full[:, data.ids.shape[1] :].numpy()


@BOTH
def test_greedy_tokens_equal_transformers(name):
    """For the clips, and for the same clips backwards, which read otherwise."""
    pair = pairs.pair(name)
    data = pairs.batch(pair.config, "left")
    written = []
    for features in (data.features, data.features[:, :, ::-1].copy()):
        got = generate(
            pair.model, pair.params, data.ids, data.mask, max_new_tokens=NEW,
            features=features, lengths=data.lengths,
        ).tokens  # fmt: skip
        expected = upstream_tokens(pair.upstream, data._replace(features=features))
        np.testing.assert_array_equal(got, expected)
        written.append(expected)
    # No degenerate answers, which many a mistake would give too; and the audio is heard.
    assert len(np.unique(written)) > 10
    changed = (written[0] != written[1]).any(axis=1)
    assert changed.sum() >= 2 and not changed[2]


def test_a_prompt_without_audio_needs_none():
    pair = pairs.pair("omni")
    data = pairs.batch(pair.config, "left")
    ids, mask = data.ids[2:3], data.mask[2:3]
    got = generate(pair.model, pair.params, ids, mask, max_new_tokens=NEW)
    among = generate(
        pair.model, pair.params, data.ids, data.mask, max_new_tokens=NEW,
        features=data.features, lengths=data.lengths,
    )  # fmt: skip
    np.testing.assert_array_equal(got.tokens[0], among.tokens[2])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lengths": None}, "go together"),
        ({"lengths": np.array([[48, 20, 7], [41, 0, 0]])}, "features have to be"),
        ({"features": None, "lengths": None}, "row 0: 19 audio placeholders .* 0 audio tokens"),
        ({"lengths": np.minimum(pairs.LENGTHS, 40)}, "row 0: 19 .* 3 clips make 17"),
    ],
)
def test_audio_that_does_not_belong_is_refused(change, words):
    pair = pairs.pair("omni")
    data = pairs.batch(pair.config, "left")
    audio = {"features": data.features, "lengths": data.lengths} | change
    with pytest.raises((GenerationError, AudioPromptError), match=words):
        generate(pair.model, pair.params, data.ids, data.mask, max_new_tokens=1, **audio)


def test_a_text_model_takes_no_audio():
    pair = pairs.pair("omni")
    text = type(pair.model)(pair.config).bind({"params": pair.params}).text.clone(parent=None)
    with pytest.raises(GenerationError, match="reads text only"):
        generate(
            text, pair.params["text"], [[5, 6]], np.ones((1, 2), bool), max_new_tokens=1,
            features=np.zeros((1, 1, 8, 7)), lengths=np.full((1, 1), 8),
        )  # fmt: skip


def test_low_rank_factors_write_what_merged_weights_write():
    pair = pairs.pair("omni")
    data = pairs.batch(pair.config, "left")
    kernel = pair.params["text"]["layers"]["mlp"]["up"]["kernel"]
    keys = jax.random.split(jax.random.key(0))
    a = jax.random.normal(keys[0], (*kernel.shape[:2], 2))
    b = jax.random.normal(keys[1], (kernel.shape[0], 2, kernel.shape[2])) / 3
    lora = {"text": {"layers": {"mlp": {"up": {"kernel": {"a": a, "b": b}}}}}}
    merged = jax.tree.map(lambda leaf: leaf, pair.params)
    merged["text"]["layers"]["mlp"]["up"]["kernel"] = kernel + a @ b
    options = {"max_new_tokens": NEW, "features": data.features, "lengths": data.lengths}
    rows = data.ids, data.mask
    got = generate(pair.model, pair.params, *rows, lora=lora, **options).tokens
    np.testing.assert_array_equal(got, generate(pair.model, merged, *rows, **options).tokens)
    assert (got != generate(pair.model, pair.params, *rows, **options).tokens).any()
