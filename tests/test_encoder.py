"""A loaded encoder: exports come back to the bit, recordings of any length and rate go in."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import soxr

import medalign_jax
from medalign_jax.architecture import architecture
from medalign_jax.audio import clip
from medalign_jax.core.errors import UserError
from medalign_jax.core.mesh import make_mesh, named_leaves
from medalign_jax.encoder import SETTINGS_FILE, Encoder, load_encoder
from medalign_jax.runs.export import export_encoder
from tests import tiny_models as tiny
from tests.toy_encoders import toy

SIZES = {
    "frames": 16, "patch": (4, 16), "width": 32, "depth": 1, "heads": 2,
    "decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2,
}  # fmt: skip
SAMPLES = tiny.SAMPLES


@pytest.fixture(scope="module")
def made():
    return architecture("vit_mae_small", SIZES, {"f_min": 40.0})


@pytest.fixture(scope="module")
def encoder(made):
    shapes = made.abstract_params()
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: (0.2 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes
    )
    return Encoder(made, jax.device_put(params), SAMPLES, pad="zero", trim=False)


@pytest.fixture(scope="module")
def export(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "export"
    folder.mkdir()
    export_encoder(folder, encoder)
    return folder


@pytest.fixture(scope="module")
def loaded(export):
    return load_encoder(None, export)


def recordings(lengths, seed: int = 0) -> list[np.ndarray]:
    return [tiny.waveforms(1, seed + i, length)[0] for i, length in enumerate(lengths)]


def test_an_export_comes_back_bit_for_bit(encoder, loaded):
    before, after = named_leaves(encoder.params), named_leaves(loaded.params)
    assert before.keys() == after.keys()
    for name, leaf in before.items():
        assert np.asarray(leaf).tobytes() == np.asarray(after[name]).tobytes(), name
    assert loaded.settings() == encoder.settings()
    assert loaded.architecture.module == encoder.architecture.module
    assert loaded.architecture.front_end == encoder.architecture.front_end
    sounds = recordings((SAMPLES, 3000))
    np.testing.assert_array_equal(loaded.embed(sounds, 16_000), encoder.embed(sounds, 16_000))


def test_shapes_are_traced_once_a_size_and_are_the_callers_own(made, monkeypatch):
    first = made.abstract_params()
    wanted = named_leaves(first)
    first.clear()

    def refuse(*_):
        raise AssertionError("traced again")

    monkeypatch.setattr(jax, "eval_shape", refuse)
    again = architecture("vit_mae_small", SIZES, {"f_min": 40.0})
    assert wanted and named_leaves(again.abstract_params()) == wanted
    with pytest.raises(AssertionError, match="traced again"):
        architecture("vit_mae_small", SIZES | {"depth": 11}).abstract_params()


def test_a_workdir_stands_for_its_export(export, loaded):
    again = load_encoder("vit_mae_small", export.parent)
    for one, other in zip(
        jax.tree.leaves(again.params), jax.tree.leaves(loaded.params), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_settings_can_be_changed_when_loading(export):
    changed = load_encoder(None, export, samples=4096, pad="tile", trim=True)
    assert (changed.samples, changed.pad, changed.trim) == (4096, "tile", True)


def test_a_weight_file_alone_needs_the_right_sizes(export):
    with pytest.raises(UserError, match=r"patch_embed"):
        load_encoder("vit_mae_small", export / "encoder.safetensors")


def test_the_package_offers_the_loader():
    assert medalign_jax.load_encoder is load_encoder


def test_features_and_waveforms_meet(encoder):
    sounds = recordings((SAMPLES,) * 4)
    features = encoder.architecture.front_end(np.stack(sounds))
    embedded = encoder.embed_features(features)
    assert embedded.shape == (4, 32) and embedded.dtype == np.float32
    np.testing.assert_allclose(embedded, encoder.embed(sounds, 16_000), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [SAMPLES + 1, int(1.5 * SAMPLES), 3 * SAMPLES + 77])
def test_a_long_recording_is_the_mean_over_its_windows(encoder, length):
    (sound,) = recordings((length,), seed=5)
    windows = clip.split_windows(sound, SAMPLES, "repeat")
    assert len(windows) >= 2
    parts = encoder.embed(list(windows), 16_000)
    np.testing.assert_allclose(
        encoder.embed([sound], 16_000)[0], parts.mean(0), rtol=1e-5, atol=1e-6
    )


def test_frames_are_the_windows_in_time(encoder):
    short, long = recordings((300, 2 * SAMPLES + 700))
    windows = clip.split_windows(long, SAMPLES, "repeat")
    one, several = encoder.embed_frames([short, long], 16_000)
    assert one.shape == (1, encoder.width) and len(several) == len(windows) == 4
    expected = encoder.embed(list(windows), 16_000)
    np.testing.assert_allclose(several, expected, rtol=1e-5, atol=1e-6)


def test_a_short_recording_is_padded_by_the_rule(encoder):
    (sound,) = recordings((3000,))
    padded = np.pad(sound, (0, SAMPLES - 3000))
    assert encoder.embed([sound], 16_000).tobytes() == encoder.embed([padded], 16_000).tobytes()


def test_an_embedding_does_not_depend_on_its_company(encoder):
    sounds = recordings((SAMPLES, 2000, 2 * SAMPLES, 5000, 7 * SAMPLES, SAMPLES, 4000))
    together = encoder.embed(sounds, 16_000)
    alone = np.concatenate([encoder.embed([sound], 16_000) for sound in sounds])
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)
    turned = encoder.embed(sounds[::-1], 16_000)
    np.testing.assert_allclose(together, turned[::-1], rtol=1e-5, atol=1e-6)
    assert np.ptp(together, axis=0).max() > 0.1  # they are different recordings


def test_a_stream_yields_in_order_over_many_rounds(encoder):
    sounds = recordings([1000 + 40 * i for i in range(70)])
    rows = list(encoder.stream((sound, 16_000) for sound in sounds))
    assert len(rows) == 70
    np.testing.assert_allclose(
        np.stack(rows)[[0, 33, 69]],
        encoder.embed([sounds[i] for i in (0, 33, 69)], 16_000),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("rate", [8_000, 44_100])
def test_other_rates_are_resampled(encoder, rate):
    (sound,) = recordings((rate // 4,), seed=3)
    expected = encoder.embed([soxr.resample(sound, rate, 16_000, quality="HQ")], 16_000)
    found = encoder.embed([sound], rate)
    np.testing.assert_array_equal(found, expected)
    assert np.abs(found - encoder.embed([sound], 16_000)).max() > 1e-3


def test_float64_is_taken(encoder):
    (sound,) = recordings((SAMPLES,))
    np.testing.assert_array_equal(
        encoder.embed([sound.astype(np.float64)], 16_000), encoder.embed([sound], 16_000)
    )


def test_silence_is_trimmed_where_asked(made, encoder):
    trimming = Encoder(made, encoder.params, SAMPLES, pad="zero", trim=True)
    (sound,) = recordings((4000,))
    quiet = np.concatenate([np.zeros(3200, np.float32), sound])
    cut = clip.trim_silence(quiet)
    assert len(cut) < len(quiet)
    expected = encoder.embed([cut], 16_000)
    np.testing.assert_array_equal(trimming.embed([quiet], 16_000), expected)
    assert np.abs(encoder.embed([quiet], 16_000) - expected).max() > 1e-3


def test_no_recording_gives_no_row(encoder):
    assert encoder.embed([], 16_000).shape == (0, 32)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (np.zeros((2, 100), np.float32), r"recording 1 .*float32 \(2, 100\).*mean\(axis=0\)"),
        (np.zeros(0, np.float32), r"recording 1 .*at least 2 samples"),
        (np.zeros(1, np.float32), r"recording 1 .*at least 2 samples"),
        (np.zeros(100, np.int16), r"recording 1 .*int16.*astype\(np.float32\) / 32768"),
        (np.zeros(100, np.uint8), r"recording 1 .*uint8.*np.float32\) - 128\) / 128"),
        (np.zeros((100, 2), np.float32), r"recording 1 .*\(100, 2\).*waveform.mean\(axis=1\)"),
        ("heart.wav", r"recording 1 is a path; .*medalign_jax.audio.read\('heart.wav', 16000\)"),
        (np.full(100, np.nan, np.float32), r"recording 1 holds NaN"),
        (np.array([0.0, np.inf, 1.0]), r"recording 1 holds NaN or infinite"),
    ],
)
def test_bad_recordings_are_named(encoder, bad, words):
    with pytest.raises(UserError, match=words):
        encoder.embed([np.ones(100, np.float32), bad], 16_000)


@pytest.mark.parametrize("rate", [0, -8000, float("nan")])
def test_a_rate_that_is_none_is_refused(encoder, rate):
    with pytest.raises(UserError, match=r"recording 0.*sample rate"):
        encoder.embed([np.ones(100, np.float32)], rate)


def test_a_recording_that_leaves_no_sample_is_refused(encoder):
    """Two samples at 384 kHz, and a rate at which a second would last for weeks."""
    with pytest.raises(UserError, match="recording 0: holds 2 samples at 384000 Hz, too few"):
        encoder.embed([np.ones(2, np.float32)], 384_000)
    with pytest.raises(UserError, match=r"recording 0: has 16000 samples .* last for weeks"):
        encoder.embed([np.ones(16_000, np.float32)], 1e-6)


def test_one_waveform_without_a_list_is_refused(encoder):
    with pytest.raises(UserError, match="put this one into a list"):
        encoder.embed(np.ones(100, np.float32), 16_000)
    with pytest.raises(UserError, match=r"100 recordings of 2 samples.*waveform.mean"):
        encoder.embed(np.ones((100, 2), np.float32), 16_000)
    with pytest.raises(UserError, match=r"list of waveforms; read the file first.*'heart.wav'"):
        encoder.embed("heart.wav", 16_000)


def test_an_encoder_says_what_it_is(encoder):
    said = repr(encoder)
    assert said.startswith("Encoder 'vit_mae_small' of ") and "become vectors of 32 numbers" in said
    assert "\n" not in said and len(said) < 400


def test_the_public_names_are_seen_before_they_are_used():
    code = "import sys, medalign_jax; print(*dir(medalign_jax)); print('jax' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names, imported = told.stdout.splitlines()
    assert {"load_encoder", "load_teacher", "losses"} <= set(names.split())
    assert imported == "False"


def test_on_a_mesh_the_embeddings_are_the_same(export, loaded):
    mesh = make_mesh(devices=jax.devices()[:1])
    spread = load_encoder(None, export, mesh)
    kernel = spread.params["block0"]["attn"]["qkv"]["kernel"]
    assert kernel.sharding.mesh == mesh
    sounds = recordings((SAMPLES, 2000, 20_000))
    np.testing.assert_allclose(
        spread.embed(sounds, 16_000), loaded.embed(sounds, 16_000), rtol=1e-5, atol=1e-6
    )


def test_an_unknown_encoder_is_named():
    with pytest.raises(UserError, match=r"unknown encoder 'operagt'; there are opera_gt"):
        architecture("operagt")


def test_the_name_has_to_be_the_exports(export):
    with pytest.raises(UserError, match=r"holds a 'vit_mae_small' encoder, not 'opera_gt'"):
        load_encoder("opera_gt", export)


def test_weights_without_settings_need_a_name(export):
    with pytest.raises(UserError, match="does not say which encoder it is"):
        load_encoder(None, export / "encoder.safetensors")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"widht": 32}, r"has no setting \['widht'\]; it has .*'width'"),
        ({"width": 30}, r"encoder 'vit_mae_small': width 30"),
        ({"width": "wide"}, r"encoder 'vit_mae_small'"),
        ({"dtype": "float33"}, r"encoder 'vit_mae_small'.*float33"),
        ({"patch": (5, 8)}, r"not divisible"),
    ],
)
def test_sizes_that_cannot_be_are_named(overrides, words):
    with pytest.raises(UserError, match=words):
        architecture("vit_mae_small", overrides)


def test_an_unknown_front_end_number_is_named():
    with pytest.raises(UserError, match=r"has no \['f_mim'\]"):
        architecture("vit_mae_small", None, {"f_mim": 1.0})


@pytest.mark.parametrize("text", ["{", "[]", '{"name": "vit_mae_small", "overrides": 3}'])
def test_damaged_settings_are_named(export, tmp_path, text):
    (tmp_path / "encoder.safetensors").write_bytes((export / "encoder.safetensors").read_bytes())
    (tmp_path / SETTINGS_FILE).write_text(text)
    with pytest.raises(UserError, match=SETTINGS_FILE):
        load_encoder(None, tmp_path)


def test_settings_are_json(encoder):
    assert json.loads(json.dumps(encoder.settings())) == {
        "name": "vit_mae_small",
        "overrides": SIZES | {"patch": [4, 16]},
        "front_end_overrides": {"f_min": 40.0},
        "samples": SAMPLES,
        "pad": "zero",
        "trim": False,
        "pooling": "mean",
        "layer": None,
    }


def random_params(made, scale: float = 0.3):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: (scale * np.abs(rng.standard_normal(leaf.shape))).astype(leaf.dtype),
        made.abstract_params(),
    )


def intermediates(made, params, features, *lengths):
    embed = tiny.quick_jit(
        lambda p, *inputs: made.module.apply({"params": p}, *inputs, method="embed")
    )
    found = embed(params, features, *lengths)[1]
    return {name: np.asarray(x) for name, x in found.items()}


@pytest.fixture(scope="module")
def deep():
    """A transformer on a grid of 4 rows and 4 bands, two blocks, a class token; and features."""
    made = toy("vit_mae_small")
    params = jax.device_put(random_params(made))
    features = np.random.default_rng(1).random((3, 16, 64)).astype(np.float32)
    return made, params, features, intermediates(made, params, features)


def pooled(made, params, features, **kept):
    return Encoder(made, params, SAMPLES, "zero", **kept).embed_features(features)


def test_pooling_by_hand(deep):
    made, params, features, out = deep
    tokens = out["tokens"]
    expected = {
        "mean_std": [tokens.mean(1), tokens.std(1)],
        "mean_max": [tokens.mean(1), tokens.max(1)],
        "bands": [tokens[:, band::4].mean(1) for band in range(4)],
    }
    expected["bands_mean_std"] = expected["bands"] + [
        tokens[:, band::4].std(1) for band in range(4)
    ]
    for pooling, parts in expected.items():
        encoder = Encoder(made, params, SAMPLES, "zero", pooling=pooling)
        found = encoder.embed_features(features)
        np.testing.assert_allclose(found, np.concatenate(parts, 1), rtol=2e-4, atol=2e-4)
        assert encoder.width == found.shape[1] == 32 * len(parts)
    assert encoder.embed(recordings((SAMPLES, 100)), 16_000).shape == (2, encoder.width)


@pytest.mark.parametrize(("layer", "block"), [(0, "block00"), (-1, "block01"), (-2, "block00")])
def test_a_layer_is_a_blocks_output_without_the_class_token(deep, layer, block):
    made, params, features, out = deep
    found = pooled(made, params, features, layer=layer)
    np.testing.assert_allclose(found, out[block][:, 1:].mean(1), rtol=2e-4, atol=2e-4)
    bands = pooled(made, params, features, layer=layer, pooling="bands")
    np.testing.assert_allclose(bands[:, :32], out[block][:, 1::4].mean(1), rtol=2e-4, atol=2e-4)


def test_bands_are_those_of_the_sound(deep):
    """What changes in the highest mel bins changes the highest band's patch embedding first."""
    made, params, features, _ = deep
    other = features.copy()
    other[:, :, 48:] = 0.0
    out, changed = (intermediates(made, params, f)["patch_embed"] for f in (features, other))
    moved = np.abs(out - changed).reshape(3, 4, 4, -1).max(axis=(0, 1, 3))  # time, then band
    assert (moved > 0).tolist() == [False, False, False, True]


