"""Adapters in PEFT's layout: against PyTorch's own forward pass, against PEFT, and read strictly.

Small random models of transformers, loaded by the mapping table as published ones are.
"""

import dataclasses
import json
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from medalign_jax.core import seals
from medalign_jax.models.language.decoder import Decoder
from medalign_jax.models.language.decoder_config import DECODER_CONFIGS
from medalign_jax.models.layers.lora import LoraConfig, as_variables, init_lora, merge
from medalign_jax.weights import Rule, Table, WeightError
from medalign_jax.weights.load import load
from medalign_jax.weights.match import flatten
from medalign_jax.weights.peft import CONFIG_FILE, WEIGHTS_FILE, export_peft, import_peft
from medalign_jax.weights.table import CONV1D, LINEAR, PadAxis, chain
from medalign_jax.weights.tables.decoder import table

DEPTH = 2
VOCABULARY = 40
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": DEPTH,
    "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24,
    "max_position_embeddings": 16, "initializer_range": 0.2, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
ADAPTED = (r"attention/(query|value|out)/kernel$", r"(mlp/down|lm_head)/kernel$")
LORA = LoraConfig(rank=3, alpha=5.0, modules=ADAPTED)
MODULES = [
    "lm_head",
    *(
        f"model.layers.{layer}.{module}"
        for layer in range(DEPTH)
        for module in ("mlp.down_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj")
    ),
]
IDS = np.random.default_rng(0).integers(1, VOCABULARY, (2, 9)).astype(np.int32)


def upstream(kind):
    """A fresh copy of one random model."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)).eval()


class Ours:
    """The same model here."""

    def __init__(self, kind):
        model = upstream(kind)
        json_config = model.config.to_dict()
        self.config = DECODER_CONFIGS[json_config["model_type"]](json_config)
        self.table = table(self.config, DEPTH)
        self.model = Decoder(self.config)
        ids, mask = jnp.asarray(IDS), jnp.ones(IDS.shape, bool)
        shapes = jax.eval_shape(self.model.init, jax.random.key(0), ids, mask)["params"]
        tensors = {name: value.numpy() for name, value in model.state_dict().items()}
        self.params = load(tensors, self.table, shapes)
        self.shapes = jax.eval_shape(lambda: init_lora(jax.random.key(0), shapes, LORA))

        @jax.jit
        def logits(params, lora=None):
            variables = {"params": params} | ({} if lora is None else {"lora": lora})
            hidden, _ = self.model.apply(variables, ids, mask)
            return self.model.apply(variables, hidden, method="logits")

        self.logits = logits


ours = cache(Ours)


def adapter(shapes, seed=1):
    """Numbers in every place, as after training."""
    rng = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, shapes)


@pytest.fixture(params=["llama", "qwen2"])
def kind(request):
    return request.param


@pytest.fixture
def exported(tmp_path):
    """A folder with an adapter of the small Qwen2, and the adapter."""
    side = ours("qwen2")
    lora = adapter(side.shapes)
    export_peft(tmp_path, lora, side.table, LORA, "org/base")
    return tmp_path, lora


def torch_logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS).long()).logits.numpy()


def put_beside(model, folder):
    """LoRA's own formula on the linear layers that the files name: W x + alpha / r * B (A x)."""
    config = json.loads((folder / CONFIG_FILE).read_text())
    tensors = safetensors.numpy.load_file(folder / WEIGHTS_FILE)
    modules = dict(model.named_modules())
    for name in config["target_modules"]:
        a, b = (
            torch.tensor(tensors.pop(f"base_model.model.{name}.lora_{side}.weight"))
            for side in "AB"
        )
        assert a.shape == (config["r"], modules[name].in_features)
        assert b.shape == (modules[name].out_features, config["r"])
        scale = config["lora_alpha"] / config["r"]

        def hook(module, inputs, output, a=a, b=b, scale=scale):
            return output + scale * (inputs[0] @ a.T) @ b.T

        modules[name].register_forward_hook(hook)
    assert not tensors
    return model


def test_exported_adapter_in_pytorch_equals_the_model_here(tmp_path, kind):
    side = ours(kind)
    lora = adapter(side.shapes)
    assert export_peft(tmp_path, lora, side.table, LORA, "org/base") == MODULES
    expected = torch_logits(put_beside(upstream(kind), tmp_path))
    got = side.logits(merge(side.params, lora, LORA))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    assert np.abs(expected - torch_logits(upstream(kind))).max() > 1  # the adapter matters
    beside = side.logits(side.params, as_variables(lora, LORA))
    np.testing.assert_allclose(beside, expected, rtol=0, atol=1e-5)


