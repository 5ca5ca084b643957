"""The decoder against transformers' Gemma-3 on small random models saved to disk."""

import dataclasses
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from medalign_jax.models.language.decoder import Decoder, empty_cache
from medalign_jax.models.language.decoder_config import (
    GEMMA3_270M,
    DecoderConfig,
    Rope,
    gemma3_config,
)
from medalign_jax.models.layers.sharded_weights import WholeWeights
from medalign_jax.models.upstream_config import ModelConfigError
from medalign_jax.weights.lazy import WeightError
from medalign_jax.weights.load import load
from medalign_jax.weights.tables import decoder as decoder_table
from tests.tiny_models import quick_jit

DEPTH = 4
VOCABULARY = 99
LENGTHS = (12, 7, 1)
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": DEPTH,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64,
    "sliding_window": 4, "query_pre_attn_scalar": 24, "initializer_range": 0.1,
    "max_position_embeddings": 64, "sliding_window_pattern": 3,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
}  # fmt: skip


def randomise_norms(model):
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.normal_(0, 0.3)


def tokens():
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (len(LENGTHS), 12)).astype(np.int32)
    return ids, np.arange(12) < np.array(LENGTHS)[:, None]


def reference(model):
    """Hidden states and logits of a transformers model."""
    ids, mask = tokens()
    with torch.no_grad():
        output = model.eval()(
            input_ids=torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long(),
            output_hidden_states=True,
        )  # fmt: skip
    return [state.numpy() for state in output.hidden_states], output.logits.numpy()


@pytest.fixture(scope="module")
def text_only(tmp_path_factory):
    torch.manual_seed(0)
    model = transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**TEXT, final_logit_softcapping=5.0)
    )
    randomise_norms(model)
    folder = tmp_path_factory.mktemp("gemma3_text")
    model.save_pretrained(folder)
    return folder, *reference(model)


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory):
    torch.manual_seed(1)
    config = transformers.Gemma3Config(text_config=TEXT, vision_config=VISION)
    model = transformers.Gemma3ForConditionalGeneration(config)
    randomise_norms(model)
    folder = tmp_path_factory.mktemp("gemma3")
    model.save_pretrained(folder)
    return folder, *reference(model)


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def load_decoder(source, config, kept=DEPTH):
    part = config.truncate(kept)
    model = Decoder(part)
    abstract = jax.eval_shape(
        model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)
    )["params"]
    return model, load(source, decoder_table.table(part, config.depth), abstract)


def assert_equal(model, params, states, logits=None):
    ids, mask = tokens()
    layers = tuple(range(DEPTH + 1))
    run = jax.jit(model.apply, static_argnums=3)
    last, kept = jax.device_get(run({"params": params}, ids, mask, layers))
    for layer in layers:
        got = kept["hidden_states"][layer]
        np.testing.assert_allclose(got[mask], states[layer][mask], rtol=0, atol=1e-5)
    if logits is not None:
        got = np.asarray(model.apply({"params": params}, last, method="logits"))
        np.testing.assert_allclose(got[mask], logits[mask], rtol=0, atol=1e-5)


def test_text_model_equals_transformers(text_only):
    folder, states, logits = text_only
    config = gemma3_config(read_config(folder))
    assert config.sliding == (True, True, False, True)
    assert config.rope == Rope(1_000_000.0, 8.0) and config.local_rope == Rope(10_000.0)
    assert np.abs(logits).max() > 1
    assert_equal(*load_decoder(folder, config), states, logits)


