import numpy as np
import pytest

from medalign_jax.evaluate.projection import embedding_map


def test_axes_are_those_of_the_training_set():
    rng = np.random.default_rng(0)
    train = rng.standard_normal((200, 5)) * np.array([5.0, 2.0, 0.1, 0.1, 0.1])
    other = rng.standard_normal((30, 5))
    result = embedding_map(train, other)
    assert [c.shape for c in result.coordinates] == [(200, 2), (30, 2)]
    np.testing.assert_allclose(result.coordinates[0].mean(0), 0, atol=1e-9)
    assert abs(np.corrcoef(result.coordinates[0][:, 0], train[:, 0])[0, 1]) > 0.999
    assert sum(result.explained) > 0.99
    np.testing.assert_allclose(embedding_map(train).coordinates[0], result.coordinates[0])


def test_sign_does_not_depend_on_the_order_of_rows():
    train = np.random.default_rng(0).standard_normal((50, 8))
    a = embedding_map(train).coordinates[0]
    b = embedding_map(train[::-1]).coordinates[0][::-1]
    np.testing.assert_allclose(a, b, atol=1e-9)


def test_degenerate_sets():
    flat = embedding_map(np.ones((4, 3)))
    assert flat.explained == (0.0, 0.0)
    assert not flat.coordinates[0].any()
    line = embedding_map(np.arange(5.0)[:, None])
    assert line.coordinates[0].shape == (5, 2)
    with pytest.raises(ValueError, match="not finite rows of one width"):
        embedding_map(np.ones((4, 3)), np.ones((4, 2)))
