"""The student against transformers, on small random models with audio in the prompt."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from medalign_jax.models.audio_lm import (
    AudioLM,
    AudioPromptError,
    audio_token_count,
    check_placeholders,
)
from medalign_jax.models.language.decoder import Decoder
from medalign_jax.models.layers.sharded_weights import WholeWeights
from medalign_jax.weights.load import export, load, save
from medalign_jax.weights.tables.audio_lm import table
from tests import devices
from tests.models import audio_lm_pairs as pairs
from tests.tiny_models import quick_jit

ATOL = 1e-4
LAYERS = tuple(range(pairs.DEPTH + 1))
BOTH = pytest.mark.parametrize("name", pairs.MODELS)


def run(model, variables, data, layers=LAYERS):
    """Logits, hidden states and where audio stands."""

    def forward(variables, *data):
        last, out = model.apply(variables, *data, layers)
        return model.apply(variables, last, method="logits"), out

    logits, out = jax.device_get(quick_jit(forward)(variables, *data))
    return logits, out["hidden_states"], out["audio"]


@BOTH
@pytest.mark.parametrize("side", ["left", "right"])
def test_states_and_logits_equal_transformers(name, side):
    """Several clips in a row, one, none; other rows' clips are never taken."""
    pair = pairs.pair(name)
    data = pairs.batch(pair.config, side)
    with torch.no_grad():
        expected = pair.upstream(**pairs.upstream_inputs(data), output_hidden_states=True)
    logits, states, audio = run(pair.model, {"params": pair.params}, data)
    mask = data.mask
    assert audio.sum() == (data.ids == pairs.AUDIO).sum() > 40
    for layer, state in enumerate(expected.hidden_states):
        np.testing.assert_allclose(states[layer][mask], state.numpy()[mask], rtol=0, atol=ATOL)
    np.testing.assert_allclose(logits[mask], expected.logits.numpy()[mask], rtol=0, atol=ATOL)
    assert np.abs(logits[mask]).max() > 1


@BOTH
def test_text_alone_needs_no_audio(name):
    pair = pairs.pair(name)
    ids = np.random.default_rng(2).integers(3, pairs.AUDIO, (2, 9)).astype(np.int32)
    mask = np.arange(9) < np.array([[9], [5]])
    inputs = {"input_ids": torch.tensor(ids).long(), "attention_mask": torch.tensor(mask).long()}
    with torch.no_grad():
        expected = pair.upstream(**inputs).logits.numpy()
    logits, _, audio = run(pair.model, {"params": pair.params}, (ids, mask, None, None))
    np.testing.assert_allclose(logits[mask], expected[mask], rtol=0, atol=ATOL)
    assert not audio.any()
    text = Decoder(pair.config.text)
    last, _ = quick_jit(text.apply)({"params": pair.params["text"]}, ids, mask)
    own, _ = quick_jit(pair.model.apply)({"params": pair.params}, ids, mask)
    np.testing.assert_allclose(own[mask], last[mask], rtol=0, atol=1e-6)


def loss_of(model, data, weight, variables, params):
    last, _ = model.apply({**variables, "params": params}, *data)
    logits = model.apply({**variables, "params": params}, last, method="logits")
    return jnp.sum(logits * weight)


def weights_of_a_loss(data):
    weight = np.random.default_rng(1).standard_normal((*data.ids.shape, pairs.VOCABULARY))
    return (weight * data.mask[..., None]).astype(np.float32) / 10


def test_gradients_equal_transformers():
    """Of every tensor of tower and text, with each layer computed anew."""
    pair = pairs.pair("omni")
    data = pairs.batch(pair.config, "right")
    weight = weights_of_a_loss(data)
    model = AudioLM(pair.config, remat=True)
    grad = quick_jit(jax.grad(lambda params: loss_of(model, data, weight, {}, params)))
    names = pairs.arrays(pair.upstream)
    ours = export(grad(pair.params), table(pair.config), names=names)
    pair.upstream.zero_grad()
    logits = pair.upstream(**pairs.upstream_inputs(data)).logits
    (logits * torch.tensor(weight)).sum().backward()
    theirs = dict(pair.upstream.named_parameters())
    ours.pop("model.audio_tower.embed_positions.weight", None)
    assert {name for name, p in theirs.items() if p.grad is not None} == set(ours)
    for name, slope in ours.items():
        expected = theirs[name].grad.numpy()
        bound = 2e-5 * max(np.abs(expected).max(), 1.0)
        np.testing.assert_allclose(slope, expected, rtol=0, atol=bound, err_msg=name)
        assert np.abs(expected).max() > 1e-4, name


