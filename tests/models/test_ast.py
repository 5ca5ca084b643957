"""AST against transformers on a small random model with odd sizes, and the published names."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from medalign_jax.core.mesh import make_mesh, shardings
from medalign_jax.models.encoders.ast import (
    AST,
    AST_AUDIOSET,
    ASTConfig,
    ast_config,
    overlapping_patches,
)
from medalign_jax.models.upstream_config import ModelConfigError
from medalign_jax.weights import WeightError
from medalign_jax.weights.load import export, load, save
from medalign_jax.weights.tables.ast import SHARDING, TABLE

torch.set_num_threads(1)

ODD = dict(
    hidden_size=36, num_hidden_layers=3, num_attention_heads=3, intermediate_size=50,
    patch_size=9, frequency_stride=7, time_stride=4, max_length=47, num_mel_bins=31,
)  # fmt: skip


@dataclasses.dataclass
class Upstream:
    folder: Path
    torch_model: torch.nn.Module
    features: np.ndarray
    output: object
    config: ASTConfig
    params: dict

    def run(self, params=None, features=None, **changes):
        """`embed`, compiled, with other parameters, features or sizes."""
        model = AST(dataclasses.replace(self.config, **changes))
        params = self.params if params is None else params
        features = self.features if features is None else features
        return jax.jit(model.apply)({"params": params}, features)


@pytest.fixture(scope="module")
def upstream(tmp_path_factory) -> Upstream:
    torch.manual_seed(0)
    torch_model = transformers.ASTModel(transformers.ASTConfig(**ODD)).eval()
    with torch.no_grad():
        for weight in torch_model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    folder = tmp_path_factory.mktemp("ast")
    torch_model.save_pretrained(folder)
    features = np.random.default_rng(0).standard_normal((2, 47, 31)).astype(np.float32)
    with torch.no_grad():
        output = torch_model(torch.tensor(features), output_hidden_states=True)
    config = ast_config(json.loads((folder / "config.json").read_text()))
    params = load(folder, TABLE, abstract_params(config))
    return Upstream(folder, torch_model, features, output, config, params)


def abstract_params(config: ASTConfig) -> dict:
    features = jax.ShapeDtypeStruct((1, config.frames, config.mels), jnp.float32)
    return jax.eval_shape(AST(config).init, jax.random.key(0), features)["params"]


def time_first(config: ASTConfig, states: torch.Tensor) -> np.ndarray:
    """Upstream's tokens (mel rows of time columns) in our order."""
    rows, columns = config.grid(config.frames)
    patches = states[:, 2:].unflatten(1, (columns, rows)).transpose(1, 2).flatten(1, 2)
    return torch.cat([states[:, :2], patches], dim=1).detach().numpy()


def test_config_reads_every_size(upstream):
    assert upstream.config == ASTConfig(
        frames=47, mels=31, patch=9, stride=(4, 7), width=36, depth=3, heads=3, mlp_width=50
    )
    assert upstream.config.grid(47) == (10, 4)
    assert ast_config(transformers.ASTConfig().to_dict()) == AST_AUDIOSET


def test_feature_and_every_layer_equal_transformers(upstream):
    feature, inner = upstream.run()
    states = [time_first(upstream.config, state) for state in upstream.output.hidden_states]
    np.testing.assert_allclose(inner["embedded"], states[0], atol=1e-5, rtol=0)
    for i, expected in enumerate(states[1:]):
        np.testing.assert_allclose(inner[f"block{i:02d}"], expected, atol=1e-5, rtol=0)
    np.testing.assert_array_equal(inner["tokens"], inner["block02"][:, 2:])
    last = time_first(upstream.config, upstream.output.last_hidden_state)
    np.testing.assert_allclose(inner["normed"], last, atol=1e-5, rtol=0)
    np.testing.assert_allclose(feature, upstream.output.pooler_output, atol=1e-5, rtol=0)
    assert feature.dtype == jnp.float32


def test_gradient_equals_pytorch(upstream):
    model = upstream.torch_model
    model.zero_grad()
    torch.sin(3 * model(torch.tensor(upstream.features)).pooler_output).sum().backward()
    gradients = {name: weight.grad.numpy() for name, weight in model.named_parameters()}
    expected = load(gradients, TABLE, abstract_params(upstream.config))

    def loss(params):
        return jnp.sin(3 * upstream.run(params)[0]).sum()

    actual = jax.jit(jax.grad(loss))(upstream.params)
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        # The gradient of a key's bias is 0 but for rounding: softmax does not see it.
        scale = max(float(np.abs(theirs).max()), 1.0)
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * scale, rtol=0, err_msg=name)


def test_export_is_bit_for_bit_and_transformers_reads_it(upstream, tmp_path):
    tensors = safetensors.numpy.load_file(upstream.folder / "model.safetensors")
    written = export(upstream.params, TABLE)
    assert written.keys() == tensors.keys()
    assert all(written[name].tobytes() == tensors[name].tobytes() for name in tensors)

    changed = jax.tree.map(lambda x: 0.9 * x, upstream.params)
    save(tmp_path / "model.safetensors", export(changed, TABLE))
    (tmp_path / "config.json").write_bytes((upstream.folder / "config.json").read_bytes())
    again = transformers.ASTModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = again(torch.tensor(upstream.features)).pooler_output
    feature, _ = upstream.run(changed)
    np.testing.assert_allclose(feature, expected, atol=1e-5, rtol=0)
    assert np.abs(feature - upstream.output.pooler_output.numpy()).max() > 1e-2


