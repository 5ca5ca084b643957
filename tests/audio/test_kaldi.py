"""Kaldi's filter bank against transformers' `ASTFeatureExtractor`, which works in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from transformers import audio_utils
from transformers.models.audio_spectrogram_transformer import (
    feature_extraction_audio_spectrogram_transformer as feature_extraction,
)

from medalign_jax.audio.kaldi import KaldiFbank, kaldi_mel_filter_bank, symmetric_hann
from medalign_jax.core.errors import UserError

# What float32 loses. torchaudio's own float32 is 7e-5 (signals with noise in every bin) and 1.3e-3
# (a chirp, whose quiet bins are 90 dB down) from its float64; features are of size 1.
TOLERANCE = {"noise": 6e-5, "offset": 1e-4, "sine": 1e-4, "chirp": 2e-3, "quiet": 1e-6}
TOLERANCE["silence"] = 2e-7


@pytest.fixture(scope="module")
def extractor() -> transformers.ASTFeatureExtractor:
    """The one without torchaudio, whether that is installed or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_extraction, "is_speech_available", lambda: False)
        yield transformers.ASTFeatureExtractor()


def signal(name: str, samples: int) -> np.ndarray:
    t = np.arange(samples) / 16_000
    rng = np.random.default_rng(0)
    return {
        "noise": lambda: 0.1 * rng.standard_normal(samples),
        "offset": lambda: 0.3 + 0.05 * rng.standard_normal(samples),
        "sine": lambda: 0.5 * np.sin(2 * np.pi * 440 * t),
        "chirp": lambda: 0.5 * np.sin(2 * np.pi * (50 * t + 780 * t**2)),
        "quiet": lambda: 1e-4 * rng.standard_normal(samples),
        "silence": lambda: np.zeros(samples),
    }[name]().astype(np.float32)


def reference(extractor, waveform: np.ndarray) -> np.ndarray:
    return extractor(waveform, sampling_rate=16_000, return_tensors="np")["input_values"][0]


@pytest.mark.parametrize("dft", ["fft", "matmul"])
@pytest.mark.parametrize("name", TOLERANCE)
def test_equals_transformers(extractor, name, dft):
    waveform = signal(name, 80_000)
    features = KaldiFbank(dft=dft)(waveform[None])
    expected = reference(extractor, waveform)
    assert features.dtype == jnp.float32 and features.shape == (1, *expected.shape)
    np.testing.assert_allclose(features[0], expected, rtol=0, atol=TOLERANCE[name])


# One frame; one sample less than two; a padded second; exactly 1024 frames; cut.
@pytest.mark.parametrize("samples", [400, 559, 560, 16_000, 164_080, 170_001])
def test_lengths(extractor, samples):
    waveform = signal("noise", samples)
    features = KaldiFbank()(waveform[None])
    assert features.shape == (1, 1024, 128) and KaldiFbank().frames(samples) == 1024
    expected = reference(extractor, waveform)
    np.testing.assert_allclose(features[0], expected, rtol=0, atol=6e-5)
    filled = np.isclose(features[0], 4.2677393 / (2 * 4.5689974), rtol=0, atol=1e-6).all(axis=1)
    assert filled.sum() == max(0, 1024 - (1 + (samples - 400) // 160))


def test_clips_of_a_batch_do_not_see_each_other(extractor):
    """More frames than fit into the cache, so that the loop over chunks is taken."""
    batch = np.stack([signal("noise", 40_000) * gain for gain in (1, 0.3, 0.01, 2)])
    together = KaldiFbank()(batch)
    for waveform, features in zip(batch, together, strict=True):
        expected = reference(extractor, waveform)
        np.testing.assert_allclose(features, expected, rtol=0, atol=TOLERANCE["noise"])


def test_without_padding_and_with_other_numbers():
    """Another rate, range and frame, against the parts that transformers has."""
    config = KaldiFbank(
        8_000, length=200, hop=70, n_mels=23, f_min=100.0, f_max=3_000.0, preemphasis=0.9,
        pad_to=None, mean=-3.0, std=2.0,
    )  # fmt: skip
    assert config.n_fft == 256
    waveform = signal("noise", 5_003)
    filters = audio_utils.mel_filter_bank(
        129,
        23,
        100.0,
        3_000.0,
        8_000,
        norm=None,
        mel_scale="kaldi",
        triangularize_in_mel_space=True,
    )
    log_energy = audio_utils.spectrogram(
        waveform, audio_utils.window_function(200, "hann", periodic=False), 200, 70, 256,
        power=2.0, center=False, preemphasis=0.9, mel_filters=filters, log_mel="log",
        mel_floor=np.finfo(np.float32).eps, remove_dc_offset=True,
    )  # fmt: skip
    features = config(waveform[None])[0]
    assert features.shape == (config.frames(5_003), 23) == (1 + 4_803 // 70, 23)
    np.testing.assert_allclose(features, (log_energy.T + 3) / 4, rtol=0, atol=6e-5)


def test_filter_bank_and_window(extractor):
    ours = kaldi_mel_filter_bank(16_000, 512, 128, 20.0, 8_000.0)
    np.testing.assert_allclose(ours.T, extractor.mel_filters, rtol=0, atol=1e-7)
    assert not ours[:, 256].any()
    assert np.flatnonzero(~ours.any(axis=1)).tolist() == [3]
    np.testing.assert_allclose(symmetric_hann(400), extractor.window, rtol=0, atol=1e-7)


def test_samples_and_frames_are_inverse():
    config = KaldiFbank(pad_to=None)
    for frames in (1, 2, 1024):
        assert config.frames(config.samples(frames)) == frames
        assert config.frames(config.samples(frames) - 1) == frames - 1
    assert KaldiFbank().samples(1024) == 164_080


def test_gradient_is_finite_and_silence_has_none():
    batch = np.stack([signal("noise", 20_000), signal("silence", 20_000)])
    slope = jax.grad(lambda x: KaldiFbank()(x).sum())(jnp.asarray(batch))
    assert np.isfinite(slope).all() and np.abs(slope[0]).max() > 0 and not slope[1].any()


def test_lowers_for_every_platform():
    x = jax.ShapeDtypeStruct((16, 128_000), jnp.float32)
    for platform, has_fft in (("cpu", True), ("cuda", False), ("tpu", False)):
        text = jax.jit(KaldiFbank().__call__).trace(x).lower(lowering_platforms=(platform,))
        text = text.as_text()
        assert ("stablehlo.fft" in text) is has_fft
        dots = [line for line in text.splitlines() if "dot_general" in line]
        assert dots and all(line.count("HIGHEST") == 2 for line in dots)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"f_max": 9_000.0}, "f_max <= sample_rate / 2"),
        ({"hop": 0}, "hop must be above 0"),
        ({"length": 1}, "length must be at least 2"),
        ({"n_mels": 0}, "n_mels"),
        ({"std": 0.0}, "std must be above 0"),
        ({"preemphasis": 1.5}, "preemphasis"),
        ({"pad_to": 0}, "pad_to"),
        ({"dft": "slow"}, "auto, fft or matmul"),
    ],
)
def test_bad_settings_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        KaldiFbank(**change)


def test_bad_waveforms_are_refused():
    with pytest.raises(ValueError, match="399 samples are less than a frame of 400"):
        KaldiFbank()(np.zeros((1, 399), np.float32))
    with pytest.raises(ValueError, match="float32"):
        KaldiFbank()(np.zeros((1, 2_000), np.int16))
    with pytest.raises(ValueError, match="batch"):
        KaldiFbank()(np.zeros(2_000, np.float32))
