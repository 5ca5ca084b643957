"""CLAP's front end against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import ClapFeatureExtractor

from medalign_jax.audio import spectrum
from medalign_jax.audio.clap_mel import (
    ClapMel,
    crop_starts,
    fusion_pictures,
    htk_mel_filter_bank,
)
from medalign_jax.audio.clip import repeat_whole, tile_pad
from medalign_jax.core.errors import UserError

torch.set_num_threads(1)
RATE = 48_000

# The published extractor transforms in float64. Where every band holds something a float32
# transform gives the same to 1e-4 dB. In the pauses of a tone the frames at its edges hold bands
# 60 dB below it, where float32 itself rounds away 7e-4 dB (torch.stft, compared below); the product
# with the matrix of the transform, for accelerators, sums in another order and loses more.
BROAD = 1e-4
TONAL = {"fft": 1e-3, "matmul": 6e-3}


def extractor(fusion: bool) -> ClapFeatureExtractor:
    kind = "fusion" if fusion else "rand_trunc"
    return ClapFeatureExtractor(frequency_min=50, frequency_max=14_000, truncation=kind)


def published(waveform: np.ndarray, fusion: bool) -> np.ndarray:
    """(4 or 1, 1001, 64) of a clip of at most 10 s."""
    made = extractor(fusion)(waveform, sampling_rate=RATE, return_tensors="np")
    return made["input_features"][0]


@pytest.fixture(scope="module")
def signals() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    t = np.arange(RATE * 7 + 123) / RATE
    noise = 0.1 * rng.standard_normal(t.size)
    signals = {
        "noise": noise,
        "quiet": 1e-3 * noise,
        "mixture": 0.4 * np.sin(2 * np.pi * 440 * t) * (t % 1 < 0.5) + 0.05 * noise,
        "burst": np.where(t < 2, noise, 0.0),
        "silence": 0 * t,
    }
    return {name: signal.astype(np.float32) for name, signal in signals.items()}


@pytest.mark.parametrize("dft", ["fft", "matmul"])
@pytest.mark.parametrize("fusion", [False, True])
@pytest.mark.parametrize("name", ["noise", "quiet", "mixture", "burst", "silence"])
def test_equals_transformers(signals, name, fusion, dft):
    wanted = published(signals[name], fusion)
    clip = repeat_whole(signals[name], 10 * RATE)
    ours = ClapMel(fusion=fusion, dft=dft)(clip[None])
    assert ours.shape == (1, 1001, 64) and ours.dtype == jnp.float32
    for picture in wanted:
        atol = TONAL[dft] if name == "mixture" else BROAD
        np.testing.assert_allclose(ours[0], picture, rtol=0, atol=atol)


@pytest.mark.parametrize("fusion", [False, True])
def test_the_error_beside_a_tone_is_that_of_float32(fusion):
    """A pure tone leaves bands empty 130 dB below it; we are no further off than torch.stft."""
    t = np.arange(10 * RATE) / RATE
    tone = (0.5 * np.sin(2 * np.pi * 440 * t)).astype(np.float32)
    wanted, front_end = published(tone, fusion)[0], ClapMel(fusion=fusion, dft="fft")
    window = torch.hann_window(1024)
    spectra = torch.stft(torch.tensor(tone), 1024, 480, window=window, return_complex=True)
    power = torch.tensor(front_end._filter_bank()) @ spectra.abs().square()
    theirs = np.abs((10 * power.clamp(min=1e-10).log10()).T.numpy() - wanted)
    ours = np.abs(front_end(tone[None])[0] - wanted)
    assert ours.max() <= 2 * theirs.max() and np.median(ours) <= 2 * np.median(theirs)


@pytest.mark.parametrize("fusion", [False, True])
def test_filter_banks(fusion):
    ours = ClapMel(fusion=fusion)._filter_bank()
    theirs = extractor(fusion)
    wanted = theirs.mel_filters if fusion else theirs.mel_filters_slaney
    np.testing.assert_allclose(ours, wanted.T, rtol=0, atol=1e-6)
    assert ours.any(axis=1).all()


def test_the_two_branches_differ(signals):
    clip = signals["noise"][None, :RATE]
    gap = np.abs(ClapMel()(clip) - ClapMel(fusion=True)(clip))
    assert np.median(gap) > 10  # dB; a filter of height 1 has an area of many Hz


@pytest.mark.parametrize("samples", [1, 1000, 160_000, 240_000, 240_001, 479_999, 480_000])
def test_padding_repeats_whole_copies(samples):
    x = np.random.default_rng(samples).standard_normal(samples).astype(np.float32)
    seen = {}

    class Spy(ClapFeatureExtractor):
        def _np_extract_fbank_features(self, waveform, mel_filters=None):
            seen["waveform"] = waveform
            return np.zeros((1001, 64), np.float32)

    Spy()(x, sampling_rate=RATE)
    ours = repeat_whole(x, 480_000)
    np.testing.assert_array_equal(ours, seen["waveform"])
    # What `clip.fit` offers is the same, unless the copies fill the clip to its last sample.
    equal = np.array_equal(tile_pad(x, 480_000), ours)
    assert equal == (480_000 % samples != 0 or samples == 480_000)


@pytest.mark.parametrize("samples", [513, 960, 16_000, 47_999])
def test_frame_numbers(samples):
    config = ClapMel()
    ours = config(np.zeros((2, samples), np.float32))
    assert ours.shape == (2, config.frames(samples), 64)
    assert config.frames(config.samples(ours.shape[1])) == ours.shape[1]


def test_long_recording_gives_the_published_pictures(monkeypatch):
    """14 s: the whole shrunk, and three crops where the published extractor drew them."""
    x = 0.1 * np.random.default_rng(1).standard_normal(14 * RATE).astype(np.float32)
    drawn = []

    def choose(candidates):
        drawn.append(candidates)
        return candidates[len(candidates) // 2]

    monkeypatch.setattr(np.random, "choice", choose)
    made = extractor(True)(x, sampling_rate=RATE, return_tensors="np")
    assert made["is_longer"].tolist() == [[True]]

    front_end = ClapMel(fusion=True)
    starts = np.array([[each[len(each) // 2] for each in drawn]])
    features = front_end(x[None])
    ours = fusion_pictures(features, starts, 1001)
    np.testing.assert_allclose(ours[0, 1:], made["input_features"][0, 1:], rtol=0, atol=1e-4)
    # Neighbouring frames differ by up to 30 dB, and places are rounded to 1e-4 frames.
    np.testing.assert_allclose(ours[0, 0], made["input_features"][0, 0], rtol=0, atol=5e-4)

    keys = jax.random.split(jax.random.key(0), 400)
    random = np.asarray(jax.vmap(lambda key: crop_starts(key, features.shape[1], 1001))(keys))
    for column, candidates in zip(random.T, drawn, strict=True):
        assert candidates[0] <= column.min() and column.max() <= candidates[-1]
        assert len(np.unique(column)) > 100

    pictures, longer = jax.jit(front_end.pictures)(x[None], keys[:1])
    assert pictures.shape == (1, 4, 1001, 64) and longer.tolist() == [True]
    np.testing.assert_allclose(pictures[:, 0], ours[:, 0], rtol=0, atol=1e-5)
    crop = features[0, random[0, 2] : random[0, 2] + 1001]
    np.testing.assert_array_equal(pictures[0, 3], crop)


def test_a_recording_that_fits_is_four_times_the_same(signals):
    clip = repeat_whole(signals["noise"], 10 * RATE)[None]
    pictures, longer = ClapMel(fusion=True).pictures(clip, jax.random.split(jax.random.key(0), 1))
    assert longer.tolist() == [False]
    np.testing.assert_allclose(pictures[0], published(signals["noise"], True), rtol=0, atol=1e-4)


@pytest.mark.parametrize("extra", [1, 2, 3, 4])
def test_crops_of_a_hardly_longer_recording(extra):
    """As many starts as extra frames and one; numpy's array_split shares them out."""
    thirds = [list(part) or [0] for part in np.array_split(np.arange(extra + 1), 3)]
    keys = jax.random.split(jax.random.key(3), 200)
    drawn = np.asarray(jax.vmap(lambda key: crop_starts(key, 50 + extra, 50))(keys))
    assert [sorted(set(column)) for column in drawn.T.tolist()] == thirds
    with pytest.raises(ValueError, match="nothing to choose"):
        crop_starts(keys[0], 50, 50)