# Bands of each block and, last, of the tokens; from mel bins, patches and strides.
BANDS = {
    "opera_ct": (8, 4, 4),  # 16 bins in patches of 2, halved after the first stage
    "opera_ce": (19, 9, 9),  # 40 bins, 38 after the first convolution
    "audiomae": (2, 2, 2),
    "ast": (3, 3, 3),  # patches of 8 every 4 bins
    "whisper": (1, 1, 1),
    "qwen2_audio": (1, 1, 1),
}


@pytest.mark.parametrize("name", BANDS)
def test_first_and_last_layers_have_the_bands_of_their_grids(name):
    made = toy(name)
    config, params = made.module.config, made.abstract_params()
    samples = made.front_end.samples(min(config.frames, 40))

    for layer in (0, None):
        bands = BANDS[name][-1 if layer is None else layer]
        if bands == 1:
            with pytest.raises(UserError, match=r"one band only; take mean_std or mean_max"):
                Encoder(made, params, samples, pooling="bands", layer=layer)
        else:
            found = Encoder(made, params, samples, pooling="bands", layer=layer).width
            channels = config.width if layer is None else config.layer_widths[layer]
            assert found == bands * channels


@pytest.mark.parametrize(
    ("name", "pooling", "layer"), [("whisper", "mean_max", None), ("qwen2_audio", "mean_std", 0)]
)
def test_what_is_filled_up_does_not_count(name, pooling, layer):
    made = toy(name)
    params = jax.device_put(random_params(made, 0.1))
    samples = made.front_end.samples(64)
    (sound,) = recordings((3211,))
    encoder = Encoder(made, params, samples, "zero", pooling=pooling, layer=layer, batch_size=2)
    beside = encoder.embed([*recordings((samples,), 5), sound], 16_000)[1]
    frames = made.front_end.valid_frames(np.array([len(sound)]))
    features = made.front_end(np.pad(sound, (0, samples - len(sound)))[None])
    out = intermediates(made, params, features, frames)
    tokens = (out["tokens"] if layer is None else out["block00"])[0]
    valid = int(np.sum(out["mask"])) * (len(tokens) // out["mask"].shape[1])
    assert 0 < valid < len(tokens)
    second = np.std if pooling == "mean_std" else np.max
    expected = np.concatenate([tokens[:valid].mean(0), second(tokens[:valid], axis=0)])
    np.testing.assert_allclose(beside, expected, rtol=1e-3, atol=1e-4)


def test_the_published_feature_is_the_default(deep):
    made, params, features, _ = deep
    published = made.module.apply({"params": params}, features, method="embed")[0]
    np.testing.assert_allclose(pooled(made, params, features), published, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ({"pooling": "median"}, r"unknown pooling 'median'; there are mean, mean_std"),
        ({"layer": 2}, r"no layer 2: the encoder has 2 blocks, 0 to 1"),
        ({"layer": -3}, r"no layer -3"),
    ],
)
def test_poolings_that_are_not_there_are_named(deep, kept, words):
    made, params, *_ = deep
    with pytest.raises(UserError, match=words):
        Encoder(made, params, SAMPLES, **kept)


