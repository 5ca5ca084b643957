"""AudioMAE: the encoder against the published network, the decoder against its mathematics."""

import dataclasses
import functools
import json
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medalign_jax.core.mesh import make_mesh, shardings
from medalign_jax.models.encoders.audiomae import (
    AUDIOMAE,
    AUDIOMAE_PRETRAINED,
    AudioMAE,
    AudioMAEConfig,
    normalise_patches,
)
from medalign_jax.models.layers.vit_layers import sincos_table
from medalign_jax.weights import WeightError
from medalign_jax.weights.load import export, load
from medalign_jax.weights.tables.audiomae import SHARDING, TABLE

torch.set_num_threads(1)

TINY = AudioMAEConfig(
    frames=48, mels=32, patch=4, width=24, depth=2, heads=3, mlp_ratio=3,
    decoder_depth=2, decoder_width=16, decoder_heads=2, mask_ratio=0.7,
)  # fmt: skip
FINE_TUNED = dataclasses.replace(TINY, decoder_depth=0)


def value(entry: dict) -> np.ndarray:
    """The tensor that the fixtures' weight rule gives (../shared/fixtures/README.md)."""
    name, shape = entry["name"], tuple(entry["shape"])
    z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    return {
        "small": lambda: np.float32(0.05) * z,
        "norm_weight": lambda: np.float32(1) + np.float32(0.05) * z,
        "fan_in": lambda: z / np.float32(math.sqrt(math.prod(shape[1:]))),
    }[entry["rule"]]()


def abstract_params(config: AudioMAEConfig) -> dict:
    features = jax.ShapeDtypeStruct((1, config.frames, config.mels), jnp.float32)
    return jax.eval_shape(AudioMAE(config).init, jax.random.key(0), features)["params"]


@dataclasses.dataclass
class Published:
    expected: dict
    tensors: dict
    params: dict


@pytest.fixture(scope="module")
def published(shared) -> Published:
    described = json.loads((shared / "fixtures" / "audiomae.json").read_text())
    with np.load(shared / "fixtures" / "audiomae.npz") as file:
        expected = dict(file)
    tensors = {entry["name"]: value(entry) for entry in described["state_dict"]}
    return Published(expected, tensors, load(tensors, TABLE, abstract_params(AUDIOMAE)))


@pytest.fixture(scope="module")
def embed():
    return jax.jit(lambda p, x: AudioMAE(AUDIOMAE).apply({"params": p}, x, method="embed"))


def test_full_size_features_and_blocks(published, embed):
    """One clip of full length, the 12 blocks of it, and one clip that is filled up with zeros."""
    for frames in (1024, 998):
        features = np.random.default_rng(0).random((1, frames, 128), dtype=np.float32)
        feature, inner = embed(published.params, features)
        expected = published.expected[f"feature_T{frames}"]
        np.testing.assert_allclose(feature, expected, atol=5e-6, rtol=0)
        if frames == 1024:
            for i, block in enumerate(published.expected["block_meanpool_T1024"]):
                pooled = inner[f"block{i:02d}"][:, 1:].mean(axis=1)
                np.testing.assert_allclose(pooled, block, atol=1e-5, rtol=0, err_msg=f"block {i}")


def test_full_size_structured_input(published, embed):
    t, f = np.ogrid[:1024, :128]
    features = (0.5 + 0.5 * np.sin(0.05 * t + 0.2 * f)).astype(np.float32)[None]
    feature, _ = embed(published.params, features)
    expected = published.expected["feature_structured_T1024"]
    np.testing.assert_allclose(feature, expected, atol=5e-6, rtol=0)


def test_full_size_export_is_bit_for_bit(published):
    out = export(published.params, TABLE)
    assert published.tensors.keys() - out.keys() == {"head.weight", "head.bias"}
    assert out.keys() <= published.tensors.keys()
    for name, tensor in out.items():
        np.testing.assert_array_equal(tensor, published.tensors[name])


