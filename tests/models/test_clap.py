"""CLAP against transformers: both towers on small random models."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from transformers.models.clap.modeling_clap import ClapAudioLayer

from medalign_jax.core.mesh import make_mesh, shardings
from medalign_jax.methods.self_supervised import make_term
from medalign_jax.models.encoders.clap import (
    CLAP_FUSED,
    CLAP_UNFUSED,
    AttentionalFusion,
    Clap,
    ClapConfig,
    ClapTextConfig,
    clap_config,
    clap_text_config,
)
from medalign_jax.models.encoders.htsat import unfold
from medalign_jax.models.language.bert import Bert
from medalign_jax.weights import WeightError
from medalign_jax.weights.load import export, save
from medalign_jax.weights.tables import clap as clap_table
from tests.models.clap_models import (
    ODD_AUDIO,
    abstract_params,
    load_audio,
    load_text,
    small_config,
)

torch.set_num_threads(1)

# 8 columns of patches: the three crops fill 6 of them, the last two stay 0.
ODD = ClapConfig(
    mels=8, spec_size=32, embed_width=24, depths=(2, 1), heads=(2, 3), window=4,
    mlp_ratio=2, projection=20, fusion_ratio=5,
)  # fmt: skip
FRAMES, MELS = 101, 8
LONGER = np.array([True, False, True])


@dataclasses.dataclass
class Upstream:
    folder: Path
    torch_model: transformers.ClapModel
    pictures: np.ndarray
    config: ClapConfig
    params: dict

    def torch_inputs(self, fused: bool) -> dict[str, torch.Tensor]:
        longer = LONGER if fused else np.zeros_like(LONGER)
        return {
            "input_features": torch.tensor(self.pictures),
            "is_longer": torch.tensor(longer)[:, None],
        }

    def run(self, params=None, features=None, **changes):
        """`embed` of the first pictures, compiled."""
        features = self.pictures[:, 0] if features is None else features
        embed = compiled(dataclasses.replace(self.config, **changes), "embed")
        return embed(self.params if params is None else params, features)

    def run_fused(self, params=None, longer=LONGER, **changes):
        """`embed_fused`, compiled."""
        embed = compiled(dataclasses.replace(self.config, **changes), "embed_fused")
        return embed(self.params if params is None else params, self.pictures, longer)


@functools.cache
def compiled(config: ClapConfig, method: str):
    return jax.jit(
        lambda params, *args: Clap(config).apply({"params": params}, *args, method=method)
    )


def make_upstream(folder: Path, fused: bool) -> Upstream:
    torch.manual_seed(0)
    config = small_config(fused)
    model = transformers.ClapModel(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
            elif tensor.is_floating_point() and tensor.ndim:
                tensor.add_(0.2 * torch.randn_like(tensor))
    model.save_pretrained(folder)
    channels = 4 if fused else 1
    rng = np.random.default_rng(0)
    pictures = rng.standard_normal((3, channels, FRAMES, MELS)).astype(np.float32)
    read = clap_config(json.loads((folder / "config.json").read_text()))
    return Upstream(folder, model, pictures, read, load_audio(folder, read))


@pytest.fixture(scope="module")
def unfused(tmp_path_factory) -> Upstream:
    return make_upstream(tmp_path_factory.mktemp("unfused"), False)


@pytest.fixture(scope="module")
def fused(tmp_path_factory) -> Upstream:
    return make_upstream(tmp_path_factory.mktemp("fused"), True)


def time_major(x: torch.Tensor, pieces: int) -> np.ndarray:
    """Upstream's tokens (B, N, C), row by row of the folded image, in our order."""
    side = int(x.shape[1] ** 0.5)
    return np.asarray(
        unfold(jnp.asarray(x.detach().numpy()).reshape(-1, side, side, x.shape[2]), pieces)
    )


def upstream_layers(upstream: Upstream, inputs: dict) -> tuple[list[np.ndarray], object, object]:
    """Patch embedding and each block's output in our order; bare and projected output."""
    seen = []
    encoder = upstream.torch_model.audio_model.audio_encoder
    modules = [encoder.patch_embed]
    modules += [module for module in encoder.modules() if isinstance(module, ClapAudioLayer)]
    hooks = [
        module.register_forward_hook(lambda _, __, y: seen.append(y[0] if type(y) is tuple else y))
        for module in modules
    ]
    with torch.no_grad():
        output = upstream.torch_model.audio_model(**inputs)
        projected = upstream.torch_model.audio_projection(output.pooler_output)
    for hook in hooks:
        hook.remove()
    return [time_major(x, upstream.config.pieces) for x in seen], output, projected.numpy()


