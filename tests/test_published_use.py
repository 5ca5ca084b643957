"""Vectors of recordings as users of transformers get them: its own feature extractors, then its
models; clips shorter than a window and as long."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers

from configs import acula
from medalign_jax.architecture import architecture
from medalign_jax.core.errors import UserError
from medalign_jax.encoder import Encoder, load_encoder
from medalign_jax.runs.parts.audio import architecture_of
from tests.torch_models import shake
from tests.toy_encoders import TOYS, toy

SECONDS = (1, 3, 5, 10)
WHISPER = {
    "num_mel_bins": 80, "d_model": 24, "encoder_layers": 1, "encoder_attention_heads": 3,
    "encoder_ffn_dim": 40, "max_source_positions": 150, "vocab_size": 50, "decoder_layers": 1,
    "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "max_target_positions": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
CLAP_AUDIO = {
    "patch_embeds_hidden_size": 12, "hidden_size": 24, "depths": [1, 1], "enable_fusion": True,
    "num_attention_heads": [2, 3], "spec_size": 64, "num_mel_bins": 16, "window_size": 4,
}  # fmt: skip
CLAP_TEXT = {
    "vocab_size": 61, "hidden_size": 36, "num_hidden_layers": 1, "num_attention_heads": 3,
    "intermediate_size": 50, "max_position_embeddings": 22,
}  # fmt: skip


def clips(rate, seconds=SECONDS):
    """Noise that grows and ends loudly, so that what lies behind a clip is heard."""
    rng = np.random.default_rng(0)
    return [
        (rng.standard_normal(length * rate) * np.linspace(0.01, 0.3, length * rate)).astype("f")
        for length in seconds
    ]


def saved(model, folder):
    model = shake(model)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def ast(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ast")
    config = transformers.ASTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=32,
        frequency_stride=16, time_stride=16,
    )  # fmt: skip
    return saved(transformers.ASTModel(config), folder), str(folder)


def test_ast_fills_up_the_filter_bank_of_a_short_clip(ast):
    model, folder = ast
    sounds = clips(16_000)
    inputs = transformers.ASTFeatureExtractor()(sounds, sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).pooler_output.numpy()
    ours = load_encoder("ast", folder).embed(sounds, 16_000)
    np.testing.assert_allclose(ours, expected, atol=3e-5, rtol=0)
    padded = load_encoder("ast", folder, pad="silence").embed(sounds[:1], 16_000)
    assert np.abs(padded - expected[:1]).max() > 0.01


def test_short_clips_do_not_depend_on_their_batch(ast):
    encoder = load_encoder("ast", ast[1])
    sounds = [*clips(16_000), np.full(100, 0.1, np.float32)]  # the last: less than a frame
    together = encoder.embed(sounds, 16_000)
    for sound, row in zip(sounds, together, strict=True):
        np.testing.assert_allclose(encoder.embed([sound], 16_000)[0], row, atol=1e-6)


@pytest.mark.parametrize("name", ["audiomae", "ast"])
def test_what_is_padded_in_a_filter_bank(name):
    """(0 - mean) / (2 std), as AudioMAE's data set and ASTFeatureExtractor give it."""
    front_end = toy(name).front_end
    sounds = np.zeros((2, 4000), np.float32)
    sounds[0, :1300] = clips(16_000, (1,))[0][:1300]
    sounds[1] = clips(16_000, (1,))[0][:4000]
    features = np.asarray(front_end(sounds, np.array([1300, 4000])))
    whole = 1 + (1300 - 400) // 160
    alone = np.asarray(front_end(sounds[:1, :1300]))[0]
    np.testing.assert_allclose(features[0], alone, atol=2e-5)
    np.testing.assert_allclose(features[0, whole:], 0.46703, atol=1e-5)
    np.testing.assert_allclose(features[1], np.asarray(front_end(sounds[1:]))[0], atol=2e-5)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whisper")
    config = transformers.WhisperConfig(**WHISPER)
    return saved(transformers.WhisperModel(config), folder), str(folder)


