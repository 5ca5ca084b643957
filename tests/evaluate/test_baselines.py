"""Baselines: constant predictions, metadata as numbers, plain statistics, random weights."""

import jax
import numpy as np
import pytest
import soxr

from medalign_jax.architecture import architecture
from medalign_jax.audio.spectral_statistics import STATISTICS, spectral_statistics
from medalign_jax.core.errors import UserError
from medalign_jax.core.mesh import named_leaves
from medalign_jax.encoder import Encoder
from medalign_jax.evaluate import baselines
from medalign_jax.evaluate.probes.problem import Problem
from medalign_jax.evaluate.statistics import auroc
from tests import tiny_models as tiny

TRAIN, TEST = np.arange(6), np.arange(6, 10)


def problem(targets, classes: int) -> Problem:
    return Problem(np.asarray(targets), TRAIN, TEST, np.arange(10), classes)


def test_majority_is_each_classs_share_of_the_training_rows():
    (found,) = baselines.majority(None, [problem([0, 1, 1, 1, 2, 2, 0, 0, 0, 1], 4)])
    np.testing.assert_allclose(found.scores, np.tile([1 / 6, 3 / 6, 2 / 6, 0], (4, 1)))
    assert found.scores.argmax(1).tolist() == [1] * 4


def test_majority_has_an_auroc_of_a_half():
    labels = np.array([0, 1, 1, 1, 0, 1, 0, 1, 1, 0])
    (found,) = baselines.majority(None, [problem(labels, 2)])
    assert auroc(labels[TEST], found.scores).value == 0.5


def test_mean_is_that_of_the_training_rows():
    (found,) = baselines.mean(None, [problem([1, 2, 3, 4, 5, 9.0, 100, 100, 100, np.nan], 0)])
    np.testing.assert_array_equal(found.scores, [4.0] * 4)


def test_each_takes_its_own_kind_only():
    both = [problem([0, 1] * 5, 2), problem(np.arange(10.0), 0)]
    assert [p.scores.shape for p in baselines.constant(None, both)] == [(4, 2), (4,)]
    with pytest.raises(ValueError, match="regression has no majority"):
        baselines.majority(None, both)
    with pytest.raises(ValueError, match="classes have no mean"):
        baselines.mean(None, both)


def test_numbers_are_standardised_and_missing_ones_marked():
    found, names = baselines.metadata_features({"age": ["20", " 40", "NA", "60", "nan"]})
    assert names == ("age", "age missing") and found.dtype == np.float32
    step = np.sqrt(1.5)
    np.testing.assert_allclose(found[:, 0], [-step, 0, 0, step, 0], atol=1e-6)
    np.testing.assert_array_equal(found[:, 1], [0, 0, 1, 0, 1])


def test_words_have_a_column_each_and_rare_ones_share():
    sites = ["A", "a ", "a", "b", "b", "b", "c", "d", ""]
    found, names = baselines.metadata_features({"site": sites}, rare=3)
    assert names == ("site = (rare)", "site = a", "site = b", "site missing")
    np.testing.assert_array_equal(
        found.T,
        [[0, 0, 0, 0, 0, 0, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0, 0, 0],
         [0, 0, 0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0, 1]],
    )  # fmt: skip


@pytest.mark.parametrize("column", ["site", "Hospital", "smoker", "Recording location", "ward_id"])
def test_codes_are_words_though_they_look_like_numbers(column):
    sites = [str(1 + i % 3) for i in range(30)] + [""]
    found, names = baselines.metadata_features({column: sites, "age": sites})
    words = [f"{column} = 1", f"{column} = 2", f"{column} = 3", f"{column} missing"]
    assert names == (*words, "age", "age missing")
    np.testing.assert_array_equal(found[:, 1], [i % 3 == 1 and i < 30 for i in range(31)])


def test_a_number_that_is_not_finite_makes_words_of_a_column():
    values = ["1", "2", "inf"] * 5
    assert baselines.metadata_features({"x": values})[1] == ("x = 1", "x = 2", "x = inf")


def test_names_constants_and_nothing_say_nothing():
    columns = {
        "subject": [f"patient {i}" for i in range(9)], "device": ["x"] * 9, "age": ["50"] * 9,
        "site": [""] * 9,
    }  # fmt: skip
    found, names = baselines.metadata_features(columns)
    assert found.shape == (9, 0) and names == ()
    assert baselines.metadata_features({})[0].shape == (0, 0)


