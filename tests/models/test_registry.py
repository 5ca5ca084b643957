"""Every registered encoder keeps the contract, at full size by shape and at toy size by numbers."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medalign_jax.architecture import architecture
from medalign_jax.core.mesh import make_mesh, named_leaves, shardings
from medalign_jax.encoder import Encoder, load_encoder
from medalign_jax.methods.accumulate import loss_and_grad
from medalign_jax.methods.acula import Acula, AculaConfig
from medalign_jax.methods.student import AudioStudent
from medalign_jax.models import ENCODERS
from medalign_jax.models.catalogue import ENCODER_CHECKPOINTS, TEACHER_CHECKPOINTS
from medalign_jax.models.encoders.clap import CLAP_FUSED, Clap
from medalign_jax.runs.export import export_encoder
from medalign_jax.teachers.teacher import ARCHITECTURES
from medalign_jax.weights.tables import clap as clap_table
from tests import devices
from tests import tiny_models as tiny
from tests.toy_encoders import ONE_OF_EACH, TOYS, toy

BATCH, TEXT_WIDTH = 4, 6
_STATISTICS = r"encoder/.*/(mean|var)"
_COLA = r"encoder/(g|layer_norm|linear)/.*"
# What no gradient reaches: statistics and tables, COLA's head under another term, and Qwen's
# projection to the language model; elsewhere the position tables.
FIXED = {
    "opera_ct": f"{_STATISTICS}|{_COLA}",
    "opera_ce": f"{_STATISTICS}|{_COLA}",
    "clap": _STATISTICS,
    "ast": "",
    "qwen_omni_audio": r"encoder/proj/.*",
}


def student(name: str, ssm: str | None = None) -> AudioStudent:
    made = toy(name)
    samples = made.front_end.samples(min(made.module.config.frames, 40))
    return AudioStudent(made.module, made.front_end, samples, ssm=ssm or made.entry.ssm)


def batch(samples: int) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(5))
    return {
        "waveform": 0.1 * jax.random.normal(keys[0], (BATCH, samples)),
        "text": jax.random.normal(keys[1], (BATCH, TEXT_WIDTH)),
    }


def test_every_encoder_has_a_toy():
    assert TOYS.keys() == ENCODERS.keys()


def test_the_parts_of_an_entry_are_found_where_its_paths_say():
    entry = ENCODERS["clap_fused"]
    assert entry.part("config") is CLAP_FUSED and entry.part("module") is Clap
    assert entry.part("table") is clap_table.TABLE and entry.sharding is clap_table.SHARDING
    assert architecture("clap_fused").sharding is clap_table.SHARDING


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
def test_published_sizes_are_covered_by_the_sharding_table(name):
    made = architecture(name)
    tree = made.abstract_params()
    shardings(tree, made.sharding, make_mesh(devices=jax.devices()[:1]))
    config = made.module.config
    assert len(config.layer_widths) == config.depth and config.prefix_tokens >= 0


@pytest.mark.parametrize("name", ENCODERS)
def test_intermediates_are_what_the_config_says(name):
    made = toy(name)
    config = made.module.config
    clip = jnp.zeros((2, made.front_end.samples(min(config.frames, 40))))
    shape = jax.eval_shape(made.front_end, clip).shape

    def embed(key):
        return made.module.init_with_output(key, jnp.zeros(shape), method="embed")[0]

    pooled, out = jax.eval_shape(embed, jax.random.key(0))
    assert pooled.shape == (2, config.width) and pooled.dtype == jnp.float32
    for layer, width in enumerate(config.layer_widths):
        assert out[f"block{layer:02d}"].shape[2] == width, layer
        assert out[f"block{layer:02d}"].ndim == 3
    assert f"block{config.depth:02d}" not in out
    if made.entry.ssm == "masked_spectrogram":
        rows, columns = config.grid(shape[1])
        assert out["tokens"].shape[:2] == (2, rows * columns)


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_acula_trains_the_encoder(name):
    """One gradient: finite, and it reaches the encoder through both terms."""
    side = student(name)
    layers = (-1, side.module.config.depth - 1)
    config = AculaConfig(hidden=8, out=4, dropout=0.0, layers=layers)
    method = Acula(side, TEXT_WIDTH, config, toy(name).sharding)
    params = tiny.quick_jit(method.init)(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), BATCH)
    run = tiny.quick_jit(lambda p: loss_and_grad(method, p, None, batch(side.samples), keys, 1))
    loss, metrics, grads = run(params)
    assert np.isfinite(loss) and metrics["reconstruction"] > 0
    norms = {path: float(jnp.abs(leaf).sum()) for path, leaf in named_leaves(grads).items()}
    assert all(np.isfinite(norm) for norm in norms.values())
    still = {path for path, norm in norms.items() if path.startswith("encoder/") and norm == 0}
    fixed = re.compile(FIXED.get(name, r"encoder/(decoder_)?pos_embed"))
    assert still == {path for path in norms if fixed.fullmatch(path)}
    assert ("term" in params) == (side.ssm == "masked_spectrogram")
    shardings(params, method.sharding_rules, make_mesh(devices=jax.devices()[:1]))


def test_cola_is_the_other_term_of_opera():
    """Without its gradient, which test_cola.py has."""
    side = student("opera_ce", "cola")
    method = Acula(side, TEXT_WIDTH, AculaConfig(hidden=8, out=4), toy("opera_ce").sharding)
    params = tiny.quick_jit(method.init)(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), BATCH)

    def losses(params):
        encoded = method.encode(params, None, batch(side.samples), keys, True)
        return method.couple(encoded.coupled)

    loss, metrics = tiny.quick_jit(losses)(params)
    assert np.isfinite(loss) and metrics["contrast"] > 0 and "reconstruction" not in metrics
    np.testing.assert_allclose(loss, metrics["align"] + metrics["contrast"], rtol=1e-6)


@pytest.mark.parametrize("name", ENCODERS)
def test_export_and_settings_come_back(name, tmp_path):
    made = toy(name)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: (0.2 * np.abs(rng.standard_normal(leaf.shape))).astype(leaf.dtype),
        made.abstract_params(),
    )
    samples = made.front_end.samples(min(made.module.config.frames, 40))
    pad = made.entry.window.pad
    encoder = Encoder(made, jax.device_put(params), samples, pad, False)
    export_encoder(tmp_path, encoder)
    loaded = load_encoder(None, tmp_path)
    assert loaded.architecture.module == made.module
    assert loaded.architecture.front_end == made.front_end
    assert json.loads(json.dumps(loaded.settings())) == json.loads(json.dumps(encoder.settings()))
    rate = made.front_end.sample_rate
    sounds = [rng.standard_normal(n).astype(np.float32) for n in (samples, samples // 2 + 7)]
    first = encoder.embed(sounds, rate)
    assert first.shape == (2, encoder.width) and np.isfinite(first).all()
    np.testing.assert_array_equal(loaded.embed(sounds, rate), first)


@pytest.mark.slow
def test_sharded_over_meshes_equals_unsharded():
    """Features and gradients of every module on 8 virtual devices; see the script."""
    devices.run(Path(__file__).with_name("sharded_encoders.py"))


@pytest.mark.parametrize("name", ["whisper", "qwen2_audio", "qwen_omni_audio"])
def test_what_is_filled_up_is_not_seen(name):
    """A short recording has the same embedding in a batch of its own and beside a long one."""
    made = toy(name)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(leaf.dtype),
        made.abstract_params(),
    )
    samples = made.front_end.samples(64)
    encoder = Encoder(made, jax.device_put(params), samples, "zero", False, batch_size=2)
    short, long = (rng.standard_normal(n).astype(np.float32) for n in (3211, samples))
    together = encoder.embed([long, short], 16_000)
    np.testing.assert_allclose(encoder.embed([short], 16_000)[0], together[1], atol=1e-5)


@pytest.mark.parametrize(
    "checkpoint", ENCODER_CHECKPOINTS + TEACHER_CHECKPOINTS, ids=lambda c: c.source
)
def test_the_catalogue_names_what_is_there(checkpoint):
    assert checkpoint.architecture in ENCODERS or checkpoint.architecture in ARCHITECTURES
    assert checkpoint.commercial in ("yes", "no", "terms") and checkpoint.millions > 0


@pytest.mark.parametrize("checkpoint", ENCODER_CHECKPOINTS, ids=lambda c: c.source)
def test_the_catalogues_sizes_are_those_of_the_presets(checkpoint):
    made = architecture(checkpoint.architecture, checkpoint.overrides)
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(made.abstract_params()))
    assert checkpoint.millions == pytest.approx(count / 1e6, rel=0.01)
