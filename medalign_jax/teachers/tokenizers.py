"""Tokenisers as a teacher needs them: texts in, unpadded lists of ids out."""

import hashlib
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from medalign_jax.errors import UserError

_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)


class TokenizerError(UserError):
    """A tokeniser is missing, cannot be read, or does not belong to the model."""


class Tokenizer(Protocol):
    """What a teacher asks of a tokeniser.

    Attributes:
      identity: Hex digest that changes with whatever changes the ids.
      pad_id: Id to fill padding with; never looked at.
    """

    identity: str
    pad_id: int

    def encode(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Ids of each text with the model's special tokens, cut at the right to ``max_tokens``."""


class FolderTokenizer:
    """A published tokeniser read from a local folder; no remote code, no network.

    Raises:
      TokenizerError: if the folder holds no readable tokeniser.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        present = [folder / name for name in _FILES if (folder / name).is_file()]
        if not present:
            raise TokenizerError(
                f"{folder}: no tokenizer files ({', '.join(_FILES[:3])}, ...). "
                "Put them beside the weights, or give tokenizer= another folder"
            )
        # Else it warns that there is no PyTorch, which is how it is meant to be here.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import AutoTokenizer  # imported late: it takes seconds

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True
            )
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise TokenizerError(f"{folder}: its tokenizer cannot be read: {error}") from error
        self._tokenizer.truncation_side = "right"
        self.pad_id = self._tokenizer.pad_token_id or 0
        digest = hashlib.sha256()
        for path in present:
            digest.update(f"{path.name}:{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
        self.identity = digest.hexdigest()

    def encode(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        encoded = self._tokenizer(
            list(texts), truncation=True, max_length=max_tokens, padding=False
        )
        return encoded["input_ids"]


class HashTokenizer:
    """Words to ids by a checksum: for random models in tests and benchmarks, which have no words.

    Id 0 is padding, 1 begins a text, 2 ends it.
    """

    pad_id = 0

    def __init__(self, vocab_size: int):
        if vocab_size < 4:
            raise TokenizerError(f"a vocabulary of {vocab_size} leaves no id for a word")
        self._words = vocab_size - 3
        self.identity = f"hash-{vocab_size}"

    def encode(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        return [[1, *map(self._id, text.split()), 2][:max_tokens] for text in texts]

    def _id(self, word: str) -> int:
        return 3 + zlib.crc32(word.encode()) % self._words
