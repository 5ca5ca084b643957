"""Seeded damage to files: the same seed and number give the same bytes."""

from __future__ import annotations

import re

import numpy as np

_SIZES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF,
          1 << 40, (1 << 63) - 1, (1 << 64) - 1)  # fmt: skip
_TEXTS = (b"-1", b"0", b"1e999", b"99999999999999999999", b"null", b"NaN", b'"x"', b"[]", b"{}",
          b"true", b"1.5", b"\xff\xfe", b"\x00")  # fmt: skip


def mutated(content: bytes, seed: int, number: int) -> bytes:
    """One to three kinds of damage to a file's bytes.

    Args:
      content: of a whole file.
      seed, number: of the mutation.
    """
    rng = np.random.default_rng([seed, number])
    for _ in range(int(rng.choice([1, 1, 1, 2, 3]))):
        content = _KINDS[rng.integers(len(_KINDS))](content, rng)
    return content


def _flip(content: bytes, rng: np.random.Generator) -> bytes:
    data = bytearray(content)
    for place in _places(data, rng, int(rng.integers(1, 9))):
        data[place] ^= 1 << rng.integers(8)
    return bytes(data)


def _overwrite(content: bytes, rng: np.random.Generator) -> bytes:
    data = bytearray(content)
    for place in _places(data, rng, int(rng.integers(1, 5))):
        data[place] = rng.integers(256)
    return bytes(data)


def _size(content: bytes, rng: np.random.Generator) -> bytes:
    """A size, count or offset becomes an extreme one: headers are where these are."""
    width = int(rng.choice([1, 2, 4, 8]))
    value = _SIZES[rng.integers(len(_SIZES))] & ((1 << 8 * width) - 1)
    start = _place(content, rng)
    return content[:start] + value.to_bytes(width, "little") + content[start + width :]


def _cut(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: _place(content, rng)]


def _remove(content: bytes, rng: np.random.Generator) -> bytes:
    start, length = _place(content, rng), int(rng.integers(1, 64))
    return content[:start] + content[start + length :]


def _repeat(content: bytes, rng: np.random.Generator) -> bytes:
    start, length = _place(content, rng), int(rng.integers(1, 64))
    times = int(rng.choice([1, 1, 50]))
    return content[:start] + content[start : start + length] * times + content[start:]


def _insert(content: bytes, rng: np.random.Generator) -> bytes:
    start = _place(content, rng)
    return content[:start] + rng.bytes(int(rng.integers(1, 17))) + content[start:]


def _word(content: bytes, rng: np.random.Generator) -> bytes:
    """A number or a word of a text becomes something that has no business there."""
    words = [m.span() for m in re.finditer(rb'-?\d+(?:\.\d+)?|"[^"\n]{0,80}"|\b\w+\b',
                                           content[:100_000])]  # fmt: skip
    if not words:
        return _flip(content, rng)
    start, stop = words[rng.integers(len(words))]
    return content[:start] + _TEXTS[rng.integers(len(_TEXTS))] + content[stop:]


_KINDS = (_flip, _overwrite, _size, _size, _cut, _remove, _repeat, _insert, _word)


def _place(content: bytes, rng: np.random.Generator) -> int:
    """Somewhere; every other time near the beginning, where headers are."""
    limit = len(content) + 1
    return int(rng.integers(min(limit, 256) if rng.random() < 0.5 else limit))


def _places(data: bytearray, rng: np.random.Generator, count: int) -> list[int]:
    return [] if not data else [min(_place(data, rng), len(data) - 1) for _ in range(count)]