def test_columns_stand_side_by_side():
    sex, age = ["F", "M"] * 5, [str(30 + i) for i in range(10)]
    found, names = baselines.metadata_features({"sex": sex, "age": age})
    assert names == ("sex = f", "sex = m", "age") and np.isfinite(found).all()
    assert found.shape == (10, 3)


def test_columns_of_different_lengths_are_refused():
    with pytest.raises(UserError, match=r"'a': 1, 'b': 2"):
        baselines.metadata_features({"a": ["1"], "b": ["1", "2"]})


@pytest.fixture(scope="module")
def encoder():
    sizes = {"frames": 16, "patch": (8, 32), "width": 16, "depth": 1, "heads": 2,
             "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}  # fmt: skip
    made = architecture("vit_mae_small", sizes)
    params = jax.tree.map(lambda x: np.full(x.shape, 0.1, x.dtype), made.abstract_params())
    return Encoder(made, jax.device_put(params), tiny.SAMPLES, pad="zero", pooling="mean_std")


def test_random_weights_are_seeded_and_of_the_same_architecture(encoder):
    first, other = (baselines.random_encoder(encoder, seed) for seed in (0, 1))
    again = baselines.random_encoder(first, 0)  # whatever weights it had
    assert first.identity() == again.identity() != other.identity()
    assert first.settings() == encoder.settings() and first.width == encoder.width
    mine, theirs = named_leaves(encoder.params), named_leaves(first.params)
    for name, leaf in theirs.items():
        assert (leaf.shape, leaf.dtype) == (mine[name].shape, mine[name].dtype)
        assert leaf.sharding == mine[name].sharding
    kernel = np.asarray(theirs["block0/attn/qkv/kernel"])
    assert 0 < kernel.std() < 1 and len(np.unique(kernel)) > 100
    sounds = list(tiny.waveforms(3))
    rows = first.embed(sounds, 16_000)
    assert np.isfinite(rows).all() and np.abs(rows - other.embed(sounds, 16_000)).max() > 1e-3
    assert np.ptp(rows, axis=0).max() > 1e-3


RATE = 8_000


def noises(lengths):
    rng = np.random.default_rng(0)
    return [rng.uniform(-0.5, 0.5, n).astype(np.float32) for n in lengths]


def test_statistics_of_recordings_of_any_length():
    made = baselines.SpectralStatistics(RATE)
    sounds = noises((7_000, 15_000, 2, 8_000, 300, 15_999))
    found = made.embed(sounds, RATE)
    assert found.shape == (6, len(STATISTICS)) and made.width == len(made.names)
    for sound, row in zip(sounds, found, strict=True):
        padded = np.pad(sound, (0, 2 * RATE - len(sound)))[None].repeat(32, 0)
        expected = spectral_statistics(padded, np.full(32, len(sound)), RATE)[0]
        np.testing.assert_allclose(row, expected, rtol=1e-3, atol=1e-3)


def test_statistics_of_other_rates_are_of_the_resampled_sound():
    made = baselines.SpectralStatistics(RATE)
    (sound,) = noises((4_000,))
    expected = made.embed([soxr.resample(sound, 4_000, RATE, quality="HQ")], RATE)
    np.testing.assert_array_equal(made.embed([sound], 4_000), expected)


def test_statistics_come_in_order_over_many_batches():
    made = baselines.SpectralStatistics(RATE)
    sounds = noises([500 + 50 * i for i in range(150)] * 2)
    rows = list(made.stream((sound, RATE) for sound in sounds))
    assert len(rows) == 300
    np.testing.assert_allclose(
        np.stack(rows)[[0, 40, 299]], made.embed([sounds[i] for i in (0, 40, 299)], RATE),
        rtol=1e-3, atol=1e-3,
    )  # fmt: skip
    assert made.embed([], RATE).shape == (0, made.width)


def test_bad_recordings_are_named():
    made = baselines.SpectralStatistics(RATE)
    for bad in (np.zeros(1), np.zeros((2, 5)), np.array([0.0, np.nan])):
        with pytest.raises(UserError, match="recording 1 must be"):
            made.embed([np.ones(9), bad], RATE)


def test_the_rate_decides_the_numbers():
    made = baselines.SpectralStatistics(RATE)
    assert made.identity() == baselines.SpectralStatistics(RATE).identity()
    assert made.identity() != baselines.SpectralStatistics(16_000).identity()
    assert made.settings()["sample_rate"] == RATE
