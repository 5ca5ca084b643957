"""Prepared data sets: array_record files in TFDS's form, and a row table beside them.

A prepared folder holds

    prepared.json           how it was made, and what has to be there for it to be whole
    rows.jsonl              one object per recording, in the manifest's order
    auscultation-SPLIT.array_record-*, dataset_info.json, features.json         (TFDS)

so that opening it decodes no audio, and TFDS can open it too (`tfds.builder_from_directory`).
`medalign_jax.data.recordings.prepare` writes it; a folder gets its name when all of it is there.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from medalign_jax.core.files import check_name
from medalign_jax.core.seals import DamagedError, check_seal
from medalign_jax.core.words import did_you_mean
from medalign_jax.data.recordings.manifest import SPLITS, Problem, Row
from medalign_jax.data.recordings.sources import Clip
from medalign_jax.data.tables import ManifestError

FORMAT = 1
NAME = "auscultation"
DESCRIPTION = "prepared.json"
ROWS = "rows.jsonl"
_AGAIN = "delete it and prepare the data set again"
_SHARD = re.compile(rf"{NAME}-({'|'.join(SPLITS)})\.array_record-\d{{5}}-of-\d{{5}}")


@dataclass(frozen=True)
class Recipe:
    """What decides the content of a prepared folder, beside the manifest and its files."""

    sample_rate: int
    max_seconds: float | None
    targets: tuple[str, ...]

    def differences(self, description: dict[str, object]) -> list[str]:
        """What a folder's description says otherwise, in words."""
        asked = json.loads(json.dumps(asdict(self)))
        return [
            f"{name} is {description.get(name)!r} there and {value!r} now"
            for name, value in asked.items()
            if description.get(name) != value
        ]


def audio_features() -> dict[str, object]:
    """TFDS features of a clip: `audio` (samples,) int16, and `scale`; waveform = audio * scale."""
    import tensorflow_datasets as tfds

    return {
        # As bytes: TFDS's Audio feature needs TensorFlow, and its integers take 2 to 10 bytes.
        "audio": tfds.features.Tensor(shape=(None,), dtype=np.int16, encoding="bytes"),
        "scale": tfds.features.Scalar(np.float32),
    }


class RecordSource:
    """Clips of a prepared folder by record number."""

    def __init__(self, paths: Sequence[str], sample_rate: int, max_samples: int | None):
        """Opens the array_record files `paths`, whose records count on from file to file.

        Raises:
          ManifestError: one is damaged.
        """
        self.paths = tuple(paths)
        self.sample_rate = sample_rate
        self.max_samples = max_samples
        self._open()

    def _open(self) -> None:
        import tensorflow_datasets as tfds
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        try:
            self._records = ArrayRecordDataSource(list(self.paths))
        except (RuntimeError, ValueError, IndexError) as error:
            raise self._damaged("a file", error) from error
        # From here, not from features.json: that file can name any class to import.
        self._features = tfds.features.FeaturesDict(audio_features())

    def _damaged(self, what: str, error: Exception) -> ManifestError:
        folder, reason = Path(self.paths[0]).parent, " ".join(str(error).split())
        return ManifestError(f"'{folder}' is damaged: {what} cannot be read ({reason}); {_AGAIN}")

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._records)

    def clip(self, position: int) -> Clip:
        """Record `position`.

        Raises:
          ManifestError: it is damaged.
        """
        try:
            found = self._features.deserialize_example_np(self._records[position])
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            raise self._damaged(f"record {position}", error) from error
        return Clip(found["audio"][: self.max_samples], float(found["scale"]))


@dataclass(frozen=True)
class Records:
    """A prepared folder, opened: rows, the record number and the sound of each, and the clips."""

    rows: tuple[Row, ...]
    numbers: tuple[int, ...]
    sounds: tuple[str, ...]
    source: RecordSource
    problems: tuple[Problem, ...]


