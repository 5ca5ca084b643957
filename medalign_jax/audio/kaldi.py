"""Kaldi's log-mel filter bank, the input of AST and AudioMAE."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from medalign_jax.audio import spectrum
from medalign_jax.core.errors import UserError
from medalign_jax.core.rounding import power_of_two

_FLOOR = float(np.finfo(np.float32).eps)  # least energy, so the log of silence is -15.94


@dataclasses.dataclass(frozen=True)
class KaldiFbank:
    """Log-mel filter bank as Kaldi computes it, with AudioSet's normalisation.

    The clip loses its mean, then each frame its own; frames are pre-emphasised and weighted with a
    symmetric Hann window; the power of their transform goes through triangles on the mel scale,
    and the log of that, at least log(2^-23), is the feature. Frames lie within the waveform.
    Clips are then filled up with zeros to `pad_to` frames, or cut, and last comes
    (x - mean) / (2 std), so that a frame of padding is 0.467 where one of silence is -1.277. What
    is padded is the filter bank: of a waveform that was padded before, say how long it was.

    This is `torchaudio.compliance.kaldi.fbank(htk_compat=True, use_energy=False, dither=0,
    window_type="hanning")` with the steps around it in AST (Gong et al. 2021, YuanGongND/ast) and
    AudioMAE (Huang et al. 2022, arXiv 2207.06405), and transformers' `ASTFeatureExtractor`. (The
    last leaves the clip's mean in, which only costs digits.) With 128 filters the fourth holds no
    bin of the transform and always gives the floor.

    Attributes:
      sample_rate: of the waveforms, Hz.
      length: samples in a frame; the transform has the next power of 2.
      hop: from frame to frame, samples.
      n_mels: filters.
      f_min: lower edge of the lowest filter, Hz.
      f_max: upper edge of the highest filter, Hz.
      preemphasis: share of the sample before that is subtracted from each sample.
      pad_to: frames of every clip; None leaves as many as there are.
      mean, std: of the features over the data that the encoder was trained on (AudioSet).
      dft: how the Fourier transform is taken: 'auto', 'fft' or 'matmul' (see `spectrum`).
    """

    sample_rate: int = 16_000
    length: int = 400
    hop: int = 160
    n_mels: int = 128
    f_min: float = 20.0
    f_max: float = 8000.0
    preemphasis: float = 0.97
    pad_to: int | None = 1024
    mean: float = -4.2677393
    std: float = 4.5689974
    dft: str = "auto"

    def __post_init__(self):
        """Refuses settings that make no front end."""
        spectrum.check_settings("fbank", self, ("hop", "n_mels", "std"))
        if self.length < 2:
            raise UserError(f"fbank: length must be at least 2, got {self.length}")
        if not 0 <= self.preemphasis <= 1:
            raise UserError(f"fbank: preemphasis must lie in 0..1, got {self.preemphasis}")
        if self.pad_to is not None and self.pad_to < 1:
            raise UserError(f"fbank: pad_to must be at least 1 or None, got {self.pad_to}")

    @property
    def n_fft(self) -> int:
        """Size of the Fourier transform, samples."""
        return power_of_two(self.length)

    def frames(self, samples: int) -> int:
        """Frames of a clip of `samples` samples, padding included."""
        return self.pad_to or spectrum.frame_count(samples, self.length, self.hop)

    def samples(self, frames: int) -> int:
        """Fewest samples that give `frames` frames without padding."""
        return (frames - 1) * self.hop + self.length

    def __call__(self, waveforms: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        """(B, samples) float32 in [-1, 1] to (B, frames, n_mels) float32; jitted, pure.

        Args:
          waveforms: each with zeros behind its end, if it is shorter than the others.
          lengths: (B,) integers, samples before that end; None for all. Frames that reach beyond
            it are padding, but for a clip of less than a frame, which has one.

        Raises:
          ValueError: another rank or dtype, or less than one frame.
        """
        return _fbank(self, waveforms, lengths)


@functools.partial(jax.jit, static_argnums=0)
def _fbank(config: KaldiFbank, waveforms: jax.Array, lengths: jax.Array | None) -> jax.Array:
    _check(config, waveforms)
    if config.pad_to is not None:
        waveforms = waveforms[:, : config.samples(config.pad_to)]
    # Frames lose their own mean below; without the clip's, that would cost digits in float32.
    waveforms = waveforms - waveforms.mean(axis=1, keepdims=True)
    filter_bank = kaldi_mel_filter_bank(
        config.sample_rate, config.n_fft, config.n_mels, config.f_min, config.f_max
    )
    bins = spectrum.used_bins(filter_bank)
    window = symmetric_hann(config.length)

    def log_energy(frames):
        frames = frames - frames.mean(axis=-1, keepdims=True)
        before = jnp.concatenate([frames[..., :1], frames[..., :-1]], axis=-1)
        frames = frames - config.preemphasis * before
        power = spectrum.power_spectrum(frames, window, config.n_fft, bins, config.dft)
        energy = jnp.matmul(power, filter_bank.T[bins], precision=jax.lax.Precision.HIGHEST)
        return jnp.log(jnp.maximum(energy, _FLOOR))

    features = spectrum.map_frames(log_energy, waveforms, config.length, config.hop)
    if lengths is not None:
        ends = jnp.maximum(1, 1 + (lengths - config.length) // config.hop)
        whole = jnp.arange(features.shape[1]) < ends[:, None]
        features = jnp.where(whole[..., None], features, 0.0)
    missing = config.frames(waveforms.shape[1]) - features.shape[1]
    features = jnp.pad(features, ((0, 0), (0, missing), (0, 0)))
    return (features - config.mean) / (2 * config.std)


def _check(config: KaldiFbank, waveforms: jax.Array) -> None:
    if waveforms.ndim != 2 or waveforms.dtype != jnp.float32:
        raise ValueError(
            f"a front end takes (batch, samples) float32, got {waveforms.shape} {waveforms.dtype}"
        )
    if waveforms.shape[1] < config.length:
        raise ValueError(
            f"fbank: {waveforms.shape[1]} samples are less than a frame of {config.length}; "
            "pad the waveforms"
        )


@functools.cache
def kaldi_mel_filter_bank(
    sample_rate: int, n_fft: int, n_mels: int, f_min: float, f_max: float
) -> np.ndarray:
    """Triangles of height 1, equally spaced and straight on the mel scale 1127 ln(1 + f / 700).

    Kaldi, `feat/mel-computations.cc`. Unlike Slaney's, the sides are straight in mel, not in Hz,
    and the bin at half the sample rate is in no filter.

    Returns:
      (n_mels, n_fft // 2 + 1) float32.
    """
    edges = np.linspace(*_mel(np.array([f_min, f_max])), n_mels + 2)
    bins = _mel(np.arange(n_fft // 2 + 1) * (sample_rate / n_fft))
    side = edges[1] - edges[0]
    filters = np.maximum(0.0, 1.0 - np.abs(bins - edges[1:-1, None]) / side)
    filters[:, -1] = 0.0
    return _constant(filters)


@functools.cache
def symmetric_hann(length: int) -> np.ndarray:
    """Hann window that is 0 at both ends, (length,) float32."""
    return _constant(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / (length - 1)))


def _mel(frequency: np.ndarray) -> np.ndarray:
    return 1127.0 * np.log1p(frequency / 700.0)


def _constant(array: np.ndarray) -> np.ndarray:
    array = array.astype(np.float32)
    array.setflags(write=False)
    return array