def test_config_file_says_what_peft_has_to_know(exported):
    folder, _ = exported
    config = json.loads((folder / CONFIG_FILE).read_text())
    expected = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "org/base",
        "r": 3, "lora_alpha": 5, "lora_dropout": 0.0, "bias": "none", "target_modules": MODULES,
        "use_rslora": False, "use_dora": False, "fan_in_fan_out": False,
    }  # fmt: skip
    assert expected.items() <= config.items()
    assert type(config["lora_alpha"]) is int


def test_export_and_import_are_bit_for_bit(exported):
    folder, lora = exported
    side = ours("qwen2")
    again = import_peft(folder, side.shapes, side.table, LORA)
    assert jax.tree.structure(again) == jax.tree.structure(lora)
    jax.tree.map(np.testing.assert_array_equal, again, lora)


def test_names_of_the_target_model_decide_between_prefixes(tmp_path):
    side = ours("qwen2")
    lora = adapter(side.shapes)
    names = [f"thinker.{name}" for name in upstream("qwen2").state_dict()]
    modules = export_peft(tmp_path, lora, side.table, LORA, "org/omni", names)
    assert modules == [f"thinker.{name}" for name in MODULES]
    again = import_peft(tmp_path, side.shapes, side.table, LORA)
    jax.tree.map(np.testing.assert_array_equal, again, lora)


def test_a_padded_head_loses_its_padding_only(tmp_path):
    padded = Table("t", (Rule("head.weight", "head/kernel", chain(LINEAR, PadAxis(1, 5, 8))),))
    config = LoraConfig(rank=2, modules=("kernel",))
    tree = {"head": {"kernel": jax.ShapeDtypeStruct((4, 8), jnp.float32)}}
    shapes = jax.eval_shape(lambda: init_lora(jax.random.key(0), tree, config))
    lora = adapter(shapes)
    with pytest.raises(WeightError, match="not zero everywhere from 5 on"):
        export_peft(tmp_path, lora, padded, config, "base")
    lora["head"]["kernel"]["b"] = lora["head"]["kernel"]["b"].at[:, 5:].set(0)
    export_peft(tmp_path, lora, padded, config, "base")
    stored = safetensors.numpy.load_file(tmp_path / WEIGHTS_FILE)
    assert stored["base_model.model.head.lora_B.weight"].shape == (5, 2)
    again = import_peft(tmp_path, shapes, padded, config)
    jax.tree.map(np.testing.assert_array_equal, again, lora)


def test_a_kernel_that_is_not_a_linear_layer_is_named(tmp_path):
    rules = (Rule("conv.weight", "conv/kernel", CONV1D), Rule("fc.weight", "fc/kernel", LINEAR))
    zeros = {"kernel": {"a": np.zeros((4, 2), np.float32), "b": np.zeros((2, 4), np.float32)}}
    with pytest.raises(WeightError, match="no rule fills parameter conv/kernel/a"):
        export_peft(tmp_path, {"conv": zeros}, Table("toy", rules), LORA, "base")
    assert not list(tmp_path.iterdir())


def rewrite(folder, change):
    path = folder / WEIGHTS_FILE
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)
    (folder / seals.NAME).unlink()  # it was meant


