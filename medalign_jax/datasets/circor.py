"""CirCor DigiScope: children's heart sounds, by auscultation site, as rows of a manifest.

Version 1.0.3 on PhysioNet (Oliveira et al. 2022, doi 10.1109/JBHI.2021.3137048; ODC-By): of 942
patients one recording or more at each of up to five sites, at 4 kHz, with an expert's description
of the murmur::

    training_data.csv      one row per patient: Patient ID, Recording locations:, Age, Sex, ...,
                           Murmur, Murmur locations, Systolic murmur timing, ..., Outcome, Campaign,
                           Additional ID
    training_data/<patient>_<site>.wav, where a site was recorded twice <patient>_<site>_<n>.wav

`validation_data` and `test_data` of the same form are read where they lie beside it.

Known faults of the published files, and what is done about each:

* Children who came twice have two patient ids; `Additional ID` says so, and both are one subject.
* Missing values are the text "nan".
* Murmur and outcome are a patient's. `murmur_at_site` says whether the murmur is heard where the
  recording was made; it is empty where the murmur is unknown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from medalign_jax.datasets.published import Converted, LayoutError, Options, folds_of, read_rows
from medalign_jax.reports.vocabulary import FEATURES, PHASES, VALVES, is_missing

_MURMUR = {
    f"{phase.capitalize()} murmur {feature}": f"{phase}_murmur_{feature}"
    for phase in PHASES
    for feature in FEATURES
}
_ABOUT = {
    "Age": "age_group", "Sex": "sex", "Height": "height", "Weight": "weight",
    "Pregnancy status": "pregnancy_status", "Campaign": "campaign",
}  # fmt: skip
_FINDINGS = {
    "Murmur": "murmur", "Murmur locations": "murmur_locations",
    "Most audible location": "most_audible_location", **_MURMUR, "Outcome": "outcome",
}  # fmt: skip
_PUBLISHED = ("Patient ID", *_ABOUT, *_FINDINGS, "Additional ID")
COLUMNS = ("audio_path", "subject_id", "split", "fold", *_ABOUT.values(), "organ", "valve_area",
           "murmur_at_site", *_FINDINGS.values())  # fmt: skip
_PARTS = {"training_data": "train", "validation_data": "valid", "test_data": "test"}
_NAME = re.compile(rf"(?P<patient>\d+)_(?P<site>{'|'.join(VALVES)})(_\d+)?")


def convert(root: Path, options: Options) -> Converted:
    """The recordings that lie under `root`.

    Raises:
      LayoutError: a table or column is missing, a recording without a row, a person in two splits.
    """
    patients, split = _patients(root)
    subject, notes = _subjects(patients)
    across = {s for s in subject.values() if len({split[p] for p in split if subject[p] == s}) > 1}
    if across:
        raise LayoutError(f"{root}: person {sorted(across)[0]} is in two splits under two ids")
    fold = folds_of({subject[p]: _kept(row["Murmur"]) for p, row in patients.items()}, options)
    rows, with_audio = [], set()
    for path, patient, site in _recordings(root, patients):
        with_audio.add(patient)
        row = _row(patients[patient], site, options)
        rows.append(
            row
            | {
                "audio_path": path,
                "subject_id": subject[patient],
                "split": split[patient],
                "fold": fold[subject[patient]],
            }
        )
    if silent := sorted(set(patients) - with_audio):
        notes.append(f"{len(silent)} of {len(patients)} patients have no recording in the folder, "
                     f"e.g. {silent[0]}")  # fmt: skip
    return Converted(COLUMNS, rows, notes)


def _patients(root: Path) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """patient -> its row, patient -> its split."""
    patients: dict[str, dict[str, str]] = {}
    split: dict[str, str] = {}
    for part, name in _PARTS.items():
        path = root / f"{part}.csv"
        if name != "train" and not path.exists():
            continue
        found = read_rows(path, "Patient ID", _PUBLISHED)
        if twice := sorted(set(found) & set(patients)):
            raise LayoutError(f"'{path}': patient {twice[0]} is in another table too")
        patients |= found
        split |= dict.fromkeys(found, name)
    return patients, split


def _subjects(patients: Mapping[str, Mapping[str, str]]) -> tuple[dict[str, str], list[str]]:
    """patient -> the least id of the person."""
    subject = {patient: patient for patient in patients}
    for patient, row in patients.items():
        # A column of numbers with gaps, written by a table program, says 50053.0.
        other = _kept(row["Additional ID"]).removesuffix(".0")
        if other in subject:
            one, two = subject[patient], subject[other]
            least = min(one, two, key=lambda name: (len(name), name))
            subject = {p: least if s in (one, two) else s for p, s in subject.items()}
    pairs = len(subject) - len(set(subject.values()))
    return subject, [f"{pairs} patient ids are of a child that has another one; both count as one "
                     "subject"] if pairs else []  # fmt: skip


def _recordings(root: Path, patients: Mapping[str, object]) -> Iterator[tuple[Path, str, str]]:
    """(path, patient, site) of the files in the folders of the parts."""
    for part in _PARTS:
        for path in sorted((root / part).glob("*.wav")):
            if not (match := _NAME.fullmatch(path.stem)):
                raise LayoutError(
                    f"'{path}' is not named <patient>_<site>.wav with a site of {', '.join(VALVES)}"
                )
            if match["patient"] not in patients:
                raise LayoutError(f"'{path}': no table has patient {match['patient']}")
            yield path, match["patient"], match["site"]


def _row(patient: Mapping[str, str], site: str, options: Options) -> dict[str, object]:
    row = {to: _kept(patient[name]) for name, to in (_ABOUT | _FINDINGS).items()}
    row |= {"organ": "heart", "valve_area": site}
    sites = row["murmur_locations"].split("+")
    row["murmur_at_site"] = {
        "Absent": "Absent", "Present": "Present" if site in sites else "Absent",
    }.get(row["murmur"], "")  # fmt: skip
    if options.reports == "no_diagnosis":
        row["outcome"] = ""
    return row


def _kept(value: str) -> str:
    return "" if is_missing(value) else value
