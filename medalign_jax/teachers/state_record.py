"""What is kept of a frozen teacher's pass over one example, and how it lies in bytes.

A record is a header (magic, sizes, the example's key), then the arrays of `layout`, one after the
other, little endian. `teachers.state_cache` keeps the records in files.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import ml_dtypes
import numpy as np

from medalign_jax.core.errors import UserError

FORMAT = 1
KEY_BYTES = 32
MAGIC = b"MJTS"
_HEADER = struct.Struct("<4sIIII32s")  # magic, layers, R, W, k, key
_BF16 = np.dtype(ml_dtypes.bfloat16)


class StateCacheError(UserError):
    """A cache of teacher states is damaged, of another teacher, or lacks an example."""


@dataclass(frozen=True)
class Fingerprint:
    """All that a teacher's states depend on, beside the example.

    Attributes:
      teacher: identity of its weights (`WeightSource.identity`).
      tokenizer: identity of its tokeniser.
      layers: hidden states that are kept, numbered as in transformers.
      width: of the hidden states.
      form: "last" keeps the last hidden state, "top_k" the most probable next tokens.
      top_k: how many of them; 0 in form "last".
      vocabulary: tokens that their probabilities are normalised over; 0 in form "last".
      temperature: that the logits were divided by; 1 in form "last".
      dtype: precision that the teacher ran in.
    """

    teacher: str
    tokenizer: str
    layers: tuple[int, ...]
    width: int
    form: str = "last"
    top_k: int = 0
    vocabulary: int = 0
    temperature: float = 1.0
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(int(layer) for layer in self.layers))
        if min(self.layers, default=0) < 0 or len(set(self.layers)) < len(self.layers):
            raise StateCacheError(
                f"teacher cache: layers {self.layers} must be different numbers from 0 on"
            )
        if self.form not in ("last", "top_k"):
            raise StateCacheError(f"teacher cache: form {self.form!r} is not one of last, top_k")
        fits = 1 <= self.top_k <= self.vocabulary if self.form == "top_k" else self.top_k == 0
        if not fits:
            raise StateCacheError(
                f"teacher cache: top_k {self.top_k} of a vocabulary of {self.vocabulary} does not "
                f"go with form {self.form!r}"
            )

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with the version of the files' format."""
        return json.loads(json.dumps({"format": FORMAT} | asdict(self)))


def example_key(ids: np.ndarray, positions: np.ndarray) -> bytes:
    """What an example is known by: 32 bytes.

    Args:
      ids: (U,) token ids of the teacher's sequence, without padding.
      positions: (R,) places in it whose next tokens are the response.
    """
    digest = hashlib.sha256(struct.pack("<II", len(ids), len(positions)))
    for part in (ids, positions):
        digest.update(np.ascontiguousarray(part, "<i4").tobytes())
    return digest.digest()


def batch_keys(batch: Mapping[str, np.ndarray]) -> list[bytes | None]:
    """The key of each row of a batch; None in a row without a response (padding).

    Args:
      batch: teacher_ids (B, U) and teacher_mask (B, U), right-padded; teacher_at (B, R) and
        response_mask (B, R).
    """
    rows = zip(
        *(np.asarray(batch[n]) for n in ("teacher_ids", "teacher_mask", "teacher_at")),
        np.asarray(batch["response_mask"], bool),
        strict=True,
    )
    return [
        example_key(ids[mask.astype(bool)], places[response]) if response.any() else None
        for ids, mask, places, response in rows
    ]


def encode(fingerprint: Fingerprint, key: bytes, arrays: Mapping[str, Any]) -> bytes:
    """The record of an example.

    Raises:
      StateCacheError: arrays of a wrong name, shape or type, or numbers that are not finite.
    """
    positions = np.shape(arrays["states"])[1] if np.ndim(arrays.get("states")) == 3 else 0
    layout = layout_of(fingerprint, positions)
    where = f"example {key.hex()[:16]} of the teacher cache"
    if set(arrays) != set(layout) or not positions:
        shapes = {name: np.shape(array) for name, array in arrays.items()}
        raise StateCacheError(
            f"{where}: {shapes} given; expected {', '.join(layout)} with at least one position"
        )
    k = fingerprint.top_k
    parts = [_HEADER.pack(MAGIC, len(fingerprint.layers), positions, fingerprint.width, k, key)]
    for name, (shape, dtype) in layout.items():
        array = np.asarray(arrays[name])
        if array.shape != shape:
            raise StateCacheError(f"{where}: {name} is {array.shape}, not {shape}")
        if (dtype.kind == "i") != (array.dtype.kind in "iu"):
            raise StateCacheError(f"{where}: {name} is {array.dtype}, not {dtype}")
        stored = np.ascontiguousarray(array, dtype)
        if name == "ids" and not ((array >= 0) & (array < fingerprint.vocabulary)).all():
            raise StateCacheError(f"{where}: ids outside of 0..{fingerprint.vocabulary - 1}")
        if dtype.kind != "i" and not np.isfinite(stored).all():
            raise StateCacheError(
                f"{where}: {name} has numbers that are not finite; the teacher's weights or its "
                "precision (try float32) are at fault"
            )
        parts.append(stored.tobytes())
    return b"".join(parts)


def layout_of(fingerprint: Fingerprint, positions: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and dtype of each array, in the order of the record."""
    width, k = fingerprint.width, fingerprint.top_k
    layout = {"states": ((len(fingerprint.layers), positions, width), _BF16)}
    if fingerprint.form == "last":
        return layout | {"last": ((positions, width), _BF16)}
    wide, floats = (positions, k), np.dtype("<f4")
    return layout | {
        "ids": (wide, np.dtype("<i4")),
        "log_probs": (wide, floats),
        "rest": ((positions,), floats),
    }


def decode(record: bytes, fingerprint: Fingerprint, key: bytes) -> dict[str, np.ndarray] | None:
    """Read-only arrays of a record; None if it is not one of this key and fingerprint."""
    if len(record) < _HEADER.size:
        return None
    *sizes, found = _HEADER.unpack_from(record)
    positions = sizes[2]
    expected = [MAGIC, len(fingerprint.layers), positions, fingerprint.width, fingerprint.top_k]
    layout = layout_of(fingerprint, positions)
    bytes_each = {
        name: int(np.prod(shape)) * dtype.itemsize for name, (shape, dtype) in layout.items()
    }
    whole = len(record) == _HEADER.size + sum(bytes_each.values())
    if sizes != expected or found != key or not whole:
        return None
    arrays, place = {}, _HEADER.size
    for name, (shape, dtype) in layout.items():
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(record, dtype, count, place).reshape(shape)
        place += bytes_each[name]
    return arrays
