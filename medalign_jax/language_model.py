"""A whole language model, with audio or text-only: module, parameters, tokeniser, way to disk.

Published checkpoints and the small models that are trained here go through the same door: a
``config.json`` says what is built, and a folder with it, the weights under their upstream names and
the tokeniser's files is what is read and written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from medalign_jax.audio import io as audio_io
from medalign_jax.audio.preprocessor_config import front_end_numbers
from medalign_jax.audio.whisper_mel import WhisperMel
from medalign_jax.core.errors import UserError
from medalign_jax.core.files import write_whole
from medalign_jax.core.mesh import Rules, placed, shardings
from medalign_jax.core.rounding import round_up
from medalign_jax.core.seals import seal
from medalign_jax.data.questions.prompts import SequenceBuilder
from medalign_jax.data.questions.question import Question
from medalign_jax.models.audio_lm import (
    AudioLM,
    AudioLMConfig,
    audio_lm_config,
    audio_token_count,
)
from medalign_jax.models.generate import generate, pad_left
from medalign_jax.models.initial import initial_params
from medalign_jax.models.language.decoder import Decoder
from medalign_jax.models.language.decoder_config import DECODER_CONFIGS
from medalign_jax.text.chat import QWEN2_AUDIO_TEMPLATE, ChatTokenizer
from medalign_jax.weights.identity import parameter_count
from medalign_jax.weights.language_export import for_transformers
from medalign_jax.weights.load import export, load, save
from medalign_jax.weights.load import identity as weights_identity
from medalign_jax.weights.source import WeightSource, resolve
from medalign_jax.weights.table import Table
from medalign_jax.weights.tables import audio_lm as audio_lm_table
from medalign_jax.weights.tables import decoder as decoder_table

Tree = Any
Sound = str | Path | tuple[np.ndarray, int]  # a file, or (waveform (samples,), Hz)
AUDIO_KINDS = ("qwen2_5_omni", "qwen2_5_omni_thinker", "qwen2_audio")
_CLIP_PADDING = {"qwen2_audio": 30.0}  # seconds that its front end pads a clip to
# Those that transformers' processors bring along, for folders that have none.
_PROCESSOR_TEMPLATES = {"qwen2_audio": QWEN2_AUDIO_TEMPLATE}
# Beginnings of the names of files that are copied: the tokeniser's and the processor's.
_BESIDE = (
    *("token", "special", "added", "vocab", "merges", "chat_template", "generation"),
    *("preprocessor", "processor", "video_preprocessor"),
)


@dataclass(frozen=True)
class LanguageModel:
    """A language model with its head.

    Attributes:
      module: `AudioLM` or `Decoder`.
      params: its parameters.
      tokenizer: with its chat template.
      config_json: the published config that the module was built from.
      identity: hex digest of the weights as loaded; "" for random ones.
      source: where they were loaded from; None for random ones.
    """

    module: nn.Module
    params: Tree
    tokenizer: ChatTokenizer
    config_json: Mapping[str, Any]
    identity: str = ""
    source: WeightSource | None = None

    def __repr__(self) -> str:
        kind, text = self.config_json.get("model_type"), self.text
        audio_clause = ""
        if self.takes_audio:
            seconds = self.max_samples / self.front_end.sample_rate
            audio_clause = f"takes recordings of up to {seconds:g} s, "
        return (
            f"LanguageModel {kind!r} of {parameter_count(self.params):,} parameters in "
            f"{jnp.dtype(self.module.dtype).name}: {audio_clause}has {text.depth} layers of width "
            f"{text.width} and a vocabulary of {text.vocab_size} tokens."
        )

    @property
    def takes_audio(self) -> bool:
        """Whether it is audio-conditioned, so that prompts may hold recordings."""
        return isinstance(self.module, AudioLM)

    @property
    def text(self) -> Any:
        """The `DecoderConfig` of its text model."""
        return self.module.config.text if self.takes_audio else self.module.config

    @property
    def table(self) -> Table:
        """Mapping table of its weights."""
        return _table(self.module.config)

    @property
    def sharding(self) -> Rules:
        """Table that lays its parameters out on a mesh."""
        return _sharding(self.module.config)

    @property
    def front_end(self) -> WhisperMel:
        """Waveforms at 16 kHz to the features of the audio tower."""
        return WhisperMel(n_mels=self.module.config.audio.mels)

    @property
    def clip_samples(self) -> int | None:
        """Samples that every clip is padded to with zeros; None for its own length."""
        seconds = _CLIP_PADDING.get(self.module.config.kind)
        return None if seconds is None else round(seconds * self.front_end.sample_rate)

    @property
    def max_samples(self) -> int:
        """Samples of the longest clip that the audio tower takes."""
        return self.front_end.samples(self.module.config.audio.frames)

    def audio_tokens(self, samples: int) -> int:
        """Tokens that a clip of so many samples becomes."""
        return audio_token_count(self.module.config, self.front_end.valid_frames(samples))

    def answer(
        self,
        question: str,
        audio: Sound | Sequence[Sound] = (),
        *,
        choices: Sequence[str] = (),
        description: str = "",
        max_new_tokens: int = 512,
    ) -> str:
        """What the model writes to a question, the likeliest token each time.

        Args:
          question: text, without the options.
          audio: what it is about: a file, (waveform (samples,) float, Hz), or several of these.
          choices: options, or none for a free answer.
          description: the recording in words, in place of `audio` for a text-only model.
          max_new_tokens: most tokens of the answer.

        Returns:
          The whole response; `text.reasoning.final_answer` finds the answer in it.

        Raises:
          AudioError: a file that cannot be read, or an array that is not a waveform.
          ExampleError: recordings too long or too short for the model, or text that makes no
            prompt.
        """
        given = [audio] if isinstance(audio, str | Path) or _is_waveform(audio) else list(audio)
        if given and not self.takes_audio:
            raise UserError("a text-only model takes no audio: give description= in its place")
        clips = [_at_rate(sound, self.front_end.sample_rate) for sound in given]
        samples = np.array([[len(clip) for clip in clips]], np.int32)
        names = tuple(f"recording {n + 1}" for n in range(len(clips)))
        asked = Question("asked", names, question, tuple(choices), "", description=description)
        builder = SequenceBuilder(
            self.tokenizer, None, self.audio_tokens if self.takes_audio else None,
            self.text.max_positions, max_samples=self.max_samples if self.takes_audio else None,
        )  # fmt: skip
        prompt = builder.prompt(asked, samples[0], max_new_tokens)
        room = self.text.max_positions - max_new_tokens
        length = min(round_up(len(prompt), 64), room)  # few lengths, few compilations
        ids, mask = pad_left([prompt], self.tokenizer.pad_id, length)
        more = {}
        if clips:
            longest = self.clip_samples or samples.max()
            padded = np.stack([np.pad(clip, (0, longest - len(clip))) for clip in clips])
            more = {
                "features": self.front_end(jnp.asarray(padded))[None],
                "lengths": self.front_end.valid_frames(jnp.asarray(samples)),
            }
        written = generate(
            self.module, self.params, ids, mask, max_new_tokens=max_new_tokens,
            stop_tokens=(self.tokenizer.end_id,), pad_token=self.tokenizer.pad_id, **more,
        )  # fmt: skip
        return self.tokenizer.decode(np.asarray(written.tokens)[0][np.asarray(written.mask)[0]])

    def with_params(self, params: Tree) -> LanguageModel:
        """The same model with other parameters; its identity is not known."""
        return dataclasses.replace(self, params=params, identity="")

    def save(self, folder: str | Path) -> Path:
        """Writes ``model.safetensors`` under upstream names, config.json and tokeniser files.

        All processes call this; the first writes. Gives the folder, which `load_language_model`
        and transformers read: of Qwen2.5-Omni the thinker, see `language_export`.
        """
        folder = Path(folder)
        tensors = export(self.params, self.table)
        if jax.process_index() == 0:
            config, tensors = for_transformers(
                self.module.config, self.config_json, tensors, self.source
            )
            save(folder / "model.safetensors", tensors)
            text = json.dumps(config, indent=2) + "\n"
            write_whole(folder / "config.json", text.encode())
            for path in sorted(self.tokenizer.folder.iterdir()):
                own = path.resolve() == (folder / path.name).resolve()
                if path.name.startswith(_BESIDE) and not own:
                    write_whole(folder / path.name, path.read_bytes())
            seal(folder)
        return folder


def _is_waveform(sound: Any) -> bool:
    """(waveform, Hz), and not two files."""
    return isinstance(sound, tuple) and len(sound) == 2 and isinstance(sound[1], int | float)


def _at_rate(sound: Sound, sample_rate: int) -> np.ndarray:
    """(samples,) float32 of a file or of (waveform, Hz)."""
    if isinstance(sound, str | Path):
        waveform, name = audio_io.read(sound, sample_rate), str(sound)
    else:
        name = "the waveform"
        waveform = np.asarray(sound[0], np.float32)
        audio_io.check_waveform(waveform, name)
        waveform = audio_io.resample(waveform, sound[1], sample_rate, name)
    audio_io.check_waveform(waveform, name)
    return waveform


def load_language_model(
    source: Any,
    mesh: Mesh | None = None,
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    remat: bool = False,
    tokenizer: ChatTokenizer | None = None,
    identity: bool = True,
) -> LanguageModel:
    """Loads a published language model, audio-conditioned or text-only, with its head.

    Args:
      source: what `weights.source.resolve` takes; a config.json and tokeniser files lie beside.
      mesh: axes (data, fsdp, tensor) over which the weights are laid out.
      dtype: of the computation.
      param_dtype: of the parameters; `dtype` by default.
      remat: whether the backward pass computes each layer anew.
      tokenizer: where the folder's own is not to be used.
      identity: whether to hash the weights, which reads them once more.

    Raises:
      UserError: an unknown architecture, no config.json, no tokeniser, or weights that do not fit.
    """
    weights = resolve(source)
    if not weights.config:
        raise UserError(f"{weights.label}: no config.json beside the weights; put it there")
    param_dtype = dtype if param_dtype is None else param_dtype
    module = build_module(weights.config, dtype=dtype, param_dtype=param_dtype, remat=remat)
    _check_front_end(weights, module)
    abstract = abstract_params(module, mesh)
    table = _table(module.config)
    params = load(weights, table, abstract, dtype=param_dtype)
    if tokenizer is None:
        tokenizer = chat_tokenizer(weights)
    name = weights_identity(weights, table, abstract) if identity else ""
    return LanguageModel(module, params, tokenizer, weights.config, name, weights)


def _check_front_end(weights: WeightSource, module: nn.Module) -> None:
    """Refuses a model whose published audio features differ from `WhisperMel`'s."""
    audio = getattr(module.config, "audio", None)
    if audio is None or weights.preprocessor is None:
        return
    own = WhisperMel(n_mels=audio.mels)
    for field, value in front_end_numbers("whisper_mel", weights.preprocessor, audio).items():
        if value != getattr(own, field):
            raise UserError(
                f"{weights.label}: preprocessor_config.json says {field}={value!r}, and the audio "
                f"tower's features are made with {getattr(own, field)!r}: correct the file where "
                "it is wrong; if the model was trained so, it cannot be run here"
            )


