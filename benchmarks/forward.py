"""Forward passes at published sizes against PyTorch, on the same cores, in one process.

    python -m benchmarks.forward [--batch 8] [--rounds 3] [--only whisper]

Each encoder (and the language model of Gemma-3-270M's shape, 64 texts of 128 tokens) takes turns
with the same architecture in PyTorch (transformers, sdpa attention, as many threads as cores), both
with random weights; medians and their ratio are printed, beside the rate of matrix products
measured in the same run, which may differ between the two libraries. Operations are counted by
PyTorch's counter on its own model. The Qwen tower has four of its 32 equal layers; OPERA-GT has a
benchmark of its own. Needs requirements-dev.txt and about 6 GB of memory.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from medalign_jax.architecture import architecture
from medalign_jax.core.host_memory import keep_host_memory
from medalign_jax.models.language.decoder import Decoder
from medalign_jax.models.language.decoder_config import GEMMA3_270M

QWEN_LAYERS = 4


class Pair(NamedTuple):
    """The same work twice: each function runs once and waits for its result."""

    ours: Callable[[], object]
    theirs: Callable[[], object]


def encoder(name: str, features: tuple[int, int, int], theirs: Callable, **overrides) -> Pair:
    """Our encoder on random features (B, T, M), and a function that gives PyTorch's."""
    made = architecture(name, overrides)
    x = np.random.default_rng(0).random(features, dtype=np.float32)
    params = jax.jit(made.module.init)(jax.random.key(0), jnp.asarray(x[:1]))["params"]
    run = jax.jit(lambda p, x: made.module.apply({"params": p}, x, method="embed")[0])
    placed = jnp.asarray(x)
    return Pair(lambda: run(params, placed).block_until_ready(), theirs(torch.from_numpy(x)))


def _clap(batch: int, name: str) -> Pair:
    model = transformers.ClapAudioModelWithProjection(transformers.ClapAudioConfig()).eval()
    # (B, one picture, frames, mels)
    return encoder(name, (batch, 1001, 64), lambda x: lambda: model(input_features=x[:, None]))


def _opera_ce(batch: int) -> Pair:
    model = transformers.EfficientNetModel(
        transformers.EfficientNetConfig(
            width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280, image_size=224
        )
    ).eval()

    def theirs(x):
        picture = x[:, None, 1:-1, 1:-1].expand(-1, 3, -1, -1).contiguous()
        return lambda: model(picture)

    return encoder("opera_ce", (batch, 251, 64), theirs)


def _audiomae(batch: int) -> Pair:
    config = transformers.ViTConfig(image_size=(1024, 128), patch_size=16, num_channels=1)
    model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    return encoder("audiomae", (batch, 1024, 128), lambda x: lambda: model(x[:, None]))


def _ast(batch: int) -> Pair:
    model = transformers.ASTModel(transformers.ASTConfig()).eval()
    return encoder("ast", (batch, 1024, 128), lambda x: lambda: model(x))


def _whisper(batch: int) -> Pair:
    config = transformers.WhisperConfig(
        d_model=512, encoder_layers=6, encoder_attention_heads=8, encoder_ffn_dim=2048,
        decoder_layers=1, decoder_attention_heads=8,
    )  # fmt: skip
    model = transformers.WhisperModel(config).eval().encoder

    def theirs(x):
        mel = x.transpose(1, 2).contiguous()
        return lambda: model(mel)

    sizes = {"width": 512, "depth": 6, "heads": 8, "mlp_width": 2048}
    return encoder("whisper", (batch, 3000, 80), theirs, **sizes)