KERNELS = (
    "audio/layers/value/kernel",
    "audio/proj/kernel",
    "text/layers/attention/out/kernel",
    "text/lm_head/kernel",
)


class Halved(WholeWeights):
    def layer(self, weights):
        return jax.tree.map(lambda leaf: leaf / 2, weights)


def test_low_rank_factors_and_hook_reach_both_parts():
    """Adapted kernels equal merged ones; the hook then sees the layers of tower and text."""
    pair = pairs.pair("omni")
    data = pairs.batch(pair.config, "left")
    rng, lora = np.random.default_rng(5), {}
    merged = jax.tree.map(np.asarray, pair.params)
    for path in KERNELS:
        *outer, last = path.split("/")
        place, kernels = lora, merged
        for key in outer:
            place, kernels = place.setdefault(key, {}), kernels[key]
        shape = kernels[last].shape
        a = rng.standard_normal((*shape[:-1], 2)).astype(np.float32)
        b = rng.standard_normal((*shape[:-2], 2, shape[-1])).astype(np.float32) / 10
        place[last] = {"a": a, "b": b}
        kernels[last] = kernels[last] + a @ b
    halve = Halved().layer
    for part in ("audio", "text"):
        merged[part]["layers"] = halve(merged[part]["layers"])
    model = AudioLM(pair.config, remat=True, access=Halved())
    logits, states, _ = run(model, {"params": pair.params, "lora": lora}, data)
    expected, wanted, _ = run(pair.model, {"params": merged}, data)
    np.testing.assert_allclose(logits[data.mask], expected[data.mask], rtol=0, atol=ATOL)
    np.testing.assert_allclose(states[0][data.mask], wanted[0][data.mask], rtol=0, atol=1e-5)
    for unknown in ({"tower": {}}, {"audio": {"stem": {}}}):
        with pytest.raises(ValueError, match="have no effect"):
            run(model, {"params": pair.params, "lora": unknown}, data)


def test_parameters_of_another_type():
    """All leaves of both parts; numbers stay within 16 bits of float32's."""
    pair = pairs.pair("omni")
    tree = pairs.abstract(pair.config, param_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(jnp.bfloat16)}
    assert jax.tree.map(jnp.shape, tree) == jax.tree.map(jnp.shape, pair.params)
    narrow = load(pairs.arrays(pair.upstream), table(pair.config), tree, dtype="bfloat16")
    data = pairs.batch(pair.config, "left")
    model = AudioLM(pair.config, jnp.bfloat16, jnp.bfloat16)
    _, states, _ = run(model, {"params": narrow}, data, layers=(-1,))
    _, wanted, _ = run(pair.model, {"params": pair.params}, data)
    last, exact = states[pairs.DEPTH][data.mask], wanted[pairs.DEPTH][data.mask]
    assert last.dtype == jnp.bfloat16
    off = np.linalg.norm(last.astype(np.float32) - exact)
    assert off < 0.05 * np.linalg.norm(exact)


@BOTH
def test_export_is_published_and_means_the_same_to_transformers(name, tmp_path):
    """Weights moved by a step, written under the published names, opened by transformers."""
    pair = pairs.pair(name)
    moved = jax.tree.map(lambda leaf: 1.01 * leaf, pair.params)
    tensors = export(moved, table(pair.config))
    published = {
        "omni": r"thinker\.(audio_tower\.|model\.(layers|norm|embed_tokens)|lm_head\.weight)",
        "qwen2_audio": r"audio_tower\.|multi_modal_projector\.linear\."
        r"|language_model\.(model\.|lm_head\.weight)",
    }[name]
    assert all(re.match(published, key) for key in tensors)
    again = load(tensors, table(pair.config), pairs.abstract(pair.config))
    jax.tree.map(np.testing.assert_array_equal, again, moved)
    save(tmp_path / "model.safetensors", tensors)
    pair.upstream.config.save_pretrained(tmp_path)
    opened = type(pair.upstream).from_pretrained(tmp_path).eval()
    data = pairs.batch(pair.config, "right")
    with torch.no_grad():
        expected = opened(**pairs.upstream_inputs(data)).logits.numpy()
    logits, _, _ = run(pair.model, {"params": moved}, data)
    np.testing.assert_allclose(logits[data.mask], expected[data.mask], rtol=0, atol=ATOL)


