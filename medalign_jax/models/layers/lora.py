"""Low-rank adaptation of chosen kernels (LoRA, Hu et al. 2021, arXiv 2106.09685).

A kernel W (in, out) is frozen and used as ``W + alpha / rank * A B`` with A (in, rank) and B
(rank, out); only A and B are trained. They live in a tree of their own, which has the nesting of
the parameters at the adapted kernels:

    {"text": {"layers": {"attention": {"query": {"kernel": {"a": (depth, in, rank),
                                                            "b": (depth, rank, out)}}}}}}

Stacked layers keep their leading axis; a kernel outside of a stack has none. B starts at zero, so
that training starts at the base model. LoRA's dropout on the adapter's input is not supported: an
adapter is applied as a change of the kernel, which has no input of its own.
"""

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from medalign_jax.core.errors import UserError
from medalign_jax.core.mesh import Rules, named_leaves, path_name

Tree = Any

# The key under which a model keeps the weights of its stacked layers (see layer_stack.py).
_STACK = "layers"


@dataclass(frozen=True)
class LoraConfig:
    """What is adapted, and how.

    Attributes:
      rank: inner width of an adapter.
      alpha: the product A B counts ``alpha / rank`` times.
      modules: regexes, searched for in the paths of the kernels, e.g.
        ``text/layers/attention/(query|value)/kernel$``.

    Raises:
      UserError: a value that makes no adapter, or text that is not a regex.
    """

    rank: int = 16
    alpha: float = 32.0
    modules: tuple[str, ...] = (r"text/layers/attention/(query|key|value|out)/kernel$",)

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise UserError(f"lora.rank must be a whole number of 1 or more, not {self.rank!r}")
        if not (np.isfinite(self.alpha) and self.alpha > 0):
            raise UserError(f"lora.alpha must be a positive number, not {self.alpha!r}")
        if isinstance(self.modules, str) or not self.modules:
            raise UserError(
                f"lora.modules must be a list of regexes of kernel paths, not {self.modules!r}"
            )
        object.__setattr__(self, "modules", tuple(self.modules))
        for pattern in self.modules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"lora.modules: {pattern!r} is not a regex ({error})") from error

    @property
    def scale(self) -> float:
        """What A B is multiplied with."""
        return self.alpha / self.rank


def init_lora(key: jax.Array, abstract_params: Tree, config: LoraConfig) -> Tree:
    """A fresh adapter, float32; traceable (``jax.eval_shape`` gives its shapes).

    A is uniform in ``±1 / sqrt(in)``, as PEFT draws it (Kaiming-uniform with a = sqrt(5)), B zero.
    Each kernel draws from a key of its own path: adapting more kernels changes none of the others.

    Args:
      key: a PRNG key.
      abstract_params: the base parameters, arrays or their shapes.
      config: which kernels, and the rank.

    Returns:
      The tree of this module's head.

    Raises:
      UserError: regexes that match no parameter and leaves that are not matrix kernels, all in one.
    """
    flat = {}
    for path, shape in _adapted(abstract_params, config).items():
        *stack, inputs, outputs = shape
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        bound = inputs**-0.5
        a = jax.random.uniform(own, (*stack, inputs, config.rank), jnp.float32, -bound, bound)
        flat[f"{path}/a"] = a
        flat[f"{path}/b"] = jnp.zeros((*stack, config.rank, outputs), jnp.float32)
    return unflatten_dict(flat, sep="/")


def _adapted(params: Tree, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the kernels that the config names, by path."""
    shapes = {path: np.shape(leaf) for path, leaf in named_leaves(params).items()}
    problems = [
        f"the regex {pattern!r} matches no parameter"
        for pattern in config.modules
        if not any(re.search(pattern, path) for path in shapes)
    ]
    found = {
        path: shape
        for path, shape in shapes.items()
        if any(re.search(pattern, path) for pattern in config.modules)
    }
    problems += [
        f"{path} {list(shape)} is not a matrix kernel"
        for path, shape in found.items()
        if not _is_matrix_kernel(path, shape)
    ]
    if problems:
        kernels = [path for path, shape in shapes.items() if _is_matrix_kernel(path, shape)]
        raise UserError(
            f"lora.modules: {'; '.join(problems)}. Name kernels only (end a regex with /kernel$); "
            f"those that can be adapted: {', '.join(kernels) or 'none'}"
        )
    return found


def _is_matrix_kernel(path: str, shape: tuple[int, ...]) -> bool:
    *parents, name = path.split("/")
    return name == "kernel" and len(shape) == (3 if _STACK in parents else 2)


def as_variables(lora: Tree, config: LoraConfig) -> Tree:
    """The adapter as models take it (Linen collection ``"lora"``): ``kernel + a @ b``.

    Returns:
      The same tree with B times ``alpha / rank``; differentiable.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * config.scale if path_name(path).endswith("/b") else leaf, lora
    )


