"""GGUF: the right numbers, the published names and settings, and no file that does harm."""

import struct

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind

from medalign_jax.weights import WeightError, resolve
from medalign_jax.weights.gguf import Quantised
from medalign_jax.weights.lazy import FileTensor
from tests.weights.gguf_files import convert, interleave

WIDTH, DEPTH, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 64, 2, 4, 2, 8, 96
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 128,
    "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM, "max_position_embeddings": 50, "tie_word_embeddings": False,
    "rms_norm_eps": 3e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}  # fmt: skip
GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
GEMMA = {
    **SIZES, "tie_word_embeddings": True, "sliding_window": 7, "query_pre_attn_scalar": HEAD_DIM,
    "rope_parameters": GEMMA_ROPE,
}  # fmt: skip
GEMMA_SETTINGS = {
    "attention__sliding_window": 7, "rope__scaling__type": "linear", "rope__scaling__factor": 8.0,
}  # fmt: skip


def model(architecture):
    torch.manual_seed(0)
    made = {
        "gemma3": lambda: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**GEMMA)),
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
        "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)),
        "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES)),
    }[architecture]()
    with torch.no_grad():
        for weight in made.parameters():
            weight.normal_(0, 0.3)
    return made


def write(path, tensors, architecture="other", **values):
    """A GGUF file of plain tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        {str: writer.add_string, int: writer.add_uint32, list: writer.add_array}[type(value)](
            key.replace("__", "."), value
        )
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Numbers


@pytest.mark.parametrize("kind", [each for each in Kind if gguf.GGML_QUANT_SIZES[each][0] > 1])
def test_every_quantised_type_whole_and_in_slices(tmp_path, kind):
    size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    stored = np.random.default_rng(0).integers(0, 256, (5, 3 * block_bytes), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "other")
    writer.add_tensor("w", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    try:
        with np.errstate(all="ignore"):
            expected = gguf.dequantize(stored, kind)
    except NotImplementedError:
        with pytest.raises(WeightError, match=f"'w' has type {kind.name}, which gguf does not"):
            resolve(tmp_path / "x.gguf")
        return
    tensor = resolve(tmp_path / "x.gguf")["w"]
    assert (tensor.shape, tensor.dtype) == ((5, 3 * size), np.float32)
    np.testing.assert_array_equal(tensor.read(), expected, strict=True)
    for index in (
        (slice(1, 4), slice(0, 3 * size)),
        (slice(0, 5), slice(size - 1, 2 * size + 1)),
        (slice(4, 5), slice(size, 2 * size)),
        (slice(2, 2), slice(0, 5)),
    ):
        np.testing.assert_array_equal(tensor.read(index), expected[index], strict=True)


def test_only_the_rows_and_blocks_asked_for_are_read(tmp_path, monkeypatch):
    array = np.random.default_rng(0).standard_normal((40, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "other")
    writer.add_tensor("w", gguf.quantize(array, Kind.Q8_0), raw_dtype=Kind.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = resolve(tmp_path / "x.gguf")["w"]
    assert isinstance(tensor, Quantised)
    read, whole = [], FileTensor.read

    def counted(self, index=None):
        read.append(whole(self, index))
        return read[-1]

    monkeypatch.setattr(FileTensor, "read", counted)
    part = tensor.read((slice(10, 13), slice(33, 40)))
    assert [each.nbytes for each in read] == [3 * 34]
    np.testing.assert_allclose(part, array[10:13, 33:40], atol=np.abs(array).max() / 127)


def test_plain_types_stay_what_they_are(tmp_path):
    draw = np.random.default_rng(0)
    tensors = {
        "half": draw.standard_normal((3, 4)).astype(np.float16),
        "single": draw.standard_normal((2, 3, 4)).astype(np.float32),
        "count": np.arange(5, dtype=np.int32),
    }
    brain = draw.standard_normal((3, 32)).astype(ml_dtypes.bfloat16)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "other")
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.add_tensor("brain", brain.view(np.uint8), raw_dtype=Kind.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    opened = resolve(tmp_path / "x.gguf")
    for name, array in {**tensors, "brain": brain}.items():
        np.testing.assert_array_equal(opened[name].read(), array, strict=True)
    assert opened["half"].read((slice(1, 2), slice(2, 4))).tolist() == (
        tensors["half"][1:2, 2:4].tolist()
    )


# What the converter did is undone


@pytest.mark.parametrize("architecture", ["gemma3", "llama", "qwen2", "qwen3"])
def test_names_and_contents_are_those_of_transformers(tmp_path, architecture):
    made = model(architecture)
    settings = GEMMA_SETTINGS if architecture == "gemma3" else {}
    convert(made, architecture, tmp_path / "x.gguf", **settings)
    opened = resolve(tmp_path)
    expected = {name: tensor.numpy() for name, tensor in made.state_dict().items()}
    if made.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert set(opened) == set(expected)
    for name, array in expected.items():
        # 1 added and taken off again rounds once.
        tolerance = 2e-7 if architecture == "gemma3" and "norm" in name else 0
        np.testing.assert_allclose(opened[name].read(), array, rtol=0, atol=tolerance)
    rows = opened["model.layers.1.self_attn.q_proj.weight"]
    for start, stop in ((0, 1), (3, 6), (5, 19), (8, 16), (31, 32)):
        part = (slice(start, stop), slice(3, 60))
        expected_part = expected["model.layers.1.self_attn.q_proj.weight"][part]
        np.testing.assert_array_equal(rows.read(part), expected_part, strict=True)


def test_the_rotary_order_is_the_converters():
    """Row p of a head's first half, and row p of its second, become rows 2p and 2p + 1."""
    rows = np.arange(12)[:, None]
    assert interleave(rows, 2).ravel().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


