"""Run by test_audio_lm.py with eight virtual devices.

An audio language model laid out over a mesh gives the hidden states, logits and gradients of one
device; and where only the rows are divided, audio is put into the prompts without any message
between devices.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np

from medalign_jax.core.mesh import batch_sharding, make_mesh, replicated, shardings
from medalign_jax.models.audio_lm import AudioLM, AudioLMConfig
from medalign_jax.models.encoders.qwen_omni_audio import QwenAudioConfig
from medalign_jax.models.language.decoder_config import DecoderConfig
from medalign_jax.models.language.decoder_rope import Rope
from medalign_jax.weights.tables.audio_lm import SHARDING

ROPE = Rope(sections=(2, 1, 1))
TEXT = DecoderConfig(
    vocab_size=61, width=32, heads=4, kv_heads=2, head_dim=8, mlp_width=64, sliding=(False,) * 2,
    attention_scale=8**-0.5, max_positions=64, qkv_bias=True, tied=False, rope=ROPE,
    local_rope=ROPE,
)  # fmt: skip
AUDIO = QwenAudioConfig(
    mels=8, frames=64, width=16, depth=2, heads=2, mlp_width=32, output_width=32, n_window=5
)
CONFIG = AudioLMConfig(TEXT, AUDIO, audio_token=60, kind="qwen2_5_omni")


def rows():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 60, (8, 14)).astype(np.int32)
    lengths = rng.integers(3, 17, (8, 2)).astype(np.int32)
    lengths[3] = 0
    for row, count in enumerate(((lengths + 1) // 2 // 2).sum(1)):
        ids[row, 2 : 2 + count] = 60
    mask = np.arange(14) < np.array([14, 13, 12, 11, 12, 13, 14, 11])[:, None]
    return ids, mask, rng.standard_normal((8, 2, 16, 8)).astype(np.float32), lengths


def main():
    assert len(jax.devices()) == 8
    data, model = rows(), AudioLM(CONFIG)
    mask = data[1]
    params = jax.jit(model.init)(jax.random.key(0), *data)["params"]

    def loss(params, *data):
        hidden, _ = model.apply({"params": params}, *data)
        logits = model.apply({"params": params}, hidden, method="logits")
        return jnp.sum(jnp.sin(logits) * data[1][..., None]), (hidden, logits)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, states0), gradients0 = jax.device_get(step(params, *data))
    for sizes in ({"data": 2, "fsdp": 4}, {"data": 1, "tensor": 2, "fsdp": 4}):
        mesh = make_mesh(**sizes)
        spread = jax.device_put(params, shardings(params, SHARDING, mesh))
        laid = jax.device_put(data, batch_sharding(mesh))
        (_, states), gradients = jax.device_get(step(spread, *laid))
        for one, other in zip(states, states0, strict=True):
            np.testing.assert_allclose(one[mask], other[mask], rtol=0, atol=1e-5)
        pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(gradients0), strict=True)
        for one, other in pairs:
            bound = 1e-5 * max(1.0, np.abs(other).max())
            np.testing.assert_allclose(one, other, rtol=0, atol=bound)
        up = spread["text"]["layers"]["mlp"]["up"]["kernel"]
        fc1 = spread["audio"]["layers"]["fc1"]["kernel"]
        ways = sizes["fsdp"] * sizes.get("tensor", 1)
        assert all(x.addressable_shards[0].data.size == x.size // ways for x in (up, fc1))
    check_locality(model, params, data)


def check_locality(model, params, data):
    mesh = make_mesh(data=8)
    embed = jax.jit(
        lambda params, *data: model.apply({"params": params}, *data, method="embedded"),
        in_shardings=(replicated(mesh), *[batch_sharding(mesh)] * 4),
        out_shardings=batch_sharding(mesh),
    )
    text = embed.lower(params, *data).compile().as_text()
    messages = re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", text)
    assert not messages, messages


if __name__ == "__main__":
    main()
