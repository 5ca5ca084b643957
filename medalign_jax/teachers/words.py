"""In the place of a language model: which words a text has. The control for what one adds.

A text becomes a vector of 0s and 1s, one place per word and per pair of neighbouring words, which
share `WIDTH` places by their hash. Nothing is learnt and nothing is known of meaning: two reports
are alike as far as they use the same words.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from medalign_jax.teachers.reading import TeacherError, check_texts

SOURCE = "words"
WIDTH = 2048
_WORD = re.compile(r"[\w/]+")


class WordTeacher:
    """Reads texts like a `Teacher`.

    Attributes:
      width: of a vector.
      identity: says how it reads; there are no weights.
    """

    width = WIDTH
    identity = hashlib.sha256(b"words and pairs of words, hashed, 0 or 1").hexdigest()

    def __repr__(self) -> str:
        return f"WordTeacher: texts become vectors of {WIDTH} numbers, which words they have."

    @property
    def settings(self) -> dict[str, Any]:
        """What a vector depends on, readable."""
        return {"source": SOURCE, "width": WIDTH, "identity": self.identity}

    @property
    def fingerprint(self) -> str:
        """Hex digest of `settings`."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    def embed(self, texts: Sequence[str], batch_size: int = 32) -> np.ndarray:
        """(N, WIDTH) float32 of N texts; `batch_size` changes nothing.

        Raises:
          TeacherError: an entry that is not text, or empty.
        """
        del batch_size
        self.check_texts(texts)
        vectors = np.zeros((len(texts), WIDTH), np.float32)
        for row, text in enumerate(texts):
            words = _WORD.findall(text.lower())
            for term in {*words, *itertools.pairwise(words)}:
                vectors[row, _place(term)] = 1.0
        return vectors

    def check_texts(self, texts: Sequence[str]) -> None:
        """Raises TeacherError naming the first entry that is not text or empty."""
        check_texts(texts)

    def overlong(self, texts: Sequence[str]) -> str:
        """Nothing is cut."""
        del texts
        return ""

    def tokenize(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """There are no tokens.

        Raises:
          TeacherError: always.
        """
        raise TeacherError(f"teacher {SOURCE!r} has no tokens: set teacher.mode=cached")


def _place(term: str | tuple[str, str]) -> int:
    digest = hashlib.blake2b(repr(term).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % WIDTH