@pytest.mark.parametrize("architecture", ["gemma3", "llama", "qwen2", "qwen3"])
def test_config_makes_the_same_transformers_config(tmp_path, architecture):
    made = model(architecture)
    settings = GEMMA_SETTINGS if architecture == "gemma3" else {}
    convert(made, architecture, tmp_path / "x.gguf", **settings)
    (tmp_path / "config.json").write_text('{"model_type": "stale"}')
    config = resolve(tmp_path / "x.gguf").config
    again = type(made.config)(**config)
    keys = [key for key in SIZES if hasattr(made.config, key)]
    keys += ["sliding_window", "query_pre_attn_scalar", "layer_types"]
    for key in keys:
        ours, theirs = getattr(again, key, None), getattr(made.config, key, None)
        if key == "rope_parameters" and architecture == "gemma3":
            ours = {kind: {**each, "factor": each.get("factor")} for kind, each in ours.items()}
            theirs = {kind: {**each, "factor": each.get("factor")} for kind, each in theirs.items()}
        assert ours == theirs, key
    assert config["model_type"] == {"gemma3": "gemma3_text"}.get(architecture, architecture)


def test_the_scale_of_the_largest_gemma(tmp_path):
    """Gemma-3-27B scales scores by its width over its heads; llama.cpp knows it by its depth."""
    for depth, expected in ((62, 168), (48, 128)):
        made = transformers.Gemma3TextConfig(
            **{**GEMMA, "num_hidden_layers": depth, "hidden_size": 5376, "head_dim": 128},
        )
        made.num_attention_heads = 32

        class Shell:
            config = made

            @staticmethod
            def state_dict():
                return {"model.embed_tokens.weight": torch.zeros(4, 2)}

        convert(Shell, "gemma3", tmp_path / "x.gguf", **GEMMA_SETTINGS)
        assert resolve(tmp_path / "x.gguf").config["query_pre_attn_scalar"] == expected


