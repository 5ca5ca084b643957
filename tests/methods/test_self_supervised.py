"""The three self-supervised terms, on an encoder of one layer."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medalign_jax.core.errors import UserError
from medalign_jax.methods.accumulate import loss_and_grad
from medalign_jax.methods.acula import Acula, AculaConfig
from medalign_jax.methods.self_supervised import make_term
from medalign_jax.methods.student import AudioStudent
from medalign_jax.models.layers.vit_layers import Dense, patchify
from tests import tiny_models as tiny

SHAPE = (16, 8)


@dataclasses.dataclass(frozen=True)
class Config:
    width: int = 12
    depth: int = 1
    layer_widths: tuple[int, ...] = (10,)
    prefix_tokens: int = 0
    mels: int = 8
    frames: int = 16
    dtype: type = jnp.float32
    footprint: tuple[int, int] = (4, 4)
    mask_unit: tuple[int, int] = (1, 2)

    def grid(self, frames: int) -> tuple[int, int]:
        return frames // 4, 2


class Patches(nn.Module):
    """Mixes all tokens, so that hidden ones can be guessed."""

    config: Config = Config()
    tokens = 8

    def setup(self) -> None:
        self.inner, self.mix = Dense(10, jnp.float32), Dense(10 * self.tokens, jnp.float32)
        self.out, self.projection = Dense(12, jnp.float32), Dense(5, jnp.float32)

    def __call__(self, features):
        return self.embed(features)[0].sum() + self.project_pair(features, features)[0].sum()

    def embed(self, features):
        short = 2 * self.tokens - features.shape[1]  # crops are filled up
        features = jnp.pad(features, ((0, 0), (0, short), (0, 0)))
        tokens = nn.gelu(self.inner(patchify(features, (4, 4))))
        whole = tokens.reshape(len(tokens), -1)
        tokens = tokens + self.mix(whole).reshape(tokens.shape)
        return self.out(tokens.mean(1)), {"block00": tokens, "tokens": tokens}

    def project_pair(self, first, second, dropout_keys=None):
        return tuple(self.projection(self.embed(x)[0]) for x in (first, second))


class Stretching(Patches):
    """Doubles its time axis before it looks."""

    tokens = 16

    def stretch(self, features):
        return features.repeat(2, axis=1) if features.shape[1] == 16 else features

    def embed(self, features):
        return Patches.embed(self, self.stretch(features))


def keys(count: int, seed: int = 0):
    return jax.random.split(jax.random.key(seed), count)


def pictures(count: int, seed: int = 0) -> jax.Array:
    """Smooth pictures: a hidden part can be told from the rest."""
    time, mel = np.arange(SHAPE[0])[:, None], np.arange(SHAPE[1])
    phase = np.random.default_rng(seed).uniform(0, 6.28, (count, 1, 1))
    return jnp.asarray(np.sin(phase + 0.2 * time + 0.3 * mel), jnp.float32)


@pytest.mark.parametrize("module", [Patches(), Stretching()], ids=["plain", "stretching"])
def test_masked_spectrogram_learns_to_fill_in(module):
    term = make_term("masked_spectrogram", module, SHAPE)
    x = pictures(32)
    params = {
        "encoder": tiny.quick_jit(module.init)(jax.random.key(0), x)["params"],
        "own": tiny.quick_jit(term.init)(jax.random.key(1)),
    }

    def loss(params, step_keys):
        return term.encode(params["encoder"], params["own"], x, step_keys, True)[0].mean()

    optimizer = optax.adam(3e-3)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, key):
        value, grads = jax.value_and_grad(loss)(params, jax.random.split(key, 32))
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    values = []
    for number in range(300):
        params, state, value = step(params, state, jax.random.key(number))
        values.append(float(value))
    assert np.mean(values[:5]) > 0.8  # the variance of the target
    assert np.mean(values[-20:]) < 0.35


def test_what_is_hidden_cannot_be_seen():
    """A change of hidden cells that keeps the clip's mean changes no prediction."""
    term = make_term("masked_spectrogram", Patches(), SHAPE)
    own = tiny.quick_jit(term.init)(jax.random.key(1))
    x = pictures(1)
    hidden = term._layout.hidden(jax.random.uniform(keys(1)[0], (term._layout.units,))[None])
    row = int(np.argmax(np.asarray(hidden)[0, :, 0]))
    other = x.at[0, 4 * row, 0].add(1.0).at[0, 4 * row + 1, 0].add(-1.0)
    seen = [
        term._decoder.apply({"params": own}, each, hidden, method="hide") for each in (x, other)
    ]
    np.testing.assert_allclose(seen[0], seen[1], atol=1e-6)


