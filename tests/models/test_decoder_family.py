"""Llama, SmolLM2, Qwen2.5, Qwen3, Gemma-3 and Qwen2.5-Omni's text model against transformers.

Small random models with odd settings, saved to disk and loaded like published ones, on texts with
padding on either side.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from medalign_jax.models.language import decoder_config
from medalign_jax.models.language.decoder import Decoder
from medalign_jax.models.language.decoder_config import DECODER_CONFIGS
from medalign_jax.models.upstream_config import ModelConfigError
from medalign_jax.weights.load import export, load
from medalign_jax.weights.tables.decoder import table
from tests.tiny_models import quick_jit

torch.set_num_threads(1)

DEPTH = 3
VOCABULARY = 99
LENGTH = 14
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": DEPTH,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40,
    "max_position_embeddings": 32, "initializer_range": 0.15, "pad_token_id": 0,
}  # fmt: skip
MROPE = {"type": "default", "rope_type": "default", "mrope_section": [1, 1, 2]}
AUDIO = {
    "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16,
    "output_dim": 32, "num_mel_bins": 8, "max_source_positions": 20, "n_window": 4,
}  # fmt: skip
VISION = {
    "depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32,
    "patch_size": 4, "fullatt_block_indexes": [0],
}  # fmt: skip


def llama(**changes):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | changes))


def qwen2(**changes):
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES | changes))


def qwen3(**changes):
    config = transformers.Qwen3Config(**SIZES | {"head_dim": 16} | changes)
    return transformers.Qwen3ForCausalLM(config)


def gemma3(**changes):
    config = transformers.Gemma3TextConfig(**SIZES | {"head_dim": 16} | changes)
    return transformers.Gemma3ForCausalLM(config)


def omni(**changes):
    text = SIZES | {"rope_scaling": MROPE} | changes
    return transformers.Qwen2_5OmniThinkerForConditionalGeneration(
        transformers.Qwen2_5OmniThinkerConfig(
            text_config=text,
            audio_config=AUDIO,
            vision_config=VISION,
            vision_start_token_id=96,
            vision_end_token_id=97,
        )
    )


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
MODELS = {
    "llama 3, all biases, wide heads": lambda: llama(
        rope_scaling=LLAMA3, attention_bias=True, mlp_bias=True, head_dim=24, rope_theta=50.0
    ),
    "smollm2, tied, three key heads": lambda: llama(
        tie_word_embeddings=True, num_attention_heads=6, num_key_value_heads=3, hidden_size=36,
        rope_scaling={"type": "linear", "factor": 3.0},
    ),
    "qwen2, window from the second layer on": lambda: qwen2(
        use_sliding_window=True, sliding_window=5, max_window_layers=1, tie_word_embeddings=True
    ),
    "qwen2, yarn, every head a key head": lambda: qwen2(
        num_key_value_heads=4, rope_theta=1_000_000.0,
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    ),
    "qwen3, mixed layers, biases, one key head": lambda: qwen3(
        num_key_value_heads=1, attention_bias=True, use_sliding_window=True, sliding_window=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "qwen3, tied": lambda: qwen3(tie_word_embeddings=True, rope_theta=500.0),
    "gemma3, all layers slide": lambda: gemma3(
        sliding_window=4, layer_types=["sliding_attention"] * DEPTH, query_pre_attn_scalar=40,
    ),
    "gemma3, softcap": lambda: gemma3(
        sliding_window=4, sliding_window_pattern=2, final_logit_softcapping=3.0,
    ),
    "qwen2.5-omni": omni,
}  # fmt: skip
ONE_OF_EACH = [name for name in MODELS if "yarn" not in name and "tied" not in name]


class Upstream:
    """A random model of transformers on disk, with its answers to ``texts()``."""

    def __init__(self, name, folder):
        torch.manual_seed(len(name))
        self.model = MODELS[name]().eval()
        with torch.no_grad():
            for key, weight in self.model.named_parameters():
                if "norm" in key or key.endswith("bias"):
                    weight.add_(0.3 * torch.randn_like(weight))
        self.model.save_pretrained(folder)
        self.folder = folder
        self.json = json.loads((folder / "config.json").read_text())
        self.config = DECODER_CONFIGS[self.json["model_type"]](self.json)
        self.tensors = safetensors.numpy.load_file(folder / "model.safetensors")
        self.states, self.logits, self.gradients = self._answers()

    def _answers(self):
        ids, mask, weight = texts()
        parts = {} if "thinker" in self.json["model_type"] else {"position_ids": positions(mask)}
        output = self.model(
            input_ids=torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long(),
            output_hidden_states=True, **parts,
        )  # fmt: skip
        (output.logits * torch.tensor(weight)).sum().backward()
        named = self.model.named_parameters()
        gradients = {key: p.grad.numpy() for key, p in named if p.grad is not None}
        states = [state.detach().numpy() for state in output.hidden_states]
        return states, output.logits.detach().numpy(), gradients


def texts():
    """Ids, mask and the weights of a scalar loss: padding at the left, the right, nowhere."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, VOCABULARY, (4, LENGTH)).astype(np.int32)
    column = np.arange(LENGTH)
    mask = np.stack([column >= 6, column < 8, column >= 0, column >= LENGTH - 1])
    weight = rng.standard_normal((4, LENGTH, VOCABULARY)).astype(np.float32)
    return ids, mask, weight * mask[..., None]


