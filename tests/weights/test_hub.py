"""Hub repositories through the Hub's own client, against a server on loopback."""

import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from huggingface_hub import constants

from medalign_jax.weights import WeightError, resolve
from medalign_jax.weights.load import save
from tests.hub_server import GATED, Repository, point_client_at, running
from tests.saved_forms import FILES, FLOAT32_SHARDS

ARRAYS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b.weight": np.arange(4, dtype=np.float16),
    "c.weight": np.ones(3, np.float32),
}
# What tokenizers and processors of all the families have beside the weights.
SMALL = (
    *("config.json", "generation_config.json", "preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"),
    *("chat_template.jinja", "chat_template.json"),
)
LARGE = ("README.md", "flax_model.msgpack", "tf_model.h5", "training_args.bin.old", "demo.wav")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with running() as hub:
        point_client_at(hub, tmp_path / "cache", monkeypatch)
        yield hub


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in SMALL:
        text = {"model_type": "bert"} if name == "config.json" else {"text": name}
        (folder / name).write_text(json.dumps(text))
    for name in LARGE:
        (folder / name).write_text(f"{name}: not to be fetched")
    return folder


def tensors():
    return {name: torch.from_numpy(array) for name, array in ARRAYS.items()}


def save_bin(path, state):
    torch.save(state, path)


def with_duplicates(folder, state):
    """Like openai/whisper-large-v3: the whole again in float32, in shards and in other formats."""
    FLOAT32_SHARDS(folder, state)
    FILES["bin shards"](folder, state)
    return FILES["safetensors"](folder, state)


def with_bin_duplicate(folder, state):
    FILES["bin"](folder, state)
    return FILES["safetensors shards"](folder, state)


