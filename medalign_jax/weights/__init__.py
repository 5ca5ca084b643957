"""Published weights: where they come from, what they hold, where they go, and back.

`source` opens them (`hub` downloads, `torch_pickle` and `gguf` read what is not safetensors),
`table` says which tensor fills which parameter, `tables` holds one table per architecture.
`load.load` fills the parameters, `load.export` and `load.save` give the tensors back;
`language_export` writes a whole language model, `peft` an adapter.
"""

from medalign_jax.weights.lazy import LazyTensor, WeightError
from medalign_jax.weights.source import WeightSource, resolve
from medalign_jax.weights.table import Ignore, Rule, Table

__all__ = ["Ignore", "LazyTensor", "Rule", "Table", "WeightError", "WeightSource", "resolve"]
