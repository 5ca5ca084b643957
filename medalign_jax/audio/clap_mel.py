"""CLAP's front end: decibels of 64 mel bands at 48 kHz, and the four pictures of a long recording.

Source: transformers' `ClapFeatureExtractor`, which was made from LAION-AI/CLAP (Wu et al. 2022,
arXiv 2211.06687, section 3.3).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from medalign_jax.audio import spectrum


@dataclasses.dataclass(frozen=True)
class ClapMel:
    """Mel power in dB above 1, as CLAP reads it; -100 dB where there is nothing.

    Frames centred on every `hop`-th sample (the waveform is mirrored at both ends), periodic Hann
    window, power spectrum, mel filters, 10 log10. There is no reference and no floor but `amin`, so
    features follow the gain of a clip. A published input has 10 s, so 1001 frames, for which
    shorter clips are repeated on the host (`audio.clip.repeat_whole`).

    The two published models differ in their filters: triangles of height 1 on HTK's mel scale for
    the fused one (`truncation="fusion"`), triangles of area 1 on Slaney's for the unfused one
    (`"rand_trunc"`).

    Attributes:
      sample_rate: of the waveforms, Hz.
      n_fft: frame and transform, samples.
      hop: from frame to frame, samples.
      n_mels: filters.
      f_min: lower edge of the lowest filter, Hz.
      f_max: upper edge of the highest filter, Hz.
      fusion: filters of the fused model.
      amin: lower bound of the power before the logarithm.
      clip_frames: frames of each of a long recording's `pictures`.
      dft: how the Fourier transform is taken: 'auto', 'fft' or 'matmul' (see `spectrum`).
    """

    sample_rate: int = 48_000
    n_fft: int = 1024
    hop: int = 480
    n_mels: int = 64
    f_min: float = 50.0
    f_max: float = 14_000.0
    fusion: bool = False
    amin: float = 1e-10
    clip_frames: int = 1001
    dft: str = "auto"

    def __post_init__(self):
        """Refuses settings that make no front end."""
        spectrum.check_settings("clap-mel", self, ("n_fft", "hop", "n_mels", "amin", "clip_frames"))
        spectrum.check_filters("clap-mel", self, self._filter_bank())

    def frames(self, samples: int) -> int:
        """Frames of a clip of `samples` samples."""
        return 1 + samples // self.hop

    def samples(self, frames: int) -> int:
        """Fewest samples that give `frames` frames."""
        return (frames - 1) * self.hop

    def __call__(self, waveforms: jax.Array) -> jax.Array:
        """(B, samples) float32 to (B, frames, n_mels) float32; jitted, pure.

        Raises:
          ValueError: another rank or dtype, or too short a clip to be mirrored at its ends
            (up to n_fft / 2 samples).
        """
        return _clap_mel(self, waveforms)

    def pictures(self, waveforms: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the fused model reads of recordings of one, any length (`Clap.embed_fused`).

        Up to `clip_frames` frames it is four times the same picture; of more, the whole shrunk to
        `clip_frames`, and a crop from each third, drawn at random.

        Args:
          waveforms: (B, samples) float32.
          keys: (B,) random keys, one per recording.

        Returns:
          (B, 4, frames, n_mels) float32 with frames <= clip_frames, and (B,) bool, whether the
          recording is longer. (The published extractor also calls one recording at random longer
          where none of a batch is; here results do not depend on the batch.)
        """
        features = self(waveforms)
        batch, total, _ = features.shape
        longer = jnp.full((batch,), total > self.clip_frames)
        if total <= self.clip_frames:
            return jnp.repeat(features[:, None], 4, axis=1), longer
        starts = jax.vmap(lambda key: crop_starts(key, total, self.clip_frames))(keys)
        return fusion_pictures(features, starts, self.clip_frames), longer

    def _filter_bank(self):
        make = htk_mel_filter_bank if self.fusion else spectrum.slaney_mel_filter_bank
        return make(self.sample_rate, self.n_fft, self.n_mels, self.f_min, self.f_max)


