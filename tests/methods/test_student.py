"""The audio side by itself, and the numbers that tell a collapse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medalign_jax.audio.augment import Augment
from medalign_jax.methods.student import embedding_health, split
from tests import tiny_models as tiny


def keys(count: int, seed: int = 0):
    return jax.random.split(jax.random.key(seed), count)


def test_sizes_follow_from_the_front_end():
    side = tiny.student()
    assert side.feature_shape == (16, 64)


def test_features_without_training_are_those_of_the_front_end():
    side, waveforms = tiny.student(), tiny.waveforms(3)
    np.testing.assert_array_equal(
        side.features(waveforms, keys(3), False), tiny.FRONT_END(waveforms)
    )


def test_features_in_training_are_augmented_by_each_samples_key():
    side = tiny.student(augment=Augment(band_mask=1.0))
    waveforms = np.repeat(tiny.waveforms(1), 4, axis=0)
    features = np.asarray(side.features(waveforms, keys(4), True))
    plain = np.asarray(tiny.FRONT_END(waveforms))
    assert all((features[i] != plain[i]).any() for i in range(4))
    assert len({features[i].tobytes() for i in range(4)}) == 4
    again = np.asarray(side.features(waveforms[:2], keys(4)[2:], True))
    np.testing.assert_array_equal(again, features[2:])


def test_without_augmentation_training_features_are_plain():
    side, waveforms = tiny.student(augment=Augment()), tiny.waveforms(2)
    np.testing.assert_array_equal(
        side.features(waveforms, keys(2), True), tiny.FRONT_END(waveforms)
    )


def test_loaded_parameters_are_what_a_run_starts_from():
    params = {"loaded": jnp.ones(3)}
    assert tiny.student(params=params).initial(jax.random.key(0)) == {"encoder": params}


def test_each_example_is_masked_by_its_own_key():
    side = tiny.student()
    params = tiny.quick_jit(side.init)(jax.random.key(0))
    features = np.repeat(tiny.FRONT_END(tiny.waveforms(1)), 6, axis=0)
    reconstruct = tiny.quick_jit(lambda *args: side.self_supervised(*args, True)[0])
    error = np.asarray(reconstruct(params, features, keys(6, seed=1)))
    assert len(set(error.tolist())) == 6
    turned = reconstruct(params, features, keys(6, seed=1)[::-1])
    np.testing.assert_array_equal(turned, error[::-1])


def test_split_gives_independent_sets():
    sets = split(keys(5), 3)
    data = np.concatenate([jax.random.key_data(part) for part in sets])
    assert len(sets) == 3 and sets[0].shape == (5,) and len(np.unique(data, axis=0)) == 15


def health(embeddings, mask=None) -> tuple[float, float]:
    found = embedding_health(jnp.asarray(embeddings, jnp.float32), mask)
    return float(found["embedding_variance"]), float(found["effective_rank"])


def test_health_of_known_matrices():
    """Rows ±e_i: variance 1/n of the rows' squares, as many equal eigenvalues as directions."""
    for directions in (1, 2, 4):
        rows = np.concatenate([np.eye(4)[:directions], -np.eye(4)[:directions]]) * 3.0
        variance, rank = health(rows + 7.0)
        assert variance == pytest.approx(9.0 / 4, rel=1e-5)
        assert rank == pytest.approx(directions, rel=1e-5)


def test_health_of_unequal_directions():
    """Variances 3 and 1 along two axes: (3 + 1)² / (9 + 1)."""
    rows = np.array([[3.0, 1], [3, -1], [-3, 1], [-3, -1]]) * np.sqrt([1 / 3, 1.0])
    assert health(rows) == pytest.approx((2.0, 1.6), rel=1e-5)


def test_health_agrees_with_numpy():
    x = np.random.default_rng(0).standard_normal((40, 7)) * np.arange(1, 8)
    eigenvalues = np.linalg.eigvalsh(np.cov(x.T, bias=True))
    expected = eigenvalues.sum() ** 2 / np.square(eigenvalues).sum()
    assert health(x) == pytest.approx((x.var(0).mean(), expected), rel=1e-4)


def test_health_of_a_collapsed_encoder_is_zero():
    assert health(np.ones((6, 3))) == (0.0, 0.0)


def test_health_leaves_out_masked_rows():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((8, 5))
    padded = np.concatenate([x, 1e3 * rng.standard_normal((3, 5))])
    mask = jnp.arange(11) < 8
    assert health(padded, mask) == pytest.approx(health(x), rel=1e-4)
