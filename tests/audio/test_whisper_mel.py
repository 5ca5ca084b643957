"""Whisper's front end against transformers and against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor
from transformers.audio_utils import spectrogram, window_function

from medalign_jax.audio import spectrum
from medalign_jax.audio.whisper_mel import WhisperMel
from medalign_jax.core.errors import UserError

# transformers computes in float32 (torch.stft). Where every bin holds something both agree to 1e-5.
# Beside a loud tone the quiet bins lie 70 dB down and show what a float32 transform rounds away:
# there transformers is up to 6e-5 off the float64 numbers, and so are we.
ATOL = {"broad": 1e-5, "tonal": 1e-4}
FLOAT64_ATOL = {
    ("fft", "broad"): 5e-6,
    ("fft", "tonal"): 5e-5,
    ("matmul", "broad"): 1e-5,
    ("matmul", "tonal"): 1e-4,
}
NAMES = ("noise", "quiet", "mixture", "burst", "sine", "silence")
RATE = 16_000


@pytest.fixture(scope="module")
def signals():
    t = np.arange(5 * RATE + 37) / RATE
    rng = np.random.default_rng(0)
    noise = 0.1 * rng.standard_normal(t.size)
    signals = {
        "noise": noise,
        "quiet": 1e-4 * noise,
        "mixture": 0.4 * np.sin(2 * np.pi * 440 * t) * (t % 1 < 0.5) + 0.05 * noise,
        "burst": np.where(t < 2, noise, 0.0),
        "sine": 0.5 * np.sin(2 * np.pi * 440 * t),
        "silence": 0 * t,
    }
    return {name: signal.astype(np.float32) for name, signal in signals.items()}


def published(waveform, mels=80, **options):
    torch.set_num_threads(1)
    extract = WhisperFeatureExtractor(feature_size=mels)
    options = {"padding": "do_not_pad"} | options
    return extract(waveform, sampling_rate=RATE, return_tensors="np", **options)


def in_float64(waveform, mels=80):
    """The published formula without float32: transformers' own NumPy transform."""
    filters = WhisperFeatureExtractor(feature_size=mels).mel_filters
    wide = spectrogram(
        waveform.astype(np.float64), window_function(400, "hann"), 400, 160, power=2.0,
        mel_filters=filters, log_mel="log10", dtype=np.float64,
    )[:, :-1]  # fmt: skip
    return ((np.maximum(wide, wide.max() - 8.0) + 4.0) / 4.0).T


def kind(name):
    return "tonal" if name in ("mixture", "sine") else "broad"


@pytest.mark.parametrize("dft", ["fft", "matmul"])
@pytest.mark.parametrize("mels", [80, 128])
@pytest.mark.parametrize("name", NAMES)
def test_equals_transformers(signals, name, mels, dft):
    wanted = published(signals[name], mels)["input_features"][0].T
    ours = WhisperMel(n_mels=mels, dft=dft)(signals[name][None])[0]
    assert ours.dtype == jnp.float32 and ours.shape == wanted.shape
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=ATOL[kind(name)])


@pytest.mark.parametrize("dft", ["fft", "matmul"])
@pytest.mark.parametrize("mels", [80, 128])
@pytest.mark.parametrize("name", NAMES)
def test_equals_float64(signals, name, mels, dft):
    ours = WhisperMel(n_mels=mels, dft=dft)(signals[name][None])[0]
    atol = FLOAT64_ATOL[dft, kind(name)]
    np.testing.assert_allclose(ours, in_float64(signals[name], mels), rtol=0, atol=atol)


def test_thirty_seconds_as_published(signals):
    """Padded to 30 s; all signals in one batch, each with a floor of its own."""
    names = ("noise", "quiet", "burst")
    batch = np.zeros((3, 30 * RATE), np.float32)
    for row, name in zip(batch, names, strict=True):
        row[: signals[name].size] = signals[name]
    ours = WhisperMel()(batch)
    assert ours.shape == (3, 3000, 80)
    for features, name in zip(ours, names, strict=True):
        wanted = published(signals[name], padding="max_length")["input_features"][0].T
        np.testing.assert_allclose(features, wanted, rtol=0, atol=ATOL["broad"])


@pytest.mark.parametrize("samples", [201, 320, 399, 16_000, 16_001, 16_159])
def test_frame_numbers(samples):
    config = WhisperMel()
    x = np.random.default_rng(samples).standard_normal(samples).astype(np.float32)
    ours = config(x[None])
    assert ours.shape == (1, config.frames(samples), 80)
    assert config.frames(config.samples(config.frames(samples))) == config.frames(samples)
    wanted = published(x)["input_features"][0].T
    np.testing.assert_allclose(ours[0], wanted, rtol=0, atol=ATOL["broad"])


@pytest.mark.parametrize("samples", [1_600, 1_601, 1_759, 1_760])
def test_valid_frames_are_those_of_the_published_mask(samples):
    x = np.ones(samples, np.float32)
    mask = published(x, padding="max_length", return_attention_mask=True)["attention_mask"]
    assert WhisperMel().valid_frames(samples) == mask.sum()
    np.testing.assert_array_equal(WhisperMel().valid_frames(np.array([samples])), mask.sum(1))


@pytest.mark.parametrize("mels", [80, 128])
def test_filter_bank(mels):
    ours = spectrum.slaney_mel_filter_bank(RATE, 400, mels, 0.0, 8000.0)
    theirs = WhisperFeatureExtractor(feature_size=mels).mel_filters
    np.testing.assert_allclose(ours, theirs.T, rtol=0, atol=1e-8)


def test_gradient_is_finite(signals):
    x = jnp.asarray(signals["burst"][None, :48_000])
    slope = jax.grad(lambda x: WhisperMel()(x).sum())(x)
    assert np.isfinite(slope).all() and np.abs(slope).max() > 0


def test_lowers_for_every_platform_without_callbacks():
    x = jax.ShapeDtypeStruct((8, 480_000), jnp.float32)
    for platform, has_fft in (("cpu", True), ("cuda", False), ("tpu", False)):
        traced = jax.jit(WhisperMel().__call__).trace(x)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.fft" in text) is has_fft
        assert "callback" not in text and "gather" not in text


def test_refusals_say_what_to_do():
    with pytest.raises(UserError, match="f_max <= sample_rate / 2"):
        WhisperMel(f_max=9_000.0)
    with pytest.raises(UserError, match="too many"):
        WhisperMel(n_mels=400)
    with pytest.raises(UserError, match="hop must be above 0"):
        WhisperMel(hop=0)
    with pytest.raises(UserError, match="dft"):
        WhisperMel(dft="slow")
    with pytest.raises(ValueError, match="float32"):
        WhisperMel()(np.zeros((1, 2_000), np.int16))
    with pytest.raises(ValueError, match="at least 201 samples"):
        WhisperMel()(np.zeros((1, 200), np.float32))
