"""Bounds of a config's numbers, said in the first second and each by its own name."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from medalign_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class _Bound:
    """From `least` (included or not) to `most`, in words; never infinite."""

    words: str
    least: float
    included: bool = True
    most: float = float("inf")

    def holds(self, value: float) -> bool:
        within = self.least <= value <= self.most and (self.included or value != self.least)
        return within and math.isfinite(value)


_COUNT = _Bound("a whole number from 1 on", 1)
_WHOLE = _Bound("a whole number from 0 on", 0)
_WEIGHT = _Bound("a number from 0 on", 0)
_LENGTH = _Bound("a number above 0", 0, included=False)
_SHARE = _Bound("a share, 0 to 1", 0, most=1)

# Regex of the end of a path -> bound; the first that matches counts, other numbers are free. Blocks
# stand in `arms`, `pretrain.changes` and `supervised.changes` again, and are bounded there as well.
_BOUNDS: Sequence[tuple[str, _Bound]] = (
    (r"train\.(batch_size|accumulate|epochs|log_every|eval_every)", _COUNT),
    (r"train\.(steps|patience)", _WHOLE),
    (r"stages\.\w+\.(steps|batch_size)", _COUNT),
    (r"(optimizer|stages\.\w+)\.learning_rate", _WEIGHT),
    (r"optimizer\.(warmup_steps)", _WHOLE),
    (r"optimizer\.(weight_decay|clip)", _WEIGHT),
    (r"data\.(seconds|max_seconds|simulated_seconds)", _LENGTH),
    (r"data\.max_bad_fraction", _SHARE),
    (r"data\.(workers|simulated|mix)", _WHOLE),
    (r"data\.(max_length|buckets)", _COUNT),
    (r"teacher\.(max_tokens|top_k)", _COUNT),
    (r"teacher\.whiten", _SHARE),
    (r"reports\.wordings", _COUNT),
    (r"loss\.(hidden|out|chunk|every)", _COUNT),
    (r"loss\.dropout", _SHARE),
    (r"loss\.temperature", _LENGTH),
    (r"loss\.\w+_weight", _WEIGHT),
    (r"lora\.rank", _COUNT),
    (r"generate\.(max_new_tokens|batch_size)", _COUNT),
    (r"generate\.(temperature|min_words)", _WEIGHT),
    (r"generate\.top_p", _SHARE),
    (r"evaluate\.(max_new_tokens|batch_size|draws|seeds)", _COUNT),
    (r"evaluate\.(folds|per_class|limit)", _WHOLE),
    (r"world\.seconds", _LENGTH),
    (r"world\.label_noise", _SHARE),
    (r"world\.(base|reasoning|valid|test|texts|read|test_seed)", _WHOLE),
    (r"seeds?", _WHOLE),
)


def check_numbers(config: ConfigDict) -> None:
    """Refuses numbers without meaning.

    Raises:
      UserError: numbers out of their bounds; names all of them with what they have to be.
    """
    wrong = []
    for path, value in _numbers(config.to_dict(), "config"):
        bound = next((b for end, b in _BOUNDS if re.search(rf"\.{end}$", path)), None)
        if bound is not None and not bound.holds(value):
            wrong.append(f"{path} is {value}; it has to be {bound.words}")
    if wrong:
        raise UserError(" | ".join(wrong))


def _numbers(value: Any, path: str) -> Iterator[tuple[str, float]]:
    """Every number with its path; one of several has the path of the list."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers(inner, f"{path}.{name}")
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(inner, path)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value