def open_records(
    folder: str | Path, targets: Sequence[str], max_seconds: float | None, sample_rate: int
) -> Records:
    """Opens a prepared folder without decoding audio.

    Args:
      folder: written by `medalign_jax.data.recordings.prepare`.
      targets: target columns to keep; none named keeps all that were prepared.
      max_seconds: what is read of a longer recording.
      sample_rate: has to be the one prepared.

    Raises:
      ManifestError: not a whole prepared folder, or prepared at another sample rate or
        without a target.
      UserError: the folder's name is not UTF-8.
    """
    folder = Path(folder)
    check_name(folder.absolute())
    description = read_description(folder)
    names = check_files(folder, description)
    try:
        rate, limit, cut = (description[name] for name in ("sample_rate", "max_seconds", "cut"))
        prepared = tuple(description["targets"])
        rows, numbers, sounds = _rows(folder, tuple(targets) or prepared)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ManifestError(
            f"'{folder}' is damaged ({error!r}); delete it and prepare the data set again"
        ) from None
    if rate != sample_rate:
        raise ManifestError(
            f"'{folder}' was prepared at {rate} Hz, not {sample_rate} Hz; prepare it again"
        )
    for target in targets:
        if target not in prepared:
            raise ManifestError(
                f"'{folder}' was prepared without the target '{target}'"
                f"{did_you_mean(target, prepared)}; prepare it again with --targets"
            )
    problems = []
    if cut and limit is not None and (max_seconds is None or max_seconds > limit):
        note = f"{cut} recordings were cut to their first {limit:g} s when they were prepared"
        problems.append(Problem(None, "", note, fatal=False))
    max_samples = None if max_seconds is None else round(max_seconds * sample_rate)
    source = RecordSource([str(folder / name) for name in names], sample_rate, max_samples)
    if sorted(numbers) != list(range(len(source))):
        raise ManifestError(
            f"'{folder}' is damaged: {len(rows)} rows for {len(source)} records; prepare it again"
        )
    return Records(tuple(rows), tuple(numbers), tuple(sounds), source, tuple(problems))


def _rows(folder: Path, targets: tuple[str, ...]) -> tuple[list[Row], list[int], list[str]]:
    rows, numbers, sounds = [], [], []
    with open(folder / ROWS, encoding="utf-8") as file:
        for line in file:
            found = json.loads(line)
            kept = {t: found["targets"][t] for t in targets if t in found["targets"]}
            columns = {field.name: found[field.name] for field in fields(Row)}
            row = Row(**columns | {"targets": kept})
            # Folders of earlier versions know the recording's file only.
            sound = found.get("sound") or f"file {found['sha256']}"
            _check_kinds(row, found["record"], sound)
            rows.append(row)
            numbers.append(found["record"])
            sounds.append(sound)
    return rows, numbers, sounds


def _check_kinds(row: Row, number: object, sound: object) -> None:
    """Raises TypeError for values that `medalign_jax.data.recordings.prepare` does not write."""
    texts = [row.audio_path, row.subject_id, row.split, row.label or "", row.report or "", sound]
    for kept in (row.targets, row.metadata):
        texts += [*kept.keys(), *kept.values()]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"row {row.row} has something else in the place of a text")
    if not all(type(n) is int for n in (row.row, number)) or row.split not in SPLITS:
        raise TypeError(f"row {row.row} has no number, record or split")


def read_description(folder: Path) -> dict[str, object]:
    """The content of prepared.json.

    Raises:
      ManifestError: there is none, or of another format.
    """
    path = folder / DESCRIPTION
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ManifestError(
            f"'{folder}' is not a prepared data set: no readable {DESCRIPTION} in it; give a "
            "manifest file, or a folder that `medalign prepare` has finished"
        ) from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ManifestError(f"'{path}' is not of format {FORMAT}; prepare the data set again")
    return found


def check_files(folder: Path, description: dict[str, object]) -> list[str]:
    """The record files in record order, after seeing that every file is there and whole.

    Raises:
      ManifestError: a file is missing or has another size, or one beside the records has
        other bytes than when it was written.
    """
    sizes = description.get("files")
    if not isinstance(sizes, dict) or not all(Path(name).name == name for name in sizes):
        raise ManifestError(f"'{folder / DESCRIPTION}' lists no files; prepare the data set again")
    wrong = [name for name, size in sizes.items() if _size(folder / name) != size]
    if not wrong and sha256(folder / ROWS) != description.get("rows_sha256"):
        wrong = [ROWS]
    if wrong:
        raise ManifestError(
            f"'{folder}' is damaged: missing or changed are {', '.join(wrong)}; {_AGAIN}"
        )
    try:
        check_seal(folder)
    except DamagedError as error:
        raise ManifestError(f"{error}; {_AGAIN}") from error
    if not (found := shards(sizes)):
        raise ManifestError(f"'{folder / DESCRIPTION}' lists no records; {_AGAIN}")
    return found


def shards(names: Iterable[str]) -> list[str]:
    """The array_record files among them, in record order; each record has a hash of its own."""
    found = sorted(name for name in names if _SHARD.fullmatch(name))
    return [name for split in SPLITS for name in found if _SHARD.fullmatch(name)[1] == split]


def _size(path: Path) -> int:
    return os.path.getsize(path) if os.path.isfile(path) else -1  # also for impossible names


def sha256(path: str | Path) -> str:
    """SHA-256 of a file in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
