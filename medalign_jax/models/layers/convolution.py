"""A convolution whose kernel gradient is fast inside loops on a CPU.

XLA's CPU compiler has a fast convolution for one order of axes alone. The gradient of a kernel has
another order; a compiler pass turns it, but only outside of loops (openxla's ConvCanonicalization
looks at the entry computation). Within `jax.lax.scan`, as in an accumulated batch, it runs as plain
nested loops in one thread: for the second convolution of Whisper-base some sixty times slower.
Here that gradient is a matrix product for each tap of the kernel, with the same result. On other
platforms it changes nothing.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    precision: Any = None,
) -> jax.Array:
    """For ``nn.Conv(conv_general_dilated=convolve)``; not for forward-mode derivatives.

    Args:
      x: (B, ..., in).
      kernel: (..., in, out), small: the gradient has one product for each of its taps.
      strides: one per axis between.
      padding: (before, after) per axis between, or "SAME" or "VALID".
      lhs_dilation, rhs_dilation, feature_group_count: ones only.
      dimension_numbers: channels last, as `nn.Conv` passes them.
      precision: as in `jax.lax.conv_general_dilated`.

    Returns:
      (B, ..., out).

    Raises:
      ValueError: dilation, groups, or another order of axes.
    """
    sizes = kernel.shape[:-2]
    order = _order(x, kernel)
    dilated = {1} != {*(lhs_dilation or (1,)), *(rhs_dilation or (1,))}
    if dilated or feature_group_count != 1 or dimension_numbers not in (None, order):
        raise ValueError(
            f"convolve: x {x.shape}, kernel {kernel.shape}: without dilation and groups, and with "
            f"channels last only, not {dimension_numbers}"
        )
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:-1], sizes, strides, padding)
    padding = tuple((int(before), int(after)) for before, after in padding)
    return _convolve(tuple(strides), padding, precision, x, kernel)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _convolve(strides, padding, precision, x, kernel):
    return _plain(strides, padding, precision, x, kernel)


def _forward(strides, padding, precision, x, kernel):
    return _convolve(strides, padding, precision, x, kernel), (x, kernel)


def _backward(strides, padding, precision, saved, gradient):
    x, kernel = saved
    plain = partial(_plain, strides, padding, precision)
    (to_x,) = jax.linear_transpose(lambda x: plain(x, kernel), x)(gradient)

    def on_cpu(x, gradient):
        return _by_taps(strides, padding, precision, x, kernel.shape[:-2], gradient)

    def elsewhere(x, gradient):
        return jax.linear_transpose(lambda kernel: plain(x, kernel), kernel)(gradient)[0]

    return to_x, jax.lax.platform_dependent(x, gradient, cpu=on_cpu, default=elsewhere)


_convolve.defvjp(_forward, _backward)


def _plain(strides, padding, precision, x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=_order(x, kernel), precision=precision
    )


def _by_taps(strides, padding, precision, x, sizes, gradient):
    """(*sizes, in, out): what each tap saw, times the gradient of where it was seen."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    seen = gradient.shape[1:-1]
    axes = tuple(range(gradient.ndim - 1))
    taps = []
    for place in itertools.product(*map(range, sizes)):
        window = tuple(
            slice(first, first + (count - 1) * stride + 1, stride)
            for first, count, stride in zip(place, seen, strides, strict=True)
        )
        taps.append(jnp.tensordot(x[:, *window], gradient, (axes, axes), precision=precision))
    return jnp.stack(taps).reshape(*sizes, *taps[0].shape)


def _order(x, kernel):
    axes = "DHW"[-(x.ndim - 2) :]
    return jax.lax.conv_dimension_numbers(
        x.shape, kernel.shape, (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    )
