"""Prepared data sets to damage, as a folder and shard by shard; see `tests.fuzz.targets`."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np

_RATE = 8000


def write_prepared(folder: Path) -> None:
    import soundfile

    from medalign_jax.data.recordings import prepare

    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for i in range(4):
            soundfile.write(place / f"{i}.wav", 0.3 * np.sin(np.arange(800) / (3.0 + i)), 8000)
        rows = (f"{i}.wav,s{i},{('train', 'test')[i // 2]},a,heard {i},{20 + i}" for i in range(4))
        header = "audio_path,subject_id,split,label,report,age"
        (place / "a.csv").write_text("\n".join([header, *rows]))
        arguments = [f"--manifest={place / 'a.csv'}", f"--out={place / 'out'}", "--targets=age",
                     f"--sample_rate={_RATE}"]  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):
            if prepare.main(arguments):
                raise RuntimeError("the folder to damage was not prepared")
        shutil.copytree(place / "out", folder, dirs_exist_ok=True)


def read_prepared(path: Path) -> None:
    """As it is, and as if it had been written so: else nothing is seen behind the checksums."""
    from medalign_jax.core.errors import UserError
    from medalign_jax.data.recordings.dataset import open_dataset

    with contextlib.suppress(UserError):
        open_dataset(path.parent, sample_rate=_RATE)
    with tempfile.TemporaryDirectory(dir=path.parent.parent) as name:
        shutil.copytree(path.parent, name, dirs_exist_ok=True)
        _sign_again(Path(name))
        data = open_dataset(name, sample_rate=_RATE)
        for i in range(len(data)):
            data.waveform(i)


def _sign_again(folder: Path) -> None:
    from medalign_jax.core import seals
    from medalign_jax.data.recordings import records

    (folder / seals.NAME).unlink()
    path = folder / records.DESCRIPTION
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):  # damaged itself
        found = json.loads(path.read_text())
        found["files"] = {
            p.name: p.stat().st_size for p in folder.iterdir() if p.name in found["files"]
        }
        found["rows_sha256"] = records.sha256(folder / records.ROWS)
        path.write_text(json.dumps(found))


def write_array_record(folder: Path) -> None:
    """The shards alone: a mutation of the folder seldom falls on one."""
    with tempfile.TemporaryDirectory() as name:
        write_prepared(Path(name))
        for path in Path(name).glob("*.array_record*"):
            shutil.copy(path, folder)


def read_array_record(path: Path) -> None:
    from medalign_jax.data.recordings.records import RecordSource

    source = RecordSource([str(path)], _RATE, None)
    for i in range(len(source)):
        source.clip(i)
