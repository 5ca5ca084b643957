"""Folders as transformers saves them, opened by name as a user does: by `load_encoder` and by a
run's `encoder.source`."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
import pytest
import torch
import transformers

from configs import acula
from medalign_jax.core.errors import UserError
from medalign_jax.core.mesh import make_mesh
from medalign_jax.encoder import load_encoder
from medalign_jax.runs.parts.audio import architecture_of, published_params
from tests.torch_models import shake

MELS, OUT = 7, 20
TOWER = {
    "num_mel_bins": MELS, "d_model": 24, "encoder_layers": 2, "encoder_attention_heads": 3,
    "encoder_ffn_dim": 40, "max_source_positions": 24,
}  # fmt: skip
TEXT = {
    "hidden_size": OUT, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 50,
}  # fmt: skip
VISION = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": OUT,
}  # fmt: skip
SWIN = {
    "window_size": 4, "num_mel_bins": 8, "spec_size": 32, "patch_embeds_hidden_size": 24,
    "hidden_size": 48, "depths": [2, 1], "num_attention_heads": [2, 3],
}  # fmt: skip


@dataclasses.dataclass
class Published:
    """A model of transformers, and what it makes of features (B, T, M): vectors (B, D)."""

    name: str
    make: Callable[[], transformers.PreTrainedModel]
    features: tuple[int, int, int]
    embed: Callable[[transformers.PreTrainedModel, torch.Tensor], torch.Tensor]


def whisper():
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            **TOWER, vocab_size=50, decoder_layers=1, decoder_attention_heads=2,
            decoder_ffn_dim=16, max_target_positions=8, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, decoder_start_token_id=1,
        )
    )  # fmt: skip


def ast():
    return transformers.ASTForAudioClassification(
        transformers.ASTConfig(
            hidden_size=36, num_hidden_layers=2, num_attention_heads=3, intermediate_size=50,
            patch_size=9, frequency_stride=7, time_stride=4, max_length=47, num_mel_bins=31,
        )
    )  # fmt: skip


def clap(fused: bool):
    text = {
        "vocab_size": 61, "hidden_size": 36, "num_hidden_layers": 1, "num_attention_heads": 3,
        "intermediate_size": 50, "max_position_embeddings": 22,
    }  # fmt: skip
    return transformers.ClapModel(
        transformers.ClapConfig(
            text_config=text, audio_config={**SWIN, "enable_fusion": fused}, projection_dim=OUT
        )
    )


def qwen2_audio():
    return transformers.Qwen2AudioForConditionalGeneration(
        transformers.Qwen2AudioConfig(
            audio_config={"model_type": "qwen2_audio_encoder"} | TOWER,
            text_config={"model_type": "qwen2"} | TEXT,
            audio_token_index=3,
        )
    )


def qwen_omni():
    rope = {"rope_type": "default", "mrope_section": [2, 2, 1]}
    return transformers.Qwen2_5OmniThinkerForConditionalGeneration(
        transformers.Qwen2_5OmniThinkerConfig(
            audio_config=TOWER | {"n_window": 12, "output_dim": OUT},
            text_config=TEXT | {"rope_parameters": rope},
            vision_config=VISION,
        )
    )


def whisper_embed(model, features):
    return model.model.encoder(features.transpose(1, 2)).last_hidden_state.mean(1)


def ast_embed(model, features):
    return model.audio_spectrogram_transformer(features).pooler_output


def clap_embed(model, features):
    one = model.audio_model(input_features=features[:, None]).pooler_output
    return model.audio_projection(one)


def clap_fused_embed(model, features):
    pictures = features[:, None].expand(-1, 4, -1, -1)
    alone = torch.zeros((len(features), 1), dtype=torch.bool)
    hidden = model.audio_model(input_features=pictures, is_longer=alone).pooler_output
    return model.audio_projection(hidden)


def qwen2_audio_embed(model, features):
    return model.model.audio_tower(features.transpose(1, 2)).last_hidden_state.mean(1)


def unprojected(model, features):
    """What goes into the tower's projection, averaged."""
    given = []
    hook = model.model.audio_tower.proj.register_forward_pre_hook(
        lambda _, args: given.append(args[0])
    )
    seen = torch.ones(features.shape[:2], dtype=torch.long)
    model.get_audio_features(features.transpose(1, 2), feature_attention_mask=seen)
    hook.remove()
    return given[0].reshape(len(features), -1, given[0].shape[-1]).mean(1)


FAMILIES = {
    family.name: family
    for family in (
        Published("whisper", whisper, (2, 48, MELS), whisper_embed),
        Published("ast", ast, (2, 47, 31), ast_embed),
        Published("clap", lambda: clap(False), (2, 101, 8), clap_embed),
        Published("clap_fused", lambda: clap(True), (2, 101, 8), clap_fused_embed),
        Published("qwen2_audio", qwen2_audio, (2, 48, MELS), qwen2_audio_embed),
        Published("qwen_omni_audio", qwen_omni, (2, 48, MELS), unprojected),
    )
}


@dataclasses.dataclass
class Saved:
    family: Published
    model: transformers.PreTrainedModel
    folder: str


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory) -> Saved:
    family = FAMILIES[request.param]
    model = shake(family.make())
    folder = tmp_path_factory.mktemp(family.name)
    model.save_pretrained(folder)
    return Saved(family, model, str(folder))


def test_load_encoder_gives_what_transformers_gives(saved):
    features = np.random.default_rng(0).standard_normal(saved.family.features).astype(np.float32)
    with torch.no_grad():
        wanted = saved.family.embed(saved.model, torch.from_numpy(features)).numpy()
    ours = load_encoder(saved.family.name, saved.folder).embed_features(features)
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5 * max(1.0, np.abs(wanted).max()))
    assert np.abs(wanted[0] - wanted[1]).max() > 1e-2  # the two clips are told apart


def test_a_run_takes_the_folder_as_its_source(saved):
    config = acula.get_config()
    config.encoder.name, config.encoder.source = saved.family.name, saved.folder
    config.data.seconds = 0.2
    made = architecture_of(config)
    params, identity = published_params(config, made, make_mesh(devices=jax.devices()[:1]))
    loaded = load_encoder(saved.family.name, saved.folder)
    assert made.module == loaded.architecture.module
    assert made.front_end == loaded.architecture.front_end
    for left, right in zip(jax.tree.leaves(params), jax.tree.leaves(loaded.params), strict=True):
        np.testing.assert_array_equal(left, right)
    assert len(identity) == 64


def test_another_architectures_folder_is_refused(saved):
    other = "whisper" if saved.family.name != "whisper" else "ast"
    with pytest.raises(UserError, match=r"config\.json|tensor"):
        load_encoder(other, saved.folder)
