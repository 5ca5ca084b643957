"""The loader: right bits in the right place, every difference said at once, and back again."""

import itertools
import json
import os
import socket
import struct
import tracemalloc
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

from medalign_jax.weights import Ignore, Rule, Table, WeightError, resolve
from medalign_jax.weights import load as loading
from medalign_jax.weights.lazy import FileTensor
from medalign_jax.weights.load import copy_into, export, load, save
from medalign_jax.weights.table import CONV2D, LINEAR, PadAxis, SplitAxis, chain
from tests import devices

TABLE = Table(
    name="toy",
    prefixes=("", "encoder."),
    rules=(
        Rule("{prefix}stem.weight", "stem/kernel", CONV2D),
        Rule("{prefix}blocks.{i}.fc.weight", "block{i}/fc/kernel", LINEAR),
        Rule("{prefix}layers.{i}.fc.weight", "layers/fc/kernel", LINEAR),
        Rule("{prefix}layers.{i}.q.weight", "layers/q/kernel", chain(LINEAR, SplitAxis(1, (2, 3)))),
        Rule("{prefix}layers.{i}.fc.bias", "layers/fc/bias"),
        Rule(("{prefix}norm.gamma", "{prefix}norm.weight"), "norm/scale"),
        Rule("{prefix}odd.{i}.weight", "odd/scale", layers=(1, 3)),
    ),
    ignores=(
        Ignore("{prefix}*.position_ids", "a counter"),
        Ignore("head.weight", "tied", equal_to="{prefix}norm.weight"),
    ),
)


def upstream(prefix="", dtype=np.float32):
    draw = np.random.default_rng(0)
    shapes = {
        "stem.weight": (8, 1, 4, 2),
        **{f"blocks.{i}.fc.weight": (6, 4) for i in range(2)},
        **{f"layers.{i}.fc.weight": (8, 4) for i in range(3)},
        **{f"layers.{i}.q.weight": (6, 4) for i in range(3)},
        **{f"layers.{i}.fc.bias": (8,) for i in range(3)},
        "norm.weight": (8,),
        "odd.1.weight": (2,),
        "odd.3.weight": (2,),
    }
    return {prefix + k: draw.standard_normal(s).astype(dtype) for k, s in shapes.items()}


def abstract(dtype=np.float32, **changes):
    tree = {
        "stem": {"kernel": (4, 2, 1, 8)},
        "block0": {"fc": {"kernel": (4, 6)}},
        "block1": {"fc": {"kernel": (4, 6)}},
        "layers": {
            "fc": {"kernel": (3, 4, 8), "bias": (3, 8)},
            "q": {"kernel": (3, 4, 2, 3)},
        },
        "norm": {"scale": (8,)},
        "odd": {"scale": (2, 2)},
        **changes,
    }
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype), tree, is_leaf=lambda x: type(x) is tuple
    )


def bits(array):
    return np.ascontiguousarray(array).tobytes()


@pytest.mark.parametrize("prefix", ["", "encoder."])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_load_and_export_are_bit_for_bit(tmp_path, prefix, dtype):
    tensors = upstream(prefix, dtype)
    save(tmp_path / "model.safetensors", tensors)
    params = load(tmp_path, TABLE, abstract(dtype))
    assert params["norm"]["scale"].dtype == dtype
    kernel = np.asarray(params["layers"]["fc"]["kernel"])
    for layer in range(3):
        assert bits(kernel[layer]) == bits(tensors[f"{prefix}layers.{layer}.fc.weight"].T)
    heads = np.asarray(params["layers"]["q"]["kernel"])[1]
    assert bits(heads) == bits(tensors[f"{prefix}layers.1.q.weight"].T.reshape(4, 2, 3))
    assert bits(params["odd"]["scale"][1]) == bits(tensors[f"{prefix}odd.3.weight"])
    written = export(params, TABLE, names=tensors)
    assert set(written) == set(tensors)
    for name, tensor in tensors.items():
        assert (written[name].shape, written[name].dtype) == (tensor.shape, tensor.dtype)
        assert bits(written[name]) == bits(tensor), name
    save(tmp_path / "again.safetensors", written)
    again = (tmp_path / "again.safetensors").read_bytes()
    assert again == (tmp_path / "model.safetensors").read_bytes()