def positions(mask):
    return torch.tensor(np.maximum(np.cumsum(mask, axis=1) - 1, 0))


def initialised(model):
    ids, mask = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)
    return quick_jit(model.init)(jax.random.key(0), ids, mask)["params"]


def abstract(config):
    ids, mask = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)
    return jax.eval_shape(Decoder(config).init, jax.random.key(0), ids, mask)["params"]


_CACHE = {}


@pytest.fixture
def upstream(request, tmp_path_factory):
    name = request.param
    if name not in _CACHE:
        _CACHE[name] = Upstream(name, tmp_path_factory.mktemp("upstream"))
    return _CACHE[name]


def all_models(names=tuple(MODELS)):
    return pytest.mark.parametrize("upstream", names, indirect=True)


@all_models()
def test_states_logits_and_gradients_equal_transformers(upstream):
    config = dataclasses.replace(upstream.config, padded_vocab=VOCABULARY + 5)
    rules = table(config, DEPTH)
    params = load(upstream.folder, rules, abstract(config))
    ids, mask, weight = texts()
    model = Decoder(config)

    def loss(params):
        layers = tuple(range(DEPTH + 1))
        last, kept = model.apply({"params": params}, ids, mask, layers)
        logits = model.apply({"params": params}, last, method="logits")
        return jnp.sum(logits * weight), (kept["hidden_states"], logits)

    grad = quick_jit(jax.value_and_grad(loss, has_aux=True))
    (_, (states, logits)), gradients = jax.device_get(grad(params))
    for layer, expected in enumerate(upstream.states):
        np.testing.assert_allclose(states[layer][mask], expected[mask], rtol=0, atol=1e-5)
    assert logits.shape[-1] == VOCABULARY
    np.testing.assert_allclose(logits[mask], upstream.logits[mask], rtol=0, atol=1e-5)
    compare_gradients(export(gradients, rules), upstream)


def compare_gradients(gradients, upstream):
    """Each tensor's gradient, within 1e-5 of its largest entry."""
    renamed = {
        key.replace("model.language_model.", "model."): value
        for key, value in upstream.gradients.items()
    }
    assert set(gradients) == set(renamed)
    for name, gradient in gradients.items():
        expected = renamed[name]
        bound = 1e-5 * max(np.abs(expected).max(), 1.0)
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=bound, err_msg=name)


@all_models()
def test_export_gives_every_tensor_back(upstream):
    for config in (upstream.config, dataclasses.replace(upstream.config, padded_vocab=104)):
        rules = table(config, DEPTH)
        params = load(upstream.folder, rules, abstract(config))
        written = export(params, rules, names=upstream.tensors)
        text = {k: v for k, v in upstream.tensors.items() if not k.startswith(("audio", "visual"))}
        if config.tied:
            text.pop("lm_head.weight", None)
        assert set(written) == set(text)
        assert all(written[name].tobytes() == text[name].tobytes() for name in text)
    assert params["embed"]["embedding"].shape[0] == 104
    assert not np.asarray(params["embed"]["embedding"])[VOCABULARY:].any()