def check_against_upstream(upstream, inputs, feature, inner):
    layers, output, projected = upstream_layers(upstream, inputs)
    ours = [inner["patch_embed"], *(inner[f"block{i:02d}"] for i in range(3))]
    assert [x.shape[2] for x in ours[1:]] == list(upstream.config.layer_widths)
    for i, (x, expected) in enumerate(zip(ours, layers, strict=True)):
        np.testing.assert_allclose(x, expected, atol=1e-5, rtol=0, err_msg=f"layer {i}")
    # Upstream's last map is (B, C, mel, time) of the unfolded picture.
    tokens = output.last_hidden_state.unflatten(3, (-1,)).flatten(2).transpose(1, 2)
    tokens = tokens.unflatten(1, upstream.config.grid(FRAMES)[::-1]).transpose(1, 2).flatten(1, 2)
    np.testing.assert_allclose(inner["tokens"], tokens, atol=1e-5, rtol=0)
    np.testing.assert_allclose(inner["pooled"], output.pooler_output, atol=1e-5, rtol=0)
    np.testing.assert_allclose(feature, projected, atol=1e-5, rtol=0)
    assert feature.shape == (3, upstream.config.width) and feature.dtype == jnp.float32
    with torch.no_grad():
        published = upstream.torch_model.get_audio_features(**inputs).pooler_output
    np.testing.assert_allclose(inner["normalised"], published, atol=1e-5, rtol=0)
    assert np.abs(feature - inner["normalised"]).max() > 0.1


def test_config_reads_every_size(unfused, fused):
    assert unfused.config == ODD
    assert fused.config == dataclasses.replace(ODD, fusion=True)
    assert (ODD.width, ODD.token_width, ODD.frames, ODD.depth) == (20, 48, 128, 3)
    assert ODD.grid(FRAMES) == (16, 1) and ODD.footprint == (8, 8)
    assert clap_config(transformers.ClapConfig().to_dict()) == CLAP_UNFUSED
    bare = transformers.ClapAudioConfig(**ODD_AUDIO, projection_dim=20).to_dict()
    assert clap_config(bare) == ODD


def test_unfused_equals_transformers_layer_by_layer(unfused):
    feature, inner = unfused.run()
    check_against_upstream(unfused, unfused.torch_inputs(False), feature, inner)


def test_fused_model_equals_transformers_on_a_mixed_batch(fused):
    """Two longer recordings and one that is not, in between."""
    feature, inner = fused.run_fused()
    check_against_upstream(fused, fused.torch_inputs(True), feature, inner)


def test_fused_model_on_short_clips_sees_the_first_picture_only(fused):
    feature, inner = fused.run()
    check_against_upstream(fused, fused.torch_inputs(False), feature, inner)
    short, _ = fused.run_fused(longer=np.zeros(3, bool))
    np.testing.assert_allclose(short, feature, atol=5e-6, rtol=0)
    longer, _ = fused.run_fused()
    change = np.abs(longer - feature).max(axis=1)
    assert change[0] > 0.01 and change[2] > 0.01 and change[1] < 5e-6


@pytest.mark.parametrize("frames", [1, 60])
def test_any_length_is_stretched_as_published(unfused, frames):
    x = np.random.default_rng(frames).standard_normal((2, frames, MELS)).astype(np.float32)
    with torch.no_grad():
        output = unfused.torch_model.audio_model(torch.tensor(x)[:, None])
    feature, inner = unfused.run(features=x)
    np.testing.assert_allclose(inner["pooled"], output.pooler_output, atol=1e-5, rtol=0)
    stretched = Clap(unfused.config).apply({}, x, method="stretch")
    assert stretched.shape == (2, 128, MELS)
    np.testing.assert_allclose(unfused.run(features=stretched)[0], feature, atol=1e-5, rtol=0)


