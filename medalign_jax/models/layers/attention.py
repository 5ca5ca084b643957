"""Scaled dot-product attention: one function, several back ends with equal results.

    out[b, t, h] = sum_s softmax_s(scale * q[b, t, h] . k[b, s, n] + bias[b, h, t, s]) v[b, s, n]

with n = h // (query heads / key heads).

Back ends:

* ``xla``   einsum, softmax, einsum; holds all (B, H, T, S) scores at once. Any platform.
* ``blocked`` the same for a few pairs (example, key head) at a time, so that the scores stay in a
  processor's cache. Any platform. The backward pass recomputes them from the saved
  log-sum-exp (Dao et al. 2022, "FlashAttention", algorithms 1 and 4, without the tiling over keys).
* ``cudnn`` the fused kernel of cuDNN through `jax.nn.dot_product_attention`; NVIDIA GPUs, 16-bit,
  no window that looks ahead.
* ``splash`` the fused kernel of `attention_splash`; TPUs, self-attention, keys masked for padding
  only. The others give a padded query what it may look at, this one gives it nothing of use.
* ``auto``  what fits the platform of this process: ``splash`` on a TPU and ``cudnn`` on a GPU where
  shapes and type allow, ``blocked`` on a CPU once the scores outgrow the cache, else ``xla``. To
  compile for a platform that is not here, name the back end.

Scores and softmax are float32 whatever the type of the inputs.
"""

import functools
import math

import jax
import jax.numpy as jnp

BACKENDS = ("auto", "xla", "blocked", "cudnn", "splash")

# Below this many bytes of scores the loop of the blocked back end costs more than it saves.
_SMALL_BYTES = 8 << 20

# Shorter sequences are not worth a fused kernel on a GPU. Initialisers are among them: they look at
# two tokens, under a vmap over the layers, in which cuDNN's kernel would want a mask for each head.
_SHORT = 64

# Scores that a turn of that loop works on: short sequences share one.
_BLOCK_BYTES = 3 << 20


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    backend: str = "auto",
) -> jax.Array:
    """Multi-head attention; grouped-query when k and v have fewer heads than q.

    Args:
      q: (B, T, Hq, D).
      k: (B, S, Hkv, D), with Hq a multiple of Hkv; query head h reads key head h // (Hq / Hkv).
      v: (B, S, Hkv, D).
      bias: added to the scaled scores; 4 dimensions, each equal to or 1 in place of (B, Hq, T, S).
      mask: boolean, True where a query may look; shaped as `bias` (key padding: (B, 1, 1, S)).
      scale: factor of the scores; 1 / sqrt(D) by default.
      causal: query t sees keys up to t only; needs T == S.
      window: query t sees keys with |t - s| < window only; needs T == S.
      backend: one of `BACKENDS`.

    Returns:
      (B, T, Hq, D) of q's type. A query that may look nowhere gets zeros.

    Raises:
      ValueError: shapes that do not fit, an unknown back end, cuDNN without an NVIDIA GPU, or
        what the kernels of cuDNN and Splash cannot do.
    """
    _check(q, k, v, bias, mask, causal, window, backend)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    bias = None if bias is None else jnp.asarray(bias)
    mask = None if mask is None else jnp.asarray(mask)
    if backend == "auto":
        backend = _choose(q, k, bias, mask, two_sided=window is not None and not causal)
    if backend == "cudnn":
        return _cudnn(q, k, v, bias, mask, scale, causal, window)
    if backend == "splash":
        return _splash(q, k, v, bias, mask, scale, causal, window)
    mask = _visible(q.shape[1], mask, causal, window)
    run = _blocked if backend == "blocked" else _whole
    return run(q, k, v, bias, mask, scale)


