"""Whisper's front end, which the audio towers of Qwen2-Audio and Qwen2.5-Omni share."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from medalign_jax.audio import spectrum


@dataclasses.dataclass(frozen=True)
class WhisperMel:
    """Log-mel features as Whisper reads them, about -1 to 2.

    Frames centred on every `hop`-th sample (the waveform is mirrored at both ends; the frame
    centred on its end is dropped), periodic Hann window, power spectrum, Slaney mel filters, log10
    with everything lower than `log_range` below the clip's maximum raised to that floor, then
    (x + 4) / 4. The floor depends on the loudest point of the clip, so padding comes before.
    Source: Radford et al. 2022 (arXiv 2212.04356), section 2.2; transformers'
    `WhisperFeatureExtractor`, which pads with zeros to 30 s = 3000 frames beforehand. Here a clip
    keeps its length.

    Attributes:
      sample_rate: of the waveforms, Hz.
      n_fft: frame and transform, samples.
      hop: from frame to frame, samples.
      n_mels: filters; 80 up to Whisper large-v2, 128 from large-v3 on and in Qwen's towers.
      f_min: lower edge of the lowest filter, Hz.
      f_max: upper edge of the highest filter, Hz.
      log_range: dynamic range, powers of ten.
      amin: lower bound of the power before the logarithm.
      dft: how the Fourier transform is taken: 'auto', 'fft' or 'matmul' (see `spectrum`).
    """

    sample_rate: int = 16_000
    n_fft: int = 400
    hop: int = 160
    n_mels: int = 80
    f_min: float = 0.0
    f_max: float = 8000.0
    log_range: float = 8.0
    amin: float = 1e-10
    dft: str = "auto"

    def __post_init__(self):
        """Refuses settings that make no front end."""
        spectrum.check_settings(
            "whisper-mel", self, ("n_fft", "hop", "n_mels", "log_range", "amin")
        )
        spectrum.check_filters("whisper-mel", self, self._filter_bank())

    def frames(self, samples: int) -> int:
        """Frames of a clip of `samples` samples."""
        return samples // self.hop

    def samples(self, frames: int) -> int:
        """Fewest samples that give `frames` frames."""
        return frames * self.hop

    def valid_frames(self, samples):
        """Frames that hold some of the first `samples` samples of a padded clip.

        An int or an array of them; the encoders' `lengths`, as the published attention mask counts.
        """
        return -(-samples // self.hop)

    def __call__(self, waveforms: jax.Array) -> jax.Array:
        """(B, samples) float32 to (B, frames, n_mels) float32; jitted, pure.

        Raises:
          ValueError: another rank or dtype, or too short a clip to be mirrored at its ends
            (up to n_fft / 2 samples).
        """
        return _whisper_mel(self, waveforms)

    def _filter_bank(self):
        return spectrum.slaney_mel_filter_bank(
            self.sample_rate, self.n_fft, self.n_mels, self.f_min, self.f_max
        )


@functools.partial(jax.jit, static_argnums=0)
def _whisper_mel(config: WhisperMel, waveforms: jax.Array) -> jax.Array:
    _check(config, waveforms)
    filter_bank = config._filter_bank()
    bins = spectrum.used_bins(filter_bank)
    window = spectrum.hann(config.n_fft)

    def mel_power(frames):
        power = spectrum.power_spectrum(frames, window, config.n_fft, bins, config.dft)
        return jnp.matmul(power, filter_bank.T[bins], precision=jax.lax.Precision.HIGHEST)

    edge = config.n_fft // 2
    padded = jnp.pad(waveforms, ((0, 0), (edge, edge)), mode="reflect")
    last = config.frames(waveforms.shape[1]) - 1
    padded = padded[:, : last * config.hop + config.n_fft]
    power = spectrum.map_frames(mel_power, padded, config.n_fft, config.hop)
    return _compress(power, config)


def _check(config: WhisperMel, waveforms: jax.Array) -> None:
    if waveforms.ndim != 2 or waveforms.dtype != jnp.float32:
        raise ValueError(
            f"a front end takes (batch, samples) float32, got {waveforms.shape} {waveforms.dtype}"
        )
    least = max(config.n_fft // 2 + 1, config.hop)
    if waveforms.shape[1] < least:
        raise ValueError(
            f"whisper-mel takes clips of at least {least} samples, got {waveforms.shape[1]}; "
            "pad them first (audio.clip)"
        )


def _compress(power: jax.Array, config: WhisperMel) -> jax.Array:
    """(B, frames, mels) power to log10 above the clip's floor, scaled."""
    logarithm = jnp.log10(jnp.maximum(power, config.amin))
    floor = logarithm.max(axis=(1, 2), keepdims=True) - config.log_range
    return (jnp.maximum(logarithm, floor) + 4.0) / 4.0