@all_models(["qwen3, mixed layers, biases, one key head", "smollm2, tied, three key heads"])
def test_exported_weights_mean_the_same_to_transformers(upstream):
    rules = table(upstream.config, DEPTH)
    params = load(upstream.folder, rules, abstract(upstream.config))
    doubled = jax.tree.map(lambda leaf: 2 * leaf, params)
    tensors = {name: torch.tensor(value) for name, value in export(doubled, rules).items()}
    model = type(upstream.model)(upstream.model.config).eval()
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= (
        {"lm_head.weight"} if upstream.config.tied else set()
    )
    ids, mask, _ = texts()
    with torch.no_grad():
        expected = model(
            torch.tensor(ids).long(), torch.tensor(mask).long(), positions(mask)
        ).logits.numpy()
    model = Decoder(upstream.config)

    def logits(params):
        last, _ = model.apply({"params": params}, ids, mask)
        return model.apply({"params": params}, last, method="logits")

    got = np.asarray(quick_jit(logits)(doubled))
    np.testing.assert_allclose(got[mask], expected[mask], rtol=0, atol=1e-4)


@all_models(ONE_OF_EACH)
def test_bfloat16_stays_close(upstream):
    """Relative distance of the last state below 3 % on every text: 8 bits over three layers."""
    params = load(upstream.folder, table(upstream.config, DEPTH), abstract(upstream.config))
    ids, mask, _ = texts()
    model = Decoder(upstream.config, dtype=jnp.bfloat16)
    run = quick_jit(lambda params: model.apply({"params": params}, ids, mask)[0])
    state = np.asarray(run(params))
    assert state.dtype == jnp.bfloat16
    for row in range(len(ids)):
        expected = upstream.states[-1][row][mask[row]]
        off = np.linalg.norm(state[row][mask[row]].astype(np.float32) - expected)
        assert off < 0.03 * np.linalg.norm(expected)


@all_models(["qwen2.5-omni"])
def test_omni_loads_whole_or_as_its_thinker_or_its_text(upstream):
    whole = {f"thinker.{name}": value for name, value in upstream.tensors.items()}
    whole |= {"talker.model.norm.weight": np.zeros(3), "token2wav.x": np.zeros(3)}
    config = {
        "model_type": "qwen2_5_omni", "enable_audio_output": True, "talker_config": {"a": 1},
        "token2wav_config": {"a": 1}, "thinker_config": upstream.json,
    }  # fmt: skip
    read = DECODER_CONFIGS["qwen2_5_omni"](config)
    assert read == upstream.config and not read.tied
    rules = table(read, DEPTH)
    one, other = load(whole, rules, abstract(read)), load(upstream.folder, rules, abstract(read))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert "thinker.lm_head.weight" in export(one, rules, names=whole)
    text = DECODER_CONFIGS["qwen2_5_omni_text"](upstream.json["text_config"])
    assert dataclasses.replace(text, tied=False) == read


@all_models(["qwen2.5-omni"])
@pytest.mark.parametrize("sections", [[1, 1, 2], [2, 0, 1, 1]])
def test_positions_of_three_axes_equal_transformers(upstream, sections):
    """Each axis has its own; the second division comes back to the first axis."""
    ids, mask, _ = texts()
    axes = np.random.default_rng(1).integers(0, 20, (3, *ids.shape)).astype(np.int32)
    rotary = upstream.model.model.language_model.rotary_emb
    before, rotary.mrope_section = rotary.mrope_section, sections
    with torch.no_grad():
        output = upstream.model(
            input_ids=torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long(),
            position_ids=torch.tensor(axes).long(), output_hidden_states=True,
        )  # fmt: skip
    rotary.mrope_section = before
    text = upstream.json["text_config"]
    text = text | {"rope_parameters": text["rope_parameters"] | {"mrope_section": sections}}
    config = DECODER_CONFIGS["qwen2_5_omni_thinker"](upstream.json | {"text_config": text})
    assert config.rope.sections == tuple(sections)
    params = load(upstream.folder, table(config, DEPTH), abstract(config))
    model, layers = Decoder(config), tuple(range(DEPTH + 1))

    def states(positions):
        run = lambda params: model.apply({"params": params}, ids, mask, layers, positions=positions)  # noqa: E731
        return quick_jit(run)(params)[1]["hidden_states"]

    got = states(axes)
    for layer, expected in enumerate(output.hidden_states):
        np.testing.assert_allclose(got[layer][mask], expected.numpy()[mask], rtol=0, atol=1e-5)
    assert np.abs(got[DEPTH] - upstream.states[-1])[mask].max() > 0.1
    flat = np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)
    np.testing.assert_array_equal(
        states(np.stack([flat] * 3))[DEPTH][mask], states(None)[DEPTH][mask]
    )
    with pytest.raises(ValueError, match="sections"):
        Decoder(TINY).apply({"params": initialised(Decoder(TINY))}, ids, mask, positions=axes)