FORMS = FILES | {
    "safetensors among duplicates": with_duplicates,
    "shards beside a bin": with_bin_duplicate,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_saved_form_is_found_and_nothing_else_is_fetched(hub, folder, form):
    weights = FORMS[form](folder, tensors())
    commit = hub.put("org/name", folder)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        opened = resolve("org/name")
    only_bin = not any(name.endswith(".safetensors") for name in weights)
    assert any("no safetensors file there" in str(each.message) for each in said) == only_bin
    assert opened.identity == resolve(ARRAYS).identity == resolve(folder).identity
    assert opened.config == {"model_type": "bert"} and opened.folder.name == commit
    indices = {path.name for path in folder.glob("*.index*.json")}
    assert hub.fetched() == {*SMALL, *weights, *indices}
    assert {path.name for path in opened.folder.iterdir()} == {*SMALL, *weights, *indices}
    for name in weights:
        assert set(resolve(f"org/name@{commit}:{name}")) <= set(ARRAYS)
    assert not hub.fetched()  # from the cache


def test_shards_come_when_they_are_looked_into(hub, folder):
    FILES["safetensors shards"](folder, tensors())
    hub.put("org/name", folder)
    opened = resolve("org/name")
    assert set(opened) == set(ARRAYS)
    assert not any(name.endswith(".safetensors") for name in hub.fetched())
    np.testing.assert_array_equal(opened["b.weight"].read(), ARRAYS["b.weight"])
    assert opened["b.weight"].shape == (4,) and opened["b.weight"].dtype == np.float16
    assert hub.fetched() == {"model-00002-of-00003.safetensors"}


@pytest.mark.parametrize("file", ["pytorch_model.bin", "sub/encoder.ckpt"])
def test_tokenizer_files_come_with_a_named_file(hub, folder, file):
    place = (folder / file).parent
    place.mkdir(exist_ok=True)
    save_bin(folder / file, tensors())
    save(folder / "model.safetensors", {"other": np.zeros(2)})
    if place != folder:
        (place / "config.json").write_text('{"model_type": "clap"}')
        (place / "vocab.txt").write_text("x")
    hub.put("org/name", folder)
    opened = resolve(f"org/name:{file}")
    assert opened.identity == resolve(ARRAYS).identity
    beside = {"sub/config.json", "sub/vocab.txt"} if place != folder else set()
    assert hub.fetched() == {*SMALL, file, *beside}
    assert (opened.folder / "vocab.txt").is_file()
    assert opened.config["model_type"] == ("clap" if beside else "bert")


def test_what_lies_in_folders_is_not_fetched(hub, folder):
    FILES["safetensors"](folder, tensors())
    (folder / "onnx").mkdir()
    for name in ("onnx/config.json", "onnx/model.safetensors"):
        (folder / name).write_text("{}")
    hub.put("org/name", folder)
    resolve("org/name")
    assert hub.fetched() == {*SMALL, "model.safetensors"}


def test_revisions(hub, folder):
    save(folder / "model.safetensors", {"w": np.zeros(2, np.float32)})
    first = hub.put("org/name", folder, "v1", "refs/pr/3", "main")
    save(folder / "model.safetensors", {"w": np.ones(2, np.float32)})
    hub.put("org/name", folder)

    def number(source):
        return float(resolve(source)["w"].read()[0])

    assert number("org/name") == number("org/name@main") == 1
    assert number("org/name@v1") == number(f"org/name@{first}") == number("org/name@refs/pr/3") == 0
    with pytest.raises(WeightError, match="the repository has no revision 'v9'"):
        resolve("org/name@v9")


def test_refusals_say_what_to_do(hub, folder):
    FILES["safetensors"](folder, tensors())
    hub.put("org/name", folder)
    with pytest.raises(WeightError, match=r"^org/nothing: .*check the spelling"):
        resolve("org/nothing")
    with pytest.raises(WeightError, match=r"no file other\.ckpt in the repository"):
        resolve("org/name:other.ckpt")
    for refuse, words in (
        (GATED, r"gated: accept the licence at https://huggingface\.co/org/name and log in"),
        ((401, "GatedRepo"), r"gated: accept the licence"),
        ((403, ""), r"refused by the Hub \(HTTP 403\): the token"),
    ):
        hub.repositories["org/name"].refuse = refuse
        with pytest.raises(WeightError, match=words):
            resolve("org/name")


def test_a_repository_without_weights(hub, folder):
    hub.put("org/name", folder)
    with pytest.raises(WeightError, match=r"no weights at the top of the repository.*org/name:FI"):
        resolve("org/name")
    hub.repositories["org/empty"] = Repository()
    hub.repositories["org/empty"].commit({})
    with pytest.raises(WeightError, match="no weights at the top of the repository"):
        resolve("org/empty")
    for name in ("one.ckpt", "two.ckpt"):
        save_bin(folder / name, tensors())
    hub.put("org/name", folder)
    with pytest.raises(WeightError, match=r"several weight files.*one\.ckpt, two\.ckpt"):
        resolve("org/name")


def unplugged(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def down(hub, monkeypatch):
    hub.down = True


@pytest.mark.parametrize("cut", [unplugged, down])
def test_without_the_hub_the_cache_serves(hub, folder, monkeypatch, cut):
    FILES["safetensors shards"](folder, tensors())
    hub.put("org/name", folder)
    online = resolve("org/name")
    online["a.weight"].read()
    hub.put("org/never", folder)
    cut(hub, monkeypatch)
    opened = resolve("org/name")
    assert set(opened) == set(ARRAYS)
    np.testing.assert_array_equal(opened["a.weight"].read(), ARRAYS["a.weight"])
    with pytest.raises(WeightError, match=r"model-00002-of-00003\.safetensors.*the Hub"):
        opened["b.weight"].read()
    with pytest.raises(WeightError, match="offline: "):
        resolve("org/never")


def test_a_client_that_is_told_of_the_server_by_its_environment(hub, folder, tmp_path):
    FILES["bin of before 1.6"](folder, tensors())
    hub.put("org/name", folder)
    code = "from medalign_jax.weights import resolve; print(resolve('org/name').identity)"
    told = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "own"), "HF_HUB_OFFLINE": "0"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | told, capture_output=True, text=True
    )
    assert run.stdout.strip() == resolve(ARRAYS).identity, run.stderr
