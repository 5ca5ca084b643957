"""Tokenisers as a teacher needs them: texts in, unpadded lists of ids out."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from medalign_jax.core.errors import UserError
from medalign_jax.weights.gguf import read_header

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

_GGUF_KEYS = {  # of the file -> as transformers calls them
    "model": "tokenizer_type",
    "pre": "pre_tokenizer_type",
    "tokens": "tokens",
    "scores": "scores",
    "token_type": "token_type",
    "merges": "merges",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "unknown_token_id": "unk_token_id",
    "padding_token_id": "pad_token_id",
    "add_space_prefix": "add_prefix_space",
}


class TokenizerError(UserError):
    """A tokeniser is missing, cannot be read, or does not belong to the model."""


class Tokenizer(Protocol):
    """What a teacher asks of a tokeniser.

    Attributes:
      identity: hex digest that changes with whatever changes the ids.
      pad_id: id to fill padding with; never looked at.
    """

    identity: str
    pad_id: int

    def encode(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Ids of each text with the model's special tokens, cut at the right to ``max_tokens``."""


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder that a tokeniser is made of.

    Raises:
      TokenizerError: there is none.
    """
    present = [folder / name for name in _FILES if (folder / name).is_file()]
    if not present:
        raise TokenizerError(
            f"{folder}: no tokenizer files ({', '.join(_FILES[:3])}, ...). "
            "Put them beside the weights, or give tokenizer= another folder"
        )
    return present


class FolderTokenizer:
    """A published tokeniser read from a local folder; no remote code, no network.

    Raises:
      TokenizerError: if the folder holds no readable tokeniser.
    """

    def __init__(self, folder: str | Path):
        self.folder = folder = Path(folder)
        present = tokenizer_files(folder)
        # Else it warns that there is no PyTorch, which is how it is meant to be here.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import AutoTokenizer  # imported late: it takes seconds

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # the library raises plain ones for what it cannot parse
            raise TokenizerError(f"{folder}: its tokenizer cannot be read: {error}") from error
        self._tokenizer.truncation_side = "right"
        self.pad_id = self._tokenizer.pad_token_id or 0
        digest = hashlib.sha256()
        for path in present:
            digest.update(f"{path.name}:{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
        self.identity = digest.hexdigest()

    def encode(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        return self._ids(list(texts), truncation=True, max_length=max_tokens, padding=False)

    def _ids(self, text, **options) -> list:
        """Of one text or several; `options` as transformers' tokenisers take them."""
        try:
            return self._tokenizer(text, **options)["input_ids"]
        except Exception as error:  # the library raises plain ones: a vocabulary without [UNK]
            raise TokenizerError(
                f"{self.folder}: its tokenizer cannot encode a text: {error}"
            ) from error


class GgufTokenizer:
    """The tokeniser that a GGUF file carries beside its weights.

    Raises:
      TokenizerError: if the file carries none, or one of a kind that is not known.
    """

    def __init__(self, path: str | Path):
        metadata = read_header(Path(path), lists=True).metadata
        stored = {
            name: metadata[f"tokenizer.ggml.{key}"]
            for key, name in _GGUF_KEYS.items()
            if f"tokenizer.ggml.{key}" in metadata
        }
        if not isinstance(stored.get("tokens"), tuple):
            raise TokenizerError(f"{path}: the file holds no tokenizer; give tokenizer= a folder")
        # Imported late: it takes seconds.
        from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

        try:
            self._backend, _ = convert_gguf_tokenizer(metadata["general.architecture"], stored)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise TokenizerError(f"{path}: its tokenizer cannot be read: {error!r}") from error
        # Files without the flag are old; llama.cpp begins a sentencepiece text all the same.
        begins = metadata.get("tokenizer.ggml.add_bos_token", stored["tokenizer_type"] == "llama")
        ends = metadata.get("tokenizer.ggml.add_eos_token", False)
        self._begin = [stored["bos_token_id"]] if begins else []
        self._end = [stored["eos_token_id"]] if ends else []
        self.pad_id = stored.get("pad_token_id", 0)
        content = json.dumps([stored, self._begin, self._end], sort_keys=True)
        self.identity = hashlib.sha256(content.encode()).hexdigest()

    def encode(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        room = max_tokens - len(self._begin) - len(self._end)
        encoded = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [[*self._begin, *each.ids[:room], *self._end] for each in encoded]