def test_gradient_equals_pytorch(fused):
    model = fused.torch_model
    model.zero_grad()
    output = model.audio_model(**fused.torch_inputs(True))
    output = model.audio_projection(output.pooler_output)
    torch.sin(3 * output).sum().backward()
    tensors = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    # Statistics are buffers upstream: nothing trains them.
    buffers = dict(model.audio_model.named_buffers(prefix="audio_model"))
    tensors |= {n: torch.zeros_like(b) for n, b in buffers.items() if n.endswith(("mean", "var"))}
    tensors = {name: tensor.numpy() for name, tensor in tensors.items()}
    expected = load_audio(tensors, fused.config)
    actual = jax.jit(jax.grad(lambda p: jnp.sin(3 * fused.run_fused(p)[0]).sum()))(fused.params)
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        scale = max(float(np.abs(theirs).max()), 1.0)
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * scale, rtol=0, err_msg=name)
        if name.endswith(("['mean']", "['var']")):
            assert not ours.any(), name


def test_fusion_mixes_twice_the_share():
    """With nothing to choose by, both maps count in full: w = 1/2."""
    model = AttentionalFusion(2, 1e-5, jnp.float32)
    x, y = np.random.default_rng(0).standard_normal((2, 1, 2, 3, 4)).astype(np.float32)
    params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0), x, y))
    np.testing.assert_allclose(model.apply(params, x, y), x + y, atol=1e-6)


