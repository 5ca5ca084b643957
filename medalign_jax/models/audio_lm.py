"""Audio language models: Qwen2.5-Omni's thinker (arXiv 2503.20215) and Qwen2-Audio (2407.10759).

features -> audio tower (`qwen_omni_audio`) -> tokens -+
                                                       +-> decoder (`decoder`) -> hidden states
ids -> embeddings, audio tokens in place of <|AUDIO|> -+

as in transformers' ``Qwen2_5OmniThinkerForConditionalGeneration`` and
``Qwen2AudioForConditionalGeneration``. A prompt holds one placeholder for each audio token, as the
published processors write it (`audio_token_count`); the tokens of a row's clips replace its
placeholders in order.

Positions: Qwen2.5-Omni turns queries and keys by positions of three axes. Without pictures its
``get_rope_index`` counts a row's real tokens on all three alike, whatever the side of the padding,
and audio tokens count like others (one per token of 40 ms), so that here the axes are always equal.

Features: Qwen2-Audio's convolutions read the silence beyond a clip. Its published numbers need
waveforms padded with zeros to 30 s before the front end, as its processor does, and `lengths` of
what was there before. Qwen2.5-Omni reads nothing beyond `lengths`; any padding will do.

Shapes: B rows, T tokens, K clips per row, F frames, M mel bins, L audio tokens of F frames,
W width.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from medalign_jax.core.errors import UserError
from medalign_jax.models.encoders.qwen_omni_audio import (
    QwenAudio,
    QwenAudioConfig,
    pooled_tokens,
    qwen2_5_omni_audio_config,
    qwen2_audio_config,
)
from medalign_jax.models.language.decoder import Cache, Decoder
from medalign_jax.models.language.decoder_config import (
    DecoderConfig,
    qwen2_config,
    qwen_omni_config,
)
from medalign_jax.models.layers.layer_stack import low_rank
from medalign_jax.models.layers.sharded_weights import WholeWeights
from medalign_jax.models.upstream_config import ConfigReader, ModelConfigError

KINDS = ("qwen2_5_omni", "qwen2_audio")


class AudioPromptError(UserError):
    """Audio and the placeholders of a prompt do not belong together."""


@dataclasses.dataclass(frozen=True)
class AudioLMConfig:
    """An audio language model.

    Attributes:
      text: the language model.
      audio: the tower, with a projection to the width of `text`.
      audio_token: id of the placeholder.
      kind: one of `KINDS`; says under which names the weights were published.
    """

    text: DecoderConfig
    audio: QwenAudioConfig
    audio_token: int
    kind: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ModelConfigError(f"kind {self.kind!r} is not one of {', '.join(KINDS)}")
        if self.audio.output_width != self.text.width:
            raise ModelConfigError(
                f"the audio tower's output has {self.audio.output_width} channels, the language "
                f"model {self.text.width}; they have to be equal"
            )
        if not 0 <= self.audio_token < self.text.vocab_size:
            raise ModelConfigError(
                f"the audio token {self.audio_token} is not among the {self.text.vocab_size} tokens"
            )


def audio_lm_config(config: Mapping[str, Any]) -> AudioLMConfig:
    """Reads the ``config.json`` of a Qwen2.5-Omni, of its thinker alone, or of a Qwen2-Audio.

    Raises:
      ModelConfigError: for a missing or malformed value, or a feature that is not supported.
    """
    reader = ConfigReader(config)
    kinds = ("qwen2_5_omni", "qwen2_5_omni_thinker", "qwen2_audio")
    kind = reader.only("model_type", kinds, None)
    if kind == "qwen2_audio":
        return _qwen2_audio(reader, config)
    if kind == "qwen2_5_omni":
        reader = ConfigReader(reader.raw("thinker_config"), "config.json: thinker_config")
    return AudioLMConfig(
        qwen_omni_config(config), qwen2_5_omni_audio_config(config), _audio_token(reader), KINDS[0]
    )


def _qwen2_audio(reader: ConfigReader, config: Mapping[str, Any]) -> AudioLMConfig:
    text = reader.raw("text_config", None) or {}
    # Its class ties no weights, whatever this level says; full dumps of transformers 4 say true.
    reader.ignore("tie_word_embeddings")
    audio, token = reader.raw("audio_config", None) or {}, _audio_token(reader)
    reader.ignore("vocab_size", "hidden_size")  # repeat text_config
    reader.ignore("ignore_index")  # of the training loss
    reader.finish()
    if isinstance(text, Mapping) and text.get("tie_word_embeddings"):
        raise ModelConfigError("config.json: text_config: tie_word_embeddings=True: not supported")
    # transformers fills in the tower of the published model.
    audio = _QWEN2_AUDIO_TOWER | audio if isinstance(audio, Mapping) else audio
    tower = qwen2_audio_config({**config, "audio_config": audio})
    return AudioLMConfig(qwen2_config(text), tower, token, KINDS[1])


def _audio_token(reader: ConfigReader) -> int:
    older = reader.integer("audio_token_index", 151_646)
    return reader.integer("audio_token_id", older)


_QWEN2_AUDIO_TOWER = {
    "num_mel_bins": 128, "d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
}  # fmt: skip


def audio_token_count(config: AudioLMConfig, frames: Any) -> Any:
    """Placeholders that a prompt needs for clips of so many frames (on the host).

    Args:
      config: of the model.
      frames: valid frames of a clip (the front end's ``valid_frames``), an int or an array; 0
        means no clip.

    Returns:
      Likewise; one token stands for 40 ms.

    Raises:
      AudioPromptError: for a clip that is longer than the tower takes or too short for one token.
    """
    flat = np.asarray(frames).reshape(-1)
    for each in flat:
        if each < 0 or each > config.audio.frames:
            raise AudioPromptError(
                f"a clip of {each} frames; the model takes up to {config.audio.frames} frames of "
                "10 ms: cut it into shorter clips"
            )
        if each and not pooled_tokens(each):
            raise AudioPromptError(
                f"a clip of {each} frames is too short for one audio token; leave it out"
            )
    return pooled_tokens(frames)


def check_placeholders(ids: Any, mask: Any, lengths: Any, config: AudioLMConfig) -> None:
    """Refuses rows whose placeholders are not those of their clips (on the host).

    Inside `jax.jit` that cannot be seen: the model then fills what is too much with other tokens.

    Args:
      ids, mask: (B, T) token ids and bool, True for real tokens.
      lengths: (B, K) valid frames of each clip, 0 for no clip; None for rows without audio.
      config: of the model.

    Raises:
      AudioPromptError: naming the row and both numbers.
    """
    ids, mask = np.asarray(ids), np.asarray(mask)
    lengths = np.zeros((len(ids), 0), np.int32) if lengths is None else np.asarray(lengths)
    if lengths.ndim != 2 or len(lengths) != len(ids):
        raise AudioPromptError(
            f"lengths have to be ({len(ids)}, clips), frames of each row's clips, not "
            f"{lengths.shape}"
        )
    for row, (tokens, real, frames) in enumerate(zip(ids, mask, lengths, strict=True)):
        try:
            counts = audio_token_count(config, frames)
        except AudioPromptError as error:
            raise AudioPromptError(f"row {row}: {error}") from error
        placed = (tokens == config.audio_token) & real
        _check_row(row, placed, counts[frames > 0], config)


def _check_row(row: int, placed: np.ndarray, counts: np.ndarray, config: AudioLMConfig) -> None:
    if placed.sum() != counts.sum():
        raise AudioPromptError(
            f"row {row}: {placed.sum()} audio placeholders (token {config.audio_token}), but its "
            f"{len(counts)} clips make {counts.sum()} audio tokens; a prompt needs one placeholder "
            "for each (audio_token_count)"
        )
    edges = np.diff(np.concatenate([[0], placed.astype(int), [0]]))
    runs = np.flatnonzero(edges < 0) - np.flatnonzero(edges > 0)
    # Clips may follow one another without a token between them, but none may be torn apart.
    if torn := sorted(set(np.cumsum(runs)) - set(np.cumsum(counts))):
        raise AudioPromptError(
            f"row {row}: its runs of audio placeholders {runs.tolist()} are not those of its clips "
            f"{counts.tolist()}: a clip is torn apart after placeholder {torn[0]}"
        )


class AudioLM(nn.Module):
    """The model.

    Parameters: ``audio/...`` of `QwenAudio` and ``text/...`` of `Decoder`; collection "lora" may
    hold low-rank factors for kernels of both (`layer_stack.low_rank`).

    Attributes:
      config: sizes and switches.
      dtype, param_dtype: of computation (of the tower too, in place of `config.audio.dtype`) and of
        parameters.
      backend: of the decoder's attention; the tower's stands in `config.audio.attention`.
      remat: whether the backward pass computes each layer of both anew.
      access: how the weights of both are read, e.g. gathered from shards (`sharded_weights`).
    """

    config: AudioLMConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    backend: str = "auto"
    remat: bool = False
    access: WholeWeights = WholeWeights()

    def setup(self) -> None:
        c = self.config
        audio = dataclasses.replace(c.audio, dtype=self.dtype, remat=self.remat)
        self.audio = _tower_of(self.param_dtype)(audio, self.access.layer)
        self.text = Decoder(
            c.text, self.dtype, self.param_dtype, self.access, self.backend, self.remat
        )

    def __call__(
        self,
        ids: jax.Array,
        mask: jax.Array,
        features: jax.Array | None = None,
        lengths: jax.Array | None = None,
        layers: tuple[int, ...] = (-1,),
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Hidden states of token ids with audio in place of the placeholders.

        Args:
          ids, mask: (B, T) int32 and bool, as of `Decoder`; padding on either side.
          features: (B, K, F, M) log-mel; F from 3 to `config.audio.frames`. None: no audio.
          lengths: (B, K) int32, valid frames of each clip; 0 where there is none.
          layers: hidden states to keep, as of `Decoder`: 0 = embeddings with the audio put in.

        Returns:
          The deepest hidden state asked for, (B, T, W), and {"hidden_states": {index: (B, T, W)},
          "audio": (B, T) bool, where audio tokens stand}. A row whose placeholders are not as many
          as its valid audio tokens gets nothing of use (`check_placeholders`).

        Raises:
          ValueError: shapes that do not fit, and as `Decoder`.
        """
        x, audio = self.embedded(ids, mask, features, lengths)
        hidden, out = self.text(ids, mask, layers, embeddings=x)
        return hidden, {**out, "audio": audio}

    def embedded(
        self,
        ids: jax.Array,
        mask: jax.Array,
        features: jax.Array | None = None,
        lengths: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Hidden state 0 (B, T, W) and where audio tokens stand (B, T); as `__call__`."""
        low_rank(self, "audio", "text")
        audio = (ids == self.config.audio_token) & mask
        x = self.text.embedded(ids)
        if self.is_initializing():
            self.audio(jnp.zeros((1, 4, self.config.audio.mels)))
        if features is None:
            return x, audio
        if features.ndim != 4 or lengths is None or lengths.shape != features.shape[:2]:
            raise ValueError(
                f"features have to be (B, clips, frames, mels) with lengths (B, clips), not "
                f"{features.shape} and {None if lengths is None else lengths.shape}"
            )
        tokens, _ = self.audio.tokens(
            features.reshape(-1, *features.shape[2:]), lengths.reshape(-1)
        )
        tokens = tokens.reshape(*lengths.shape, -1, tokens.shape[-1])
        ordered = _in_order(tokens, pooled_tokens(lengths), jnp.cumsum(audio, axis=1) - 1)
        return jnp.where(audio[..., None], ordered.astype(x.dtype), x), audio

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Next-token scores (..., vocabulary), float32, of last hidden states (..., W)."""
        return self.text.logits(hidden)

    def extend(
        self,
        ids: jax.Array,
        mask: jax.Array,
        cache: Cache,
        start: int | jax.Array,
        *,
        features: jax.Array | None = None,
        lengths: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """As `Decoder.extend`, with the audio of a prompt that is given whole (``start=0``)."""
        real = jax.lax.dynamic_slice_in_dim(mask, start, ids.shape[1], axis=1)
        x, _ = self.embedded(ids, real, features, lengths)
        return self.text.extend(ids, mask, cache, start, embeddings=x)


def _in_order(tokens: jax.Array, counts: jax.Array, number: jax.Array) -> jax.Array:
    """The valid tokens of each row's clips by number.

    Args:
      tokens: (B, K, L, W), of which the first counts (B, K) of each clip are valid.
      number: (B, T): which of a row's valid tokens, from 0; out of range gives any.

    Returns:
      (B, T, W).
    """
    batch, clips, length, width = tokens.shape
    ends = jnp.cumsum(counts, axis=1)
    clip = jnp.sum(number[:, :, None] >= ends[:, None, :], axis=2)
    clip = jnp.minimum(clip, clips - 1)
    first = jnp.take_along_axis(ends - counts, clip, axis=1)
    place = jnp.clip(clip * length + number - first, 0, clips * length - 1)
    flat = tokens.reshape(batch, clips * length, width)
    return jnp.take_along_axis(flat, place[..., None], axis=1)


def _tower_of(param_dtype: Any) -> Any:
    """`QwenAudio`, whose parameters are made in another type than its own float32."""
    if param_dtype == jnp.float32:
        return QwenAudio

    def cast(variables: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(param_dtype), variables)

    return nn.map_variables(
        QwenAudio, "params", trans_out_fn=cast, init=True, methods=["__call__", "tokens"]
    )


def _omni(text: Mapping[str, Any], width: int) -> AudioLMConfig:
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24]}
    return audio_lm_config(
        {
            "model_type": "qwen2_5_omni_thinker",
            "text_config": {"rope_scaling": rope, **text},
            "audio_config": {**_QWEN2_AUDIO_TOWER, "output_dim": width},
        }
    )


# Qwen/Qwen2.5-Omni-7B and -3B, Qwen/Qwen2-Audio-7B
QWEN2_5_OMNI_7B = _omni({}, 3584)
QWEN2_5_OMNI_3B = _omni(
    {
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 11_008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
    },
    2048,
)
QWEN2_AUDIO_7B = audio_lm_config(
    {
        "model_type": "qwen2_audio",
        "text_config": {
            "vocab_size": 156_032,
            "intermediate_size": 11_008,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
        },
    }
)