def test_multimodal_model_equals_transformers(multimodal):
    folder, states, logits = multimodal
    assert_equal(*load_decoder(folder, gemma3_config(read_config(folder))), states, logits)


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("language_model.model.", ""),  # as published
        ("model.language_model.", "model."),  # as transformers 5 names its modules
    ],
)
def test_both_multimodal_prefixes_load(multimodal, text, rest):
    folder, _, _ = multimodal
    saved = safetensors.numpy.load_file(folder / "model.safetensors")
    marks = ("language_model.model.", "model.language_model.")
    renamed = {}
    for name, tensor in saved.items():
        mark = next((mark for mark in marks if name.startswith(mark)), None)
        plain = name.removeprefix("model.")
        renamed[text + name.removeprefix(mark) if mark else rest + plain] = tensor
    assert any(name.startswith(f"{rest}vision_tower.") for name in renamed)
    assert any(name.startswith(f"{rest}multi_modal_projector.") for name in renamed)
    config = gemma3_config(read_config(folder))
    _, params = load_decoder(renamed, config)
    _, expected = load_decoder(folder, config)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_a_stored_head_has_to_equal_the_embedding(text_only):
    folder, _, _ = text_only
    config = gemma3_config(read_config(folder))
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].copy()
    load_decoder({**tensors, "lm_head.weight": head}, config)
    head[0, 0] += 1
    with pytest.raises(WeightError, match=r"lm_head\.weight"):
        load_decoder({**tensors, "lm_head.weight": head}, config)


def test_a_truncated_model_gives_the_inner_state(text_only):
    folder, states, _ = text_only
    config = gemma3_config(read_config(folder))
    model, params = load_decoder(folder, config, kept=2)
    assert params["layers"]["mlp"]["up"]["kernel"].shape[0] == 2 and "final_norm" not in params
    ids, mask = tokens()
    last, _ = model.apply({"params": params}, ids, mask)
    np.testing.assert_allclose(last[mask], states[2][mask], rtol=0, atol=1e-5)


def test_old_and_new_config_keys_mean_the_same(text_only):
    new = read_config(text_only[0])
    old = {
        key: value
        for key, value in new.items()
        if key not in ("rope_parameters", "layer_types", "_sliding_window_pattern")
    }
    old |= {
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 3,
    }
    assert gemma3_config(old) == gemma3_config(new)


def test_published_multimodal_config_relies_on_defaults():
    published = {
        "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999,
        "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144,
        "initializer_range": 0.02, "mm_tokens_per_image": 256, "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
            "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    }  # fmt: skip
    config = gemma3_config(published)
    assert (config.heads, config.kv_heads, config.head_dim) == (8, 4, 256)
    assert config.vocab_size == 262_208 and config.attention_scale == 1 / 16
    assert [i for i, slides in enumerate(config.sliding) if not slides] == [5, 11, 17, 23, 29]
    assert config.rope.factor == 8.0 and config.local_rope == Rope(10_000.0)


def test_shape_of_gemma3_270m():
    model = Decoder(GEMMA3_270M)
    tree = jax.eval_shape(
        model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert count == 268_098_176  # the published model's number of parameters


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"hidden_activation": "silu"}, "hidden_activation"),
        ({"attention_bias": True}, "attention_bias"),
        ({"num_experts": 8}, "num_experts=8"),
        ({"layer_types": ["chunked_attention"] * DEPTH}, "chunked_attention"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "yarn"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "rope_scaling"),
        ({"sliding_window": None}, "sliding_window"),
        ({"num_key_value_heads": 3}, "key-value heads"),
        ({"model_type": "gemma2"}, "gemma2"),
    ],
)
def test_unsupported_settings_are_refused_by_name(text_only, change, named):
    with pytest.raises(ModelConfigError, match=named):
        gemma3_config({**read_config(text_only[0]), **change})


def test_switches_of_the_family_equal_transformers_qwen():
    """Plain norms, SwiGLU, projection biases, one rope, an untied head: what is not Gemma's."""
    torch.manual_seed(2)
    qwen = transformers.Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=DEPTH, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, initializer_range=0.1,
        tie_word_embeddings=False, max_position_embeddings=64,
    )  # fmt: skip
    upstream = transformers.Qwen2ForCausalLM(qwen)
    with torch.no_grad():
        for name, weight in upstream.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0, 0.3)
    config = DecoderConfig(
        vocab_size=VOCABULARY, width=32, heads=4, kv_heads=2, head_dim=8, mlp_width=64,
        sliding=(False,) * DEPTH, attention_scale=8**-0.5, max_positions=64, qkv_bias=True,
        tied=False, rope=Rope(10_000.0),
    )  # fmt: skip
    tensors = {name: value.numpy() for name, value in upstream.state_dict().items()}
    assert_equal(Decoder(config), stack_qwen(tensors), *reference(upstream))