def test_whisper_that_listens_to_the_silence_as_published(whisper):
    model, folder = whisper
    sounds = clips(16_000, (1, 2, 3))
    extractor = transformers.WhisperFeatureExtractor(chunk_length=3)
    inputs = extractor(sounds, sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        states = model.encoder(inputs["input_features"]).last_hidden_state
    published = load_encoder("whisper", folder, pad="silence")
    assert published.samples == 48_000 + 159
    published = load_encoder("whisper", folder, pad="silence", samples=48_000)
    vectors = published.embed(sounds, 16_000)
    np.testing.assert_allclose(vectors, states.mean(1).numpy(), atol=3e-5, rtol=0)
    default = load_encoder("whisper", folder).embed(sounds, 16_000)
    assert np.abs(default[0] - vectors[0]).max() > 0.01
    np.testing.assert_allclose(default[2], vectors[2], atol=1e-4)  # no silence behind it


def test_fused_clap_of_a_clip_that_comes_alone(tmp_path):
    model = saved(
        transformers.ClapModel(
            transformers.ClapConfig(
                text_config=CLAP_TEXT, audio_config=CLAP_AUDIO, projection_dim=20
            )
        ),
        tmp_path,
    )
    extractor = transformers.ClapFeatureExtractor(
        feature_size=16, max_length_s=2, truncation="fusion", frequency_min=50
    )
    (sound,) = clips(48_000, (1,))
    inputs = extractor(sound, sampling_rate=48_000, return_tensors="pt")
    assert inputs["is_longer"].all()
    with torch.no_grad():
        published = model.audio_projection(model.audio_model(**inputs).pooler_output).numpy()
    settings = {"samples": 96_000}
    marked = load_encoder(
        "clap_fused", str(tmp_path), overrides={"mark_longer": True}, **settings
    )  # fmt: skip
    np.testing.assert_allclose(marked.embed([sound], 48_000), published, atol=3e-5, rtol=0)
    default = load_encoder("clap_fused", str(tmp_path), **settings)
    inputs["is_longer"][:] = False
    with torch.no_grad():
        alone = model.audio_projection(model.audio_model(**inputs).pooler_output).numpy()
    np.testing.assert_allclose(default.embed([sound], 48_000), alone, atol=3e-5, rtol=0)
    assert np.abs(alone - published).max() > 0.01
    assert marked.settings()["overrides"]["mark_longer"]
    with pytest.raises(UserError, match="no fusion"):
        architecture("clap", {"mark_longer": True})


LIMITED = [name for name in TOYS if name not in ("opera_ct", "opera_ce")]


@pytest.mark.parametrize("name", LIMITED)
def test_a_window_longer_than_the_model_is_refused(name):
    made = toy(name)
    most = made.most_samples
    made.check_window(most)
    frames = made.front_end.samples(made.module.config.most_frames)
    assert made.module.config.frames <= made.module.config.most_frames and frames <= most
    for samples in (most + 1, 40 * made.front_end.sample_rate):
        with pytest.raises(UserError, match=rf"reads at most .* not of .* \({samples}\)"):
            Encoder(made, {}, samples)


@pytest.mark.parametrize("name", ["opera_ct", "opera_ce"])
def test_encoders_of_any_length_take_any_window(name):
    made = toy(name)
    assert made.most_samples is None
    made.check_window(10**7)


def test_the_longest_window_is_the_longest_that_runs():
    """What the limit says is what the models themselves take, frame for frame."""
    for name in ("ast", "whisper", "vit_mae_small"):
        made = toy(name)
        config = made.module.config
        check = getattr(config, "tokens", getattr(config, "grid", None))
        check(config.most_frames)
        with pytest.raises(ValueError, match="frames"):
            check(config.most_frames + 1)


def test_windows_are_checked_before_weights_are_read(whisper, monkeypatch):
    monkeypatch.setattr("medalign_jax.encoder.load", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(UserError, match=r"not of 40 s \(640000\)"):
        load_encoder("whisper", whisper[1], samples=640_000)
    config = acula.get_config()
    config.encoder.name, config.encoder.source = "whisper", whisper[1]
    config.data.seconds = 40.0
    with pytest.raises(UserError, match=r"config\.data\.seconds is 40: .* reads at most 300 fr"):
        architecture_of(config)


# Settings that a published file may have otherwise than the usual ones.
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("preprocessor_config.json", {"mean": -6.5, "std": 2.25}),
        ("processor_config.json", {"mean": -1.0, "do_normalize": False}),
    ],
)
def test_ast_is_heard_as_its_preprocessor_config_says(ast, tmp_path, changes, name):
    model, folder = ast
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    extractor = transformers.ASTFeatureExtractor(**changes)
    extractor.save_pretrained(tmp_path)
    if name == "processor_config.json":  # where transformers 5 keeps it beside a tokenizer
        settings = (tmp_path / "preprocessor_config.json").read_text()
        (tmp_path / name).write_text(json.dumps({"feature_extractor": json.loads(settings)}))
        (tmp_path / "preprocessor_config.json").unlink()
    sounds = clips(16_000, (1, 3))
    inputs = extractor(sounds, sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).pooler_output.numpy()
    encoder = load_encoder("ast", str(tmp_path))
    ours = encoder.embed(sounds, 16_000)
    np.testing.assert_allclose(ours, expected, atol=3e-5, rtol=0)
    usual = load_encoder("ast", folder)
    assert np.abs(usual.embed(sounds, 16_000) - expected).max() > 1e-3
    made = architecture(**encoder.architecture.settings)  # as an export brings them along
    assert made.front_end == encoder.architecture.front_end != usual.architecture.front_end