def pretrained_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of `mae_vit_base_patch16_dec512d8b` with `decoder_mode=1`."""

    def block(name, width):
        dense = {
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            "mlp.fc1": (4 * width, width),
            "mlp.fc2": (width, 4 * width),
        }
        shapes = {f"{name}.{each}.weight": shape for each, shape in dense.items()}
        shapes |= {f"{name}.{each}.bias": shape[:1] for each, shape in dense.items()}
        return shapes | {
            f"{name}.norm{n}.{x}": (width,) for n in (1, 2) for x in ("weight", "bias")
        }

    shapes = {
        "cls_token": (1, 1, 768), "pos_embed": (1, 513, 768),
        "mask_token": (1, 1, 512), "decoder_pos_embed": (1, 513, 512),
        "patch_embed.proj.weight": (768, 1, 16, 16), "patch_embed.proj.bias": (768,),
        "norm.weight": (768,), "norm.bias": (768,),
        "decoder_embed.weight": (512, 768), "decoder_embed.bias": (512,),
        "decoder_norm.weight": (512,), "decoder_norm.bias": (512,),
        "decoder_pred.weight": (256, 512), "decoder_pred.bias": (256,),
    }  # fmt: skip
    for i in range(12):
        shapes |= block(f"blocks.{i}", 768)
    for i in range(16):
        attend = f"decoder_blocks.{i}.attn"
        shapes |= block(f"decoder_blocks.{i}", 512)
        shapes |= {
            f"{attend}.tau": (16,),
            f"{attend}.meta_mlp.fc1.weight": (384, 2),
            f"{attend}.meta_mlp.fc1.bias": (384,),
            f"{attend}.meta_mlp.fc2.weight": (16, 384),
            f"{attend}.meta_mlp.fc2.bias": (16,),
        }
    return shapes


def test_full_pretrained_key_list_loads_strictly():
    shapes = pretrained_shapes()
    buffers = {
        "decoder_blocks.1.attn_mask": (32, 16, 16),
        "decoder_blocks.1.attn.relative_coordinates_log": (256, 2),
    }
    tensors = {n: np.broadcast_to(np.float32(0), s) for n, s in (shapes | buffers).items()}
    params = load(tensors, TABLE, abstract_params(AUDIOMAE_PRETRAINED))
    assert export(params, TABLE).keys() == shapes.keys()
    with pytest.raises(WeightError, match=r"2 missing, .* unused"):
        load(tensors, TABLE, abstract_params(AUDIOMAE))


@pytest.mark.parametrize("config", [AUDIOMAE, AUDIOMAE_PRETRAINED], ids=["tuned", "pretrained"])
def test_sharding_covers_every_leaf(config):
    tree = abstract_params(config)
    chosen = shardings(tree, SHARDING, make_mesh())
    assert jax.tree.structure(chosen) == jax.tree.structure(tree)


# A second implementation, in PyTorch, on tensors under their upstream names. The decoder's windows
# are written as which pairs of tokens see each other, over the whole grid.


def linear(t, name, x):
    return F.linear(x, t[f"{name}.weight"], t[f"{name}.bias"])


def norm(t, name, x):
    return F.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], 1e-6)


def mlp(t, name, x):
    return linear(t, f"{name}.fc2", F.gelu(linear(t, f"{name}.fc1", x)))


def split_heads(t, name, x, heads):
    return linear(t, f"{name}.qkv", x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)


def encoder(t, c, x):
    """Tokens of patches with positions, (B, N, W), to the outputs of all blocks."""
    first = (t["cls_token"] + t["pos_embed"][:, :1]).expand(len(x), 1, -1)
    x, out = torch.cat([first, x], dim=1), []
    for i in range(c.depth):
        q, k, v = split_heads(t, f"blocks.{i}.attn", norm(t, f"blocks.{i}.norm1", x), c.heads)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + linear(t, f"blocks.{i}.attn.proj", mixed)
        x = x + mlp(t, f"blocks.{i}.mlp", norm(t, f"blocks.{i}.norm2", x))
        out.append(x)
    return out


def patches_of(t, c, features):
    """(patches (B, L, values), embedded with positions (B, L, W))."""
    features = F.pad(features, (0, 0, 0, c.frames - features.shape[1]))[:, None]
    kernel, bias = t["patch_embed.proj.weight"], t["patch_embed.proj.bias"]
    embedded = F.conv2d(features, kernel, bias, stride=c.patch).flatten(2).transpose(1, 2)
    patches = F.unfold(features, c.patch, stride=c.patch).transpose(1, 2)
    return patches, embedded + t["pos_embed"][:, 1:]


def window_attention(t, name, x, c, shift):
    """Cosine attention between all tokens that share a window of the rolled grid."""
    rows, columns = c.grid(c.frames)
    row, column = torch.arange(rows * columns) // columns, torch.arange(rows * columns) % columns
    window = torch.stack([(row - shift) % rows // 4, column // 4, (row < shift).long()])
    together = (window[:, :, None] == window[:, None, :]).all(dim=0)
    offset = torch.stack([row[:, None] - row, column[:, None] - column], dim=-1).float()
    offset = offset.sign() * torch.log(1 + offset.abs())
    hidden = F.relu(linear(t, f"{name}.meta_mlp.fc1", offset))
    bias = linear(t, f"{name}.meta_mlp.fc2", hidden).permute(2, 0, 1)
    q, k, v = split_heads(t, name, x, c.decoder_heads)
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    scores = scores / t[f"{name}.tau"].clamp(min=0.01)[:, None, None] + bias
    weights = scores.masked_fill(~together, -torch.inf).softmax(dim=-1)
    return linear(t, f"{name}.proj", (weights @ v).transpose(1, 2).flatten(2))


def decoder(t, c, x):
    """(B, L, decoder width) with positions to (outputs of the blocks, prediction)."""
    out = []
    for i in range(c.decoder_depth):
        name = f"decoder_blocks.{i}"
        y = window_attention(t, f"{name}.attn", x, c, shift=2 * (i % 2))
        x = x + norm(t, f"{name}.norm1", y)
        x = x + norm(t, f"{name}.norm2", mlp(t, f"{name}.mlp", x))
        out.append(x)
    return out, linear(t, "decoder_pred", norm(t, "decoder_norm", x))


def reference(t, c, features, noise):
    """Feature, encoder blocks, decoder blocks, prediction and loss of each clip."""
    patches, embedded = patches_of(t, c, features)
    whole = encoder(t, c, embedded)
    feature = norm(t, "norm", whole[-1][:, 1:].mean(dim=1))
    kept = noise.argsort(dim=1)[:, : c.kept, None]
    seen = encoder(t, c, embedded.gather(1, kept.expand(-1, -1, c.width)))[-1]
    latent = linear(t, "decoder_embed", norm(t, "norm", seen)[:, 1:])
    full = t["mask_token"].expand(len(latent), embedded.shape[1], -1)
    full = full.scatter(1, kept.expand_as(latent), latent)
    blocks, predicted = decoder(t, c, full + t["decoder_pos_embed"][:, 1:])
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    target = (patches - mean) / (variance + 1e-6).sqrt()
    removed = torch.ones(noise.shape).scatter(1, kept[..., 0], 0.0)
    error = (predicted - target).square().mean(-1)
    return feature, whole, blocks, predicted, (error * removed).sum(1) / removed.sum(1)


@dataclasses.dataclass
class Step:
    """All that a model gives for one batch, and the gradient of a scalar of it."""

    feature: jax.Array
    inner: dict
    loss: jax.Array
    masked: dict
    gradient: dict


@dataclasses.dataclass
class Tiny:
    params: dict
    features: np.ndarray
    noise: np.ndarray
    tensors: dict
    steps: dict = dataclasses.field(default_factory=dict)

    def step(self, **changes) -> Step:
        """Of the sizes TINY with changes; compiled once for each."""
        key = tuple(changes.items())
        if key not in self.steps:
            self.steps[key] = self._step(AudioMAE(dataclasses.replace(TINY, **changes)))
        return self.steps[key]

    def _step(self, model: AudioMAE) -> Step:
        @jax.jit
        @functools.partial(jax.grad, has_aux=True)
        def run(params):
            apply = functools.partial(model.apply, {"params": params}, self.features)
            feature, inner = apply(method="embed")
            loss, masked = apply(self.noise, method="reconstruct")
            return jnp.sin(3 * feature).sum() + loss.sum(), (feature, inner, loss, masked)

        gradient, rest = run(self.params)
        return Step(*rest, gradient)

    def embed(self, features):
        return jax.jit(AudioMAE(TINY).apply)({"params": self.params}, features)


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((3, TINY.frames, TINY.mels)).astype(np.float32)
    noise = rng.random((3, TINY.tokens(TINY.frames))).astype(np.float32)

    def draw(path, leaf):
        # No zero bias, no scale or temperature of 1; matrices keep the size of their input.
        spread, centre = (0.2, 0.0) if leaf.ndim == 1 else (leaf.shape[-2] ** -0.5, 0.0)
        centre = 1.0 if path[-1].key in ("scale", "tau") else centre
        return (centre + spread * rng.standard_normal(leaf.shape)).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(draw, abstract_params(TINY))
    tensors = {name: torch.from_numpy(x) for name, x in export(params, TABLE).items()}
    return Tiny(params, features, noise, tensors)


def test_everything_equals_the_second_implementation(tiny):
    with torch.no_grad():
        feature, whole, blocks, predicted, loss = reference(
            tiny.tensors, TINY, torch.from_numpy(tiny.features), torch.from_numpy(tiny.noise)
        )
    ours = tiny.step()
    np.testing.assert_allclose(ours.feature, feature, atol=1e-5, rtol=0)
    for i, block in enumerate(whole):
        np.testing.assert_allclose(ours.inner[f"block{i:02d}"], block, atol=1e-5, rtol=0)
    np.testing.assert_array_equal(ours.inner["tokens"], ours.inner["block01"][:, 1:])
    for i, block in enumerate(blocks):
        np.testing.assert_allclose(ours.masked[f"decoder_block{i:02d}"], block, atol=1e-5, rtol=0)
    np.testing.assert_allclose(ours.masked["pred"], predicted, atol=1e-5, rtol=0)
    assert ours.loss.shape == (3,) and ours.loss.dtype == jnp.float32
    np.testing.assert_allclose(ours.loss, loss, atol=1e-5, rtol=0)


def test_gradient_equals_pytorch(tiny):
    tensors = {
        name: tensor.clone().requires_grad_("pos_embed" not in name)
        for name, tensor in tiny.tensors.items()
    }
    inputs = torch.from_numpy(tiny.features), torch.from_numpy(tiny.noise)
    feature, _, _, _, loss = reference(tensors, TINY, *inputs)
    (torch.sin(3 * feature).sum() + loss.sum()).backward()
    gradients = {
        name: np.zeros(x.shape, np.float32) if x.grad is None else x.grad.numpy()
        for name, x in tensors.items()
    }
    expected = load(gradients, TABLE, abstract_params(TINY))
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(tiny.step().gradient),
        jax.tree.leaves(expected),
        strict=True,
    ):
        name = jax.tree_util.keystr(path)
        # Softmax takes a bias common to all scores away: its gradient is rounding, or exactly 0.
        if "'meta_mlp']['fc2']['bias']" not in name:
            assert theirs.any() != ("pos_embed" in name), name
        scale = max(float(np.abs(theirs).max()), 1.0)
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * scale, rtol=0, err_msg=name)


def test_short_clips_are_filled_up_with_zeros(tiny):
    short, inner = tiny.embed(tiny.features[:, :37])
    filled = np.where(np.arange(48)[:, None] < 37, tiny.features, np.float32(0))
    np.testing.assert_allclose(short, tiny.embed(filled)[0], atol=1e-6)
    assert np.abs(short - tiny.step().feature).max() > 1e-2
    assert inner["tokens"].shape[1] == TINY.tokens(37) == 96


def test_a_fine_tuned_checkpoint_loads_from_its_file(tiny, tmp_path):
    """{"model": state dict}, with `fc_norm` for `norm`, a classifier, and no decoder."""
    state = {k: v for k, v in tiny.tensors.items() if not k.startswith(("decoder", "mask", "norm"))}
    state |= {f"fc_{name}": tiny.tensors[name] for name in ("norm.weight", "norm.bias")}
    head = {"head.weight": torch.zeros(527, 24), "head.bias": torch.zeros(527)}
    torch.save({"model": state | head, "epoch": 99}, tmp_path / "finetuned.pth")
    params = load(tmp_path / "finetuned.pth", TABLE, abstract_params(FINE_TUNED))
    feature, _ = jax.jit(AudioMAE(FINE_TUNED).apply)({"params": params}, tiny.features)
    # The same path as with a decoder: only the name of the last norm differs.
    np.testing.assert_allclose(feature, tiny.step().feature, atol=2e-6)
    assert export(params, TABLE).keys() == state.keys()


def test_masking(tiny):
    inner = tiny.step().masked
    assert inner["mask"].sum(axis=1).tolist() == [96 - int(96 * 0.3)] * 3
    assert AUDIOMAE_PRETRAINED.kept == 102
    np.testing.assert_array_equal(inner["mask"][0, np.argsort(tiny.noise[0])[:28]], np.zeros(28))
    assert inner["latent"].shape == (3, 1 + 28, 24)


def test_normalised_patches():
    x = np.random.default_rng(0).normal(3.0, 5.0, (2, 3, 64)).astype(np.float32)
    x[1, 2] = 7.0
    y = np.asarray(normalise_patches(jnp.asarray(x)))
    np.testing.assert_allclose(y[0].mean(axis=-1), 0, atol=1e-6)
    np.testing.assert_allclose(y[0].std(axis=-1, ddof=1), 1, atol=1e-5)
    assert not y[1, 2].any()


def test_remat_and_another_back_end_change_nothing(tiny):
    ours, reference = tiny.step(remat=True, attention="blocked"), tiny.step()
    for name in ("feature", "loss", "gradient"):
        left, right = (jax.tree.leaves(getattr(step, name)) for step in (ours, reference))
        for x, y in zip(left, right, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-5 * max(1, np.abs(y).max()), rtol=0)


def test_bfloat16_stays_close_and_returns_float32(tiny):
    model = AudioMAE(dataclasses.replace(TINY, dtype=jnp.bfloat16))

    @jax.jit
    def run(params):
        apply = functools.partial(model.apply, {"params": params}, tiny.features)
        return apply(method="embed")[0], apply(tiny.noise, method="reconstruct")[0]

    # Both are of size 1; 8 bits of mantissa leave a few percent.
    exact = tiny.step().feature, tiny.step().loss
    for low, high in zip(run(tiny.params), exact, strict=True):
        assert low.dtype == jnp.float32
        np.testing.assert_allclose(low, high, atol=0.1)


def test_position_tables_of_a_new_model_are_those_of_the_grid(tiny):
    config = dataclasses.replace(TINY, depth=0, decoder_depth=1)
    params = jax.jit(AudioMAE(config).init)(jax.random.key(1), tiny.features)["params"]
    assert jnp.array_equal(params["pos_embed"], sincos_table(24, (12, 8)))
    assert jnp.array_equal(params["decoder_pos_embed"], sincos_table(16, (12, 8)))


@pytest.mark.parametrize(
    ("shape", "words"),
    [((1, 48, 16), r"\(B, T, 32\)"), ((1, 49, 32), "1 to 48"), ((1, 0, 32), "1 to 48")],
)
def test_bad_shapes_are_named(tiny, shape, words):
    with pytest.raises(ValueError, match=words):
        tiny.embed(jnp.zeros(shape))


def test_reconstruction_needs_a_decoder_and_noise(tiny):
    with pytest.raises(ValueError, match="AUDIOMAE_PRETRAINED"):
        AudioMAE(FINE_TUNED).apply(
            {"params": tiny.params}, tiny.features, tiny.noise, method="reconstruct"
        )
    with pytest.raises(ValueError, match=r"noise must be \(3, 96\)"):
        AudioMAE(TINY).apply(
            {"params": tiny.params}, tiny.features, tiny.noise[:, :95], method="reconstruct"
        )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"frames": 46}, "divisible"),
        ({"heads": 5}, "5 heads"),
        ({"decoder_width": 18}, "multiple of 4"),
        ({"frames": 40}, "windows do not divide"),
        ({"mask_ratio": 1.0}, "mask_ratio"),
        ({"mask_ratio": 0.0}, "mask_ratio"),
    ],
)
def test_bad_configs_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(TINY, **change)
