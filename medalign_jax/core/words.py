"""What names and cells say, however they are spelt: no value, a number, the name that was meant."""

from __future__ import annotations

import difflib
import math
import re
import unicodedata
from collections.abc import Iterable

MISSING = frozenset({"", "nan", "na", "n/a", "#n/a", "<na>", "null", "none"})


def plain_name(column: str) -> str:
    """A column's name in lower case, with one underscore for all that is not a letter or digit."""
    return re.sub(r"[^0-9a-z]+", "_", column.lower()).strip("_")


def is_missing(value: object) -> bool:
    """Whether a cell holds nothing, or one of the words of `MISSING` that stand for nothing.

    The one list for manifests, questions, metadata and tables of embeddings. Where "none" is an
    answer (a finding that is absent), whoever reads that column looks for it first.
    """
    return value is None or str(value).strip().casefold() in MISSING


def is_none_in_words(value: str) -> bool:
    """Whether a cell says "none", as people do; ``None`` is what Python writes for no value."""
    text = value.strip()
    return text.casefold() == "none" and text != "None"


def finite_number(text: str) -> float | None:
    """The number that a cell holds; None where it holds none, or one that is not finite."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def is_comma_number(text: str) -> bool:
    """Whether a comma alone keeps a cell from being a number: "36,6", and "1,100" too."""
    point = text.replace(",", ".", 1)
    return point != text and finite_number(text) is None and finite_number(point) is not None


def plain_spelling(text: str) -> str:
    """Without case, invisible characters, and what Unicode writes in two ways (NFKC)."""
    plain = unicodedata.normalize("NFKC", text)
    return "".join(c for c in plain if unicodedata.category(c) != "Cf").casefold()


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` where a known name is near, else nothing."""
    near = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.75)
    return f" (did you mean '{near[0]}'?)" if near else ""
