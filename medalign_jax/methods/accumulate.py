"""Loss and gradient of a batch in one piece or in several, which give the same.

The parts are first embedded without gradients; the gradient of `Method.couple` with respect to all
embeddings is taken at once and back-propagated part by part (Gao et al. 2021, "Scaling Deep
Contrastive Learning Batch Size under Memory Limited Setup"). A method that couples nothing is
spared the first of the two.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from medalign_jax.methods.base import Method, Tree


def loss_and_grad(
    method: Method, params: Tree, frozen: Tree, batch: Tree, keys: jax.Array, chunks: int
) -> tuple[jax.Array, dict[str, jax.Array], Tree]:
    """Loss, metrics and gradient of the whole batch, computed in `chunks` equal parts.

    Chunk i takes the samples i, i + chunks, ...: each device's share of the batch is cut the same
    way, so chunking moves nothing between devices.
    """
    batch = method.weigh(batch)
    if chunks == 1:

        def whole(params):
            encoded = method.encode(params, frozen, batch, keys, True)
            loss, metrics = method.couple(encoded.coupled)
            return loss + encoded.per_example.mean(), metrics | _means(encoded.metrics)

        (loss, metrics), grads = jax.value_and_grad(whole, has_aux=True)(params)
        return loss, metrics, grads

    parts = jax.tree.map(lambda x: _split(x, chunks), (batch, keys))

    def embed(part):
        return method.encode(params, frozen, *part, True).coupled

    coupled = jax.eval_shape(embed, jax.tree.map(lambda x: x[0], parts))
    if jax.tree.leaves(coupled):
        coupled = jax.tree.map(_join, jax.lax.map(embed, parts))
    (coupled_loss, metrics), pull = jax.value_and_grad(method.couple, has_aux=True)(coupled)
    pull = jax.tree.map(lambda x: _split(x, chunks), pull)

    def add_chunk(total, inputs):
        (part, part_keys), part_pull = inputs

        def surrogate(params):
            encoded = method.encode(params, frozen, part, part_keys, True)
            products = jax.tree.map(lambda x, g: (x * g).sum(), encoded.coupled, part_pull)
            own = encoded.per_example.mean() / chunks
            return sum(jax.tree.leaves(products), own), (own, _means(encoded.metrics))

        grads, (own, means) = jax.grad(surrogate, has_aux=True)(params)
        return jax.tree.map(jnp.add, total, grads), (own, means)

    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, (own, means) = jax.lax.scan(add_chunk, zeros, (parts, pull))
    metrics = metrics | jax.tree.map(lambda x: x.mean(0), means)
    return coupled_loss + own.sum(), metrics, grads


def _means(metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: value.mean() for name, value in metrics.items()}


def _split(x: jax.Array, chunks: int) -> jax.Array:
    """(B, ...) -> (chunks, B / chunks, ...), interleaved."""
    return jnp.swapaxes(x.reshape(x.shape[0] // chunks, chunks, *x.shape[1:]), 0, 1)


def _join(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])