def test_llama3_scaling_is_recovered_or_refused(tmp_path):
    scaling = {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = transformers.LlamaConfig(**{**SIZES, "head_dim": 64, "rope_parameters": scaling})
    made = transformers.LlamaForCausalLM(config)
    frequencies = 500_000.0 ** (-np.arange(32) / 32)
    # The converter stores by what transformers' frequencies are smaller than the plain ones.
    factors = (frequencies / made.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    assert factors[0] == 1 and factors[-1] == 32
    for change, words in ((1.0, None), (1.01, "not the rotary scaling of Llama 3")):
        factors[16] *= change
        made.model.register_buffer("rope_freqs", torch.from_numpy(factors))
        path = tmp_path / "x.gguf"
        _convert_with_factors(made, path, factors)
        opened = resolve(path)
        assert not any("rope_freqs" in name for name in opened)
        if words is None:
            found = opened.config["rope_scaling"]
            assert found == {key: scaling[key] for key in found} and len(found) == 5
        else:
            with pytest.raises(WeightError, match=words):
                _ = opened.config


def _convert_with_factors(made, path, factors):
    class WithFactors:
        config = made.config

        @staticmethod
        def state_dict():
            kept = {k: v for k, v in made.state_dict().items() if k != "model.rope_freqs"}
            return {**kept, "rope_freqs.weight": torch.from_numpy(factors)}

    convert(WithFactors, "llama", path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"expert_count": 8}, "llama settings that are not supported: expert_count=8"),
        ({"rope__scaling__type": "yarn"}, "rotary scaling 'yarn' is not read"),
        ({"attention__value_length": 16}, "attention.value_length is 16, not 8"),
        ({"block_count": None}, r"llama\.block_count is None, not a positive integer"),
        ({"feed_forward_length": [1, 2]}, r"feed_forward_length is \(1, 2\), not a positive"),
        ({"rope__freq_base": -1.0}, "not a positive number"),
        ({"vocab_size": 5}, r"vocab_size is 5, not 96: token_embd\.weight says otherwise"),
    ],
)
def test_settings_that_are_not_supported_are_named(tmp_path, settings, words):
    convert(model("llama"), "llama", tmp_path / "x.gguf", **settings)
    with pytest.raises(WeightError, match=words):
        _ = resolve(tmp_path / "x.gguf").config


def test_an_unknown_architecture_and_one_part_of_several(tmp_path):
    path = write(tmp_path / "x.gguf", {"blk.0.attn_q.weight": np.ones((2, 2), np.float32)})
    assert set(resolve(path)) == {"blk.0.attn_q.weight"}
    with pytest.raises(WeightError, match=r"architecture 'other' is not known in GGUF \(gemma3, "):
        _ = resolve(path).config
    write(path, {"w": np.ones(2, np.float32)}, split__count=3)
    with pytest.raises(WeightError, match="one of 3 parts; join them first"):
        resolve(path)


# Files that are not what they say


def raw_file(entries=b"", tensors=b"", *, version=3, count=(0, 0), data=b"\0" * 64):
    head = b"GGUF" + struct.pack("<IQQ", version, *count) + entries + tensors
    return head + b"\0" * (-len(head) % 32) + data


def text(value):
    return struct.pack("<Q", len(value)) + value


def info(name, sizes, kind, offset):
    packed = struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)
    return text(name) + packed


