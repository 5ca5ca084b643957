"""The dense layers' product: like `jnp.matmul`, in value and gradient."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medalign_jax.models.layers.flat_dot import flat_dot


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("leading", [(), (5,), (3, 4), (2, 3, 4)])
def test_equals_dense_layer(leading, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (*leading, 6), dtype)
    weigh = jax.random.normal(keys[1], (*leading, 7), dtype)
    plain = nn.Dense(7, dtype=dtype)
    flat = nn.Dense(7, dtype=dtype, dot_general=flat_dot)
    variables = plain.init(keys[2], x)

    def both(layer):
        def weighed(variables, x):
            out = layer.apply(variables, x)
            return jnp.sum((out * weigh).astype(jnp.float32)), out

        return jax.jit(jax.value_and_grad(weighed, argnums=(0, 1), has_aux=True))(variables, x)

    tolerance = 1e-6 if dtype == jnp.float32 else 1e-2
    for ours, theirs in zip(jax.tree.leaves(both(flat)), jax.tree.leaves(both(plain)), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        ours, theirs = (np.asarray(each, np.float32) for each in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def test_refuses_another_product():
    x, kernel = jnp.ones((2, 3)), jnp.ones((2, 3))
    with pytest.raises(ValueError, match="by a matrix only"):
        flat_dot(x, kernel, (((0,), (0,)), ((), ())))
