"""Published weights: where they come from, what they hold, where they go, and back.

`source` opens them, `table` says which tensor fills which parameter, `load` does it (and `export`
and `save` undo it), `tables` holds one table per architecture.
"""

from medalign_jax.weights.lazy import LazyTensor, WeightError
from medalign_jax.weights.source import WeightSource, resolve
from medalign_jax.weights.table import Ignore, Rule, Table

__all__ = ["Ignore", "LazyTensor", "Rule", "Table", "WeightError", "WeightSource", "resolve"]
