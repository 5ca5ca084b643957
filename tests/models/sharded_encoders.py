"""Run by test_registry.py with eight virtual devices.

Every encoder's module laid out over a mesh gives the feature and the gradients of one device.
"""

import jax
import jax.numpy as jnp
import numpy as np

from medalign_jax.architecture import Architecture
from medalign_jax.core.mesh import batch_sharding, make_mesh, named_leaves, shardings
from tests.tiny_models import quick_jit
from tests.toy_encoders import ONE_OF_EACH, toy


def compare(name: str) -> None:
    """Asserts equal features on one mesh, equal features and gradients on the other."""
    made = toy(name)
    config, rng = made.module.config, np.random.default_rng(0)
    features = rng.standard_normal((8, min(config.frames, 40), config.mels)).astype(np.float32)
    params = jax.tree.map(
        lambda leaf: (0.1 * np.abs(rng.standard_normal(leaf.shape))).astype(leaf.dtype),
        made.abstract_params(),
    )

    def embed(params, features):
        return made.module.apply({"params": params}, features, method="embed")[0]

    def loss(params, features):
        feature = embed(params, features)
        return jnp.sum(jnp.sin(3 * feature)), feature

    forward = quick_jit(embed)
    step = quick_jit(jax.grad(loss, has_aux=True))
    gradients, feature = jax.device_get(step(params, features))

    close(forward(*spread(made, params, features, fsdp=8)), feature, f"{name}, fsdp 8")
    got_gradients, got = step(*spread(made, params, features, tensor=2, fsdp=4))
    close(got, feature, f"{name}, tensor 2, fsdp 4")
    wanted = named_leaves(gradients)
    for path, leaf in named_leaves(got_gradients).items():
        close(leaf, wanted[path], f"{name}, tensor 2, fsdp 4, gradient of {path}")


def spread(made: Architecture, params, features: np.ndarray, **sizes: int):
    """Parameters and features laid out over a mesh, which has to divide some of the former."""
    mesh = make_mesh(data=1, **sizes)
    params = jax.device_put(params, shardings(params, made.sharding, mesh))
    parts = [(leaf.addressable_shards[0].data.size, leaf.size) for leaf in jax.tree.leaves(params)]
    assert any(part < whole for part, whole in parts), f"{made.name}: nothing is divided"
    return params, jax.device_put(features, batch_sharding(mesh))


def close(ours: jax.Array, alone: np.ndarray, label: str) -> None:
    bound = 1e-5 * max(1.0, np.abs(alone).max())
    np.testing.assert_allclose(ours, alone, rtol=0, atol=bound, err_msg=label)


def main() -> None:
    assert len(jax.devices()) == 8
    for name in ONE_OF_EACH:
        compare(name)


if __name__ == "__main__":
    main()