def test_the_usual_settings_change_nothing(ast, tmp_path):
    shutil.copytree(ast[1], tmp_path, dirs_exist_ok=True)
    transformers.ASTFeatureExtractor().save_pretrained(tmp_path)
    ours, usual = load_encoder("ast", str(tmp_path)), load_encoder("ast", ast[1])
    assert ours.identity() == usual.identity()
    assert ours.settings() == usual.settings()


def front_end_of(name, extractor, config=None):
    said = json.loads(extractor.to_json_string())
    return architecture(name, published=config, preprocessor=said).front_end


def test_whisper_and_clap_features_follow_their_settings():
    sound = clips(24_000, (2,))[0]
    extractor = transformers.WhisperFeatureExtractor(
        sampling_rate=24_000, hop_length=240, n_fft=512, chunk_length=2
    )
    expected = extractor(sound, sampling_rate=24_000, return_tensors="np").input_features[0].T
    config = transformers.WhisperConfig(**WHISPER | {"max_source_positions": 100})
    made = front_end_of("whisper", extractor, config.to_dict())
    np.testing.assert_allclose(made(sound[None])[0], expected, atol=2e-3)
    extractor = transformers.ClapFeatureExtractor(
        sampling_rate=8_000, hop_length=100, fft_window_size=256, frequency_min=20,
        frequency_max=3_000, truncation="rand_trunc",
    )  # fmt: skip
    sound = clips(8_000, (10,))[0]
    expected = extractor(sound, sampling_rate=8_000, return_tensors="np").input_features[0, 0]
    made = front_end_of("clap", extractor)
    np.testing.assert_allclose(made(sound[None])[0], expected, atol=2e-2)


@pytest.mark.parametrize(
    ("name", "said", "words"),
    [
        ("ast", {"sampling_rate": 8000}, "sampling_rate=8000, and .* only 16000"),
        ("ast", {"num_mel_bins": 64}, "num_mel_bins=64, and the model's config.json asks for 128"),
        ("ast", {"max_length": 512}, "max_length=512"),
        ("ast", {"mean": "high"}, "mean='high', and a number belongs there"),
        ("whisper", {"feature_size": 128}, "feature_size=128, and .* 80"),
        ("whisper", {"dither": 0.1}, "dither=0.1"),
        ("whisper", {"chunk_length": 15}, "chunk_length=15, and the model reads 3000 frames"),
        ("clap", {"top_db": 80}, "top_db=80, and .* only None"),
        ("clap", {"truncation": "fusion"}, "truncation='fusion', and .* only 'rand_trunc'"),
        ("clap", {"padding": "pad"}, "padding='pad'"),
        ("clap", {"max_length_s": 5}, "max_length_s=5"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(name, said, words):
    with pytest.raises(UserError, match=f"preprocessor_config.json has {words}"):
        architecture(name, preprocessor=said)


def test_numbers_that_are_asked_for_go_before_the_published_ones():
    made = architecture("ast", None, {"mean": 1.0}, preprocessor={"mean": 2.0, "std": 3.0})
    assert (made.front_end.mean, made.front_end.std) == (1.0, 3.0)
