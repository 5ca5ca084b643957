"""The convolution for loops: values and gradients of `nn.Conv`, without its slow gradient."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medalign_jax.models.layers.convolution import convolve


def gradients(layer, variables, x, weigh):
    def weighed(variables, x):
        out = layer.apply(variables, x)
        return jnp.sum((out * weigh).astype(jnp.float32)), out

    return jax.jit(jax.value_and_grad(weighed, argnums=(0, 1), has_aux=True))(variables, x)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("shape", "size", "settings"),
    [
        ((2, 9, 4), (3,), {"padding": 1}),
        ((2, 9, 4), (3,), {"padding": 1, "strides": 2}),
        ((2, 10, 4), (3,), {"padding": 1, "strides": 2}),
        ((2, 10, 4), (4,), {"padding": "SAME", "strides": 3}),
        ((2, 7, 6, 3), (3, 2), {"padding": ((0, 2), (1, 0)), "strides": (2, 1)}),
        ((2, 7, 6, 3), (2, 3), {"padding": "VALID"}),
    ],
)
def test_equals_the_convolution(shape, size, settings, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], shape, dtype)
    plain = nn.Conv(5, size, dtype=dtype, **settings)
    ours = nn.Conv(5, size, dtype=dtype, conv_general_dilated=convolve, **settings)
    variables = plain.init(keys[1], x)
    weigh = jax.random.normal(keys[2], plain.apply(variables, x).shape, dtype)
    tolerance = 1e-5 if dtype == jnp.float32 else 4e-2
    pairs = (jax.tree.leaves(gradients(layer, variables, x, weigh)) for layer in (ours, plain))
    for one, other in zip(*pairs, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        one, other = (np.asarray(each, np.float32) for each in (one, other))
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


def test_no_convolution_of_another_order_is_left_in_a_loop_on_a_cpu():
    """The order of axes that XLA's CPU compiler has a fast convolution for is b01f_01io."""

    def program(**how):
        layer = nn.Conv(5, (3,), padding=1, strides=2, **how)
        x = jnp.ones((4, 2, 9, 4))
        variables = layer.init(jax.random.key(0), x[0])

        def gradient(x):
            return jax.grad(lambda v, x: layer.apply(v, x).sum(), argnums=(0, 1))(variables, x)

        lowered = jax.jit(lambda x: jax.lax.map(gradient, x)).lower(x)
        return lowered.compile().as_text()

    def orders(text):
        marks = (part.split("dim_labels=")[1] for part in text.split(",") if "dim_labels=" in part)
        return {mark.split()[0].strip() for mark in marks}

    if jax.default_backend() != "cpu":
        pytest.skip("of XLA's CPU compiler")
    assert orders(program(conv_general_dilated=convolve)) <= {"b0f_0io->b0f", "b0f_0oi->b0f"}
    assert "f0b_i0o->0bf" in orders(program())


@pytest.mark.parametrize(
    "more", [{"kernel_dilation": 2}, {"input_dilation": 2}, {"feature_group_count": 2}]
)
def test_refuses_what_it_does_not_do(more):
    layer = nn.Conv(4, (3,), conv_general_dilated=convolve, **more)
    with pytest.raises(ValueError, match="without dilation and groups"):
        jax.eval_shape(lambda x: layer.init(jax.random.key(0), x), jnp.ones((2, 9, 4)))