def _choose(q, k, bias=None, mask=None, platform=None, two_sided=False) -> str:
    platform = platform or jax.default_backend()
    if platform == "tpu":
        return "splash" if _splash_pays(q, k, bias, mask) else "xla"
    if platform == "gpu":
        # What the fused kernel takes on every card since Ampere.
        fused = q.dtype.itemsize == 2 and q.shape[3] % 8 == 0 and q.shape[3] <= 128
        plain = bias is None and not two_sided and q.shape[1] >= _SHORT
        return "cudnn" if fused and plain else "xla"
    scores = 4 * q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1]
    return "blocked" if platform == "cpu" and scores > _SMALL_BYTES else "xla"


def _splash_pays(q, k, bias, mask) -> bool:
    from medalign_jax.models.layers.attention_splash import misfit

    mesh = jax.sharding.get_abstract_mesh()
    alone = jax.device_count() == 1 or not mesh.empty  # else the compiler would have to divide it
    return alone and misfit(q, k, bias, mask) is None


def _splash(q, k, v, bias, mask, scale, causal, window):
    from medalign_jax.models.layers.attention_splash import (  # Pallas takes time to import
        misfit,
        splash,
    )

    reason = misfit(q, k, bias, mask)
    if reason is not None:
        raise ValueError(f"attention: back end 'splash': {reason}; use backend='auto'")
    return splash(q, k, v, mask, scale, causal, window)


def _check(q, k, v, bias, mask, causal, window, backend) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"attention: unknown backend {backend!r}; choose one of {BACKENDS}")
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            "attention: q must be (B, T, Hq, D) and k, v (B, S, Hkv, D), "
            f"got {q.shape}, {k.shape}, {v.shape}"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"attention: q {q.shape} and k {k.shape} need equal B and D, and Hq a multiple of Hkv"
        )
    if (causal or window is not None) and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"attention: causal and window need T == S, got T={q.shape[1]}, S={k.shape[1]}; "
            "pass a mask instead"
        )
    if window is not None and window < 1:
        raise ValueError(f"attention: window must be at least 1, got {window}")
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    for name, array in (("bias", bias), ("mask", mask)):
        if array is None:
            continue
        if array.ndim != 4 or any(a not in (1, f) for a, f in zip(array.shape, full, strict=True)):
            raise ValueError(f"attention: {name} {array.shape} does not broadcast to {full}")
    if mask is not None and mask.dtype != jnp.bool_:
        raise ValueError(f"attention: mask must be boolean, got {mask.dtype}")


def _visible(length, mask, causal, window):
    """`mask` together with the causal and window rules, or None when all is visible."""
    if causal or window is not None:
        ahead = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
        rule = (ahead >= 0) if causal else jnp.ones_like(ahead, dtype=bool)
        if window is not None:
            rule &= jnp.abs(ahead) < window
        mask = rule[None, None] if mask is None else mask & rule[None, None]
    return mask


def _cudnn(q, k, v, bias, mask, scale, causal, window):
    if jax.default_backend() != "gpu":
        raise ValueError(
            "attention: backend 'cudnn' needs an NVIDIA GPU, and this process runs on "
            f"{jax.default_backend()!r}; use backend='auto'"
        )
    if window is not None and not causal:
        raise ValueError(
            "attention: backend 'cudnn' has no window that looks ahead; use backend='auto'"
        )
    out = _fused(q, k, v, bias, mask, scale, causal, window)
    if mask is None:
        return out
    visible = _visible(q.shape[1], mask, causal, window)
    some = jnp.any(visible, axis=-1)  # (B|1, Hq|1, T|1)
    return jnp.where(jnp.swapaxes(some, 1, 2)[..., None], out, 0)


def _fused(q, k, v, bias, mask, scale, causal, window):
    """cuDNN's kernel. It wants all queries and keys of a mask, and its gradient even numbers."""
    queries, keys = q.shape[1], k.shape[1]
    if keys % 2 and mask is None:
        mask = jnp.ones((1, 1, 1, keys), bool)
    bias, mask = (x if x is None else _spread(x, queries, keys) for x in (bias, mask))
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    local = None if window is None else (window - 1, 0)
    out = jax.nn.dot_product_attention(
        q, k, v, bias, mask, scale=scale, is_causal=causal, local_window_size=local,
        implementation="cudnn",
    )  # fmt: skip
    return out[:, :queries]


