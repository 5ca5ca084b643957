"""Architectures in `encoders`, `language` and `layers`; a model returns `(output, intermediates)`.

`audio_lm` joins an encoder and a language model, `generate` writes with one, `catalogue` lists what
is published.

An audio encoder is a Linen module with a frozen dataclass `config` and the method

    embed(features (B, T, M) float32) -> ((B, width) float32, intermediates)

where intermediates hold "block00", "block01", ... (B, N, channels), prefix tokens first, and
"tokens" (B, L, W), those of the last layer without prefix, in the order of `config.grid`. Its
config has `width`, `depth`, `layer_widths`, `prefix_tokens`, `mels`, `frames`, `most_frames` (None
where an input may have any number), and, for a masked-spectrogram loss, `grid(frames)`, `footprint`
and `mask_unit` (`models.encoders.masked_spectrogram`).
One that was published with a reconstruction has `reconstruct(features, noise)` as well, and
`config.tokens(frames)`; one whose `embed` takes `lengths` (B,), the valid frames of each clip,
reads nothing beyond them.

`ENCODERS` is the one place where an audio encoder is made known. To add one, write
`models/encoders/<file>.py` and `weights/tables/<file>.py`, and one line below; or, in a package of
your own, an `EncoderEntry` with an entry point of the group `medalign_jax.encoders`. `medalign
models` prints what can be loaded, from where, with sizes and licences.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

from medalign_jax.core.registry import Registry

if TYPE_CHECKING:
    from medalign_jax.core.mesh import Rules


class Window(NamedTuple):
    """How recordings are cut for an encoder, as it was published.

    Attributes:
      seconds: length of a window; longer recordings are cut into windows that overlap by half.
      pad: how shorter ones are filled, see `audio.clip.fit`.
      trim: cut silence from both ends first.
    """

    seconds: float
    pad: str = "zero"
    trim: bool = False


class EncoderEntry(NamedTuple):
    """Where an encoder's parts are: import paths `module:attribute`, so nothing is loaded here.

    `part` follows such a path, `sharding` reads what stands beside the table.

    Attributes:
      config: a frozen dataclass with its sizes.
      module: the Linen module built from that config.
      table: the mapping table of its published weights, or a function of the config that gives
        it. The same module has `SHARDING`, the lines that lay its parameters out on a mesh
        (`core.mesh`): those of `clap` are `medalign_jax.weights.tables.clap.SHARDING`.
      front_end: name in `medalign_jax.audio.frontend.FRONT_ENDS` of the input it was made for.
      window: how recordings are cut.
      ssm: the self-supervised term that AcuLa uses by default (`methods.self_supervised`).
      read_config: function from a published config.json to the config, where there is one.
    """

    config: str
    module: str
    table: str
    front_end: str
    window: Window
    ssm: str = "masked_spectrogram"
    read_config: str | None = None

    def part(self, field: str) -> Any:
        """What stands at the path in a field: `config`, `module`, `table` or `read_config`."""
        module, attribute = getattr(self, field).split(":")
        return getattr(importlib.import_module(module), attribute)

    @property
    def sharding(self) -> Rules:
        """`SHARDING` of the module that holds the table."""
        return importlib.import_module(self.table.split(":")[0]).SHARDING


def _entry(file: str, preset: str, module: str, front_end: str, window: Window, **more: str):
    """A line of `ENCODERS`; the table has the model's file name unless it is given."""
    table = more.pop("table", f"{file}:TABLE")
    if reader := more.pop("reader", ""):
        more["read_config"] = f"{_ROOM}.{file}:{reader}"
    return EncoderEntry(
        config=f"{_ROOM}.{file}:{preset}",
        module=f"{_ROOM}.{module}",
        table=f"medalign_jax.weights.tables.{table}",
        front_end=front_end,
        window=window,
        **more,
    )


_ROOM = "medalign_jax.models.encoders"
_OPERA = Window(8.18, "repeat", trim=True)  # chunks of OPERA-GT's extraction
_OPERA_WHOLE = Window(8.0, "repeat", trim=True)
_AUDIOSET = Window(10.0)
_CLAP = Window(10.0, "repeat_whole")
_SPEECH = Window(30.0)
_VIT_MAE = ("vit_mae:ViTMAE", "log_mel", _OPERA)

_OWN = {
    "opera_gt": _entry(
        "vit_mae", "OPERA_GT", *_VIT_MAE, table="opera_gt:TABLE", ssm="published"
    ),
    "vit_mae_small": _entry(
        "vit_mae", "SMALL", *_VIT_MAE, table="opera_gt:TABLE", ssm="published"
    ),
    "opera_ct": _entry(
        "htsat", "OPERA_CT", "cola:Cola", "log_mel", _OPERA_WHOLE, table="opera_ct:TABLE"
    ),
    "opera_ce": _entry(
        "efficientnet", "OPERA_CE", "cola:Cola", "log_mel", _OPERA_WHOLE, table="opera_ce:TABLE"
    ),
    "audiomae": _entry("audiomae", "AUDIOMAE", "audiomae:AudioMAE", "kaldi_fbank", _AUDIOSET),
    "audiomae_pretrained": _entry(
        "audiomae", "AUDIOMAE_PRETRAINED", "audiomae:AudioMAE", "kaldi_fbank", _AUDIOSET,
        ssm="published",
    ),
    "ast": _entry("ast", "AST_AUDIOSET", "ast:AST", "kaldi_fbank", _AUDIOSET, reader="ast_config"),
    # config.json says which of the two it is; the second name is for weights without one.
    "clap": _entry("clap", "CLAP_UNFUSED", "clap:Clap", "clap_mel", _CLAP, reader="clap_config"),
    "clap_fused": _entry(
        "clap", "CLAP_FUSED", "clap:Clap", "clap_mel", _CLAP, reader="clap_config"
    ),
    "whisper": _entry(
        "whisper", "BASE", "whisper:Whisper", "whisper_mel", _SPEECH,
        reader="whisper_config",
    ),
    "qwen2_audio": _entry(
        "qwen_omni_audio", "QWEN2_AUDIO", "qwen_omni_audio:QwenAudio", "whisper_mel", _SPEECH,
        table="qwen_omni_audio:QWEN2_AUDIO_TABLE", reader="qwen2_audio_config",
    ),
    "qwen_omni_audio": _entry(
        "qwen_omni_audio", "QWEN2_5_OMNI_AUDIO", "qwen_omni_audio:QwenAudio", "whisper_mel",
        _SPEECH, table="qwen_omni_audio:QWEN2_5_OMNI_TABLE", reader="qwen2_5_omni_audio_config",
    ),
}  # fmt: skip

ENCODERS: Registry[EncoderEntry] = Registry("medalign_jax.encoders", _OWN, EncoderEntry)
