"""BMD-HS: heart sounds of the valves, by patient, as rows of a manifest.

The BUET Multi-disease Heart Sound data set (Ali et al. 2024, arXiv 2409.00724; repository
mHealthBuet/BMD-HS-Dataset): 108 patients with aortic stenosis (AS), aortic regurgitation (AR),
mitral regurgitation (MR), mitral stenosis (MS), several of them at once, or none (N); of each
patient eight recordings of 20 s at 4 kHz, supine and sitting, over the four valve areas::

    train.csv                 patient_id,AS,AR,MR,MS,N,recording_1,...,recording_8
    additional_metadata.csv   patient_id,Age,Gender,Smoker,Lives
    train/<CLASS>_<patient>_<sup|sit>_<Mit|Tri|Pul|Aor>.wav

The manifest has one row per recording. Reports come from its columns `diagnosis`, `posture` and
`valve_area` (see `medalign_jax.reports.templates`); `fold` deals the patients out for
cross-validation.

What is wrong in the published files is said on the screen and dealt with:

* Recordings that are named and do not exist are left out.
* Of recordings that are sample for sample another one of the same patient, one is kept. It was
  made in one of the places that the copies name, and nobody knows in which: where they disagree,
  posture or valve area stays empty.
* File names begin with the class. Nothing is read from that part, and nothing else may read it:
  the path is not a feature, and no report is made from it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from medalign_jax.audio import io as audio_io
from medalign_jax.datasets.published import Converted, LayoutError, Options, read_rows
from medalign_jax.datasets.splits import deal_folds
from medalign_jax.reports.phrases import NOTHING_SAID

LABELS = ("AS", "AR", "MR", "MS", "N")
COLUMNS = ("audio_path", "subject_id", *LABELS, "age", "sex", "smoker", "lives", "organ",
           "diagnosis", "posture", "valve_area", "report", "fold")  # fmt: skip
RECORDINGS = tuple(f"recording_{number}" for number in range(1, 9))
_SEXES, _LIVES = {"M": "male", "F": "female"}, {"U": "urban", "R": "rural"}
_POSTURES = {"sup": "supine", "sit": "sitting"}
_AREAS = {"Mit": "MV", "Tri": "TV", "Pul": "PV", "Aor": "AV"}
_PLACE = re.compile(rf"_({'|'.join(_POSTURES)})_({'|'.join(_AREAS)})$")


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
      LayoutError: a table or column is missing, a label is not 0 or 1, a patient with no label,
        with "N" beside a disease, without a row of metadata or with two rows; names the patient.
    """
    root = Path(root)
    needed = ("patient_id", *LABELS, *RECORDINGS)
    table = read_rows(root / "train.csv", "patient_id", needed)
    about = read_rows(
        root / "additional_metadata.csv",
        "patient_id",
        ("patient_id", "Age", "Gender", "Smoker", "Lives"),
    )
    if lacking := sorted(set(table) - set(about)):
        raise LayoutError(f"{root}: additional_metadata.csv has no row for {', '.join(lacking)}")
    return [_patient(root, row, about[name]) for name, row in table.items()]


def find_recordings(
    patients: Sequence[Patient], root: str | Path
) -> tuple[list[Recording], list[str]]:
    """The recordings that can be used, and what is wrong with the others in words.

    Raises:
      LayoutError: a name that does not end in posture and valve area, or two patients that name the
        same recording, or the same samples.
    """
    found: list[Recording] = []
    notes: list[str] = []
    owner: dict[str, str] = {}
    first: dict[bytes, int] = {}
    for patient in patients:
        for name in patient.recordings:
            if owner.setdefault(name, patient.name) != patient.name or not name:
                raise LayoutError(f"{patient.name} and {owner[name]} both name recording {name!r}")
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


def convert(root: Path, options: Options) -> Converted:
    """The recordings that can be used. Where reports leave the diagnosis out they say where a
    recording was made and nothing of what the patient has.

    Raises:
      LayoutError: see `read_patients`, `find_recordings`.
      SplitError: see `splits.deal_folds`.
    """
    patients = read_patients(root)
    labels = np.array([patient.labels for patient in patients])
    dealt = deal_folds(labels, options.folds, options.seed)
    fold = {patient.name: int(f) for patient, f in zip(patients, dealt, strict=True)}
    recordings, notes = find_recordings(patients, root)
    rows = [_row(recording, options) | {"fold": fold[recording.patient.name]}
            for recording in recordings]  # fmt: skip
    return Converted(COLUMNS, rows, notes)


def _row(recording: Recording, options: Options) -> dict[str, object]:
    patient = recording.patient
    row: dict[str, object] = {
        "audio_path": recording.path,
        "subject_id": patient.name,
        "organ": "heart",
        "posture": recording.posture,
        "valve_area": recording.valve_area,
    }
    row |= dict(zip(LABELS, patient.labels, strict=True)) | dict(patient.about)
    if options.reports == "full":
        row["diagnosis"] = _diagnosis(patient.labels)
    elif not (recording.posture or recording.valve_area):
        row["report"] = NOTHING_SAID["heart"]
    return row


def _patient(root: Path, row: Mapping[str, str], about: Mapping[str, str]) -> Patient:
    name = row["patient_id"]
    values = [row[label] for label in LABELS]
    if not set(values) <= {"0", "1"}:
        raise LayoutError(f"{root}: {name} has labels {', '.join(values)}; they are 0 or 1")
    labels = tuple(map(int, values))
    if bool(labels[-1]) == any(labels[:-1]):
        raise LayoutError(f"{root}: {name} is N (no disease) and diseased at once, or neither")
    known = about["Gender"] in _SEXES and about["Lives"] in _LIVES and about["Smoker"] in ("0", "1")
    if not known or not about["Age"].isdigit():
        raise LayoutError(
            f"{root}: additional_metadata.csv says {dict(about)}; Age is in whole years, Gender M "
            "or F, Smoker 0 or 1, Lives U or R"
        )
    facts = {
        "age": about["Age"],
        "sex": _SEXES[about["Gender"]],
        "smoker": about["Smoker"],
        "lives": _LIVES[about["Lives"]],
    }
    return Patient(name, labels, facts, tuple(row[column] for column in RECORDINGS))


def _place(name: str) -> tuple[str, str]:
    """Posture and valve area from the end of a name; its beginning is the class, and not read."""
    if not (found := _PLACE.search(name)):
        raise LayoutError(
            f"recording {name!r} does not end in sup or sit and Mit, Tri, Pul or Aor, as in "
            "'_sup_Mit'"
        )
    return _POSTURES[found[1]], _AREAS[found[2]]


def _digest(path: Path) -> bytes:
    waveform = audio_io.read(path, sample_rate=4000)  # theirs
    return hashlib.blake2b(waveform.tobytes(), digest_size=16).digest()


def _merged(kept: Recording, copy: Recording) -> Recording:
    if kept.patient.name != copy.patient.name:
        raise LayoutError(
            f"'{kept.path}' and '{copy.path}' hold the same samples and belong to two patients; "
            "take one of the two patients out of train.csv"
        )
    return replace(
        kept,
        posture=kept.posture if kept.posture == copy.posture else "",
        valve_area=kept.valve_area if kept.valve_area == copy.valve_area else "",
    )


def _diagnosis(labels: Sequence[int]) -> str:
    """Abbreviations joined by "+", as `reports.templates` reads them; "N" is normal."""
    return "+".join(label for label, value in zip(LABELS, labels, strict=True) if value)