def chat_tokenizer(weights: WeightSource, **settings: Any) -> ChatTokenizer:
    """The tokeniser that lies beside weights, with the chat format of their model.

    Args:
      weights: opened; their config.json says which model they are.
      settings: further ones of `ChatTokenizer`.

    Raises:
      UserError: there is no folder, or no readable tokeniser or template in it.
    """
    if weights.folder is None:
        raise UserError(f"{weights.label}: no folder to read a tokenizer from; give tokenizer=")
    kind = (weights.config or {}).get("model_type")
    return ChatTokenizer(
        weights.folder, default_template=_PROCESSOR_TEMPLATES.get(kind), **settings
    )


def random_language_model(
    config_json: Mapping[str, Any], tokenizer: ChatTokenizer, seed: int, **settings: Any
) -> LanguageModel:
    """A model of the given config with random parameters, to be trained from nothing."""
    module = build_module(config_json, **settings)
    params = jax.jit(partial(initial_params, module))(jax.random.key(seed))
    digest = hashlib.sha256(json.dumps([config_json, seed], sort_keys=True).encode())
    return LanguageModel(module, params, tokenizer, config_json, f"random-{digest.hexdigest()}")


def build_module(
    config_json: Mapping[str, Any],
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    remat: bool = False,
    **settings: Any,
) -> nn.Module:
    """The Linen module that a config.json asks for.

    Raises:
      UserError: an architecture that is not known, or a feature that it does not have.
    """
    kind = str(config_json.get("model_type"))
    settings |= {"dtype": dtype, "param_dtype": param_dtype, "remat": remat}
    if kind in AUDIO_KINDS:
        return AudioLM(audio_lm_config(config_json), **settings)
    if kind in DECODER_CONFIGS:
        return Decoder(DECODER_CONFIGS[kind](config_json), **settings)
    known = ", ".join(sorted({*AUDIO_KINDS, *DECODER_CONFIGS}))
    raise UserError(f"config.json has model_type {kind!r}; language models can be {known}")


def abstract_params(module: nn.Module, mesh: Mesh | None = None) -> Tree:
    """Shapes, dtypes and, with a mesh, shardings of a module's parameters."""
    tree = jax.eval_shape(partial(initial_params, module), jax.random.key(0))
    if mesh is None:
        return tree
    return placed(tree, shardings(tree, _sharding(module.config), mesh))


def _table(config: Any) -> Table:
    if isinstance(config, AudioLMConfig):
        return audio_lm_table.table(config)
    return decoder_table.table(config, config.depth)


def _sharding(config: Any) -> Rules:
    return audio_lm_table.SHARDING if isinstance(config, AudioLMConfig) else decoder_table.SHARDING