def test_a_model_without_its_head_needs_none():
    config = dataclasses.replace(decoder_config.QWEN2_5_7B, head=False)
    assert "lm_head" not in abstract(config)
    assert "lm_head" in abstract(decoder_config.QWEN2_5_7B)
    assert "lm_head" not in abstract(decoder_config.QWEN2_5_7B.truncate(3))


def test_random_padded_rows_are_zero():
    config = dataclasses.replace(TINY, tied=False, padded_vocab=112)
    params = initialised(Decoder(config))
    assert not params["embed"]["embedding"][VOCABULARY:].any()
    assert not params["lm_head"]["kernel"][:, VOCABULARY:].any()
    assert params["lm_head"]["kernel"][:, :VOCABULARY].any(0).all()


TINY = decoder_config.DecoderConfig(
    vocab_size=VOCABULARY, width=16, heads=2, kv_heads=1, head_dim=8, mlp_width=32,
    sliding=(True, False), window=4, attention_scale=8**-0.5, max_positions=64,
)  # fmt: skip


def test_remat_changes_nothing():
    ids, mask, _ = texts()
    plain, frugal = Decoder(TINY), Decoder(TINY, remat=True)
    params = initialised(plain)

    def gradient(model):
        def loss(params):
            state, _ = model.apply({"params": params}, ids, mask)
            return jnp.sum(jnp.where(mask[..., None], state, 0) ** 3)

        return quick_jit(jax.grad(loss))(params)

    for one, other in zip(
        jax.tree.leaves(gradient(plain)), jax.tree.leaves(gradient(frugal)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "change", "named"),
    [
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ("llama", {"rope_scaling": LLAMA3 | {"low_freq_factor": 9.0}}, "high_freq_factor"),
        ("llama", {"rope_scaling": LLAMA3 | {"attention_factor": 2.0}}, "attention_factor"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"sliding_window": 5}, "sliding_window=5"),
        ("llama", {"attention_bias": "yes"}, "attention_bias"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved"),
        ("llama", {"head_dim": 7}, "even head_dim"),
        ("llama", {"num_attention_heads": 5, "head_dim": None}, "hidden_size"),
        ("llama", {"model_type": "mistral"}, "mistral"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("qwen2", {"use_mrope": True}, "use_mrope"),
        ("qwen2", {"rope_scaling": MROPE}, "mrope_section"),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 1.0}}, "mscale"),
        ("qwen2", {"layer_types": ["sliding_attention"] * DEPTH}, "sliding_window"),
        ("qwen2", {"layer_types": ["chunked_attention"] * DEPTH}, "chunked_attention"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": "2"}, "max_window_layers"),
        ("qwen3", {"num_experts": 8}, "num_experts=8"),
        ("qwen2_5_omni_text", {"rope_scaling": MROPE | {"mrope_section": [1, 1]}}, "mrope_section"),
        ("qwen2_5_omni", {"thinker_config": None}, "intermediate_size=40"),
    ],
)
def test_unsupported_settings_are_refused_by_name(kind, change, named):
    with pytest.raises(ModelConfigError, match=named):
        DECODER_CONFIGS[kind](SIZES | {"model_type": kind} | change)


def test_windows_of_qwen_are_read_only_where_they_are_used():
    config = SIZES | {"model_type": "qwen2", "sliding_window": 5, "max_window_layers": 1}
    read = DECODER_CONFIGS["qwen2"]
    assert read(config).sliding == (False,) * DEPTH and read(config).window is None
    used = config | {"use_sliding_window": True}
    assert read(used).sliding == (False, True, True) and read(used).window == 5
    assert read(used | {"max_window_layers": 0}).sliding == (True,) * DEPTH