def text_inputs(side: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids with padding (1) at a side, and the mask of real tokens."""
    ids = np.random.default_rng(0).integers(2, 61, (3, 20)).astype(np.int32)
    mask = np.arange(20) < np.array([20, 7, 1])[:, None]
    mask = mask if side == "right" else np.flip(mask, 1).copy()
    return np.where(mask, ids, 1), mask


@pytest.fixture(scope="module")
def text(fused):
    config = clap_text_config(json.loads((fused.folder / "config.json").read_text()))
    assert config == ClapTextConfig(
        vocab_size=61, width=36, depth=3, heads=3, mlp_width=50, max_positions=20,
        token_types=1, eps=1e-12, position_offset=2, projection=20,
    )  # fmt: skip
    return config, load_text(fused.folder, config, config.depth)


@pytest.mark.parametrize("side", ["right", "left"])
def test_text_tower_equals_transformers(fused, text, side):
    config, params = text
    ids, mask = text_inputs(side)
    inputs = {
        "input_ids": torch.tensor(ids).long(),
        "attention_mask": torch.tensor(mask).long(),
    }
    with torch.no_grad():
        output = fused.torch_model.text_model(**inputs, output_hidden_states=True)
    run = jax.jit(Bert(config).apply, static_argnums=3)
    last, kept = run({"params": params}, ids, mask, (0, 1, 2, -1))
    for layer, state in kept["hidden_states"].items():
        expected = output.hidden_states[layer].numpy()
        np.testing.assert_allclose(state[mask], expected[mask], atol=1e-5, rtol=0)
    np.testing.assert_array_equal(last, kept["hidden_states"][3])


def test_text_gradient_equals_pytorch(fused, text):
    config, params = text
    ids, mask = text_inputs("right")
    model = fused.torch_model
    model.zero_grad()
    output = model.text_model(torch.tensor(ids).long(), torch.tensor(mask).long())
    torch.sin(3 * output.last_hidden_state[torch.tensor(mask)]).sum().backward()
    tensors = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    tensors = {n: t for n, t in tensors.items() if n.startswith("text_")}
    # Upstream gives the padding token no gradient; nor does ours get any but at its own rows.
    expected = load_text(tensors, config, config.depth)

    def loss(params):
        hidden, _ = Bert(config).apply({"params": params}, ids, mask)
        return jnp.where(mask[..., None], jnp.sin(3 * hidden), 0).sum()

    actual = jax.jit(jax.grad(loss))(params)
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        scale = max(float(np.abs(theirs).max()), 1.0)
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * scale, rtol=0, err_msg=name)


def test_only_the_layers_of_the_text_tower_that_are_read_are_loaded(fused, text):
    config, whole = text
    part = config.truncate(1)
    params = load_text(fused.folder, part, config.depth)
    ids, mask = text_inputs("right")
    ours, _ = jax.jit(Bert(part).apply)({"params": params}, ids, mask)
    run = jax.jit(Bert(config).apply, static_argnums=3)
    expected, _ = run({"params": whole}, ids, mask, (1,))
    np.testing.assert_allclose(ours[mask], expected[mask], atol=1e-6, rtol=0)


@pytest.mark.parametrize("which", ["unfused", "fused"])
def test_export_is_bit_for_bit_and_transformers_reads_it(request, which, tmp_path):
    upstream = request.getfixturevalue(which)
    tensors = safetensors.numpy.load_file(upstream.folder / "model.safetensors")
    written = export(upstream.params, clap_table.TABLE)
    assert all(written[name].tobytes() == tensors[name].tobytes() for name in written)
    left = {name for name in tensors.keys() - written.keys() if name.startswith("audio_")}
    assert {name.rsplit(".", 1)[-1] for name in left} == {
        "num_batches_tracked", "relative_position_index"
    }  # fmt: skip

    params = jax.tree.map(lambda x: 0.9 * x, upstream.params)
    changed = export(params, clap_table.TABLE)
    rest = {name: tensors[name] for name in tensors.keys() - changed.keys() - left}
    save(tmp_path / "model.safetensors", changed | rest)
    (tmp_path / "config.json").write_bytes((upstream.folder / "config.json").read_bytes())
    again = transformers.ClapModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        audio = again.get_audio_features(**upstream.torch_inputs(which == "fused")).pooler_output
    run = upstream.run_fused if which == "fused" else upstream.run
    np.testing.assert_allclose(run(params)[1]["normalised"], audio, atol=1e-5, rtol=0)
    assert np.abs(run()[1]["normalised"] - audio.numpy()).max() > 1e-2


def test_fused_weights_do_not_pass_as_unfused(fused, unfused):
    with pytest.raises(WeightError, match="mel_conv2d"):
        load_audio(fused.folder, unfused.config)
    with pytest.raises(WeightError, match="fusion/global/reduce/kernel"):
        load_audio(unfused.folder, fused.config)


def test_sharding_covers_every_leaf():
    tree = abstract_params(CLAP_FUSED)
    places = shardings(tree, clap_table.SHARDING, make_mesh())
    assert all(place is not None for place in jax.tree.leaves(places))
    paths = ["/".join(str(k.key) for k in path) for path, _ in
             jax.tree_util.tree_leaves_with_path(tree)]  # fmt: skip
    for pattern, _ in clap_table.SHARDING:
        assert any(re.search(pattern, path) for path in paths), pattern


def test_masked_spectrogram_term_learns(unfused):
    term = make_term("masked_spectrogram", Clap(unfused.config), (FRAMES, MELS))
    own, keys = term.init(jax.random.key(1)), jax.random.split(jax.random.key(2), 3)
    features = jnp.asarray(unfused.pictures[:, 0])

    def loss(params):
        return term.encode(params, own, features, keys, True)[0].mean()

    value, slope = jax.jit(jax.value_and_grad(loss))(unfused.params)
    assert 0.5 < value < 3.0
    assert np.abs(slope["encoder"]["patch_embed"]["kernel"]).max() > 0
    assert not np.any(slope["linear2"]["kernel"])  # tokens come before the projection


def test_remat_and_back_ends_change_nothing(fused):
    reference, _ = fused.run_fused()
    other, _ = fused.run_fused(remat=True, attention="xla")
    np.testing.assert_allclose(other, reference, atol=1e-5, rtol=0)


def test_bfloat16_stays_close_and_returns_float32(fused):
    exact, _ = fused.run_fused()
    low, inner = fused.run_fused(dtype=jnp.bfloat16)
    assert low.dtype == jnp.float32 and inner["block00"].dtype == jnp.bfloat16
    # 8 bits of mantissa through three blocks leave a few percent of the feature's size.
    assert np.abs(low - exact).max() < 0.05 * np.abs(exact).max()


def test_bad_shapes_are_named(fused, unfused):
    for shape, words in (
        ((1, 101, 7), r"\(B, T, 8\)"),
        ((1, 129, 8), "1 to 128 frames, got 129"),
        ((1, 0, 8), "1 to 128 frames, got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            unfused.run(features=jnp.zeros(shape))
    with pytest.raises(ValueError, match="without fusion"):
        unfused.run_fused()
    with pytest.raises(ValueError, match=r"longer must be \(3,\)"):
        fused.run_fused(longer=np.zeros((3, 1), bool))
    model, params = Clap(fused.config), {"params": fused.params}
    with pytest.raises(ValueError, match=r"pictures must be \(B, 4, T, 8\)"):
        model.apply(params, jnp.zeros((1, 3, 101, 8)), jnp.ones(1, bool), method="embed_fused")
