"""Run by test_generate.py with eight virtual devices.

A decoder laid out over a mesh gives the hidden states, logits, gradients and generated tokens of
one device, also where the heads do not divide by the mesh.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from medalign_jax.core.mesh import batch_sharding, make_mesh, shardings
from medalign_jax.models.generate import generate
from medalign_jax.models.language.decoder import CACHE_SHARDING, Decoder, empty_cache
from medalign_jax.models.language.decoder_config import DecoderConfig
from medalign_jax.weights.tables.decoder import SHARDING

TINY = DecoderConfig(
    vocab_size=61, padded_vocab=64, width=32, heads=3, kv_heads=3, head_dim=16, mlp_width=64,
    sliding=(True, False), window=3, attention_scale=0.25, max_positions=32, qk_norm=True,
    qkv_bias=True, out_bias=True, mlp_bias=True, tied=False,
)  # fmt: skip
CONFIGS = {
    "three key heads": TINY,
    "one key head": dataclasses.replace(TINY, heads=4, kv_heads=1, tied=True, post_norms=True),
}


def main():
    assert len(jax.devices()) == 8
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 61, (8, 6)).astype(np.int32)
    mask = np.arange(6) >= np.array([0, 1, 5, 2, 0, 3, 4, 0])[:, None]
    for name, config in CONFIGS.items():
        model = Decoder(config)
        params = jax.jit(model.init)(jax.random.key(0), ids, mask)["params"]

        def loss(params, ids, mask, model=model):
            hidden, _ = model.apply({"params": params}, ids, mask)
            logits = model.apply({"params": params}, hidden, method="logits")
            return jnp.sum(jnp.sin(logits) * mask[..., None]), (hidden, logits)

        step = jax.jit(jax.value_and_grad(loss, has_aux=True))
        alone = jax.device_get(step(params, ids, mask))
        written = generate(model, params, ids, mask, max_new_tokens=3)
        for sizes in ({"fsdp": 8}, {"tensor": 2, "fsdp": 4}):
            mesh = make_mesh(data=1, **sizes)
            spread = jax.device_put(params, shardings(params, SHARDING, mesh))
            rows = jax.device_put((ids, mask), batch_sharding(mesh))
            (_, (hidden, logits)), gradients = jax.device_get(step(spread, *rows))
            (_, (hidden0, logits0)), gradients0 = alone
            np.testing.assert_allclose(hidden[mask], hidden0[mask], rtol=0, atol=1e-5)
            np.testing.assert_allclose(logits[mask], logits0[mask], rtol=0, atol=1e-5)
            for one, other in zip(
                jax.tree.leaves(gradients), jax.tree.leaves(gradients0), strict=True
            ):
                bound = 1e-5 * max(1.0, np.abs(other).max())
                np.testing.assert_allclose(one, other, rtol=0, atol=bound, err_msg=name)
            if "tensor" in sizes:
                got = generate(model, spread, ids, mask, max_new_tokens=3, mesh=mesh)
                np.testing.assert_array_equal(got.tokens, written.tokens)
            check_layout(config, spread, mesh)


def check_layout(config, params, mesh):
    """What can be divided is; key heads of a cache that cannot stay whole."""
    for path in (("attention", "query"), ("mlp", "up"), ("mlp", "down")):
        kernel = params["layers"][path[0]][path[1]]["kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size // 8, path
    embedding = params["embed"]["embedding"]
    assert embedding.addressable_shards[0].data.size == embedding.size // 8
    cache = empty_cache(config, 8, 4, jnp.float32)
    spec = shardings(cache, CACHE_SHARDING, mesh).key.spec
    assert spec[1] == ("data", "fsdp") and spec[3] is None


if __name__ == "__main__":
    main()