@BOTH
def test_a_folder_of_transformers_loads(name, tmp_path):
    pair = pairs.pair(name)
    pair.upstream.save_pretrained(tmp_path)
    again = load(tmp_path, table(pair.config), pairs.abstract(pair.config))
    jax.tree.map(np.testing.assert_array_equal, again, pair.params)


def test_a_tied_head_is_checked_and_not_exported():
    """transformers ties a thinker's head where its config says so."""
    pair = pairs.pair("omni")
    text = dataclasses.replace(pair.config.text, tied=True)
    config = dataclasses.replace(pair.config, text=text)
    tensors = export(pair.params, table(pair.config))
    copy = tensors["thinker.model.embed_tokens.weight"]
    params = load(tensors | {"thinker.lm_head.weight": copy}, table(config), pairs.abstract(config))
    assert "thinker.lm_head.weight" not in export(params, table(config))
    with pytest.raises(ValueError, match=r"thinker\.lm_head\.weight must equal"):
        load(tensors, table(config), pairs.abstract(config))


A = pairs.AUDIO


@pytest.mark.parametrize(
    ("row", "frames", "words"),
    [
        ([5, A, A, 6], [8, 0], None),  # two tokens of 40 ms
        ([A, A, A, 6], [8, 5], None),  # clips side by side
        ([5, 6, 7, 8], [0, 0], None),
        ([5, 6, 7, 8], [8, 0], "row 1: 0 audio placeholders .* 1 clips make 2"),
        ([5, A, A, 6], [0, 0], "row 1: 2 audio placeholders .* 0 clips make 0"),
        ([5, A, 6, 7], [8, 8], "row 1: 1 audio placeholders .* 2 clips make 4"),
        ([A, A, 6, A], [4, 8], r"row 1: its runs .*\[2, 1\] .*\[1, 2\]: .* after placeholder 2"),
        ([5, A, A, 6], [49, 0], "row 1: a clip of 49 frames; the model takes up to 48"),
        ([5, A, A, 6], [8, 2], "row 1: a clip of 2 frames is too short"),
        ([5, A, A, 6], [-1, 0], "row 1: a clip of -1 frames"),
        ([5, A, A, 6], None, "row 1: 2 audio placeholders"),
        ([5, A, A, 6], [[8, 0]], r"lengths have to be \(2, clips\)"),
    ],
)
def test_placeholders_have_to_be_those_of_the_clips(row, frames, words):
    config = pairs.pair("qwen2_audio").config
    ids = np.array([[5, A, 6, 7], row])
    mask = np.ones(ids.shape, bool)
    if frames is None:
        lengths, ids[0, 1] = None, 5
    else:
        lengths = np.array(frames if np.ndim(frames) == 2 else [[3, 0], frames])
    if words is None:
        check_placeholders(ids, mask, lengths, config)
        return
    with pytest.raises(AudioPromptError, match=words):
        check_placeholders(ids, mask, lengths, config)


def test_placeholders_in_padding_do_not_count():
    config = pairs.pair("omni").config
    ids, mask = np.array([[A, A, 5, A]]), np.array([[False, False, True, True]])
    check_placeholders(ids, mask, np.array([[4]]), config)
    with pytest.raises(AudioPromptError, match="1 audio placeholders"):
        check_placeholders(ids, mask, np.array([[12]]), config)


def test_token_counts_are_those_of_the_published_processor():
    config = pairs.pair("omni").config
    frames = np.arange(3, 1000)
    published = ((frames - 1) // 2 + 1 - 2) // 2 + 1
    np.testing.assert_array_equal(audio_token_count(config, frames), published)
    assert audio_token_count(config, 0) == 0 and audio_token_count(config, 100) == 25


@pytest.mark.parametrize(
    ("features", "lengths"),
    [((2, 8, 7), (2,)), ((2, 1, 8, 7), None), ((2, 1, 8, 7), (2, 2)), ((2, 1, 8, 6), (2, 1))],
)
def test_bad_shapes_are_named(features, lengths):
    pair = pairs.pair("omni")
    ids = np.full((2, 4), 5, np.int32)
    lengths = None if lengths is None else np.full(lengths, 8, np.int32)
    with pytest.raises(ValueError, match=r"features (have to|must) be"):
        pair.model.apply(
            {"params": pair.params}, ids, ids > 0, np.zeros(features, np.float32), lengths
        )


@pytest.mark.slow
def test_sharded_over_meshes_equals_unsharded():
    """On 8 virtual devices, which have to be there before JAX starts; see the script."""
    devices.run(Path(__file__).with_name("sharded_audio_lm.py"))