U64 = 2**64 - 1
DAMAGED = {
    "empty header": (b"GGUF", "24 bytes announced, 4 left"),
    "version 1": (raw_file(version=1), "version 0x1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 0x3000000"),
    "tensor count": (raw_file(count=(U64, 0)), f"{U64} tensors"),
    "entry count": (raw_file(count=(0, U64)), f"{U64} entries"),
    "long key": (raw_file(struct.pack("<Q", U64), count=(0, 1)), "a string of"),
    "key beyond the end": (raw_file(struct.pack("<Q", 999), count=(0, 1)), "999 bytes announced"),
    "key not UTF-8": (raw_file(text(b"\xff"), count=(0, 1)), "not UTF-8"),
    "value type": (raw_file(text(b"k") + struct.pack("<I", 77), count=(0, 1)), "unknown type 77"),
    "long list": (
        raw_file(text(b"k") + struct.pack("<IIQ", 9, 4, U64), count=(0, 1)),
        f"a list of {U64} values",
    ),
    "list beyond the end": (
        raw_file(text(b"k") + struct.pack("<IIQ", 9, 10, 2**20), count=(0, 1)),
        "8388608 bytes announced",
    ),
    "list of lists": (
        raw_file(text(b"k") + struct.pack("<IIQ", 9, 9, 1), count=(0, 1)),
        "a list of values of unknown type 9",
    ),
    "key twice": (
        raw_file(2 * (text(b"k") + struct.pack("<IB", 0, 1)), count=(0, 2)),
        "'k' stands twice",
    ),
    "alignment": (
        raw_file(text(b"general.alignment") + struct.pack("<II", 4, 3), count=(0, 1)),
        "alignment 3 is not a power of two",
    ),
    "alignment 0": (
        raw_file(text(b"general.alignment") + struct.pack("<II", 4, 0), count=(0, 1)),
        "alignment 0 is not",
    ),
    "no axes": (raw_file(tensors=info(b"w", (), 0, 0), count=(1, 0)), "has 0 axes"),
    "many axes": (raw_file(tensors=info(b"w", (1,) * 5, 0, 0), count=(1, 0)), "has 5 axes"),
    "axis of 0": (raw_file(tensors=info(b"w", (2, 0), 0, 0), count=(1, 0)), "is empty"),
    "tensor type": (raw_file(tensors=info(b"w", (2,), 999, 0), count=(1, 0)), "tensor type 999"),
    "half a block": (raw_file(tensors=info(b"w", (33,), 8, 0), count=(1, 0)), "33 in blocks of 32"),
    "too large": (raw_file(tensors=info(b"w", (2**40, 2**40), 0, 0), count=(1, 0)), "reaches to"),
    "beyond the end": (raw_file(tensors=info(b"w", (2,), 0, 2**63), count=(1, 0)), "reaches to"),
    "cut short": (raw_file(tensors=info(b"w", (17,), 0, 0), count=(1, 0)), "cut short"),
    "not aligned": (raw_file(tensors=info(b"w", (2,), 0, 4), count=(1, 0)), "multiple of 32"),
    "overlap": (
        raw_file(tensors=info(b"v", (9,), 0, 0) + info(b"w", (2,), 0, 32), count=(2, 0)),
        "'w' begins at .*, inside another one",
    ),
    "tensor twice": (
        raw_file(tensors=info(b"w", (2,), 0, 0) + info(b"w", (2,), 0, 32), count=(2, 0)),
        "'w' stands twice",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_refused_in_words(tmp_path, case):
    data, words = DAMAGED[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(WeightError, match=words) as caught:
        resolve(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_no_damage_gets_further_than_an_error_in_words(tmp_path, damage):
    path = tmp_path / "x.gguf"
    convert(model("llama"), "llama", path, {"ffn": Kind.Q8_0, "attn": Kind.Q4_0})
    good = path.read_bytes()
    header = good.index(b"token_embd") + 2000
    draw = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        place = int(draw.integers(0, header))
        bad = bytearray(good)
        if damage == "cut":
            del bad[place:]
        else:
            bad[place] = draw.integers(0, 256)
        path.write_bytes(bad)
        try:
            opened = resolve(path)
            assert sum(tensor.read().nbytes for tensor in opened.values()) < 10 * len(good)
            _ = opened.config
        except WeightError as error:
            refused += 1
            assert str(error).startswith(str(path))
    assert refused > (148 if damage == "cut" else 30)


def test_without_the_gguf_package(tmp_path, monkeypatch):
    path = write(tmp_path / "x.gguf", {"w": np.ones(2, np.float32)})
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(WeightError, match="pip install gguf"):
        resolve(path)
