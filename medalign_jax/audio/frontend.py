"""Front ends: batches of waveforms to the features that an encoder reads.

A front end is a frozen dataclass of numbers, callable on (B, samples) float32, with `.frames` and
`.samples` to convert lengths, put together from the steps in `medalign_jax.audio.spectrum`. OPERA's
is here; those of other families have files of their own and a line in `FRONT_ENDS`.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from medalign_jax.audio import spectrum
from medalign_jax.audio.clap_mel import ClapMel
from medalign_jax.audio.kaldi import KaldiFbank
from medalign_jax.audio.whisper_mel import WhisperMel
from medalign_jax.core.errors import UserError
from medalign_jax.core.registry import Registry


@dataclasses.dataclass(frozen=True)
class LogMel:
    """Log-mel features of OPERA and AcuLA, in [0, 1] within each clip.

    Centred frames (zeros beyond both ends), periodic Hann window, power spectrum, Slaney mel
    filters, decibels below the clip's maximum, floor at `top_db`, then minimum to 0 and maximum
    to 1 over the clip. Because of the last step features do not change with a clip's gain, and
    padding has to be done before. Digital silence gives zeros. Source: OPERA `src/util.py`,
    `pre_process_audio_mel_t` (its callers pass f_max=8000; its own default is 2000).

    Attributes:
      sample_rate: of the waveforms, Hz.
      n_fft: frame and transform, samples.
      hop: from frame to frame, samples.
      n_mels: filters.
      f_min: lower edge of the lowest filter, Hz.
      f_max: upper edge of the highest filter, Hz.
      top_db: dynamic range, dB.
      amin: lower bound of the power before the logarithm.
      dft: how the Fourier transform is taken: 'auto', 'fft' or 'matmul' (see `spectrum`).
    """

    sample_rate: int = 16_000
    n_fft: int = 1024
    hop: int = 512
    n_mels: int = 64
    f_min: float = 50.0
    f_max: float = 8000.0
    top_db: float = 80.0
    amin: float = 1e-10
    dft: str = "auto"

    def __post_init__(self):
        """Refuses settings that make no front end."""
        spectrum.check_settings("log-mel", self, ("n_fft", "hop", "n_mels", "top_db", "amin"))
        spectrum.check_filters("log-mel", self, self._filter_bank())

    def frames(self, samples: int) -> int:
        """Frames of a clip of `samples` samples."""
        return 1 + samples // self.hop

    def samples(self, frames: int) -> int:
        """Fewest samples that give `frames` frames."""
        return (frames - 1) * self.hop

    def __call__(self, waveforms: jax.Array) -> jax.Array:
        """(B, samples) float32 to (B, frames, n_mels) float32; jitted, pure.

        Raises:
          ValueError: another rank or dtype.
        """
        return _log_mel(self, waveforms)

    def _filter_bank(self):
        return spectrum.slaney_mel_filter_bank(
            self.sample_rate, self.n_fft, self.n_mels, self.f_min, self.f_max
        )


@functools.partial(jax.jit, static_argnums=0)
def _log_mel(config: LogMel, waveforms: jax.Array) -> jax.Array:
    if waveforms.ndim != 2 or waveforms.dtype != jnp.float32:
        raise ValueError(
            f"a front end takes (batch, samples) float32, got {waveforms.shape} {waveforms.dtype}"
        )
    filter_bank = config._filter_bank()
    bins = spectrum.used_bins(filter_bank)
    window = spectrum.hann(config.n_fft)

    def mel_power(frames):
        power = spectrum.power_spectrum(frames, window, config.n_fft, bins, config.dft)
        return jnp.matmul(power, filter_bank.T[bins], precision=jax.lax.Precision.HIGHEST)

    edge = config.n_fft // 2
    padded = jnp.pad(waveforms, ((0, 0), (edge, config.n_fft - edge)))
    padded = padded[:, : config.n_fft + waveforms.shape[1] // config.hop * config.hop]
    power = spectrum.map_frames(mel_power, padded, config.n_fft, config.hop)
    return spectrum.relative_decibels(power, config.top_db, config.amin)


FRONT_ENDS: Registry[type] = Registry(
    "medalign_jax.front_ends",
    {
        "log_mel": LogMel,
        "kaldi_fbank": KaldiFbank,
        "whisper_mel": WhisperMel,
        "clap_mel": ClapMel,
    },
    type,
)


def front_end(name: str, **overrides) -> Callable[[jax.Array], jax.Array]:
    """The front end of that name, with some of its numbers changed.

    Raises:
      UserError: unknown name or number.
    """
    if name not in FRONT_ENDS:
        raise UserError(f"unknown front end {name!r}; choose from {sorted(FRONT_ENDS)}")
    kind = FRONT_ENDS[name]
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(set(overrides) - known):
        raise UserError(f"front end {name!r} has no {unknown}; it has {sorted(known)}")
    return kind(**overrides)
