"""The log-mel front end against the published numbers, librosa and itself."""

import json

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest

from medalign_jax.audio import LogMel, clip, front_end, spectrum
from medalign_jax.core.errors import UserError

# The fixtures lie within 2e-7 of float64. What is left is the float32 transform of tones whose
# quiet bins are 80 dB down (1e-5 of the range is 0.0008 dB); signals with noise in every bin do
# better.
TOLERANCE = {
    ("fft", "tonal"): 1.5e-5,
    ("fft", "broad"): 1e-6,
    ("matmul", "tonal"): 4e-5,
    ("matmul", "broad"): 5e-6,
}
SIGNALS = ("click", "sine440", "chirp", "noise", "burst", "mixture")


@pytest.fixture(scope="module")
def expected(shared):
    return np.load(shared / "fixtures" / "logmel.npz", allow_pickle=False)


@pytest.fixture(scope="module")
def facts(shared):
    return json.loads((shared / "fixtures" / "logmel.json").read_text())


@pytest.fixture(scope="module")
def signals():
    return make_signals()


def make_signals():
    t, long = np.arange(128_000) / 16_000, np.arange(130_880) / 16_000
    click = np.zeros(128_000)
    click[64_000] = 1
    gate = np.sin(2 * np.pi * 1.25 * long) > 0
    tones = 0.4 * np.sin(2 * np.pi * 440 * long) + 0.2 * np.sin(2 * np.pi * 1500 * long) * gate
    signals = {
        "click": click,
        "sine440": 0.5 * np.sin(2 * np.pi * 440 * t),
        "chirp": 0.5 * np.sin(2 * np.pi * (50 * t + (7900 - 50) / (2 * 8) * t**2)),
        "noise": 0.1 * np.random.default_rng(42).standard_normal(128_000),
        "burst": 0.2 * np.random.default_rng(7).standard_normal(20_800),
        "mixture": tones + 0.05 * np.random.default_rng(11).standard_normal(130_880),
    }
    return {name: signal.astype(np.float32) for name, signal in signals.items()}


def assert_close(actual, wanted, dft, name):
    assert actual.dtype == jnp.float32 and actual.shape == wanted.shape
    kind = "tonal" if name in ("sine440", "chirp") else "broad"
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=TOLERANCE[dft, kind])


@pytest.mark.parametrize("dft", ["fft", "matmul"])
@pytest.mark.parametrize("f_max", [8000, 2000])
@pytest.mark.parametrize("name", SIGNALS)
def test_equals_opera(expected, signals, name, f_max, dft):
    features = LogMel(f_max=f_max, dft=dft)(signals[name][None])
    assert_close(features[0], expected[f"{name}_mel{f_max}"], dft, name)


@pytest.mark.parametrize("dft", ["auto", "fft", "matmul"])
def test_one_batch_equals_acula(expected, signals, dft):
    """All signals together: a clip's features do not depend on its neighbours."""
    batch = np.stack([clip.crop_or_zero_pad(signals[name], 131_000) for name in SIGNALS])
    features = LogMel(dft=dft)(batch)
    for i, name in enumerate(SIGNALS):
        kind = "fft" if dft == "auto" else dft
        assert_close(features[i], expected[f"{name}_acula"], kind, name)


def test_equals_opera_after_padding_and_splitting(expected, signals):
    burst = clip.trim_silence(signals["burst"])
    mixture = clip.trim_silence(signals["mixture"])
    cases = {
        "burst_entire_repeat": clip.fit(burst, 128_000, "repeat"),
        "burst_entire_zero": clip.fit(burst, 128_000, "tile"),
        "burst_split_8p18": clip.split_windows(burst, 130_880)[0],
        "mixture_split_8_last": clip.split_windows(mixture, 128_000)[-1],
    }
    for name, waveform in cases.items():
        assert_close(LogMel()(waveform[None])[0], expected[name], "fft", name)


def test_digital_silence_is_all_zeros(facts):
    features = LogMel()(np.zeros((2, 128_000), np.float32))
    assert list(features.shape[1:]) == facts["facts_per_signal"]["all_zero"]["shape"]
    assert np.unique(features).tolist() == facts["facts_per_signal"]["all_zero"]["unique"]


def test_range_is_exactly_zero_to_one(signals):
    features = np.asarray(LogMel()(np.stack([signals[n] for n in SIGNALS[:4]])))
    assert (features.min(axis=(1, 2)) == 0).all() and (features.max(axis=(1, 2)) == 1).all()


