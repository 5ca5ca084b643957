"""The identity of parameters in memory, a hash of their numbers, and how many these are."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import jax
import numpy as np

from medalign_jax.core.mesh import named_leaves, on_host


def params_identity(params: Any) -> str:
    """Hex SHA-256 over paths, dtypes, shapes and numbers of all leaves, in order of paths.

    The same wherever the leaves lie; one leaf at a time is on the host. Where processes hold parts
    of them, all processes have to call this.
    """
    digest = hashlib.sha256()
    for name, leaf in sorted(named_leaves(params).items()):
        array = on_host(leaf)
        digest.update(json.dumps([name, array.dtype.name, list(array.shape)]).encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def parameter_count(params: Any) -> int:
    """How many numbers a tree of parameters holds, on all devices together."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