def test_masks_follow_each_examples_key():
    term = make_term("masked_spectrogram", Patches(), SHAPE)
    params = tiny.quick_jit(Patches().init)(jax.random.key(0), pictures(1))["params"]
    own = tiny.quick_jit(term.init)(jax.random.key(1))
    same = jnp.repeat(pictures(1), 6, axis=0)
    error, coupled = term.encode(params, own, same, keys(6), True)
    assert coupled == {} and len(set(np.asarray(error).tolist())) > 2
    turned, _ = term.encode(params, own, same, keys(6)[::-1], True)
    np.testing.assert_allclose(turned, error[::-1], rtol=1e-6)


def test_cola_is_cross_entropy_over_the_rows():
    term = make_term("cola", Patches(), SHAPE)
    rng = np.random.default_rng(0)
    query, key = rng.standard_normal((2, 7, 5))
    logits = query @ key.T
    expected = (np.log(np.exp(logits).sum(1)) - np.diag(logits)).mean()
    coupled = {"query": jnp.asarray(query), "key": jnp.asarray(key)}
    np.testing.assert_allclose(term.couple(coupled), expected, rtol=1e-5)
    padded = jax.tree.map(lambda x: jnp.concatenate([x, 9 * x[:2]]), coupled)
    np.testing.assert_allclose(term.couple(padded, jnp.arange(9) < 7), expected, rtol=1e-5)


def test_cola_crops_differ_and_come_from_the_recording():
    term = make_term("cola", Patches(), SHAPE)
    params = tiny.quick_jit(Patches().init)(jax.random.key(0), pictures(1))["params"]
    error, coupled = term.encode(params, {}, pictures(8), keys(8), False)
    assert not error.any() and coupled["query"].shape == (8, 5)
    gap = np.abs(np.asarray(coupled["query"] - coupled["key"])).max(1)
    assert (gap > 0).sum() >= 5  # two of nine starts may be equal


@pytest.mark.parametrize("ssm", ["masked_spectrogram", "cola"])
def test_acula_with_the_term_is_exact_when_accumulated(ssm):
    student = AudioStudent(Patches(), lambda x: x.reshape(-1, *SHAPE), 128, ssm=ssm)
    config = AculaConfig(layers=(-1, 0), hidden=8, out=4, dropout=0.0)
    method = Acula(student, 6, config, ((r".*", ()),))
    params = tiny.quick_jit(method.init)(jax.random.key(0))
    assert ("term" in params) == (ssm == "masked_spectrogram")
    text = jax.random.normal(jax.random.key(3), (8, 6))
    batch = {"waveform": pictures(8).reshape(8, -1), "text": text}
    one, split = (
        jax.jit(lambda p, chunks=chunks: loss_and_grad(method, p, None, batch, keys(8), chunks))(
            params
        )
        for chunks in (1, 4)
    )
    name = {"masked_spectrogram": "reconstruction", "cola": "contrast"}[ssm]
    assert float(one[1][name]) > 0
    np.testing.assert_allclose(split[0], one[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(split[2]), jax.tree.leaves(one[2]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "module", "words"),
    [
        ("published", Patches(), "published without a reconstruction head"),
        ("cola", tiny.student().module, "objective of OPERA-CT"),
        ("simclr", Patches(), "'simclr' is not one of"),
    ],
)
def test_terms_that_an_encoder_does_not_have(kind, module, words):
    with pytest.raises(UserError, match=words):
        make_term(kind, module, SHAPE)


def test_clips_too_short_to_hide_anything():
    with pytest.raises(UserError, match="too short"):
        make_term("masked_spectrogram", Patches(), (4, 8))


def test_an_encoder_without_a_token_grid_says_what_its_config_lacks():
    @dataclasses.dataclass(frozen=True)
    class Config:
        footprint: tuple = (1, 1)

    class Bare(nn.Module):
        config: Config = Config()

    with pytest.raises(
        UserError, match=r"the config of Bare lacks grid, mask_unit, dtype .*ssm_weight=0"
    ):
        make_term("masked_spectrogram", Bare(), SHAPE)
    error, coupled = make_term("none", Bare(), SHAPE).encode(
        {}, {}, jnp.ones((3, *SHAPE)), None, True
    )
    assert error.tolist() == [0, 0, 0] and coupled == {}
