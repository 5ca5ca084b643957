"""PyTorch's zip files (`.pt`, `.pth`, `.ckpt`, `.bin`), read without running what is in them.

Format: a zip whose `NAME/data.pkl` is a pickle of the saved object, with each storage left out and
named by a persistent id, and whose `NAME/data/KEY` are the storages, not compressed
(`torch.serialization`, "zip file format").
"""

import io
import struct
import zipfile
from pathlib import Path

from medalign_jax.core.files import DAMAGED_ZIP
from medalign_jax.weights.lazy import FileTensor, WeightError
from medalign_jax.weights.torch_pickle import (
    MAX_PICKLE_BYTES,
    Stretch,
    TensorUnpickler,
    claims,
    load_pickle,
    located,
)


def open_torch_zip(path: Path) -> dict[str, FileTensor]:
    """Tensors of a file written by `torch.save`, by their name in its state dict.

    Which dict that is: see `torch_pickle.claims`.

    Raises:
      WeightError: not such a file, damaged, or a tensor reaches beyond its storage.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root, data = _read_pickle(path, archive)
            entries = {
                info.filename.removeprefix(f"{root}/data/"): info
                for info in archive.infolist()
                if info.filename.startswith(f"{root}/data/")
            }
    except WeightError:  # a ValueError too
        raise
    except DAMAGED_ZIP as error:
        raise WeightError(f"{path}: damaged PyTorch zip file ({error})") from error

    def find(key: str) -> Stretch | None:
        entry = entries.get(key)
        return None if entry is None else Stretch(_data_start(path, entry), entry.file_size)

    unpickler = TensorUnpickler(io.BytesIO(data))
    tensors = claims(path, load_pickle(path, unpickler), unpickler.unknown)
    missing = "data/{key} is missing from the zip file"
    return {name: located(path, name, each, find, missing) for name, each in tensors.items()}


def _read_pickle(path: Path, archive: zipfile.ZipFile) -> tuple[str, bytes]:
    names = archive.namelist()
    pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise WeightError(f"{path}: a zip file, but not one that torch.save wrote (no data.pkl)")
    root = pickles[0].removesuffix("/data.pkl")
    if archive.getinfo(pickles[0]).file_size > MAX_PICKLE_BYTES:
        raise WeightError(f"{path}: data.pkl is larger than {MAX_PICKLE_BYTES} bytes; refused")
    if f"{root}/byteorder" in names and archive.read(f"{root}/byteorder") != b"little":
        raise WeightError(f"{path}: saved on a big-endian machine, which is not read")
    return root, archive.read(pickles[0])


def _data_start(path: Path, entry: zipfile.ZipInfo) -> int:
    """Byte of the file where an entry's content begins: after its local header, of free length."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise WeightError(f"{path}: {entry.filename} is compressed or encrypted; save it anew")
    with path.open("rb") as file:
        file.seek(entry.header_offset)
        header = file.read(30)
        file.seek(0, io.SEEK_END)
        size = file.tell()
    if len(header) != 30 or header[:4] != b"PK\x03\x04":
        raise WeightError(f"{path}: {entry.filename} has no zip header")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    start = entry.header_offset + 30 + name_length + extra_length
    if start + entry.file_size > size:
        raise WeightError(f"{path}: {entry.filename} reaches beyond the end of the file")
    return start