def test_export_without_names_writes_the_first_of_each(tmp_path):
    written = export(load(upstream("encoder."), TABLE, abstract()), TABLE)
    assert "norm.gamma" in written and "stem.weight" in written
    written["stem.weight"][...] = 0  # a copy: changing it leaves the parameters alone


def test_a_padded_vocabulary():
    table = Table("t", (Rule("embed.{i}.weight", "embed", PadAxis(0, 3, 8)),))
    tensors = {f"embed.{i}.weight": np.full((3, 2), 1 + i, ml_dtypes.bfloat16) for i in range(2)}
    tree = {"embed": jax.ShapeDtypeStruct((2, 8, 2), ml_dtypes.bfloat16)}
    embed = np.array(load(tensors, table, tree)["embed"])
    assert bits(embed[1, :3]) == bits(tensors["embed.1.weight"]) and not embed[:, 3:].any()
    written = export({"embed": embed}, table)
    assert all(bits(written[name]) == bits(tensors[name]) for name in tensors)
    embed[1, 7, 1] = 1
    with pytest.raises(WeightError, match=r"embed\.1\.weight from parameter embed: axis 0 is not"):
        export({"embed": embed}, table)
    with pytest.raises(WeightError, match="axis 0 must have size 3"):
        load({name: tensor[:2] for name, tensor in tensors.items()}, table, tree)


def test_special_numbers_survive():
    tensors = upstream()
    tensors["norm.weight"].view(np.uint32)[:4] = [0x7FC00001, 0xFF800000, 0x80000000, 0x00000001]
    params = load(tensors, TABLE, abstract())
    assert bits(export(params, TABLE, names=tensors)["norm.weight"]) == bits(tensors["norm.weight"])


def test_ignored_tensors_and_the_check_of_a_copy():
    tensors = upstream()
    tensors["embed.position_ids"] = np.arange(4)
    tensors["head.weight"] = tensors["norm.weight"].copy()
    load(tensors, TABLE, abstract())
    tensors["head.weight"][3] += 1
    with pytest.raises(WeightError, match=r"head\.weight must equal norm\.weight, but the numbers"):
        load(tensors, TABLE, abstract())
    tensors["head.weight"] = np.zeros((2, 4), np.float32)
    with pytest.raises(WeightError, match=r"head\.weight must equal norm\.weight, but they are"):
        load(tensors, TABLE, abstract())


def test_all_differences_at_once(tmp_path):
    tensors = upstream()
    tensors["layers.1.fcc.weight"] = tensors.pop("layers.1.fc.weight")
    tensors["stem.weight"] = tensors["stem.weight"].reshape(8, 1, 2, 4)
    tensors["norm.gamma"] = tensors["norm.weight"]
    tensors["blocks.0.fc.weight"] = tensors["blocks.0.fc.weight"].astype(np.float64)
    tensors["blocks.2.fc.weight"] = tensors["blocks.1.fc.weight"]
    tensors["odd.1.weight"] = np.zeros((2, 1), np.float32)
    save(tmp_path / "model.safetensors", tensors)
    tree = abstract(extra={"bias": (3,)})
    with pytest.raises(WeightError) as caught:
        load(tmp_path, TABLE, tree)
    file = tmp_path / "model.safetensors"
    assert str(caught.value).splitlines() == [
        f"{tmp_path}: does not fit the table 'toy' "
        "(1 table, 1 ambiguous, 1 missing, 2 unused, 2 shape, 1 dtype):",
        "  table: no rule fills parameter extra/bias [3]",
        "  ambiguous: parameter norm/scale: alternatives are both there: norm.gamma and "
        "norm.weight",
        "  missing: layers.1.fc.weight for parameter layers/fc/kernel "
        "(nearest: layers.1.fcc.weight)",
        "  unused: blocks.2.fc.weight; the model has no place for it at block{i}/fc/kernel",
        "  unused: layers.1.fcc.weight (nearest: layers.1.fc.weight)",
        "  shape: odd.1.weight [2, 1] for parameter odd/scale [2, 2]: becomes [2, 1], "
        f"expected [2] per layer ({file})",
        "  shape: stem.weight [8, 1, 2, 4] for parameter stem/kernel [4, 2, 1, 8]: "
        f"becomes [2, 4, 1, 8], expected [4, 2, 1, 8] ({file})",
        f"  dtype: blocks.0.fc.weight is float64, parameter block0/fc/kernel is float32 ({file})"
        "; it is not cut down without being asked: store it anew",
    ]