@pytest.mark.parametrize("f_max", [8000, 2000])
def test_filter_bank(expected, f_max):
    ours = spectrum.slaney_mel_filter_bank(16_000, 1024, 64, 50.0, float(f_max))
    theirs = librosa.filters.mel(sr=16_000, n_fft=1024, n_mels=64, fmin=50, fmax=f_max)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-8)
    np.testing.assert_allclose(ours, expected[f"mel_filterbank_{f_max}"], rtol=0, atol=1e-8)


def test_other_numbers_against_librosa():
    """A hop that does not divide the frame, another rate and another range."""
    x = np.random.default_rng(3).standard_normal((3, 9_001)).astype(np.float32)
    config = LogMel(8_000, n_fft=400, hop=160, n_mels=20, f_min=100.0, f_max=3_500.0, top_db=60.0)
    for wave, ours in zip(x, config(x), strict=True):
        power = librosa.feature.melspectrogram(
            y=wave, sr=8_000, n_fft=400, hop_length=160, n_mels=20, fmin=100, fmax=3_500
        )
        decibels = librosa.power_to_db(power, ref=np.max, top_db=60)
        wanted = (decibels - decibels.min()) / np.ptp(decibels)
        np.testing.assert_allclose(ours, wanted.T, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("length", "hop"), [(1024, 512), (400, 160), (7, 7), (5, 9)])
def test_frames_are_the_samples_they_should_be(length, hop):
    x = np.arange(2 * 3_000, dtype=np.float32).reshape(2, 3_000)
    frames = spectrum.frame(jnp.asarray(x), length, hop)
    windows = np.lib.stride_tricks.sliding_window_view(x, length, axis=1)[:, ::hop]
    np.testing.assert_array_equal(frames, windows)


@pytest.mark.parametrize("samples", [130_880, 131_000, 20_800, 1_024, 600, 2])
def test_frame_numbers(samples):
    config = LogMel()
    x = np.random.default_rng(0).standard_normal((1, samples)).astype(np.float32)
    assert config(x).shape == (1, config.frames(samples), 64)
    assert config.samples(config.frames(samples)) <= samples


def test_chunked_order_changes_nothing(signals):
    """More clips than fit into the cache, against clip by clip."""
    batch = np.stack([signals[n][:40_000] for n in ("noise", "mixture", "chirp")] * 4)
    batch *= np.arange(1, 13, dtype=np.float32)[:, None]
    together = LogMel()(batch)
    alone = np.concatenate([LogMel()(row[None]) for row in batch])
    np.testing.assert_allclose(together, alone, rtol=0, atol=2e-5)


def test_same_on_a_sharded_batch(signals):
    """Over all devices there are (one on a plain CPU), split by the compiler or by shard_map."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    spec = jax.sharding.PartitionSpec("data")
    batch = np.stack([signals["noise"][i * 5_000 :][:20_000] for i in range(jax.device_count())])
    split = jax.device_put(batch, jax.sharding.NamedSharding(mesh, spec))
    mapped = jax.jit(jax.shard_map(LogMel().__call__, mesh=mesh, in_specs=spec, out_specs=spec))
    wanted = LogMel()(batch)
    np.testing.assert_allclose(LogMel()(split), wanted, rtol=0, atol=1e-6)
    np.testing.assert_allclose(mapped(split), wanted, rtol=0, atol=1e-6)


def test_gradient_is_finite(signals):
    slope = jax.grad(lambda x: LogMel()(x).sum())(jnp.asarray(signals["noise"][None, :20_000]))
    assert np.isfinite(slope).all() and np.abs(slope).max() > 0


def test_lowers_for_every_platform_without_callbacks():
    """The accelerators' variants are at least traced and lowered here."""
    x = jax.ShapeDtypeStruct((16, 131_000), jnp.float32)
    for platform, has_fft in (("cpu", True), ("cuda", False), ("tpu", False)):
        text = jax.jit(LogMel().__call__).trace(x).lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.fft" in text) is has_fft
        assert "callback" not in text and "gather" not in text
        dots = [line for line in text.splitlines() if "dot_general" in line]
        assert dots and all(line.count("HIGHEST") == 2 for line in dots)


def test_refusals_say_what_to_do():
    with pytest.raises(UserError, match="choose from"):
        front_end("mfcc")
    with pytest.raises(UserError, match="n_mel'"):
        front_end("log_mel", n_mel=3)
    with pytest.raises(UserError, match="f_max <= sample_rate / 2"):
        front_end("log_mel", f_max=9_000.0)
    with pytest.raises(UserError, match="too many"):
        front_end("log_mel", n_mels=400)
    with pytest.raises(ValueError, match="float32"):
        LogMel()(np.zeros((1, 2_000), np.int16))
    with pytest.raises(ValueError, match="batch"):
        LogMel()(np.zeros(2_000, np.float32))
    assert front_end("log_mel", f_max=2_000.0) == LogMel(f_max=2_000.0)
