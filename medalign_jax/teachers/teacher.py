"""A frozen language model as a function from texts to vectors.

A text becomes one vector: the hidden state of one layer, pooled over the text's real tokens.
"""

import hashlib
import json
import warnings
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from medalign_jax.core.mesh import batch_sharding, batch_ways, placed, replicated, shardings
from medalign_jax.core.rounding import power_of_two, round_up
from medalign_jax.models.encoders.clap import clap_text_config
from medalign_jax.models.initial import initial_params
from medalign_jax.models.language.bert import Bert, BertConfig, bert_config, roberta_config
from medalign_jax.models.language.decoder import Decoder
from medalign_jax.models.language.decoder_config import DECODER_CONFIGS, DecoderConfig
from medalign_jax.models.layers.layer_stack import normalise_layers
from medalign_jax.teachers import words
from medalign_jax.teachers.reading import (
    OverlongWarning,
    Reading,
    TeacherError,
    check_texts,
    pool,
)
from medalign_jax.text.tokenizers import (
    FolderTokenizer,
    GgufTokenizer,
    Tokenizer,
    tokenizer_files,
)
from medalign_jax.weights.identity import parameter_count
from medalign_jax.weights.load import identity, load
from medalign_jax.weights.source import WeightSource, resolve
from medalign_jax.weights.table import Table
from medalign_jax.weights.tables import bert as bert_table
from medalign_jax.weights.tables import decoder as decoder_table

ModelConfig = BertConfig | DecoderConfig


@dataclass(frozen=True)
class TextArchitecture:
    """What it takes to build and fill one kind of language model.

    Attributes:
      module: made from a config; called with ids and mask.
      table: mapping table of (the part that is loaded, layers of the whole).
      sharding: lays the parameters out on a mesh (see core/mesh.py).
    """

    module: Callable[..., nn.Module]
    table: Callable[[Any, int], Table]
    sharding: Sequence[tuple[str, tuple[Any, ...]]]


_BERT = TextArchitecture(
    Bert, lambda part, depth: bert_table.table(part.depth, depth), bert_table.SHARDING
)
_DECODER = TextArchitecture(Decoder, decoder_table.table, decoder_table.SHARDING)

# What config.json may say under model_type, and how it is read.
ARCHITECTURES: Mapping[str, Callable[[Mapping[str, Any]], ModelConfig]] = ChainMap(
    {
        "bert": bert_config,
        "roberta": roberta_config,
        "clap": clap_text_config,
        "clap_text_model": clap_text_config,
    },
    DECODER_CONFIGS,
)