def published() -> dict[str, tuple[int, ...]]:
    """Names and shapes in MIT/ast-finetuned-audioset-10-10-0.4593."""
    prefix = "audio_spectrogram_transformer."
    shapes = {
        f"{prefix}embeddings.cls_token": (1, 1, 768),
        f"{prefix}embeddings.distillation_token": (1, 1, 768),
        f"{prefix}embeddings.position_embeddings": (1, 1214, 768),
        f"{prefix}embeddings.patch_embeddings.projection.weight": (768, 1, 16, 16),
        f"{prefix}embeddings.patch_embeddings.projection.bias": (768,),
        f"{prefix}layernorm.weight": (768,),
        f"{prefix}layernorm.bias": (768,),
        "classifier.layernorm.weight": (768,),
        "classifier.layernorm.bias": (768,),
        "classifier.dense.weight": (527, 768),
        "classifier.dense.bias": (527,),
    }
    dense = {
        "attention.attention.query": (768, 768),
        "attention.attention.key": (768, 768),
        "attention.attention.value": (768, 768),
        "attention.output.dense": (768, 768),
        "intermediate.dense": (3072, 768),
        "output.dense": (768, 3072),
        "layernorm_before": (768,),
        "layernorm_after": (768,),
    }
    for i in range(12):
        for name, shape in dense.items():
            shapes[f"{prefix}encoder.layer.{i}.{name}.weight"] = shape
            shapes[f"{prefix}encoder.layer.{i}.{name}.bias"] = shape[:1]
    return shapes


def in_memory() -> dict[str, tuple[int, ...]]:
    """The same in a module of transformers 5, at full size without its memory."""
    with torch.device("meta"):
        model = transformers.ASTForAudioClassification(transformers.ASTConfig(num_labels=527))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("shapes", [published(), in_memory()], ids=["published", "in memory"])
def test_full_key_list_loads_strictly(shapes):
    assert len(shapes) == 203
    zeros = {n: np.broadcast_to(np.float32(0), shape) for n, shape in shapes.items()}
    params = load(zeros, TABLE, abstract_params(AST_AUDIOSET))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 86_187_264
    del zeros[next(iter(zeros))]
    with pytest.raises(WeightError, match="1 missing"):
        load(zeros, TABLE, abstract_params(AST_AUDIOSET))


def test_one_step_of_the_full_position_table_too_few_is_named():
    shapes = published() | {
        "audio_spectrogram_transformer.embeddings.position_embeddings": (1, 1212, 768)
    }
    zeros = {n: np.broadcast_to(np.float32(0), shape) for n, shape in shapes.items()}
    with pytest.raises(WeightError, match=r"position_embeddings \[1, 1212, 768\]"):
        load(zeros, TABLE, abstract_params(AST_AUDIOSET))


def test_sharding_covers_every_leaf_and_splits_every_matrix():
    tree = abstract_params(AST_AUDIOSET)
    for path, each in jax.tree_util.tree_leaves_with_path(shardings(tree, SHARDING, make_mesh())):
        assert each is not None, path
    rules = {pattern for pattern, spec in SHARDING if "fsdp" in spec}
    assert len(rules) == 4


def test_short_input_is_the_first_time_steps(upstream):
    """Patches of the first rows get the positions of the first rows."""
    _, whole = upstream.run()
    _, part = upstream.run(features=upstream.features[:, :24])
    rows, columns = upstream.config.grid(24)
    assert (rows, columns) == (4, 4) and part["tokens"].shape == (2, 16, 36)
    np.testing.assert_allclose(part["embedded"], whole["embedded"][:, : 2 + 16], atol=5e-6)


def test_patches_overlap_and_run_over_time_first():
    x = np.arange(2 * 11 * 8, dtype=np.float32).reshape(2, 11, 8)
    patches = overlapping_patches(jnp.asarray(x), 4, (3, 2))
    assert patches.shape == (2, 3 * 3, 16)
    np.testing.assert_array_equal(patches[1, 5], x[1, 3:7, 4:8].ravel())


def test_remat_and_back_ends_change_nothing(upstream):
    reference, _ = upstream.run()
    for change in ({"remat": True}, {"attention": "blocked"}):
        np.testing.assert_allclose(upstream.run(**change)[0], reference, atol=5e-6)


def test_bfloat16_stays_close_and_returns_float32(upstream):
    low, inner = upstream.run(dtype=jnp.bfloat16)
    assert low.dtype == jnp.float32 and inner["block00"].dtype == jnp.bfloat16
    # Features are of size 1 here; 8 bits of mantissa through three blocks leave a few percent.
    np.testing.assert_allclose(low, upstream.output.pooler_output, atol=0.1)


@pytest.mark.parametrize(
    ("shape", "words"),
    [((1, 47, 30), r"\(B, T, 31\)"), ((1, 8, 31), "9 to 47"), ((1, 48, 31), "9 to 47")],
)
def test_bad_shapes_are_named(upstream, shape, words):
    with pytest.raises(ValueError, match=words):
        upstream.run(features=jnp.zeros(shape))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"qkv_bias": False}, "qkv_bias"),
        ({"hidden_act": "gelu_new"}, "hidden_act"),
        ({"model_type": "vit"}, "model_type"),
        ({"head_dim": 8}, "head_dim"),
        ({"patch_size": [16, 16]}, "patch_size"),
        ({"num_attention_heads": 5}, "5 heads"),
        ({"max_length": 5}, "no patch"),
        ({"use_mask_token": True}, "use_mask_token"),
    ],
)
def test_unsupported_settings_are_refused_by_name(upstream, change, named):
    config = json.loads((upstream.folder / "config.json").read_text())
    with pytest.raises(ModelConfigError, match=named):
        ast_config({**config, **change})


def test_a_stride_of_nothing_is_refused():
    with pytest.raises(ValueError, match="stride"):
        ASTConfig(stride=(0, 10))