def test_gradient_is_finite(signals):
    x = jnp.asarray(signals["burst"][None, RATE : 3 * RATE])
    slope = jax.grad(lambda x: ClapMel()(x).sum())(x)
    assert np.isfinite(slope).all() and np.abs(slope).max() > 0


def test_lowers_for_every_platform_without_callbacks():
    x = jax.ShapeDtypeStruct((8, 480_000), jnp.float32)
    for platform, has_fft in (("cpu", True), ("cuda", False), ("tpu", False)):
        traced = jax.jit(ClapMel().__call__).trace(x)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.fft" in text) is has_fft
        assert "callback" not in text and "gather" not in text


def test_htk_filters_are_not_slaneys():
    numbers = (RATE, 1024, 64, 50.0, 14_000.0)
    htk, slaney = htk_mel_filter_bank(*numbers), spectrum.slaney_mel_filter_bank(*numbers)
    assert htk.max() > 0.9 and slaney.max() < 0.05


def test_refusals_say_what_to_do():
    with pytest.raises(UserError, match="f_max <= sample_rate / 2"):
        ClapMel(f_max=25_000.0)
    with pytest.raises(UserError, match="too many"):
        ClapMel(n_mels=400)
    with pytest.raises(UserError, match="hop must be above 0"):
        ClapMel(hop=0)
    with pytest.raises(UserError, match="dft"):
        ClapMel(dft="slow")
    with pytest.raises(ValueError, match="float32"):
        ClapMel()(np.zeros((1, 2_000), np.int16))
    with pytest.raises(ValueError, match="more than 512 samples"):
        ClapMel()(np.zeros((1, 512), np.float32))
    with pytest.raises(ValueError, match="11 samples do not fit into 10"):
        repeat_whole(np.zeros(11, np.float32), 10)
