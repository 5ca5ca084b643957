"""Random parameters of language models: of any input the same, in the shapes of published ones."""

import jax
import jax.numpy as jnp
import numpy as np

from medalign_jax.core.mesh import named_leaves
from medalign_jax.models.audio_lm import AudioLM, audio_lm_config
from medalign_jax.models.initial import initial_params
from medalign_jax.models.language.bert import Bert, BertConfig
from tests.tiny_models import quick_jit

AUDIO = 30
CONFIG = audio_lm_config({
    "model_type": "qwen2_audio", "audio_token_index": AUDIO,
    "text_config": {
        "model_type": "qwen2", "vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 8,
    },
    "audio_config": {
        "num_mel_bins": 5, "d_model": 8, "encoder_layers": 1, "encoder_attention_heads": 2,
        "encoder_ffn_dim": 8, "max_source_positions": 6,
    },
})  # fmt: skip


def test_an_audio_language_models_parameters_depend_on_the_key_alone():
    model, key = AudioLM(CONFIG), jax.random.key(3)
    ids = jnp.array([[AUDIO, 4, 5], [1, AUDIO, 2]], jnp.int32)
    features, lengths = jnp.ones((2, 1, 12, 5)), jnp.array([[12], [8]], jnp.int32)
    other = quick_jit(model.init)(key, ids, ids > 1, features, lengths)["params"]
    found = quick_jit(lambda key: initial_params(model, key))(key)
    assert {"audio", "text"} == set(found)
    jax.tree.map(np.testing.assert_array_equal, found, other)


def test_a_model_of_text_needs_no_audio():
    model = Bert(BertConfig(vocab_size=16, width=8, depth=1, heads=2, mlp_width=8, max_positions=4))
    shapes = jax.eval_shape(lambda key: initial_params(model, key), jax.random.key(0))
    assert (16, 8) in {leaf.shape for leaf in named_leaves(shapes).values()}