class Teacher:
    """A frozen language model with its tokeniser and the way its hidden states are read.

    Attributes:
      params: the frozen tree, sharded over the mesh if there is one.
      width: H, length of an embedding.
      identity: hex digest of the weights.
      sharding_rules: table that lays ``params`` out on a mesh (see core/mesh.py).
      fingerprint: hex digest of everything that an embedding depends on: weights, sizes,
        tokeniser, precision and ``reading``.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Any,
        tokenizer: Tokenizer,
        reading: Reading,
        identity: str,
        mesh: Mesh | None = None,
    ):
        self.model = model
        self.params = params
        self.reading = reading
        self.identity = identity
        self.width = model.config.width
        self.sharding_rules = _architecture_of(model.config).sharding
        self._tokenizer = tokenizer
        self._mesh = mesh
        self._embed = jax.jit(self.apply, out_shardings=replicated(mesh) if mesh else None)

    def __repr__(self) -> str:
        reading, count = self.reading, parameter_count(self.params)
        case = "in lower case" if reading.lowercase else "as they are"
        return (
            f"Teacher of {count:,} frozen parameters in {jnp.dtype(self.model.dtype).name}: texts, "
            f"{case} and cut to {reading.max_tokens} tokens, become vectors of {self.width} "
            f"numbers ({reading.pooling} of layer {reading.layer}"
            f"{', length 1' if reading.normalise else ''}). .embed(texts) gives (N, {self.width})."
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What an embedding depends on, readable."""
        return {
            "weights": self.identity,
            "tokenizer": self._tokenizer.identity,
            "model": asdict(self.model.config),
            "dtype": jnp.dtype(self.model.dtype).name,
            **asdict(self.reading),
        }

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    def apply(self, params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Embeddings of right-padded tokens; pure.

        Args:
          params: tree like ``self.params``.
          ids: (N, L) int32.
          mask: (N, L) bool, True for a real token.

        Returns:
          (N, H) float32.
        """
        hidden, _ = self.model.apply({"params": params}, ids, mask, (self.reading.layer,))
        vectors = pool(hidden.astype(jnp.float32), mask, self.reading.pooling)
        if self.reading.normalise:
            norm = jnp.linalg.norm(vectors, axis=-1, keepdims=True)
            vectors = vectors / jnp.maximum(norm, 1e-12)
        return vectors

    def tokenize(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids (N, L) int32 and mask (N, L) bool, padded at the right to a bucket's length.

        Raises:
          TeacherError: for no text, an empty text (named by its index) or an id that the model
            does not have.
        """
        if not texts:
            raise TeacherError("no texts to tokenize")
        return self._padded(self._encode(texts))

    def embed(self, texts: Sequence[str], batch_size: int = 32) -> np.ndarray:
        """Embeddings of texts, in their order.

        Texts of like length share a batch, padded to one of a few lengths. Texts that are cut
        are counted in an `OverlongWarning`.

        Args:
          texts: N texts, none of them empty.
          batch_size: texts per batch.

        Returns:
          (N, H) float32.

        Raises:
          TeacherError: as ``tokenize``; no texts give an empty array.
        """
        if batch_size < 1:
            raise TeacherError(f"batch_size has to be at least 1, not {batch_size}")
        result = np.empty((len(texts), self.width), np.float32)
        tokens = self._encode(texts)
        if note := self.overlong(texts):
            warnings.warn(note, OverlongWarning, stacklevel=2)
        order = sorted(range(len(texts)), key=lambda i: len(tokens[i]))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            ids, mask = self._padded([tokens[i] for i in chosen])
            rows = _rows(len(chosen), batch_size, batch_ways(self._mesh))
            # Rows that fill up the batch repeat its last text, so that no row is without tokens.
            fill = ((0, rows - len(chosen)), (0, 0))
            ids, mask = self._put(np.pad(ids, fill, "edge")), self._put(np.pad(mask, fill, "edge"))
            result[chosen] = np.asarray(self._embed(self.params, ids, mask))[: len(chosen)]
        return result

    def check_texts(self, texts: Sequence[str]) -> None:
        """Raises TeacherError naming the first entry that is not text or empty."""
        check_texts(texts)

    def overlong(self, texts: Sequence[str]) -> str:
        """What is to be said of texts that have more than ``max_tokens`` tokens; "" for none."""
        limit, texts = self.reading.max_tokens, self._cased(texts)
        tokens = self._tokenizer.encode(texts, limit + 1) if texts else []
        long = [text for text, each in zip(texts, tokens, strict=True) if len(each) > limit]
        if not long:
            return ""
        alike = len(long) - len(set(map(tuple, self._tokenizer.encode(long, limit))))
        same = f", and {alike} of them then read as another of them does" if alike else ""
        return (
            f"{len(long)} of {len(texts)} texts have more than max_tokens = {limit} tokens and are "
            f"cut there{same}; raise max_tokens (the model takes {self.model.config.max_positions})"
        )

    def _cased(self, texts: Sequence[str]) -> list[str]:
        return [text.lower() for text in texts] if self.reading.lowercase else list(texts)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if isinstance(texts, str):
            raise TeacherError("texts is one string; give a list of strings")
        self.check_texts(texts)
        if not texts:
            return []
        texts = self._cased(texts)
        tokens = self._tokenizer.encode(texts, self.reading.max_tokens)
        vocabulary = self.model.config.vocab_size
        for index, row in enumerate(tokens):
            if not row:
                raise TeacherError(f"text {index} has no tokens: {texts[index][:60]!r}")
            if max(row) >= vocabulary:
                raise TeacherError(
                    f"text {index} has token id {max(row)}, but the model's vocabulary has "
                    f"{vocabulary}: the tokenizer belongs to another model"
                )
        return tokens

    def _padded(self, tokens: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        length = _bucket(max(map(len, tokens)), self.reading.max_tokens)
        ids = np.full((len(tokens), length), self._tokenizer.pad_id, np.int32)
        mask = np.zeros((len(tokens), length), bool)
        for row, sequence in enumerate(tokens):
            ids[row, : len(sequence)] = sequence
            mask[row, : len(sequence)] = True
        return ids, mask

    def _put(self, array: np.ndarray) -> jax.Array:
        if self._mesh is None:
            return jnp.asarray(array)
        sharding = batch_sharding(self._mesh)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def load_teacher(
    source: Any,
    mesh: Mesh | None = None,
    *,
    layer: int = -1,
    pooling: str = "mean",
    max_tokens: int = 128,
    lowercase: bool = False,
    normalise: bool = False,
    dtype: Any = jnp.float32,
    config: Mapping[str, Any] | None = None,
    tokenizer: str | Path | Tokenizer | None = None,
) -> Teacher | words.WordTeacher:
    """Loads a published language model as a frozen teacher.

    Only the layers that are read are loaded. "words" is no model but which words a text has
    (`teachers.words`), and takes no notice of what else is asked.

    Args:
      source: what ``weights.source.resolve`` takes: Hub id, folder, file, mapping of tensors.
      mesh: mesh with axes (data, fsdp, tensor) over which the weights are laid out.
      layer, pooling, max_tokens, lowercase, normalise: see ``Reading``.
      dtype: float32 or bfloat16, of weights and computation; pooling is always float32.
      config: the parsed config.json, where the source has none.
      tokenizer: folder of tokeniser files or a ready one; by default what lies in the source's
        folder, or in a GGUF file.

    Raises:
      TeacherError: if the architecture is unknown or the settings do not fit the model.
      ModelConfigError: if config.json asks for something unsupported.
      WeightError: if the tensors are not those of the architecture.
      TokenizerError: if there is no readable tokeniser.
    """
    if source == words.SOURCE:
        return words.WordTeacher()
    weights = resolve(source)
    full = _read_config(config or weights.config, weights.label)
    asked = Reading(layer, pooling, max_tokens, lowercase, normalise)
    model, abstract, reading = unfilled(full, asked, dtype, mesh)
    table = _architecture_of(full).table(model.config, full.depth)
    params = load(weights, table, abstract, dtype=model.dtype)
    tokenizer = _tokenizer(weights) if tokenizer is None else tokenizer
    if isinstance(tokenizer, str | Path):
        tokenizer = FolderTokenizer(tokenizer)
    hashed = identity(weights, table, abstract)
    return Teacher(model, params, tokenizer, reading, hashed, mesh)


def teacher_width(
    source: Any,
    *,
    layer: int = -1,
    pooling: str = "mean",
    max_tokens: int = 128,
    dtype: Any = jnp.float32,
) -> int:
    """H of what `load_teacher` would load with the tokeniser beside it; no weight is read.

    Args:
      source, layer, pooling, max_tokens, dtype: as `load_teacher` takes them.

    Raises:
      UserError: what `load_teacher` would refuse, as far as the files' headers say it.
    """
    if source == words.SOURCE:
        return words.WIDTH
    weights = resolve(source)
    full = _read_config(weights.config, weights.label)
    model, _, _ = unfilled(full, Reading(layer, pooling, max_tokens), dtype)
    _check_folder(weights)
    if weights.file.suffix != ".gguf":
        tokenizer_files(weights.folder)
    return model.config.width


def unfilled(
    config: ModelConfig, reading: Reading, dtype: Any, mesh: Mesh | None = None
) -> tuple[nn.Module, Any, Reading]:
    """A language model without weights.

    Args:
      config: the published sizes.
      reading: as asked for.
      dtype: float32 or bfloat16, of weights and computation.
      mesh: as in `load_teacher`.

    Returns:
      The module up to the layer that is read; shapes, dtypes and (with a mesh) shardings of its
      parameters; the reading with its layer counted from 0.

    Raises:
      TeacherError: the settings do not fit the model.
    """
    architecture, reading = _architecture_of(config), _fitted(reading, config)
    model = _read_part(architecture, config, reading, dtype)
    abstract = jax.eval_shape(partial(initial_params, model), jax.random.key(0))
    if mesh is not None:
        abstract = placed(abstract, shardings(abstract, architecture.sharding, mesh))
    return model, abstract, reading


def _check_folder(weights: WeightSource) -> None:
    if weights.folder is None:
        raise TeacherError(f"{weights.label}: no folder to read a tokenizer from; give tokenizer=")


def _tokenizer(weights: WeightSource) -> Tokenizer:
    """The one that comes with the weights."""
    _check_folder(weights)
    if weights.file.suffix == ".gguf":
        return GgufTokenizer(weights.file)
    return FolderTokenizer(weights.folder)


def _architecture_of(config: ModelConfig) -> TextArchitecture:
    return _BERT if isinstance(config, BertConfig) else _DECODER


def _read_config(config: Mapping[str, Any] | None, label: str) -> ModelConfig:
    if not config:
        raise TeacherError(
            f"{label}: no config.json beside the weights, so the sizes are unknown; "
            "put it there or give config= (a GGUF file brings its own)"
        )
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise TeacherError(
            f"{label}: config.json has model_type {kind!r} (architectures "
            f"{config.get('architectures')}); teachers can be {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[kind](config)


def _fitted(reading: Reading, config: ModelConfig) -> Reading:
    """The reading with its layer counted from 0, checked against the model's sizes."""
    if reading.max_tokens > config.max_positions:
        raise TeacherError(
            f"max_tokens {reading.max_tokens} is more than the model's {config.max_positions} "
            "positions"
        )
    try:
        (layer,) = normalise_layers((reading.layer,), config.depth)
    except ValueError as error:
        raise TeacherError(str(error)) from error
    return Reading(**{**asdict(reading), "layer": layer})


def _read_part(
    architecture: TextArchitecture, config: ModelConfig, reading: Reading, dtype: Any
) -> nn.Module:
    """The model up to the layer that is read (at least one layer)."""
    dtype = jnp.dtype(dtype)
    if dtype.name not in ("float32", "bfloat16"):
        raise TeacherError(f"dtype {dtype} is not float32 or bfloat16")
    part = config.truncate(max(reading.layer, 1))
    if isinstance(part, DecoderConfig):
        part = replace(part, head=False)  # only hidden states are read
    return architecture.module(part, dtype=dtype, param_dtype=dtype)


def _bucket(length: int, max_tokens: int) -> int:
    """Padded length: 16, then multiples of 32, at most ``max_tokens``; few compilations.

    Reports are short: the edges of questions, which begin at 64, would double many of them.
    """
    return min(16 if length <= 16 else round_up(length, 32), max_tokens)


def _rows(count: int, batch_size: int, ways: int) -> int:
    """Rows of a batch: a power of two or the full batch, in either case a multiple of ``ways``."""
    return round_up(min(power_of_two(count), batch_size), ways)
