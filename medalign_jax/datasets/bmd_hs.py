"""BMD-HS: heart sounds of the valves, by patient, as a manifest.

    python -m medalign_jax.datasets.bmd_hs --root=BMD-HS-Dataset --out=DIR/metadata.csv

The BUET Multi-disease Heart Sound data set (Ali et al. 2024, arXiv 2409.00724; repository
mHealthBuet/BMD-HS-Dataset): 108 patients with aortic stenosis (AS), aortic regurgitation (AR),
mitral regurgitation (MR), mitral stenosis (MS), several of them at once, or none (N); of each
patient eight recordings of 20 s at 4 kHz, supine and sitting, over the four valve areas::

    train.csv                 patient_id,AS,AR,MR,MS,N,recording_1,...,recording_8
    additional_metadata.csv   patient_id,Age,Gender,Smoker,Lives
    train/<CLASS>_<patient>_<sup|sit>_<Mit|Tri|Pul|Aor>.wav

The manifest has one row a recording. Reports come from its columns `diagnosis`, `posture` and
`valve_area` (see `medalign_jax.data.reports`); `fold` deals the patients out for cross-validation.

What is wrong in the published files is said on the screen and dealt with:

* Recordings that are named and do not exist are left out.
* Of recordings that are sample for sample another one of the same patient, one is kept. It was
  made in one of the places that the copies name, and nobody knows in which: where they disagree,
  posture or valve area stays empty.
* File names begin with the class. Nothing is read from that part, and nothing else may read it:
  the path is no feature, and no report is made from it.
"""

import argparse
import csv
import hashlib
import io
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from medalign_jax.audio import io as audio_io
from medalign_jax.data.tables import BadRecord, read_table
from medalign_jax.datasets.splits import deal_folds
from medalign_jax.errors import UserError
from medalign_jax.files import write_whole

LABELS = ("AS", "AR", "MR", "MS", "N")
REPORTS = ("full", "no_diagnosis")
COLUMNS = ("audio_path", "subject_id", *LABELS, "age", "sex", "smoker", "lives", "organ",
           "diagnosis", "posture", "valve_area", "report", "fold")  # fmt: skip
RECORDINGS = tuple(f"recording_{number}" for number in range(1, 9))
_SEXES, _LIVES = {"M": "male", "F": "female"}, {"U": "urban", "R": "rural"}
_POSTURES = {"sup": "supine", "sit": "sitting"}
_AREAS = {"Mit": "MV", "Tri": "TV", "Pul": "PV", "Aor": "AV"}
_PLACE = re.compile(rf"_({'|'.join(_POSTURES)})_({'|'.join(_AREAS)})$")
_NOTHING_KNOWN = "Recording of heart sounds."


class BmdHsError(UserError):
    """A folder that is not BMD-HS in its published layout."""


@dataclass(frozen=True)
class Patient:
    """A row of both tables.

    Attributes:
      name: such as "patient_001".
      labels: 0 or 1 for each of `LABELS`.
      about: age (years), sex ("female", "male"), smoker (0 or 1), lives ("urban", "rural").
      recordings: names of files in `train`, without suffix.
    """

    name: str
    labels: tuple[int, ...]
    about: Mapping[str, str]
    recordings: tuple[str, ...]


@dataclass(frozen=True)
class Recording:
    """One file and where it was recorded; an empty text where that is not known."""

    patient: Patient
    path: Path
    posture: str
    valve_area: str


def read_patients(root: str | Path) -> list[Patient]:
    """The patients of both tables, in the order of `train.csv`.

    Raises:
      BmdHsError: a table or column is missing, a label is not 0 or 1, a patient with no label, with
        "N" beside a disease, without a row of metadata or with two rows; names the patient.
    """
    root = Path(root)
    needed = ("patient_id", *LABELS, *RECORDINGS)
    table = _read(root / "train.csv", needed)
    about = _read(
        root / "additional_metadata.csv", ("patient_id", "Age", "Gender", "Smoker", "Lives")
    )
    if lacking := sorted(set(table) - set(about)):
        raise BmdHsError(f"{root}: additional_metadata.csv has no row for {', '.join(lacking)}")
    return [_patient(root, row, about[name]) for name, row in table.items()]