def test_all_that_does_not_fit_is_said_in_one_error(exported):
    folder, _ = exported
    side = ours("qwen2")
    top, end = "base_model.model.model.layers.", "weight"

    def change(tensors):
        del tensors[f"{top}0.self_attn.q_proj.lora_A.{end}"]
        tensors[f"{top}0.self_attn.k_proj.lora_A.{end}"] = np.zeros((3, 16), np.float32)
        tensors[f"{top}1.self_attn.v_proj.lora_B.{end}"] = np.zeros((3, 8), np.float32)

    rewrite(folder, change)
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 4, "use_dora": True}))
    with pytest.raises(WeightError) as caught:
        import_peft(folder, side.shapes, side.table, LORA)
    text = str(caught.value)
    for part in (
        "r is 4, expected 3",
        "use_dora is True; only False",
        f"missing: {top}0.self_attn.q_proj.lora_A.{end} for parameter layers/attention/query",
        f"unused: {top}0.self_attn.k_proj.lora_A.{end}",
        f"{top}1.self_attn.v_proj.lora_B.{end}",
        "[3, 8]",
    ):
        assert part in text, text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_alpha": 6}, "lora_alpha is 6, expected 5.0"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_rslora": True}, "use_rslora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "'pissa'; it changed the base model's weights; let PEFT"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights is 'pissa_niter_16'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"init_lora_weights": "of next year"}, "init_lora_weights is 'of next year'"),
        ({"use_qalora": True}, "use_qalora is True"),
        ({"kasa_config": {"a": 1}}, "kasa_config is .* not known"),
    ],
)
def test_settings_that_compute_something_else_are_refused(exported, changes, message):
    folder, _ = exported
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    side = ours("qwen2")
    with pytest.raises(WeightError, match=message):
        import_peft(folder, side.shapes, side.table, LORA)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), ("{", "not JSON"), ("[]", "not a JSON obj")]
)
def test_a_broken_config_is_named(exported, content, message):
    folder, _ = exported
    path = folder / CONFIG_FILE
    path.unlink()
    if content is not None:
        path.write_text(content)
    side = ours("qwen2")
    with pytest.raises(WeightError, match=f"{CONFIG_FILE}: {message}"):
        import_peft(folder, side.shapes, side.table, LORA)


def test_missing_weights_are_named(exported):
    folder, _ = exported
    (folder / WEIGHTS_FILE).unlink()
    side = ours("qwen2")
    with pytest.raises(WeightError, match=f"{WEIGHTS_FILE}: no such file"):
        import_peft(folder, side.shapes, side.table, LORA)


def test_peft_itself_reads_what_is_written(tmp_path, kind):
    import peft  # here, since it takes seconds

    side = ours(kind)
    lora = adapter(side.shapes)
    export_peft(tmp_path, lora, side.table, LORA, "org/base")
    model = peft.PeftModel.from_pretrained(upstream(kind), tmp_path).eval()
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    assert sorted(name.removeprefix("base_model.model.") for name in adapted) == MODULES
    got = side.logits(merge(side.params, lora, LORA))
    np.testing.assert_allclose(got, torch_logits(model), rtol=0, atol=1e-5)
    merged = torch_logits(model.merge_and_unload())
    np.testing.assert_allclose(got, merged, rtol=0, atol=1e-5)


def test_what_peft_writes_is_read(tmp_path, kind):
    import peft  # here, since it takes seconds

    targets = ["q_proj", "v_proj", "o_proj", "down_proj", "lm_head"]
    settings = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(upstream(kind), settings).eval()
    model.save_pretrained(tmp_path)
    side = ours(kind)
    lora = import_peft(tmp_path, side.shapes, side.table, LORA)
    assert all(leaf.any() for leaf in flatten(lora)[0].values())
    got = side.logits(merge(side.params, lora, LORA))
    np.testing.assert_allclose(got, torch_logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("start", ["pissa", "olora", "orthogonal", "gaussian"])
def test_an_adapter_that_changed_its_base_is_refused_and_no_other(tmp_path, start):
    import peft  # here, since it takes seconds

    before = {name: tensor.clone() for name, tensor in upstream("llama").state_dict().items()}
    settings = peft.LoraConfig(
        r=4 if start == "orthogonal" else 3, lora_alpha=5, init_lora_weights=start,
        target_modules=["q_proj", "v_proj", "o_proj", "down_proj", "lm_head"],
    )  # fmt: skip
    model = peft.get_peft_model(upstream("llama"), settings).eval()
    model.save_pretrained(tmp_path)
    base = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name
    }
    changed = any(not tensor.equal(base[name]) for name, tensor in before.items())
    assert changed == (start in ("pissa", "olora"))
    side, config = ours("llama"), dataclasses.replace(LORA, rank=settings.r)
    shapes = jax.eval_shape(lambda: init_lora(jax.random.key(0), side.params, config))
    if changed:
        with pytest.raises(WeightError, match=f"init_lora_weights is '{start}'; it changed"):
            import_peft(tmp_path, shapes, side.table, config)
        return
    lora = import_peft(tmp_path, shapes, side.table, config)
    got = side.logits(merge(side.params, lora, config))
    np.testing.assert_allclose(got, torch_logits(model), rtol=0, atol=1e-5)