def _qwen(batch: int) -> Pair:
    config = transformers.models.qwen2_5_omni.Qwen2_5OmniAudioEncoderConfig(
        encoder_layers=QWEN_LAYERS
    )
    kind = transformers.models.qwen2_5_omni.modeling_qwen2_5_omni.Qwen2_5OmniAudioEncoder
    model = kind._from_config(config, attn_implementation="sdpa").eval()

    def theirs(x):
        frames = x.shape[1]
        packed = x.reshape(-1, x.shape[2]).T.contiguous()
        lengths = torch.full((len(x),), frames)
        after = torch.full((len(x),), (frames - 1) // 2 + 1)
        return lambda: model(packed, feature_lens=lengths, aftercnn_lens=after)

    return encoder(
        "qwen_omni_audio", (batch, 1000, 128), theirs, depth=QWEN_LAYERS, output_width=3584
    )


def _gemma(batch: int) -> Pair:
    config = transformers.Gemma3TextConfig(
        vocab_size=262_144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18,
        num_attention_heads=4, num_key_value_heads=1, sliding_window=512,
        max_position_embeddings=32_768,
    )  # fmt: skip
    reference = transformers.Gemma3TextModel(config).eval()
    model = Decoder(GEMMA3_270M)
    ids = np.random.default_rng(0).integers(3, 262_144, (8 * batch, 128)).astype(np.int32)
    mask = np.ones_like(ids, bool)
    mask[::2, 100:] = False
    params = jax.jit(model.init)(jax.random.key(0), ids[:1], mask[:1])["params"]
    run = jax.jit(lambda p, i, m: model.apply({"params": p}, i, m)[0])
    placed = jnp.asarray(ids), jnp.asarray(mask)
    inputs = {
        "input_ids": torch.from_numpy(ids).long(), "attention_mask": torch.from_numpy(mask).long()
    }  # fmt: skip
    return Pair(lambda: run(params, *placed).block_until_ready(), lambda: reference(**inputs))


WORK: dict[str, Callable[[int], Pair]] = {
    "OPERA-CT / HTS-AT": lambda batch: _clap(batch, "opera_ct"),
    "OPERA-CE / EfficientNet-B0": _opera_ce,
    "AudioMAE": _audiomae,
    "AST": _ast,
    "CLAP": lambda batch: _clap(batch, "clap"),
    "Whisper base, 30 s": _whisper,
    f"Qwen2.5-Omni tower, {QWEN_LAYERS} layers, 10 s": _qwen,
    "Gemma-3-270M, 64 x 128 tokens": _gemma,
}


def matrix_rate() -> float:
    """Billions of operations per second of a float32 matrix product, the best of a few."""
    product = jax.jit(lambda a, b: a @ b)
    x = jnp.ones((2048, 2048))
    product(x, x).block_until_ready()
    return 2 * 2048**3 / 1e9 / min(_seconds(lambda: product(x, x).block_until_ready(), 5))


def torch_matrix_rate() -> float:
    """The same by PyTorch, whose library (MKL) is slower on some processors."""
    x = torch.ones((2048, 2048))
    return 2 * 2048**3 / 1e9 / min(_seconds(lambda: x @ x, 6))


def _seconds(function: Callable[[], object], rounds: int) -> list[float]:
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        function()
        times.append(time.perf_counter() - begun)
    return times


def compare(name: str, pair: Pair, rounds: int) -> str:
    """A line of the Markdown table."""
    with torch.inference_mode():
        with FlopCounterMode(display=False) as counter:
            pair.theirs()
        pair.ours()  # compiles
        ours, theirs, rates = [], [], []
        for _ in range(rounds):
            ours += _seconds(pair.ours, 1)
            theirs += _seconds(pair.theirs, 1)
            rates.append(matrix_rate())
    us, them = statistics.median(ours), statistics.median(theirs)
    share = counter.get_total_flops() / 1e9 / us / statistics.median(rates)
    ratios = sorted(t / o for t, o in zip(theirs, ours, strict=True))
    spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
    return f"| {name} | {us:.2f} s | {them:.2f} s | {them / us:.2f} ({spread}) | {share:.0%} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="what holds this text")
    arguments = parser.parse_args()
    keep_host_memory()
    print("| forward | ours | PyTorch | PyTorch / ours | share of the matrix-product rate |")
    print("|---|---|---|---|---|")
    for name, make in WORK.items():
        if arguments.only.lower() in name.lower():
            print(compare(name, make(arguments.batch), arguments.rounds), flush=True)
            gc.collect()
    rates = f"XLA {matrix_rate():.0f} Gflop/s, PyTorch {torch_matrix_rate():.0f} Gflop/s"
    print(f"\nmatrix products alone: {rates}")


if __name__ == "__main__":
    main()