def test_pooling_goes_into_the_export_and_comes_back(deep, tmp_path):
    made, params, features, _ = deep
    encoder = Encoder(made, params, SAMPLES, "zero", pooling="bands", layer=0)
    export_encoder(tmp_path, encoder)
    loaded = load_encoder(None, tmp_path)
    assert (loaded.pooling, loaded.layer, loaded.width) == ("bands", 0, 128)
    np.testing.assert_array_equal(loaded.embed_features(features), encoder.embed_features(features))
    again = load_encoder(None, tmp_path, pooling="mean")
    assert (again.pooling, again.layer, again.width) == ("mean", None, 32)
    with pytest.raises(UserError, match="no layer 7"):
        load_encoder(None, tmp_path, layer=7)


def test_identity_is_that_of_weights_and_settings(encoder, loaded, export, made):
    assert loaded.identity() == encoder.identity()  # from disk and in memory
    mesh = make_mesh(devices=jax.devices()[:1])
    assert load_encoder(None, export, mesh).identity() == encoder.identity()
    names = named_leaves(encoder.params)
    others = [
        Encoder(made, encoder.params, SAMPLES + 1, "zero"),
        Encoder(made, encoder.params, SAMPLES, "tile"),
        Encoder(made, encoder.params, SAMPLES, "zero", True),
        Encoder(made, encoder.params, SAMPLES, "zero", pooling="mean_std"),
        Encoder(made, encoder.params, SAMPLES, "zero", layer=0),
        Encoder(architecture("vit_mae_small", SIZES), encoder.params, SAMPLES, "zero"),
        encoder.with_params(jax.tree.map(lambda x: x.at[(0,) * x.ndim].add(1e-3), encoder.params)),
    ]
    assert len(names) > 10
    assert len({e.identity() for e in (encoder, *others)}) == len(others) + 1


def test_other_parameters_in_the_same_encoder(encoder, made):
    params = jax.tree.map(lambda x: 0.5 * x, encoder.params)
    sounds = recordings((SAMPLES, 5000))
    np.testing.assert_array_equal(
        encoder.with_params(params).embed(sounds, 16_000),
        Encoder(made, params, SAMPLES, pad="zero").embed(sounds, 16_000),
    )