def find_recordings(
    patients: Sequence[Patient], root: str | Path
) -> tuple[list[Recording], list[str]]:
    """The recordings that can be used, and what is wrong with the others in words.

    Raises:
      BmdHsError: a name that does not end in posture and valve area, or two patients that name the
        same recording, or the same samples.
    """
    found: list[Recording] = []
    notes: list[str] = []
    owner: dict[str, str] = {}
    first: dict[bytes, int] = {}
    for patient in patients:
        for name in patient.recordings:
            if owner.setdefault(name, patient.name) != patient.name or not name:
                raise BmdHsError(f"{patient.name} and {owner[name]} both name recording {name!r}")
            recording = Recording(patient, Path(root) / "train" / f"{name}.wav", *_place(name))
            if not recording.path.exists():
                notes.append(f"{name}: named in train.csv, but there is no such file; left out")
                continue
            same = first.setdefault(_digest(recording.path), len(found))
            if same == len(found):
                found.append(recording)
                continue
            found[same] = _merged(found[same], recording)
            notes.append(
                f"{name}: sample for sample {found[same].path.stem}; left out, and where the two "
                "disagree on posture or valve area the other one's is left empty"
            )
    return found, notes


def manifest_rows(
    recordings: Sequence[Recording], fold: Mapping[str, int], folder: Path, reports: str
) -> list[dict[str, object]]:
    """Rows of the manifest.

    Args:
      recordings: from `find_recordings`.
      fold: patient's name -> fold.
      folder: where the manifest will lie; files inside it are named relative to it.
      reports: "full", or "no_diagnosis" to leave the column `diagnosis` empty, so that reports say
        where a recording was made and nothing of what the patient has.
    """
    rows = []
    for recording in recordings:
        patient = recording.patient
        row: dict[str, object] = dict.fromkeys(COLUMNS, "")
        row |= {
            "audio_path": _seen_from(recording.path, folder),
            "subject_id": patient.name,
            "organ": "heart",
            "posture": recording.posture,
            "valve_area": recording.valve_area,
            "fold": fold[patient.name],
        }
        row |= dict(zip(LABELS, patient.labels, strict=True)) | dict(patient.about)
        if reports == "full":
            row["diagnosis"] = _diagnosis(patient.labels)
        elif not (recording.posture or recording.valve_area):
            row["report"] = _NOTHING_KNOWN
        rows.append(row)
    return rows


def write_manifest(
    root: str | Path, out: str | Path, *, folds: int = 5, seed: int = 0, reports: str = "full"
) -> list[str]:
    """Reads the published layout and writes the manifest, whole or not at all.

    Args:
      root: the folder with `train.csv`.
      out: the CSV to write.
      folds, seed: see `deal_folds`.
      reports: see `manifest_rows`.

    Returns:
      What is wrong with the files, in words.

    Raises:
      BmdHsError: see `read_patients`, `find_recordings` and `deal_folds`; unknown `reports`.
    """
    if reports not in REPORTS:
        raise BmdHsError(f"reports {reports!r} is not one of {', '.join(REPORTS)}")
    out = Path(out)
    patients = read_patients(root)
    dealt = deal_folds(np.array([patient.labels for patient in patients]), folds, seed)
    fold = {patient.name: int(f) for patient, f in zip(patients, dealt, strict=True)}
    recordings, notes = find_recordings(patients, root)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(manifest_rows(recordings, fold, out.parent, reports))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, text.getvalue().encode())
    return notes


