"""BERT against transformers on a small random model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from medalign_jax.models.language.bert import Bert, bert_config, roberta_config
from medalign_jax.models.upstream_config import ModelConfigError
from medalign_jax.weights.load import load
from medalign_jax.weights.tables import bert as bert_table

DEPTH = 3
LENGTHS = (12, 7, 1)


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    """(folder, token ids, mask, hidden states) of a random BertModel."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=DEPTH, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=40, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "LayerNorm" in name or name.endswith("bias"):
                weight.add_(0.3 * torch.randn_like(weight))
    folder = tmp_path_factory.mktemp("bert")
    model.save_pretrained(folder)
    ids = np.random.default_rng(0).integers(0, 99, (len(LENGTHS), 12))
    mask = np.arange(12) < np.array(LENGTHS)[:, None]
    with torch.no_grad():
        output = model(
            torch.tensor(ids), attention_mask=torch.tensor(mask).long(), output_hidden_states=True
        )
    return folder, ids.astype(np.int32), mask, [state.numpy() for state in output.hidden_states]


def load_bert(folder, kept=DEPTH):
    config = bert_config(json.loads((folder / "config.json").read_text()))
    model = Bert(config.truncate(kept))
    abstract = jax.eval_shape(
        model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)
    )["params"]
    return model, load(folder, bert_table.table(kept, config.depth), abstract)


def test_every_hidden_state_equals_transformers(upstream):
    folder, ids, mask, expected = upstream
    model, params = load_bert(folder)
    last, kept = jax.jit(model.apply, static_argnums=3)(
        {"params": params}, ids, mask, (0, 1, 2, -1)
    )
    assert sorted(kept["hidden_states"]) == [0, 1, 2, 3]
    for layer, state in kept["hidden_states"].items():
        np.testing.assert_allclose(state[mask], expected[layer][mask], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(last, kept["hidden_states"][3])


def test_only_what_is_asked_for_is_kept(upstream):
    folder, ids, mask, expected = upstream
    model, params = load_bert(folder)
    deepest, kept = model.apply({"params": params}, ids, mask, (-3, 2))
    assert sorted(kept["hidden_states"]) == [1, 2]
    np.testing.assert_allclose(deepest[mask], expected[2][mask], rtol=0, atol=1e-5)
    np.testing.assert_allclose(kept["hidden_states"][1][mask], expected[1][mask], rtol=0, atol=1e-5)


def test_a_truncated_model_loads_only_its_layers(upstream):
    folder, ids, mask, expected = upstream
    model, params = load_bert(folder, kept=1)
    assert params["layers"]["query"]["kernel"].shape[0] == 1
    last, _ = model.apply({"params": params}, ids, mask)
    np.testing.assert_allclose(last[mask], expected[1][mask], rtol=0, atol=1e-5)


def test_padding_cannot_be_seen(upstream):
    folder, ids, mask, _ = upstream
    model, params = load_bert(folder)
    other = np.where(mask, ids, 98 - ids)
    run = jax.jit(model.apply)
    before, after = (run({"params": params}, x, mask)[0] for x in (ids, other))
    np.testing.assert_array_equal(before[mask], after[mask])


@pytest.mark.parametrize("layer", [4, -5])
def test_a_layer_that_does_not_exist_is_an_error(upstream, layer):
    folder, ids, mask, _ = upstream
    model, params = load_bert(folder)
    with pytest.raises(ValueError, match=f"hidden state {layer} does not exist"):
        model.apply({"params": params}, ids, mask, (layer,))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"hidden_act": "gelu_new"}, "hidden_act"),
        ({"is_decoder": True}, "is_decoder"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
    ],
)
def test_unsupported_settings_are_refused_by_name(upstream, change, named):
    config = json.loads((upstream[0] / "config.json").read_text())
    with pytest.raises(ModelConfigError, match=named):
        bert_config({**config, **change})


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    """(folder, model) of a random RobertaForMaskedLM with padding token 1."""
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=14, type_vocab_size=1,
        initializer_range=0.3, layer_norm_eps=1e-5,
    )  # fmt: skip
    model = transformers.RobertaForMaskedLM(config).eval()
    folder = tmp_path_factory.mktemp("roberta")
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("side", ["right", "left"])
def test_roberta_counts_real_tokens_from_after_the_padding_token(roberta, side):
    folder, upstream = roberta
    config = roberta_config(json.loads((folder / "config.json").read_text()))
    assert (config.max_positions, config.position_offset) == (12, 2)
    ids = np.random.default_rng(1).integers(2, 61, (3, 12)).astype(np.int32)
    mask = np.arange(12) < np.array(LENGTHS)[:, None]
    mask = mask if side == "right" else np.flip(mask, 1).copy()
    ids = np.where(mask, ids, 1)
    with torch.no_grad():
        states = upstream.roberta(
            torch.tensor(ids).long(), torch.tensor(mask).long(), output_hidden_states=True
        ).hidden_states
    model = Bert(config)
    abstract = jax.eval_shape(
        model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)
    )["params"]
    params = load(folder, bert_table.table(2, 2), abstract)
    _, kept = jax.jit(model.apply, static_argnums=3)({"params": params}, ids, mask, (0, 1, 2))
    for layer, state in kept["hidden_states"].items():
        np.testing.assert_allclose(state[mask], states[layer].numpy()[mask], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="13 tokens; this model has 12 positions"):
        model.apply({"params": params}, np.zeros((1, 13), np.int32), np.ones((1, 13), bool))


def test_roberta_is_not_read_as_bert(roberta):
    config = json.loads((roberta[0] / "config.json").read_text())
    with pytest.raises(ModelConfigError, match="model_type='roberta'"):
        bert_config(config)
    with pytest.raises(ModelConfigError, match="pad_token_id leaves no position"):
        roberta_config(config | {"pad_token_id": 13})