def test_too_few_and_too_many_layers():
    shallow = {"fc": {"kernel": (2, 4, 8), "bias": (2, 8)}, "q": {"kernel": (2, 4, 2, 3)}}
    with pytest.raises(WeightError, match=r"3 unused") as caught:
        load(upstream(), TABLE, abstract(layers=shallow))
    assert "layers.2.fc.bias; the model has no place for it at layers/fc/bias" in str(caught.value)
    deep = {"fc": {"kernel": (4, 4, 8), "bias": (4, 8)}, "q": {"kernel": (4, 4, 2, 3)}}
    with pytest.raises(WeightError, match="3 missing"):
        load(upstream(), TABLE, abstract(layers=deep))
    with pytest.raises(WeightError, match="must stack 2 layers on axis 0"):
        load(upstream(), TABLE, abstract(odd={"scale": (3, 2)}))


def test_a_square_matrix_of_the_wrong_rank_and_a_wrong_model():
    tensors = upstream()
    tensors["layers.0.fc.weight"] = tensors["layers.0.fc.weight"][None]
    with pytest.raises(WeightError, match="2 axes expected, found 3"):
        load(tensors, TABLE, abstract())
    other = {f"transformer.h.{i}.w": np.zeros(1, np.float32) for i in range(500)}
    with pytest.raises(WeightError, match="15 missing, 500 unused"):
        load(other, TABLE, abstract())


def test_two_prefixes_and_two_claims_are_ambiguous():
    both = {**upstream(), "encoder.norm.weight": np.zeros(8, np.float32)}
    with pytest.raises(WeightError, match=r"several prefixes of the table: '' and 'encoder\.'"):
        load(both, TABLE, abstract())
    table = Table("t", (Rule("w", "a"), Rule("w", "b")))
    one = {"w": np.zeros(2, np.float32)}
    tree = {key: jax.ShapeDtypeStruct((2,), np.float32) for key in "ab"}
    with pytest.raises(WeightError, match="w is claimed by parameter a and by parameter b"):
        load(one, table, tree)
    with pytest.raises(WeightError, match="w is claimed by parameter a and by parameter b"):
        export({key: np.zeros(2, np.float32) for key in "ab"}, table)
    table = Table("t", (Rule("w", "a"),), (Ignore("*", "everything"),))
    with pytest.raises(WeightError, match="w is claimed by parameter a and by ignored: everything"):
        load(one, table, {"a": tree["a"]})
    table = Table("t", (Rule("w", "a"), Rule("v", "a")))
    with pytest.raises(WeightError, match="a is filled by the rules for 'w' and 'v'"):
        load(one, table, {"a": tree["a"]})


