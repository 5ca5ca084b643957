"""Augmentations of waveforms and features, on the device, one random key per sample.

Each pure function here changes one sample, (samples,) or (frames, bands); `Augment` draws whether
and how strongly each applies and maps over the batch. A sample's result depends on its own key
only, so the split of a batch over steps or devices does not matter. Zeros at the ends of a
waveform are padding: filters and noise leave them zero.

Gain, peak normalisation, low-pass and high-pass are those that AcuLA takes from AugLy; frame and
band masks are SpecAugment's (Park et al., 2019). A front end that normalises each clip (`LogMel`)
hides a change of gain from the encoder.

The filters take Fourier transforms, for which XLA gathers a batch that is split over devices;
`jax.shard_map` over the batch axis keeps each sample where it is, with the same results.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from medalign_jax.core.errors import UserError

_FILTER_TAIL_SECONDS = 0.1  # room for a filter's ringing, so that the ends of a clip do not mix


def gain(waveform: jax.Array, decibels: jax.Array) -> jax.Array:
    """Amplifies by so many dB; values beyond 1 are not clipped."""
    return waveform * 10.0 ** (decibels / 20.0)


def peak_normalise(waveform: jax.Array, peak: float = 1.0) -> jax.Array:
    """Scales the largest magnitude to `peak`; silence stays silence."""
    largest = jnp.max(jnp.abs(waveform))
    return waveform * jnp.where(largest > 0, peak / jnp.where(largest > 0, largest, 1.0), 1.0)


def low_pass(waveform: jax.Array, cutoff: jax.Array, sample_rate: int, order: int = 8) -> jax.Array:
    """Butterworth magnitude, zero phase: -3 dB at `cutoff` Hz, then 6 dB per octave and order."""
    return _filter(
        waveform, sample_rate, lambda hz: 1.0 / jnp.sqrt(1.0 + (hz / cutoff) ** (2 * order))
    )


def high_pass(
    waveform: jax.Array, cutoff: jax.Array, sample_rate: int, order: int = 8
) -> jax.Array:
    """Mirror of `low_pass`: -3 dB at `cutoff` Hz, 6 dB per octave and order below; 0 at 0 Hz."""

    def response(hz):
        ratio = (hz / cutoff) ** order  # grows without bound above the cut-off: 1 - 1 / (1 + r²)
        return jnp.sqrt(1.0 - 1.0 / (1.0 + jnp.square(ratio)))

    return _filter(waveform, sample_rate, response)


def add_noise(waveform: jax.Array, key: jax.Array, snr_db: jax.Array) -> jax.Array:
    """Adds white Gaussian noise at a signal-to-noise ratio.

    Signal power is the mean square without the padding at the ends, which gets no noise; neither
    does silence.
    """
    inside = _inside(waveform)
    power = jnp.sum(jnp.square(waveform)) / jnp.maximum(inside.sum(), 1)
    noise = jax.random.normal(key, waveform.shape, waveform.dtype)
    return waveform + jnp.where(inside, noise * jnp.sqrt(power * 10.0 ** (-snr_db / 10.0)), 0.0)


def time_shift(waveform: jax.Array, shift: jax.Array, circular: bool) -> jax.Array:
    """Moves a waveform by `shift` samples, later if positive.

    Args:
      waveform: (samples,).
      shift: integer of magnitude at most `samples`.
      circular: what leaves one end comes in at the other; else zeros come in.
    """
    size = waveform.size
    side = waveform if circular else jnp.zeros_like(waveform)
    return jax.lax.dynamic_slice_in_dim(jnp.concatenate([side, waveform, side]), size - shift, size)


def draw_spans(key: jax.Array, length: int, count: int, max_width: int) -> jax.Array:
    """Which of `length` places lie in one of `count` spans of 1..max_width, (length,) bool."""
    width_key, start_key = jax.random.split(key)
    widths = jax.random.randint(width_key, (count, 1), 1, min(max_width, length) + 1)
    starts = jax.random.uniform(start_key, (count, 1)) * (length - widths + 1)
    starts = jnp.minimum(jnp.floor(starts).astype(jnp.int32), length - widths)
    index = jnp.arange(length)
    return ((index >= starts) & (index < starts + widths)).any(axis=0)


def frame_mask(features: jax.Array, masked: jax.Array, value: float = 0.0) -> jax.Array:
    """Sets the frames marked in (frames,) to `value`; features are (frames, bands)."""
    return jnp.where(masked[:, None], value, features)


def band_mask(features: jax.Array, masked: jax.Array, value: float = 0.0) -> jax.Array:
    """Sets the bands marked in (bands,) to `value`; features are (frames, bands)."""
    return jnp.where(masked[None, :], value, features)


@dataclasses.dataclass(frozen=True)
class Augment:
    """What is done to training clips, and how often.

    The first eight attributes are the probabilities with which each augmentation applies to a
    sample. 0, the default, leaves it out of the program; a sample that an augmentation does not
    draw keeps its bits. Draws of one augmentation do not depend on which others are on.

    Waveforms: low-pass, high-pass, noise, time shift, peak normalisation, gain, in this order.
    Features: frame mask, band mask.

    Attributes:
      gain: probability.
      peak_normalise: probability.
      low_pass: probability.
      high_pass: probability.
      noise: probability.
      time_shift: probability.
      frame_mask: probability.
      band_mask: probability.
      sample_rate: of the waveforms, Hz.
      gain_db: range, dB; uniform.
      peak: largest magnitude after peak normalisation.
      low_pass_hz: range of the cut-off; uniform in its logarithm.
      high_pass_hz: range of the cut-off; uniform in its logarithm.
      filter_order: of both filters; 6 dB per octave each.
      noise_snr_db: range, dB; uniform.
      shift_seconds: longest shift, in both directions; uniform.
      shift_circular: see `time_shift`.
      frame_masks: spans of frames in a sample.
      frame_mask_width: widest span, frames.
      band_masks: spans of bands in a sample.
      band_mask_width: widest span, bands.
      mask_value: what masked features become; 0 is the floor of `LogMel`.
    """

    gain: float = 0.0
    peak_normalise: float = 0.0
    low_pass: float = 0.0
    high_pass: float = 0.0
    noise: float = 0.0
    time_shift: float = 0.0
    frame_mask: float = 0.0
    band_mask: float = 0.0
    sample_rate: int = 16_000
    gain_db: tuple[float, float] = (-12.0, 12.0)
    peak: float = 1.0
    low_pass_hz: tuple[float, float] = (800.0, 6000.0)
    high_pass_hz: tuple[float, float] = (30.0, 150.0)
    filter_order: int = 8
    noise_snr_db: tuple[float, float] = (10.0, 40.0)
    shift_seconds: float = 1.0
    shift_circular: bool = True
    frame_masks: int = 2
    frame_mask_width: int = 24
    band_masks: int = 2
    band_mask_width: int = 8
    mask_value: float = 0.0

    def __post_init__(self):
        """Refuses settings without meaning, by name."""
        for name in _PROBABILITIES:
            _require(0 <= getattr(self, name) <= 1, self, name, "a probability, 0 to 1")
        for name in ("gain_db", "low_pass_hz", "high_pass_hz", "noise_snr_db"):
            value = tuple(getattr(self, name))
            object.__setattr__(self, name, value)  # a list would not be hashable
            _require(len(value) == 2 and value[0] <= value[1], self, name, "(lowest, highest)")
        for kind in ("low_pass", "high_pass"):
            low, high = getattr(self, f"{kind}_hz")
            # Where it is off it does not matter, and the defaults are for 16 kHz.
            inside = low > 0 and (high <= self.sample_rate / 2 or not getattr(self, kind))
            _require(inside, self, f"{kind}_hz", "above 0 and up to half of the sample rate")
        for name in ("peak", "filter_order", "frame_mask_width", "band_mask_width"):
            _require(getattr(self, name) > 0, self, name, "above 0")
        for name in ("frame_masks", "band_masks", "shift_seconds"):
            _require(getattr(self, name) >= 0, self, name, "0 or more")

    @functools.partial(jax.jit, static_argnums=0)
    def waveform(self, waveforms: jax.Array, keys: jax.Array) -> jax.Array:
        """Augments waveforms; jitted, pure.

        Args:
          waveforms: (B, samples) float32.
          keys: (B,) typed keys, one per sample.

        Returns:
          (B, samples) float32.
        """
        steps = (
            ("low_pass", self._low_pass),
            ("high_pass", self._high_pass),
            ("noise", self._noise),
            ("time_shift", self._time_shift),
            ("peak_normalise", lambda x, key: peak_normalise(x, self.peak)),
            ("gain", lambda x, key: gain(x, _uniform(key, self.gain_db))),
        )
        return self._apply(steps, waveforms, keys)

    @functools.partial(jax.jit, static_argnums=0)
    def features(self, features: jax.Array, keys: jax.Array) -> jax.Array:
        """Masks features; jitted, pure.

        Args:
          features: (B, frames, bands) float32.
          keys: (B,) typed keys, one per sample; may be those given to `waveform`.

        Returns:
          (B, frames, bands) float32.
        """
        steps = (("frame_mask", self._frame_mask), ("band_mask", self._band_mask))
        return self._apply(steps, features, keys)

    def _apply(self, steps, batch: jax.Array, keys: jax.Array) -> jax.Array:
        for name, function in steps:
            probability = getattr(self, name)
            if probability > 0:
                keys_of_step = jax.vmap(jax.random.fold_in, (0, None))(
                    keys, _PROBABILITIES.index(name)
                )
                batch = jax.vmap(_sometimes(function, probability))(batch, keys_of_step)
        return batch

    def _low_pass(self, x: jax.Array, key: jax.Array) -> jax.Array:
        cutoff = _log_uniform(key, self.low_pass_hz)
        return low_pass(x, cutoff, self.sample_rate, self.filter_order)

    def _high_pass(self, x: jax.Array, key: jax.Array) -> jax.Array:
        cutoff = _log_uniform(key, self.high_pass_hz)
        return high_pass(x, cutoff, self.sample_rate, self.filter_order)

    def _noise(self, x: jax.Array, key: jax.Array) -> jax.Array:
        ratio_key, noise_key = jax.random.split(key)
        return add_noise(x, noise_key, _uniform(ratio_key, self.noise_snr_db))

    def _time_shift(self, x: jax.Array, key: jax.Array) -> jax.Array:
        longest = min(round(self.shift_seconds * self.sample_rate), x.size)
        shift = jax.random.randint(key, (), -longest, longest + 1)
        return time_shift(x, shift, self.shift_circular)

    def _frame_mask(self, x: jax.Array, key: jax.Array) -> jax.Array:
        masked = draw_spans(key, x.shape[0], self.frame_masks, self.frame_mask_width)
        return frame_mask(x, masked, self.mask_value)

    def _band_mask(self, x: jax.Array, key: jax.Array) -> jax.Array:
        masked = draw_spans(key, x.shape[1], self.band_masks, self.band_mask_width)
        return band_mask(x, masked, self.mask_value)


# The place of a name is part of its random stream: append, do not sort.
_PROBABILITIES = (
    "gain",
    "peak_normalise",
    "low_pass",
    "high_pass",
    "noise",
    "time_shift",
    "frame_mask",
    "band_mask",
)


def _sometimes(function: Callable, probability: float) -> Callable:
    """`function(x, key)` with that probability, else x."""

    def maybe(x, key):
        choice_key, own_key = jax.random.split(key)
        return jnp.where(jax.random.uniform(choice_key) < probability, function(x, own_key), x)

    return maybe


def _uniform(key: jax.Array, bounds: tuple[float, float]) -> jax.Array:
    low, high = bounds
    return low + (high - low) * jax.random.uniform(key)


def _log_uniform(key: jax.Array, bounds: tuple[float, float]) -> jax.Array:
    low, high = bounds
    return low * (high / low) ** jax.random.uniform(key)


def _inside(waveform: jax.Array) -> jax.Array:
    """From the first to the last sample that is not zero; (samples,) bool."""
    sounding = waveform != 0
    index = jnp.arange(waveform.size)
    first = jnp.argmax(sounding)
    last = waveform.size - 1 - jnp.argmax(sounding[::-1])
    return (index >= first) & (index <= last) & sounding.any()


def _filter(waveform: jax.Array, sample_rate: int, response: Callable) -> jax.Array:
    """Multiplies the spectrum by `response(frequency in Hz)`; the ends do not wrap around."""
    size = _fast_size(waveform.size + round(_FILTER_TAIL_SECONDS * sample_rate))
    hz = jnp.arange(size // 2 + 1) * (sample_rate / size)
    spectrum = jnp.fft.rfft(waveform, size) * response(hz)
    filtered = jnp.fft.irfft(spectrum, size)[: waveform.size]
    return jnp.where(_inside(waveform), filtered, 0.0)


def _fast_size(least: int) -> int:
    """Smallest even number of at least `least` with no prime factor above 5."""
    best = 1 << (least - 1).bit_length()
    for fives in (1, 5, 25, 125, 625):
        for threes in (1, 3, 9, 27, 81, 243):
            twos = max(1, (-(-least // (fives * threes)) - 1).bit_length())
            best = min(best, fives * threes << twos)
    return best


def _require(holds: bool, config: Augment, name: str, meaning: str) -> None:
    if not holds:
        raise UserError(f"augment.{name} must be {meaning}; got {getattr(config, name)}")
