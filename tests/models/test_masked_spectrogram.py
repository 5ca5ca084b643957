"""What is hidden, what is predicted and what counts in masked-spectrogram modelling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medalign_jax.models.encoders.masked_spectrogram import MaskLayout, SpectrogramDecoder

LAYOUT = MaskLayout(grid=(5, 2), footprint=(4, 3), unit=(2, 1), ratio=0.5)  # 3 x 2 units
FRAMES, MELS, WIDTH = 22, 7, 6  # two frames and one bin lie beyond the grid


def features(batch: int = 3, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (batch, FRAMES, MELS)) * 3 + 2


@pytest.fixture(scope="module")
def decoder():
    module = SpectrogramDecoder(LAYOUT, MELS, hidden=8)
    params = module.init(jax.random.key(0), features(1), jnp.zeros((1, 10, WIDTH)))["params"]
    params = params | {"mask_value": jnp.arange(MELS, dtype=jnp.float32)}
    return lambda method, *inputs: module.apply({"params": params}, *inputs, method=method)


def noise(batch: int = 3, seed: int = 1) -> jax.Array:
    return jax.random.uniform(jax.random.key(seed), (batch, LAYOUT.units))


def test_every_example_hides_as_many_whole_units():
    assert (LAYOUT.units, LAYOUT.hidden_units) == (6, 3)
    hidden = np.asarray(LAYOUT.hidden(noise(40)))
    assert hidden.shape == (40, 5, 2)
    np.testing.assert_array_equal(hidden[:, 0], hidden[:, 1])
    np.testing.assert_array_equal(hidden[:, 2], hidden[:, 3])
    units = hidden[:, ::2]
    assert (units.reshape(40, -1).sum(1) == 3).all()
    assert len({row.tobytes() for row in units}) > 10


def test_hidden_cells_hold_the_mean_and_the_learned_value_and_others_stay(decoder):
    x, hidden = np.asarray(features()), np.asarray(LAYOUT.hidden(noise()))
    seen = np.asarray(decoder("hide", x, hidden))
    cover = np.zeros(x.shape, bool)
    for b, row, column in zip(*np.nonzero(hidden), strict=True):
        cover[b, 4 * row : 4 * row + 4, 3 * column : 3 * column + 3] = True
    np.testing.assert_array_equal(seen[~cover], x[~cover])
    expected = np.broadcast_to(x.mean((1, 2), keepdims=True) + np.arange(MELS), x.shape)
    np.testing.assert_allclose(seen[cover], expected[cover], rtol=1e-5)
    assert not cover[:, 20:].any() and not cover[:, :, 6:].any()


def test_the_error_counts_hidden_parts_only_and_is_zero_when_they_are_right(decoder):
    x, hidden = np.asarray(features(), np.float64), np.asarray(LAYOUT.hidden(noise()))
    scaled = (x - x.mean((1, 2), keepdims=True)) / np.sqrt(x.var((1, 2), keepdims=True) + 1e-6)
    parts = scaled[:, :20, :6].reshape(3, 5, 4, 2, 3).transpose(0, 1, 3, 2, 4).reshape(3, 10, 12)
    away = np.where(hidden.reshape(3, 10, 1), parts, 99.0)
    right = decoder("error", features(), jnp.asarray(away, jnp.float32), hidden)
    np.testing.assert_allclose(right, 0.0, atol=1e-10)
    off = decoder("error", features(), jnp.asarray(parts + 2.0, jnp.float32), hidden)
    np.testing.assert_allclose(off, 4.0, rtol=1e-5)


def test_a_target_is_free_of_gain_and_offset(decoder):
    x, hidden, predicted = features(), LAYOUT.hidden(noise()), jnp.ones((3, 10, 12))
    plain = decoder("error", x, predicted, hidden)
    np.testing.assert_allclose(decoder("error", 5 * x - 40, predicted, hidden), plain, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ratio": 0.0}, "between 0 and 1"),
        ({"ratio": 1.0}, "between 0 and 1"),
        ({"grid": (1, 1), "unit": (1, 1)}, "too short"),
        ({"unit": (8, 2)}, "too short"),
    ],
)
def test_layouts_that_cannot_be(changes, words):
    with pytest.raises(ValueError, match=words):
        MaskLayout(**({"grid": (5, 2), "footprint": (4, 3)} | changes))


def test_a_picture_shorter_than_the_grid_is_filled_up(decoder):
    """A convolution's last token may reach beyond the input."""
    short = features()[:, :18]
    hidden = jnp.ones((3, 5, 2), bool)
    assert decoder("hide", short, hidden).shape == short.shape
    assert np.isfinite(decoder("error", short, jnp.zeros((3, 10, 12)), hidden)).all()