def _read(path: Path, columns: Sequence[str]) -> dict[str, dict[str, str]]:
    """A table by patient."""
    if not path.exists():
        raise BmdHsError(f"there is no '{path}'; --root is the folder that holds train.csv")
    table = read_table(path, "patient_id")
    if lacking := [name for name in columns if name not in table.columns]:
        raise BmdHsError(f"'{path}' has no column {', '.join(lacking)}")
    rows: dict[str, dict[str, str]] = {}
    for number, record in enumerate(table.records, start=1):
        if isinstance(record, BadRecord):
            raise BmdHsError(f"'{path}', row {number}: {record.reason}")
        row = {name: record.get(name, "").strip() for name in columns}
        if row["patient_id"] in rows or not row["patient_id"]:
            raise BmdHsError(f"'{path}', row {number}: patient {row['patient_id']!r} again")
        rows[row["patient_id"]] = row
    return rows


def _patient(root: Path, row: Mapping[str, str], about: Mapping[str, str]) -> Patient:
    name = row["patient_id"]
    values = [row[label] for label in LABELS]
    if not set(values) <= {"0", "1"}:
        raise BmdHsError(f"{root}: {name} has labels {', '.join(values)}; they are 0 or 1")
    labels = tuple(map(int, values))
    if bool(labels[-1]) == any(labels[:-1]):
        raise BmdHsError(f"{root}: {name} is N (no disease) and diseased at once, or neither")
    known = about["Gender"] in _SEXES and about["Lives"] in _LIVES and about["Smoker"] in ("0", "1")
    if not known or not about["Age"].isdigit():
        raise BmdHsError(
            f"{root}: additional_metadata.csv says {dict(about)}; Age is in whole years, Gender M "
            "or F, Smoker 0 or 1, Lives U or R"
        )
    told = {
        "age": about["Age"],
        "sex": _SEXES[about["Gender"]],
        "smoker": about["Smoker"],
        "lives": _LIVES[about["Lives"]],
    }
    return Patient(name, labels, told, tuple(row[column] for column in RECORDINGS))


def _place(name: str) -> tuple[str, str]:
    """Posture and valve area from the end of a name; its beginning is the class, and not read."""
    if not (found := _PLACE.search(name)):
        raise BmdHsError(
            f"recording {name!r} does not end in sup or sit and Mit, Tri, Pul or Aor, as in "
            "'_sup_Mit'"
        )
    return _POSTURES[found[1]], _AREAS[found[2]]


def _digest(path: Path) -> bytes:
    waveform = audio_io.read(path, sample_rate=4000)  # theirs
    return hashlib.blake2b(waveform.tobytes(), digest_size=16).digest()


def _merged(kept: Recording, copy: Recording) -> Recording:
    if kept.patient.name != copy.patient.name:
        raise BmdHsError(
            f"'{kept.path}' and '{copy.path}' hold the same samples and belong to two patients; "
            "take one of the two patients out of train.csv"
        )
    return replace(
        kept,
        posture=kept.posture if kept.posture == copy.posture else "",
        valve_area=kept.valve_area if kept.valve_area == copy.valve_area else "",
    )


def _diagnosis(labels: Sequence[int]) -> str:
    """Abbreviations joined by "+", as `data.reports` reads them; "N" is normal."""
    return "+".join(label for label, value in zip(LABELS, labels, strict=True) if value)


def _seen_from(path: Path, folder: Path) -> str:
    """Relative to the manifest where the file lies inside its folder, else absolute."""
    path, folder = Path(os.path.abspath(path)), Path(os.path.abspath(folder))
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m medalign_jax.datasets.bmd_hs", description="BMD-HS as a manifest."
    )
    parser.add_argument("--root", required=True, help="folder that holds train.csv")
    parser.add_argument("--out", required=True, help="manifest to write, e.g. DIR/metadata.csv")
    parser.add_argument("--folds", type=int, default=5, help="for cross-validation, by patient")
    parser.add_argument("--seed", type=int, default=0, help="of the folds")
    parser.add_argument(
        "--reports", choices=REPORTS, default="full", help="whether reports name the diseases"
    )
    arguments = parser.parse_args(argv)
    settings = {name: getattr(arguments, name) for name in ("folds", "seed", "reports")}
    try:
        notes = write_manifest(arguments.root, arguments.out, **settings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for note in notes:
        print(f"note: {note}")
    print(f"'{arguments.out}' written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