def stack_qwen(tensors):
    def layers(name):
        return np.stack([tensors[f"model.layers.{i}.{name}"] for i in range(DEPTH)])

    def dense(name, bias=False):
        kernel = {"kernel": layers(f"{name}.weight").swapaxes(1, 2)}
        return {**kernel, "bias": layers(f"{name}.bias")} if bias else kernel

    return {
        "embed": {"embedding": tensors["model.embed_tokens.weight"]},
        "final_norm": {"scale": tensors["model.norm.weight"]},
        "lm_head": {"kernel": tensors["lm_head.weight"].T},
        "layers": {
            "attention": {
                "query": dense("self_attn.q_proj", bias=True),
                "key": dense("self_attn.k_proj", bias=True),
                "value": dense("self_attn.v_proj", bias=True),
                "out": dense("self_attn.o_proj"),
            },
            "mlp": {name: dense(f"mlp.{name}_proj") for name in ("gate", "up", "down")},
            "attention_norm": {"scale": layers("input_layernorm.weight")},
            "mlp_norm": {"scale": layers("post_attention_layernorm.weight")},
        },
    }


SMALL = DecoderConfig(
    vocab_size=VOCABULARY, width=16, heads=2, kv_heads=1, head_dim=8, mlp_width=24,
    sliding=(True, False, True), window=4, attention_scale=8**-0.5, max_positions=64, tied=False,
    embed_scale=4.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def small():
    ids, mask = tokens()
    return quick_jit(Decoder(SMALL).init)(jax.random.key(0), ids, mask)["params"]


def forward(model, variables, **options):
    """Logits at real tokens, and the gradient of a function of them (where there is one)."""
    ids, mask = tokens()

    def loss(params):
        last, _ = model.apply({**variables, "params": params}, ids, mask, **options)
        logits = model.apply({**variables, "params": params}, last, method="logits")
        return jnp.sum(jnp.sin(logits) * mask[..., None]), logits

    grad = quick_jit(jax.value_and_grad(loss, has_aux=True))
    (_, logits), gradient = jax.device_get(grad(variables["params"]))
    return logits[mask], gradient


def close(one, other):
    """Within 1e-5 of the largest entry of each array."""

    def check(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(np.abs(b).max(), 1.0))

    jax.tree.map(check, one, other)


def factors(params, *paths, rank=3):
    """Random low-rank factors for some kernels, nested as the parameters."""
    rng, lora = np.random.default_rng(5), {}
    for path in paths:
        kernel, place = params, lora
        for key in path.split("/"):
            kernel, place = kernel[key], place.setdefault(key, {})
        a = rng.standard_normal((*kernel.shape[:-1], rank)).astype(np.float32)
        b = rng.standard_normal((*kernel.shape[:-2], rank, kernel.shape[-1])).astype(np.float32)
        place |= {"a": a, "b": 0.1 * b}
    return lora


def merged(params, lora):
    if "a" in lora:
        return np.asarray(params, np.float64) + lora["a"].astype(np.float64) @ lora["b"]
    return {**params, **{key: merged(params[key], each) for key, each in lora.items()}}


KERNELS = ("layers/attention/query/kernel", "layers/mlp/down/kernel", "lm_head/kernel")


def test_low_rank_factors_equal_merged_weights(small):
    lora = factors(small, *KERNELS)
    whole = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), merged(small, lora))
    got = forward(Decoder(SMALL, remat=True), {"params": small, "lora": lora})
    expected = forward(Decoder(SMALL), {"params": whole})
    close(got, expected)
    assert np.abs(got[0] - forward(Decoder(SMALL), {"params": small})[0]).max() > 0.1


