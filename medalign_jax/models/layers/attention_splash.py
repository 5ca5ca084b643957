"""Attention on a TPU by JAX's Splash kernel, which skips the blocks that are masked for all.

The kernel (``jax.experimental.pallas.ops.tpu.splash_attention``) has neither a scale nor a key
mask: the scale goes into the queries, and padding becomes a segment of its own, so that no token
looks at padding. What comes out at padding is an average of padding; it means nothing.

A kernel cannot be divided over devices by the compiler. Under ``jax.set_mesh`` it runs on each
device's texts (mesh axes data, fsdp) and heads (tensor); without it, on one device only.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec

LANES = 128  # of a TPU's vector unit: lengths and head widths are multiples of it
_BLOCKS = (512, 256, 128)  # largest first: of queries and of keys at a time


def misfit(
    q: jax.Array, k: jax.Array, bias: jax.Array | None, mask: jax.Array | None
) -> str | None:
    """Why these inputs (as for ``attention``) cannot be handed to the kernel; None if they can."""
    if q.shape[1] != k.shape[1] or q.shape[1] % LANES:
        return f"lengths have to be equal and a multiple of {LANES}, got {q.shape[1]}, {k.shape[1]}"
    if bias is not None:
        return "it takes no bias"
    if mask is not None and (mask.shape[1] != 1 or mask.shape[2] != 1):
        return f"its mask has to be over keys only, (B, 1, 1, S), got {mask.shape}"
    return None


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    scale: float,
    causal: bool,
    window: int | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Attention of a text with itself; arguments as in ``attention``.

    Args:
      q: (B, T, Hq, D).
      k, v: (B, T, Hkv, D).
      mask: (B, 1, 1, T) or (1, 1, 1, T) bool, or None.
      scale, causal, window: as in ``attention``.
      interpret: runs the kernel's text on any platform, slowly.

    Returns:
      (B, T, Hq, D) of q's type.
    """
    batch, length, _, depth = q.shape
    segments = jnp.ones((batch, length), jnp.int32)
    if mask is not None:
        segments = jnp.broadcast_to(mask[:, 0, 0], (batch, length)).astype(jnp.int32)
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    # Zero channels add nothing to a score, and give zeros that are cut off.
    wide = [(0, 0)] * 3 + [(0, -depth % LANES)]
    q, k, v = (jnp.pad(x, wide) for x in (q, k, v))
    run = partial(_on_one_device, causal=causal, window=window, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        rows, heads = _spread(mesh, batch, k.shape[2])
        each = PartitionSpec(rows, None, heads, None)
        specs = (each, each, each, PartitionSpec(rows, None))
        run = jax.shard_map(run, in_specs=specs, out_specs=each, check_vma=False)
    return run(q, k, v, segments)[..., :depth]


def _spread(
    mesh: jax.sharding.AbstractMesh, batch: int, heads: int
) -> tuple[tuple[str, ...] | None, str | None]:
    """Mesh axes over which texts and key heads divide."""
    rows = tuple(axis for axis in ("data", "fsdp") if axis in mesh.shape)
    ways = math.prod(mesh.shape[axis] for axis in rows)
    tensor = mesh.shape.get("tensor", 1)
    return (rows if rows and batch % ways == 0 else None), (
        "tensor" if tensor > 1 and heads % tensor == 0 else None
    )


def _on_one_device(q, k, v, segments, *, causal, window, interpret):
    length, heads = q.shape[1], q.shape[2]
    made = kernel.make_splash_mha_single_device(
        masks.MultiHeadMask([_rule(length, causal, window)] * heads),
        block_sizes=_block_sizes(length),
        interpret=interpret,
    )

    def one(q, k, v, segments):
        return made(q, k, v, segment_ids=kernel.SegmentIds(segments, segments))

    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    return jnp.swapaxes(jax.vmap(one)(q, k, v, segments), 1, 2)


def _rule(length: int, causal: bool, window: int | None) -> masks.Mask:
    shape = (length, length)
    if window is not None:
        return masks.LocalMask(shape, (window - 1, 0 if causal else window - 1), 0)
    return masks.CausalMask(shape) if causal else masks.FullMask(shape)


def _block_sizes(length: int) -> kernel.BlockSizes:
    size = next(size for size in _BLOCKS if length % size == 0)
    return kernel.BlockSizes(
        block_q=size, block_kv=size, block_kv_compute=size,
        block_q_dkv=size, block_kv_dkv=size, block_kv_dkv_compute=size,
        block_q_dq=size, block_kv_dq=size,
    )  # fmt: skip