def merge(params: Tree, lora: Tree, config: LoraConfig) -> Tree:
    """Base parameters with the adapter added to its kernels; pure, and it keeps their dtypes.

    The sum is taken in float32 and rounded once to the kernel's dtype. A bfloat16 kernel loses what
    is finer than its last digit, so that a small adapter is better exported by itself
    (``weights.peft``).

    Args:
      params: the base tree, or a part of it that holds all adapted kernels.
      lora: the adapter.
      config: the one that it was made with.

    Raises:
      UserError: the adapter is of another model or rank; names the kernels.
    """
    adapters = _pairs(lora)
    _check_fit(named_leaves(params), adapters, config)

    def merged(path: tuple[Any, ...], kernel: jax.Array) -> jax.Array:
        pair = adapters.get(path_name(path))
        if pair is None:
            return kernel
        a, b = (pair[side].astype(jnp.float32) for side in ("a", "b"))
        change = jnp.matmul(a, b, precision="highest") * config.scale
        return (kernel.astype(jnp.float32) + change).astype(kernel.dtype)

    return jax.tree_util.tree_map_with_path(merged, params)


def _pairs(lora: Tree) -> dict[str, dict[str, Any]]:
    """``{"a", "b"}`` by the path of the kernel."""
    pairs: dict[str, dict[str, Any]] = {}
    for path, leaf in named_leaves(lora).items():
        kernel, _, side = path.rpartition("/")
        pairs.setdefault(kernel, {})[side] = leaf
    for kernel, pair in pairs.items():
        if set(pair) != {"a", "b"}:
            raise UserError(f"the adapter of {kernel!r} has {sorted(pair)}; it must have a and b")
    return pairs


def _check_fit(
    params: Mapping[str, Any], adapters: Mapping[str, Mapping[str, Any]], config: LoraConfig
) -> None:
    problems = []
    for path, pair in adapters.items():
        if path not in params:
            problems.append(f"there is no parameter {path}")
            continue
        *stack, inputs, outputs = np.shape(params[path])
        for side, expected in (
            ("a", (*stack, inputs, config.rank)),
            ("b", (*stack, config.rank, outputs)),
        ):
            shape = np.shape(pair[side])
            if shape != expected:
                problems.append(f"{path}/{side} is {list(shape)}, not {list(expected)}")
    if problems:
        raise UserError(f"the LoRA adapter does not fit the parameters: {'; '.join(problems)}")


def lora_sharding(rules: Rules) -> Rules:
    """The sharding table of an adapter, from that of the base parameters (see core/mesh.py).

    A lies along the kernel's input axis, B along its output axis as the kernel does; the rank,
    which is small, stays whole. A line matches the adapter of exactly those kernels that it matches
    in the base table, so the first match is the same too.

    Args:
      rules: (regex, spec) lines that cover every adapted kernel.
    """
    lines = []
    for pattern, spec in rules:
        *stack, inputs, outputs = (*(None,) * (2 - len(spec)), *spec)
        lines.append((_below(pattern, "a"), (*stack, inputs, None)))
        lines.append((_below(pattern, "b"), (*stack, None, outputs)))
    return tuple(lines)


def _below(pattern: str, side: str) -> str:
    """A regex of ``PATH/side``, for one that is searched for in ``PATH``.

    The path's end, ``$``, is now where ``/side`` begins; in a set of characters, or after a
    backslash, it is a plain character.
    """
    parts = re.sub(
        r"(\\.|\[\^?\]?[^\]]*\])|\$",
        lambda hit: hit[1] or rf"(?=/{side}$)",
        pattern,
    )
    return rf"(?:{parts}).*/{side}$"