def test_gradients_of_low_rank_factors(small):
    """By the chain rule from the gradient of the kernel: a gets G b^T, b gets a^T G."""
    ids, mask = tokens()
    lora = factors(small, "layers/mlp/up/kernel")
    model = Decoder(SMALL, remat=True)

    def loss(lora):
        hidden, _ = model.apply({"params": small, "lora": lora}, ids, mask)
        return jnp.sum(jnp.sin(hidden) * mask[..., None])

    got = quick_jit(jax.grad(loss))(lora)["layers"]["mlp"]["up"]["kernel"]
    whole = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), merged(small, lora))

    def plain(params):
        hidden, _ = Decoder(SMALL).apply({"params": params}, ids, mask)
        return jnp.sum(jnp.sin(hidden) * mask[..., None])

    slope = np.asarray(quick_jit(jax.grad(plain))(whole)["layers"]["mlp"]["up"]["kernel"])
    a, b = (lora["layers"]["mlp"]["up"]["kernel"][name] for name in "ab")
    bound = 1e-5 * np.abs(slope).max() * 16
    np.testing.assert_allclose(got["a"], slope @ b.swapaxes(1, 2), rtol=0, atol=bound)
    np.testing.assert_allclose(got["b"], a.swapaxes(1, 2) @ slope, rtol=0, atol=bound)


WRONG = {"a": np.ones((3, 16, 2), np.float32), "b": np.ones((3, 2, 5), np.float32)}


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"embed": {"embedding": {"a": 0, "b": 0}}}, "embed of Decoder have no effect"),
        ({"layers": {"mlp": {"fc": {"kernel": {}}}}}, r"factors for \['fc'\]"),
        ({"layers": {"mlp": {"up": {"kernel": WRONG}}}}, "do not fit a kernel"),
    ],
)
def test_low_rank_factors_without_a_place_are_named(small, lora, words):
    with pytest.raises(ValueError, match=words):
        Decoder(SMALL).apply({"params": small, "lora": lora}, *tokens())


@dataclasses.dataclass(frozen=True)
class Hooked(WholeWeights):
    hook: Callable

    def layer(self, weights):
        return self.hook(weights)


def test_a_hook_sees_each_layers_weights_before_use(small):
    """Halved weights of all layers, in the forward pass, the gradient and cached steps."""
    hook = lambda weights: jax.tree.map(lambda leaf: leaf / 2, weights)  # noqa: E731
    hooked = Decoder(SMALL, remat=True, access=Hooked(hook))
    halved = {**small, "layers": hook(small["layers"])}
    logits, gradient = forward(hooked, {"params": small})
    expected, slope = forward(Decoder(SMALL), {"params": halved})
    close((logits, gradient), (expected, {**slope, "layers": hook(slope["layers"])}))
    ids, mask = tokens()
    cache = empty_cache(SMALL, *ids.shape, jnp.float32)
    arguments = (ids, mask, cache, 0)
    got, _ = hooked.apply({"params": small}, *arguments, method="extend")
    wanted, _ = Decoder(SMALL).apply({"params": halved}, *arguments, method="extend")
    np.testing.assert_allclose(got[mask], wanted[mask], rtol=0, atol=1e-5)


def test_adapted_weights_go_through_the_hook(small):
    lora = factors(small, *KERNELS[:2])
    hook = lambda weights: jax.tree.map(lambda leaf: leaf / 2, weights)  # noqa: E731
    whole = merged(small, lora)
    whole = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), whole)
    halved = {**whole, "layers": hook(whole["layers"])}
    got = forward(Decoder(SMALL, access=Hooked(hook)), {"params": small, "lora": lora})[0]
    close(got, forward(Decoder(SMALL), {"params": halved})[0])


def test_embeddings_stand_in_for_those_of_the_ids(small):
    ids, mask = tokens()
    model = Decoder(SMALL)
    embeddings = model.apply({"params": small}, ids, method="embedded")
    table = np.asarray(small["embed"]["embedding"])
    np.testing.assert_allclose(embeddings, 4 * table[ids], rtol=1e-6)
    expected, _ = forward(model, {"params": small})
    got, _ = forward(model, {"params": small}, embeddings=embeddings)
    close(got, expected)  # two programs: not bit for bit
    _, kept = model.apply({"params": small}, ids, mask, (0, -1), embeddings=2 * embeddings)
    np.testing.assert_array_equal(kept["hidden_states"][0], 2 * embeddings)
