"""ICBHI 2017: breath sounds, by recording, as rows of a manifest.

The Respiratory Sound Database of the ICBHI challenge (Rocha et al. 2019, doi
10.1088/1361-6579/ab03ea; CC0): 920 recordings of 126 patients, with every breath cycle marked::

    ICBHI_Challenge_diagnosis.txt                  patient, diagnosis
    ICBHI_Challenge_demographic_information.txt    patient, age, sex, BMI (adults), weight in kg
                                                   and height in cm (children)
    ICBHI_challenge_train_test.txt                 recording, train or test
    ICBHI_final_database/<patient>_<index>_<location>_<mode>_<device>.wav and .txt: one line per
                                                   cycle, start, end, crackles, wheezes

Known faults of the published files, and what is done about each:

* The official split has recordings of patients 156 and 218 on both sides. `official_split` keeps
  it; in `split` all of a patient's recordings are where most of them are.
* It has no validation part: a fifth of the training patients is dealt out for it.
* Healthy patients were recorded with one device alone: what sets them apart may be the device. The
  column is kept, and `evaluate`'s baseline from metadata shows how far it goes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from medalign_jax.datasets.published import Converted, LayoutError, Options, folds_of, read_lines

COLUMNS = ("audio_path", "subject_id", "split", "official_split", "fold", "label", "copd",
           "crackles", "wheezes", "cycles", "chest_location", "acquisition_mode", "device",
           "age", "sex", "bmi", "weight", "height", "organ", "diagnosis")  # fmt: skip
_AUDIO = "ICBHI_final_database"
_SEXES = {"M": "male", "F": "female", "NA": ""}
_COPD = {"COPD": "1", "Healthy": "0"}  # the task of OPERA's benchmark; other patients are left out
_VALIDATION_FOLDS = 5  # one of them is the validation part


@dataclass(frozen=True)
class _Recording:
    path: Path
    patient: str
    location: str
    mode: str
    device: str
    crackles: int
    wheezes: int
    cycles: int


def convert(root: Path, options: Options) -> Converted:
    """The recordings that lie under `root`.

    Raises:
      LayoutError: a file of the layout is missing or reads otherwise; names file and line.
    """
    diagnoses = dict(read_lines(root / "ICBHI_Challenge_diagnosis.txt", 2))
    about = {
        patient: fields
        for patient, *fields in read_lines(root / "ICBHI_Challenge_demographic_information.txt", 6)
    }
    official = dict(read_lines(root / "ICBHI_challenge_train_test.txt", 2))
    if wrong := sorted(set(official.values()) - {"train", "test"}):
        raise LayoutError(f"{root}: the official split says {wrong[0]!r}; it is train or test")
    recordings = [_recording(path) for path in sorted((root / _AUDIO).glob("*.wav"))]
    notes = _missing(recordings, official, root)
    for recording in recordings:
        if recording.patient not in diagnoses:
            raise LayoutError(f"'{recording.path}': patient {recording.patient} has no diagnosis")
    split, moved = _splits(official, diagnoses, options)
    notes += moved
    fold = folds_of(diagnoses, options)
    rows = [
        _row(recording, diagnoses, about, options)
        | {
            "split": split.get(recording.patient, ""),
            "official_split": official.get(recording.path.stem, ""),
            "fold": fold[recording.patient],
        }
        for recording in recordings
    ]
    return Converted(COLUMNS, rows, notes)


def _recording(path: Path) -> _Recording:
    parts = path.stem.split("_")
    if len(parts) != 5 or not parts[0].isdigit():
        raise LayoutError(
            f"'{path}' is not named <patient>_<index>_<location>_<mode>_<device>.wav, such as "
            "101_1b1_Al_sc_Meditron.wav"
        )
    patient, _, location, mode, device = parts
    cycles = read_lines(path.with_suffix(".txt"), 4)
    if wrong := [c for c in cycles if not {c[2], c[3]} <= {"0", "1"}]:
        raise LayoutError(f"'{path.with_suffix('.txt')}': a cycle says {' '.join(wrong[0])}; "
                          "crackles and wheezes are 0 or 1")  # fmt: skip
    crackles, wheezes = (int(any(c[k] == "1" for c in cycles)) for k in (2, 3))
    return _Recording(path, patient, location, mode, device, crackles, wheezes, len(cycles))


def _missing(
    recordings: Sequence[_Recording], official: Mapping[str, str], root: Path
) -> list[str]:
    there = {recording.path.stem for recording in recordings}
    lacking, unnamed = sorted(set(official) - there), sorted(there - set(official))
    notes = []
    if lacking:
        notes.append(
            f"{len(lacking)} of {len(official)} recordings of the official split are not in "
            f"'{root / _AUDIO}', e.g. {lacking[0]}"
        )
    if unnamed:
        notes.append(
            f"{len(unnamed)} recordings are not in the official split, e.g. {unnamed[0]}; they go "
            "where their patient's others are"
        )
    return notes


def _splits(
    official: Mapping[str, str], diagnoses: Mapping[str, str], options: Options
) -> tuple[dict[str, str], list[str]]:
    """patient -> split, none in two, and notes on those who were."""
    counts: dict[str, Counter] = {}
    for name, part in official.items():
        counts.setdefault(name.split("_")[0], Counter())[part] += 1
    split = {p: "test" if c["test"] > c["train"] else "train" for p, c in counts.items()}
    notes = [
        f"patient {p}: {c['train']} recordings in train and {c['test']} in test of the official "
        f"split; all are in {split[p]} here"
        for p, c in counts.items()
        if len(c) > 1
    ]
    training = {p: diagnoses.get(p, "") for p in split if split[p] == "train"}
    if len(training) >= _VALIDATION_FOLDS:
        dealt = folds_of(training, Options(_VALIDATION_FOLDS, options.seed))
        split |= {p: "valid" for p, part in dealt.items() if part == 0}
    return split, notes


def _row(
    recording: _Recording,
    diagnoses: Mapping[str, str],
    about: Mapping[str, Sequence[str]],
    options: Options,
) -> dict[str, object]:
    diagnosis = diagnoses[recording.patient]
    age, sex, bmi, weight, height = about.get(recording.patient, ("NA",) * 5)
    if sex not in _SEXES:
        raise LayoutError(f"patient {recording.patient}: sex {sex!r} is not M, F or NA")
    known = {"age": age, "bmi": bmi, "weight": weight, "height": height}
    return {
        "audio_path": recording.path,
        "subject_id": recording.patient,
        "label": diagnosis,
        "copd": _COPD.get(diagnosis, ""),
        "crackles": recording.crackles,
        "wheezes": recording.wheezes,
        "cycles": recording.cycles,
        "chest_location": recording.location,
        "acquisition_mode": recording.mode,
        "device": recording.device,
        "sex": _SEXES[sex],
        "organ": "lung",
        "diagnosis": diagnosis if options.reports == "full" else "",
    } | {name: "" if value == "NA" else value for name, value in known.items()}