def test_dtype_policy():
    tensors = upstream(dtype=np.float32)
    params = load(tensors, TABLE, abstract(), dtype=ml_dtypes.bfloat16)
    expected = tensors["norm.weight"].astype(ml_dtypes.bfloat16)
    assert bits(params["norm"]["scale"]) == bits(expected)
    half = upstream(dtype=np.float16)
    params = load(half, TABLE, abstract(), dtype=np.float32)
    assert bits(params["norm"]["scale"]) == bits(half["norm.weight"].astype(np.float32))
    with pytest.raises(WeightError, match=r"norm\.weight is float16, parameter norm/scale is"):
        load(half, TABLE, abstract())
    for wrong in (np.int32, np.float64):
        other = {**tensors, "norm.weight": np.ones(8, wrong)}
        with pytest.raises(WeightError, match=f"is {np.dtype(wrong)}"):
            load(other, TABLE, abstract(), dtype=np.float32)
    table, tree = Table("t", (Rule("n", "n"),)), {"n": jax.ShapeDtypeStruct((2,), np.int32)}
    count = {"n": np.array([1, 2], np.int32)}
    assert load(count, table, tree, dtype=np.float32)["n"].dtype == np.int32
    with pytest.raises(WeightError, match="n is float32, parameter n is int32"):
        load({"n": np.ones(2, np.float32)}, table, tree, dtype=np.float32)
    with pytest.raises(WeightError, match="cuts to 32 bits"):
        load({"n": np.ones(2, int)}, table, {"n": jax.ShapeDtypeStruct((2,), np.int64)})


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_file_dtype_to_requested_dtype(tmp_path, stored, wanted):
    """Rounded as PyTorch rounds, transposed or not."""
    tensors = upstream(dtype=stored)
    save(tmp_path / "model.safetensors", tensors)
    params = load(tmp_path, TABLE, abstract(), dtype=wanted)
    of_torch = safetensors.torch.load_file(tmp_path / "model.safetensors")
    kind = getattr(torch, np.dtype(wanted).name)
    for name, got in (
        ("blocks.1.fc.weight", params["block1"]["fc"]["kernel"].T),
        ("layers.2.fc.bias", params["layers"]["fc"]["bias"][2]),
    ):
        assert got.dtype == wanted
        expected = of_torch[name].to(kind).to(torch.float32).numpy()
        np.testing.assert_array_equal(np.asarray(got).astype(np.float32), expected)


@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
def test_numbers_beyond_float16_are_not_made_infinite(stored):
    tensors = upstream(dtype=stored)
    tensors["layers.1.fc.weight"][2, 3] = -np.inf  # infinite already
    load(tensors, TABLE, abstract(), dtype=np.float16)
    tensors["norm.weight"][5] = 1e5
    with pytest.raises(WeightError, match="parameter norm/scale: mapping has numbers beyond"):
        load(tensors, TABLE, abstract(), dtype=np.float16)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (ml_dtypes.float8_e4m3fn, "float8_e4m3fn, .* mean nothing without their scales"),
        (ml_dtypes.float8_e5m2, "float8_e5m2, .* mean nothing without their scales"),
        (np.int8, "int8, .* mean nothing without their scales"),
        (np.uint8, "uint8, .* or a GGUF file"),
        (np.int32, "int32, .* mean nothing without their scales"),
        (np.float64, "float64, .* store it anew"),
    ],
)
@pytest.mark.parametrize("wanted", [None, np.float32])
def test_dtypes_that_are_not_weights_are_refused_in_words(kind, words, wanted):
    tensors = {**upstream(), "norm.weight": np.ones(8, kind)}
    with pytest.raises(WeightError, match=words):
        load(tensors, TABLE, abstract(), dtype=wanted)
    with pytest.raises(ValueError, match="is not one of float32, bfloat16, float16"):
        load(upstream(), TABLE, abstract(), dtype=kind)


def test_a_conversion_that_was_not_asked_for_is_offered():
    with pytest.raises(WeightError, match=r"float16, .*; give dtype= to convert"):
        load(upstream(dtype=np.float16), TABLE, abstract())


def test_the_reference_library_reads_what_save_writes(tmp_path):
    tensors = {
        "z": np.ones((2, 3), ml_dtypes.bfloat16),
        "a": np.arange(3, dtype=np.uint8),
        "scalar": np.array(3.0, np.float32),
        "t": np.arange(6, dtype=np.float64).reshape(2, 3).T,
        "empty": np.zeros((0, 2), np.float16),
    }
    path = tmp_path / "new" / "x.safetensors"
    save(path, tensors)
    read = safetensors.torch.load_file(path)
    assert set(read) == set(tensors)
    assert read["z"].dtype == torch.bfloat16 and bool((read["z"] == 1).all())
    np.testing.assert_array_equal(read["t"].numpy(), tensors["t"])
    assert read["scalar"].shape == () and read["empty"].shape == (0, 2)
    length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    assert length % 8 == 0 and json.loads(path.read_bytes()[8 : 8 + length])


