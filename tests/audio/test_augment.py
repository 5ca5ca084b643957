"""What each augmentation does to a signal and its spectrum, and what it leaves alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medalign_jax.audio import Augment, augment
from medalign_jax.core.errors import UserError

RATE = 16_000
WAVEFORM_STEPS = ("gain", "peak_normalise", "low_pass", "high_pass", "noise", "time_shift")
FEATURE_STEPS = ("frame_mask", "band_mask")


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def tones(*frequencies, seconds=2.0):
    t = np.arange(int(seconds * RATE)) / RATE
    return sum(np.sin(2 * np.pi * f * t) for f in frequencies).astype(np.float32)


def level(waveform, frequency):
    """Amplitude of a tone, dB, away from the ends."""
    inner = np.asarray(waveform, np.float64)[4_000:-4_000]
    t = np.arange(len(inner)) / RATE
    window = np.hanning(len(inner))
    return 20 * np.log10(
        2 * abs(np.sum(window * inner * np.exp(-2j * np.pi * frequency * t))) / window.sum() + 1e-12
    )


def noisy(count=4, samples=8_000):
    return np.random.default_rng(0).standard_normal((count, samples)).astype(np.float32)


def test_low_pass():
    """300 Hz stays within 1 dB, the cut-off loses 3 dB, two octaves above lose over 40 dB."""
    before = tones(300, 1_000, 4_000)
    after = augment.low_pass(before, 1_000.0, RATE)
    assert level(after, 300) == pytest.approx(level(before, 300), abs=0.1)
    assert level(after, 1_000) == pytest.approx(level(before, 1_000) - 3.01, abs=0.1)
    assert level(after, 4_000) < level(before, 4_000) - 80


def test_high_pass():
    before = tones(25, 100, 400) + 0.5
    after = augment.high_pass(before, 100.0, RATE)
    assert level(after, 400) == pytest.approx(level(before, 400), abs=0.1)
    assert level(after, 100) == pytest.approx(level(before, 100) - 3.01, abs=0.1)
    assert level(after, 25) < level(before, 25) - 60
    assert abs(np.mean(after[4_000:-4_000])) < 1e-3


def test_slope_follows_the_order():
    """An octave above the cut-off: 6 dB per order, as of a Butterworth filter."""
    for order in (2, 4, 8):
        wanted = -10 * np.log10(1 + 2.0 ** (2 * order))
        assert level(augment.low_pass(tones(2_000), 1_000.0, RATE, order), 2_000) == pytest.approx(
            wanted, abs=0.1
        )
        assert level(augment.high_pass(tones(500), 1_000.0, RATE, order), 500) == pytest.approx(
            wanted, abs=0.1
        )


def test_filters_neither_shift_nor_wrap_nor_fill_padding():
    click = np.zeros(8_000, np.float32)
    click[10], click[4_000] = 1, 1
    after = np.asarray(augment.low_pass(click, 1_000.0, RATE))
    assert after.argmax() in (10, 4_000)
    assert not after[:10].any() and not after[4_001:].any()
    edge = np.zeros(8_000, np.float32)
    edge[:100], edge[-1] = 1, 1e-9  # sound at the start must not ring at the end
    assert np.abs(augment.low_pass(edge, 300.0, RATE)[-1_000:]).max() < 1e-6


def test_gain():
    x = tones(440)
    assert level(augment.gain(x, 6.0), 440) == pytest.approx(level(x, 440) + 6, abs=1e-3)
    after = np.asarray(Augment(gain=1.0, gain_db=(-9, -3)).waveform(np.tile(x, (64, 1)), keys(64)))
    drawn = 20 * np.log10(np.abs(after).max(axis=1) / np.abs(x).max())
    assert drawn.min() > -9.01 and drawn.max() < -2.99 and np.ptp(drawn) > 4


def test_peak_normalise():
    x = 0.1 * noisy()
    after = Augment(peak_normalise=1.0, peak=0.9).waveform(x, keys(4))
    np.testing.assert_allclose(np.abs(after).max(axis=1), 0.9, rtol=1e-6)
    np.testing.assert_allclose(after / x, (after / x)[:, :1].repeat(8_000, 1), rtol=1e-5)
    assert not augment.peak_normalise(jnp.zeros(100)).any()


@pytest.mark.parametrize("snr_db", [-5.0, 10.0, 30.0])
def test_noise_has_the_ratio_asked_for(snr_db):
    """Over the sound only; padding before and after stays zero."""
    clip = np.zeros(64_000, np.float32)
    clip[3_000:40_000] = 0.3 * tones(440, seconds=4)[3_000:40_000]
    clip[20_000:20_100] = 0  # a pause in the sound is not padding
    noise = np.asarray(augment.add_noise(clip, jax.random.key(1), snr_db)) - clip
    first, last = np.flatnonzero(clip)[[0, -1]]
    ratio = np.mean(clip[first : last + 1] ** 2) / np.mean(noise[first : last + 1] ** 2)
    assert 10 * np.log10(ratio) == pytest.approx(snr_db, abs=0.5)
    assert not noise[:first].any() and not noise[last + 1 :].any()
    assert noise[20_000:20_100].any()


def test_noise_is_white():
    clip = 1e-3 * tones(440, seconds=8)
    noise = np.asarray(augment.add_noise(clip, jax.random.key(2), -60.0)) - clip
    power = np.abs(np.fft.rfft(noise)) ** 2
    bands = [band.mean() for band in np.array_split(power, 8)]
    assert 10 * np.log10(max(bands) / min(bands)) < 0.5


def test_noise_ratio_is_drawn_from_its_range():
    x = np.tile(tones(440), (64, 1))
    after = Augment(noise=1.0, noise_snr_db=(5, 15)).waveform(x, keys(64))
    ratio = 10 * np.log10(np.mean(x**2, axis=1) / np.mean((np.asarray(after) - x) ** 2, axis=1))
    assert ratio.min() > 4.7 and ratio.max() < 15.3 and np.ptp(ratio) > 7


def test_silence_gets_no_noise_and_no_nan():
    everything = Augment(**dict.fromkeys(WAVEFORM_STEPS, 1.0))
    after = everything.waveform(jnp.zeros((2, 4_000)), keys(2))
    assert not np.asarray(after).any()


@pytest.mark.parametrize("shift", [0, 1, 300, -1, -300, 1_000, -1_000])
def test_time_shift(shift):
    x = np.arange(1, 1_001, dtype=np.float32)
    np.testing.assert_array_equal(
        augment.time_shift(x, jnp.int32(shift), circular=True), np.roll(x, shift)
    )
    wanted = np.zeros_like(x)
    for i in range(1_000):
        if 0 <= i - shift < 1_000:
            wanted[i] = x[i - shift]
    np.testing.assert_array_equal(augment.time_shift(x, jnp.int32(shift), circular=False), wanted)


def test_time_shift_keeps_the_magnitudes_of_a_spectrum():
    x = noisy(16)
    after = Augment(time_shift=1.0, shift_seconds=0.2).waveform(x, keys(16))
    before_and_after = [np.abs(np.fft.rfft(y)) for y in (x, after)]
    np.testing.assert_allclose(*before_and_after, atol=0.01)
    shifts = [int(np.flatnonzero(a == b[0])[0]) for a, b in zip(np.asarray(after), x, strict=True)]
    signed = np.array([s - 8_000 if s > 4_000 else s for s in shifts])
    assert np.abs(signed).max() <= 3_200 and signed.min() < -500 and signed.max() > 500


def runs(masked):
    """(start, width) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], masked.astype(int), [0]])))
    return [(a, b - a) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def test_spans():
    drawn = np.asarray(jax.vmap(lambda key: augment.draw_spans(key, 256, 1, 24))(keys(20_000)))
    spans = [runs(row) for row in drawn[:4_000]]
    assert all(len(row) == 1 for row in spans)
    starts, widths = np.array([row[0] for row in spans]).T
    assert set(widths) == set(range(1, 25))
    assert (starts + widths).max() == 256 and starts.min() == 0
    share = drawn.mean(axis=0)
    assert share[30:-30].max() < 1.35 * share[30:-30].min()  # no place is preferred
    assert not augment.draw_spans(jax.random.key(0), 256, 0, 24).any()
    assert augment.draw_spans(jax.random.key(0), 3, 2, 24).shape == (3,)


@pytest.mark.parametrize(("name", "axis"), [("frame_mask", 0), ("band_mask", 1)])
def test_masks_cover_just_what_was_drawn(name, axis):
    x = 1 + np.random.default_rng(0).random((16, 256, 64), dtype=np.float32)
    config = Augment(**{name: 1.0, f"{name}s": 2, f"{name}_width": 6, "mask_value": 0.25})
    after = np.asarray(config.features(x, keys(16)))
    for before, now in zip(x, after, strict=True):
        masked = (now == 0.25).all(axis=1 - axis)
        assert 1 <= masked.sum() <= 12 and len(runs(masked)) <= 2
        kept = [slice(None)] * 2
        kept[axis] = ~masked
        np.testing.assert_array_equal(now[tuple(kept)], before[tuple(kept)])
    assert len({(row == 0.25).all(axis=1 - axis).tobytes() for row in after}) > 8


def test_probability_zero_leaves_every_bit():
    x, features = noisy(), np.random.default_rng(1).random((4, 32, 8), dtype=np.float32)
    off = Augment()
    np.testing.assert_array_equal(off.waveform(x, keys(4)), x)
    np.testing.assert_array_equal(off.features(features, keys(4)), features)
    text = jax.jit(off.waveform).lower(x, keys(4)).as_text()
    assert "stablehlo" not in text.replace("stablehlo.return", "")  # the program does nothing
    for name in (*WAVEFORM_STEPS, *FEATURE_STEPS):
        assert getattr(off, name) == 0


@pytest.mark.parametrize("name", [*WAVEFORM_STEPS, *FEATURE_STEPS])
def test_each_applies_as_often_as_told(name):
    """Those not drawn keep every bit; the others change."""
    config = Augment(**{name: 0.3}, band_mask_width=2, frame_mask_width=2)
    if name in FEATURE_STEPS:
        x = 1 + np.random.default_rng(0).random((500, 12, 8), dtype=np.float32)
        after = config.features(x, keys(500))
    else:
        x = noisy(500, 200)
        after = config.waveform(x, keys(500))
    changed = (np.asarray(after) != x).reshape(500, -1).any(axis=1)
    assert 0.22 < changed.mean() < 0.38


@pytest.fixture(scope="module")
def all_on():
    return Augment(**dict.fromkeys((*WAVEFORM_STEPS, *FEATURE_STEPS), 0.6))


def test_result_depends_on_the_own_key_only(all_on):
    """Not on the neighbours, the order or the size of the batch."""
    x, k = noisy(6), keys(6)
    features = np.random.default_rng(1).random((6, 64, 16), dtype=np.float32)
    whole, masked = all_on.waveform(x, k), all_on.features(features, k)
    order = np.array([4, 1, 5, 0, 2, 3])
    np.testing.assert_array_equal(masked[order], all_on.features(features[order], k[order]))
    np.testing.assert_allclose(whole[order], all_on.waveform(x[order], k[order]), rtol=0, atol=1e-6)
    for i in range(6):
        alone = slice(i, i + 1)
        np.testing.assert_array_equal(masked[alone], all_on.features(features[alone], k[alone]))
        np.testing.assert_allclose(
            whole[alone], all_on.waveform(x[alone], k[alone]), rtol=0, atol=1e-6
        )
    assert not np.allclose(whole, all_on.waveform(x, keys(6, seed=1)), atol=1e-3)


def test_switching_one_on_leaves_the_draws_of_others():
    x = noisy()
    shifted = Augment(time_shift=1.0).waveform(x, keys(4))
    both = Augment(time_shift=1.0, gain=1.0).waveform(x, keys(4))
    factor = np.asarray(both / shifted)
    np.testing.assert_allclose(factor, factor[:, :1].repeat(x.shape[1], 1), rtol=1e-5)


def test_jits_to_one_program_without_callbacks(all_on):
    x = jax.ShapeDtypeStruct((4, 8_000), jnp.float32)
    features = jax.ShapeDtypeStruct((4, 64, 16), jnp.float32)
    for function, shape in ((all_on.waveform, x), (all_on.features, features)):
        lowered = jax.jit(function).lower(shape, keys(4))
        assert "callback" not in lowered.as_text()
        assert lowered.out_info.shape == shape.shape and lowered.out_info.dtype == jnp.float32


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gain", 1.5),
        ("noise", -0.1),
        ("low_pass_hz", (0.0, 500.0)),
        ("high_pass_hz", (50.0, 9_000.0)),
        ("noise_snr_db", (20.0, 10.0)),
        ("frame_mask_width", 0),
        ("peak", 0.0),
    ],
)
def test_senseless_settings_are_named(name, value):
    with pytest.raises(UserError, match=f"augment.{name} must be"):
        dataclasses.replace(Augment(low_pass=0.1, high_pass=0.1), **{name: value})


def test_a_filter_that_is_off_may_lie_beyond_a_low_sample_rate():
    assert Augment(sample_rate=4000).low_pass_hz == (800.0, 6000.0)
    with pytest.raises(UserError, match="low_pass_hz must be"):
        Augment(sample_rate=4000, low_pass=0.5)