def _spread(array, queries, keys):
    """(b, h, t, s) to (b, h, queries, keys), both made even: a row like the last, zeros as keys."""
    full = jnp.broadcast_to(array, (*array.shape[:2], queries, keys))
    full = jnp.pad(full, ((0, 0), (0, 0), (0, queries % 2), (0, 0)), mode="edge")
    return jnp.pad(full, ((0, 0), (0, 0), (0, 0), (0, keys % 2)))


def _whole(q, k, v, bias, mask, scale):
    """All scores at once. Shapes as in `attention`."""
    batch, length, heads, depth = q.shape
    groups = k.shape[2]
    q = q.reshape(batch, length, groups, heads // groups, depth)
    scores = scale * jnp.einsum("btngd,bsnd->bngts", q, k, preferred_element_type=jnp.float32)
    weights = _softmax(scores, _grouped(bias, groups), _grouped(mask, groups))
    out = jnp.einsum("bngts,bsnd->btngd", weights.astype(v.dtype), v)
    return out.reshape(batch, length, heads, depth).astype(q.dtype)


def _grouped(array, groups):
    """(b, h, t, s) to (b, n, g, t, s), where every dimension may be 1 for broadcasting."""
    if array is None:
        return None
    b, h, t, s = array.shape
    return array.reshape(b, groups if h > 1 else 1, h // groups if h > 1 else 1, t, s)


def _softmax(scores, bias, mask):
    """Softmax over the last axis; rows without a visible key are zero."""
    if bias is not None:
        scores = scores + bias.astype(jnp.float32)
    if mask is None:
        return jax.nn.softmax(scores, axis=-1)
    # A finite floor keeps a fully masked row free of NaN in value and in gradient.
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    return jnp.where(mask, jax.nn.softmax(scores, axis=-1), 0.0)


def _blocked(q, k, v, bias, mask, scale):
    """The key heads of all examples, some at a time; see `_cores`."""
    batch, length, heads, depth = q.shape
    keys, groups = k.shape[1], k.shape[2]
    per_group = heads // groups
    rows = q.reshape(batch, length, groups, per_group, depth).transpose(0, 2, 3, 1, 4)
    rows = (rows * jnp.asarray(scale, q.dtype)).reshape(batch * groups, per_group * length, depth)
    k = k.transpose(0, 2, 1, 3).reshape(batch * groups, keys, depth)
    v = v.transpose(0, 2, 1, 3).reshape(batch * groups, keys, depth)
    out = _cores((groups, per_group), rows, k, v, _grouped(bias, groups), _grouped(mask, groups))
    out = out.reshape(batch, heads, length, depth).transpose(0, 2, 1, 3)
    return out.astype(q.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cores(layout, q, k, v, bias, mask):
    """Attention of N independent (example, key head) pairs in a loop, `_pairs` of them per turn.

    Args:
      layout: (key heads, query heads per key head); static.
      q: (N, R, D), already scaled; the R rows are (query head of the group, query).
      k, v: (N, S, D).
      bias, mask: (b, n, g, t, s) with 1 for what is shared, or None.

    Returns:
      (N, R, D) float32.
    """
    return _cores_forward(layout, q, k, v, bias, mask)[0]


def _cores_forward(layout, q, k, v, bias, mask):
    def one(args):
        index, q, k, v = args
        scores = _scores(layout, index, q, k, bias, mask)
        highest = jnp.max(scores, axis=-1, keepdims=True)
        # A row that sees nothing has only -inf; 0 as its highest makes its weights 0.
        highest = jax.lax.stop_gradient(jnp.where(jnp.isfinite(highest), highest, 0.0))
        weights = jnp.exp(scores - highest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = _dot(weights.astype(v.dtype), v)
        total = jnp.where(total > 0.0, total, 1.0)
        return out / total, (highest + jnp.log(total))[:, 0]

    pairs = (jnp.arange(q.shape[0]), q, k, v)
    out, log_total = jax.lax.map(one, pairs, batch_size=_pairs(q, k))
    return out, (q, k, v, bias, mask, out, log_total)


def _cores_backward(layout, saved, gradient):
    q, k, v, bias, mask, out, log_total = saved
    inner = jnp.sum(gradient * out, axis=-1)

    def one(args):
        index, q, k, v, gradient, log_total, inner = args
        # Keys first: two of the three products below then need no transposed operand.
        scores = _scores_by_key(layout, index, q, k, bias, mask)
        weights = jnp.exp(scores - log_total)
        gradient = gradient.astype(v.dtype)
        slope = weights * (_dot(v, gradient.T) - inner)
        to_v = _dot(weights.astype(v.dtype), gradient)
        part = slope.astype(q.dtype)
        to_q, to_k = _dot(k.T, part).T, _dot(part, q)
        return (to_q.astype(q.dtype), to_k.astype(k.dtype), to_v.astype(v.dtype)), slope

    def with_bias(total, args):
        gradients, slope = one(args)
        return _add_at(layout, total, args[0], slope.T), gradients

    pairs = (jnp.arange(q.shape[0]), q, k, v, gradient, log_total, inner)
    if bias is None:
        gradients = jax.lax.map(lambda args: one(args)[0], pairs, batch_size=_pairs(q, k))
        return *gradients, None, None
    to_bias, gradients = jax.lax.scan(with_bias, jnp.zeros(bias.shape, jnp.float32), pairs)
    return *gradients, to_bias.astype(bias.dtype), None


_cores.defvjp(_cores_forward, _cores_backward)


def _pairs(q, k):
    """How many of N pairs a turn takes, a divisor of N."""
    room = _BLOCK_BYTES // (4 * q.shape[1] * k.shape[1])
    return max(n for n in range(1, q.shape[0] + 1) if q.shape[0] % n == 0 and n <= max(room, 1))


def _dot(left, right):
    return jnp.dot(left, right, preferred_element_type=jnp.float32)


def _place(layout, array, index):
    """Where pair `index` reads a (b, n, ...) array, of which b or n may be 1."""
    b, n = index // layout[0], index % layout[0]
    return (b if array.shape[0] > 1 else 0), (n if array.shape[1] > 1 else 0)


def _scores(layout, index, q, k, bias, mask):
    """(R, S) float32 scores of one pair; -inf where masked."""
    scores = _dot(q, k.T)
    if bias is None and mask is None:
        return scores
    full = (layout[1], scores.shape[0] // layout[1], scores.shape[1])
    scores = scores.reshape(full)
    if bias is not None:
        scores = scores + bias[_place(layout, bias, index)].astype(jnp.float32)
    if mask is not None:
        scores = jnp.where(mask[_place(layout, mask, index)], scores, -jnp.inf)
    return scores.reshape(-1, full[2])


def _scores_by_key(layout, index, q, k, bias, mask):
    """The scores of `_scores` as (S, R)."""
    if bias is not None:  # turning the bias around costs more than turning the scores
        return _scores(layout, index, q, k, bias, mask).T
    scores = _dot(k, q.T)
    if mask is None:
        return scores
    visible = mask[_place(layout, mask, index)].transpose(2, 0, 1)
    full = (scores.shape[0], layout[1], scores.shape[1] // layout[1])
    return jnp.where(visible, scores.reshape(full), -jnp.inf).reshape(scores.shape)


def _add_at(layout, total, index, slope):
    """Adds one pair's (R, S) gradient of the scores to that of the bias."""
    slope = slope.reshape(layout[1], -1, slope.shape[1])
    b, n = _place(layout, total, index)
    shared = tuple(axis for axis in range(3) if total.shape[2 + axis] == 1)
    return total.at[b, n].add(jnp.sum(slope, axis=shared, keepdims=True))