def test_save_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save(path, {"a": np.ones(2, np.float32)})
    with pytest.raises(WeightError, match="no dtype complex64"):
        save(path, {"a": np.ones(2, np.complex64)})

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        save(path, {"a": np.zeros(2, np.float32)})
    assert [each.name for each in tmp_path.iterdir()] == ["x.safetensors"]
    np.testing.assert_array_equal(resolve(path)["a"].read(), np.ones(2, np.float32))


@pytest.mark.parametrize("kind", [np.float32, ml_dtypes.bfloat16])
def test_the_host_holds_little_beside_the_model(tmp_path, monkeypatch, kind):
    """Stacked or not, padded, transposed, converted: a few stretches for each thread."""
    # Stretches as small, against the model, as they are with real ones.
    monkeypatch.setattr(loading, "_STRETCH_BYTES", 2**16)
    monkeypatch.setattr(loading, "_MAX_THREADS", 2)
    layers, size = 4, 1024
    tensors = {f"l.{i}.w": np.full((size, size), i, np.float32) for i in range(layers)}
    tensors["e"] = np.arange(4 * size * size, dtype=np.float32).reshape(-1, size)
    save(tmp_path / "model.safetensors", tensors)
    table = Table("t", (Rule("l.{i}.w", "w", LINEAR), Rule("e", "e", PadAxis(0, 4096, 4104))))
    shapes = {"w": (layers, size, size), "e": (4104, size)}
    tree = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    embed = tensors.pop("e")
    tensors.clear()
    tracemalloc.start()
    params = load(tmp_path, table, tree, dtype=kind)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    model = sum(each.nbytes for each in params.values())
    assert model < peak < 1.15 * model
    assert params["w"][3, 3, 2] == 3
    assert bits(params["e"][:4096]) == bits(embed.astype(kind))


def test_a_copy_through_padded_rows():
    draw = np.random.default_rng(0)
    for kind in (np.float32, ml_dtypes.bfloat16, np.bool_, np.complex128):
        array = draw.standard_normal((6, 1, 5, 4)).astype(kind)
        for axes in itertools.permutations(range(4)):
            expected = np.ascontiguousarray(array.transpose(axes))
            out = np.zeros_like(expected)
            copy_into(out, array.transpose(axes))
            assert bits(out) == bits(expected)
            copy_into(out[1:, ::2], array.transpose(axes)[:-1, ::2])
            assert bits(out[1:, ::2]) == bits(expected[:-1, ::2])
    scalar = np.zeros((), np.float32)
    copy_into(scalar, np.array(2.0))
    assert scalar == 2


def test_nothing_is_read_before_everything_fits(tmp_path, monkeypatch):
    tensors = upstream()
    del tensors["norm.weight"]
    save(tmp_path / "model.safetensors", tensors)

    def read(self, index=None):
        raise AssertionError("read a tensor of a checkpoint that does not fit")

    monkeypatch.setattr(FileTensor, "read", read)
    with pytest.raises(WeightError, match="1 missing"):
        load(tmp_path, TABLE, abstract())


def test_a_lightning_checkpoint_goes_in_and_comes_out(tmp_path):
    tensors = upstream("encoder.")
    state = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    state["encoder.stem.weight"] = state["encoder.stem.weight"].to(
        memory_format=torch.channels_last
    )
    torch.save({"state_dict": state, "epoch": 1, "callbacks": {Path: 1}}, tmp_path / "x.ckpt")
    written = export(load(tmp_path / "x.ckpt", TABLE, abstract()), TABLE, names=tensors)
    assert set(written) == set(tensors)
    assert all(bits(written[name]) == bits(tensors[name]) for name in tensors)


def test_on_eight_devices():
    """Each part is read once, whichever of the devices hold it."""
    devices.run(Path(__file__).with_name("sharded_load.py"), quick=False)


def test_in_two_processes(tmp_path):
    """Each process reads its half only; export gathers the whole in both."""
    script = Path(__file__).with_name("sharded_load.py")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    running = [
        devices.start([script, address, n, tmp_path], devices=4, quick=False) for n in range(2)
    ]
    try:
        outputs = [each.communicate(timeout=devices.WAIT)[0] for each in running]
    finally:
        for each in running:
            each.kill()
    assert [each.returncode for each in running] == [0, 0], "\n".join(outputs)