@functools.partial(jax.jit, static_argnums=0)
def _clap_mel(config: ClapMel, waveforms: jax.Array) -> jax.Array:
    _check(config, waveforms)
    filter_bank = config._filter_bank()
    bins = spectrum.used_bins(filter_bank)
    window = spectrum.hann(config.n_fft)

    def decibels(frames):
        power = spectrum.power_spectrum(frames, window, config.n_fft, bins, config.dft)
        power = jnp.matmul(power, filter_bank.T[bins], precision=jax.lax.Precision.HIGHEST)
        return 10.0 * jnp.log10(jnp.maximum(power, config.amin))

    edge = config.n_fft // 2
    padded = jnp.pad(waveforms, ((0, 0), (edge, edge)), mode="reflect")
    return spectrum.map_frames(decibels, padded, config.n_fft, config.hop)


def _check(config: ClapMel, waveforms: jax.Array) -> None:
    if waveforms.ndim != 2 or waveforms.dtype != jnp.float32:
        raise ValueError(
            f"a front end takes (batch, samples) float32, got {waveforms.shape} {waveforms.dtype}"
        )
    if waveforms.shape[1] <= config.n_fft // 2:
        raise ValueError(
            f"clap-mel takes clips of more than {config.n_fft // 2} samples, got "
            f"{waveforms.shape[1]}; pad them first (audio.clip.repeat_whole)"
        )


def crop_starts(key: jax.Array, total: int, frames: int) -> jax.Array:
    """First frames of three crops of `frames` out of `total` frames, (3,) int32.

    One is drawn from each third of the possible starts; a third without any (two starts in all)
    gives 0.

    Raises:
      ValueError: no frames are left to choose from.
    """
    count = total - frames + 1
    if count < 2:
        raise ValueError(f"{total} frames leave nothing to choose for crops of {frames}")
    sizes = np.array([(count + 2) // 3, (count + 1) // 3, count // 3])
    firsts = np.where(sizes > 0, np.cumsum(sizes) - sizes, 0)
    return jax.random.randint(key, (3,), firsts, firsts + np.maximum(sizes, 1))


def fusion_pictures(features: jax.Array, starts: jax.Array, frames: int) -> jax.Array:
    """The whole recording shrunk to `frames`, then its crops.

    Args:
      features: (B, T, M), T above `frames`.
      starts: (B, 3) int, first frames of the crops.
      frames: of each picture.

    Returns:
      (B, 4, frames, M) float32.
    """
    shrunk = jnp.einsum(
        "ft,btm->bfm",
        _linear_matrix(features.shape[1], frames),
        features,
        precision=jax.lax.Precision.HIGHEST,
    )

    def crops(feature, starts):
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, feature, slice_size=frames)
        return jnp.stack([cut(starts[i]) for i in range(3)])

    return jnp.concatenate([shrunk[:, None], jax.vmap(crops)(features, starts)], axis=1)


@functools.cache
def _linear_matrix(length: int, frames: int) -> np.ndarray:
    """(frames, length): linear interpolation at the middles of `frames` equal parts.

    As PyTorch's `interpolate(mode="bilinear", align_corners=False)`: two neighbours, however much
    is left out between. Places are float32 as there; in 60 s that moves them by up to 5e-4 frames.
    """
    step = np.float32(length) / np.float32(frames)
    place = step * (np.arange(frames, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
    place = np.clip(place, 0, length - 1)
    first = place.astype(int)
    weight = place - first
    matrix = np.zeros((frames, length), np.float32)
    rows = np.arange(frames)
    matrix[rows, first] = 1 - weight
    matrix[rows, np.minimum(first + 1, length - 1)] += weight
    matrix.setflags(write=False)
    return matrix


@functools.cache
def htk_mel_filter_bank(
    sample_rate: int, n_fft: int, n_mels: int, f_min: float, f_max: float
) -> np.ndarray:
    """Triangles of height 1, straight in Hz, between edges equally spaced on HTK's mel scale.

    The scale is 2595 log10(1 + f / 700); torchaudio's default `melscale_fbanks`.

    Returns:
      (n_mels, n_fft // 2 + 1) float32.
    """
    low, high = (2595.0 * np.log10(1.0 + f / 700.0) for f in (f_min, f_max))
    edges = 700.0 * (10.0 ** (np.linspace(low, high, n_mels + 2) / 2595.0) - 1.0)
    bins = np.arange(n_fft // 2 + 1) * (sample_rate / n_fft)
    rise = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    fall = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    filters = np.maximum(0.0, np.minimum(rise, fall)).astype(np.float32)
    filters.setflags(write=False)
    return filters
