"""Metadata columns of heart and lung recordings, and the values that they may hold.

Values are those of the published data sets: CirCor DigiScope 1.0.3 (murmur columns), ICBHI 2017
(chest location, crackles, wheezes, diagnosis), KAUH (sound type, location, diagnosis),
Respiratory@TR (COPD0 to COPD4), ZCHSound (abbreviated diagnoses) and BMD-HS (posture and valve
area of a recording). `read_metadata` turns a row of them into one canonical form, or says which
column is wrong and what it may hold.
"""

import math
import re
from collections.abc import Callable, Mapping

from medalign_jax.core.errors import UserError
from medalign_jax.core.words import is_missing, is_none_in_words, plain_name


class ReportError(UserError):
    """Metadata that no report can be made from."""


PHASES = ("systolic", "diastolic")
FEATURES = ("timing", "shape", "grading", "pitch", "quality")
HEART_COLUMNS = frozenset(
    {"murmur", "murmur_locations", "most_audible_location", "outcome", "heart_rate", "valve_area"}
    | {f"{phase}_murmur_{feature}" for phase in PHASES for feature in FEATURES}
)
LUNG_COLUMNS = frozenset(
    {"crackles", "wheezes", "sound_type", "chest_location", "respiratory_rate"}
)
METADATA_COLUMNS = HEART_COLUMNS | LUNG_COLUMNS | {"diagnosis", "organ", "posture"}

_COLUMN_ALIASES = {
    "location": "chest_location",  # KAUH; CirCor's own are `murmur_locations` and so on
    "diagnoses": "diagnosis",
}
_FINDINGS = frozenset({"crackles", "wheezes"})  # where "none" says that there are none
_GRADES = ("I", "II", "III", "IV", "V", "VI")
VALVES = ("AV", "PV", "TV", "MV", "Phc")


def normalise_column(name: str) -> str:
    """Column name of this package for a published header.

    `Systolic murmur timing` and `Recording locations:` become `systolic_murmur_timing` and
    `recording_locations`; `Chest_Location` and KAUH's `Location` both become `chest_location`.
    """
    plain = plain_name(name)
    return _COLUMN_ALIASES.get(plain, plain)


def says_nothing(column: str, value: object) -> bool:
    """Whether a cell is empty or holds a text that stands for it, such as CirCor's "nan".

    Args:
      column: this package's name of the column (`normalise_column`).
      value: of the cell.
    """
    if column in _FINDINGS and is_none_in_words(str(value)):
        return False
    return is_missing(value)


def _fold(text: str) -> str:
    return re.sub(r"[\s_-]+", "-", text.strip().lower())


def _one_of(*values: str, **aliases: str) -> Callable[[str, str], str]:
    known = {_fold(v): v for v in values} | {_fold(k): v for k, v in aliases.items()}

    def read(column: str, value: str) -> str:
        if (found := known.get(_fold(value))) is None:
            raise ReportError(
                f"column {column!r}: unknown value {value!r}; allowed: {', '.join(values)}"
            )
        return found

    return read


def _number(low: float, high: float) -> Callable[[str, str], str]:
    def read(column: str, value: str) -> str:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not low <= number <= high:
            raise ReportError(
                f"column {column!r}: unknown value {value!r}; "
                f"allowed: a number per minute from {low:g} to {high:g}"
            )
        return f"{number:.1f}".removesuffix(".0")

    return read


def _valve_list(column: str, value: str) -> str:
    """`AV+MV+AV` (a location may be repeated) to `AV+MV`."""
    read = _one_of(*VALVES)
    return "+".join(dict.fromkeys(read(column, part) for part in value.split("+")))


_EVENTS = {
    "1": {"1", "1.0", "yes", "true", "present"},
    "0": {"0", "0.0", "no", "none", "false", "absent"},
}


def _event(*kinds: str) -> Callable[[str, str], str]:
    def read(column: str, value: str) -> str:
        for canonical, spellings in _EVENTS.items():
            if value.lower() in spellings:
                return canonical
        if value.lower() in kinds:
            return value.lower()
        raise ReportError(
            f"column {column!r}: unknown value {value!r}; "
            f"allowed: {', '.join(('0', '1', 'none', *kinds))}"
        )

    return read


_ICBHI_LOCATIONS = {
    "tc": "trachea",
    "al": "left anterior chest",
    "ar": "right anterior chest",
    "pl": "left posterior chest",
    "pr": "right posterior chest",
    "ll": "left lateral chest",
    "lr": "right lateral chest",
}
_ZONES = {"U": "upper ", "M": "middle ", "L": "lower "}
CHEST_LOCATIONS = tuple(_ICBHI_LOCATIONS.values()) + tuple(
    f"{side} {zone}{face} chest"
    for side in ("left", "right")
    for zone in _ZONES.values()
    for face in ("anterior", "posterior")
)


def _chest_location(column: str, value: str) -> str:
    folded = value.strip().lower()
    if folded in CHEST_LOCATIONS:
        return folded
    if folded in _ICBHI_LOCATIONS:
        return _ICBHI_LOCATIONS[folded]
    if found := _kauh_location(value):
        return found
    raise ReportError(
        f"column {column!r}: unknown value {value!r}; allowed: Tc, Al, Ar, Pl, Pr, Ll, Lr (ICBHI), "
        "face side zone such as 'P L U' (KAUH: A P, L R, U M L), or words such as "
        "'left anterior chest'"
    )


def _kauh_location(value: str) -> str | None:
    """KAUH writes face (A, P), then side (L, R) and zone (U, M, L) in either order.

    An L beside R is the zone "lower", beside U or M the side "left", and L L is both.
    """
    letters = re.sub(r"\s+", "", value.upper())
    if not re.fullmatch(r"[AP](L[LRUM]|R[LUM]|[UM][LR])", letters):
        return None
    face = {"A": "anterior", "P": "posterior"}[letters[0]]
    side = "right" if "R" in letters else "left"
    zone = letters[1:].replace("R", "") if side == "right" else letters[1:].replace("L", "", 1)
    return f"{side} {_ZONES[zone]}{face} chest"


_SOUNDS = {"W": "wheezes", "C": "crackles", "CREP": "crepitations", "CREPITATIONS": "crepitations"}
_BREATH_PHASES = {"I": "inspiratory", "E": "expiratory"}
_BRONCHIAL = {"B", "BRONCHIAL"}


def _sound_type(column: str, value: str) -> str:
    """KAUH's codes: `N`; or phases before their sounds, as in `I C E W`.

    Returns:
      Comma-joined sounds, `normal` or such as `inspiratory crackles,expiratory wheezes`.
    """
    tokens = value.upper().split()
    if tokens in (["N"], ["NORMAL"]):
        return "normal"
    sounds: list[str] = []
    phases: list[str] = []
    for token in tokens:
        if token in _BREATH_PHASES:
            phases.append(_BREATH_PHASES[token])
        elif token in _SOUNDS:
            sounds.append(" ".join([" and ".join(phases), _SOUNDS[token]]).strip())
            phases = []
        elif token in _BRONCHIAL and not phases:
            sounds.append("bronchial breath sounds")
        else:
            sounds = []
            break
    if not sounds or phases:
        raise ReportError(
            f"column {column!r}: unknown value {value!r}; allowed: N, or C, W, Crep, each with I "
            "and E before it if need be, and Bronchial, as in 'I C E W'"
        )
    return ",".join(dict.fromkeys(sounds))


_DIAGNOSES = {  # abbreviation or odd spelling -> name
    "n": "normal",
    "normal": "normal",
    "healthy": "healthy",
    "ar": "aortic regurgitation",
    "as": "aortic stenosis",
    "mr": "mitral regurgitation",
    "ms": "mitral stenosis",
    "mvp": "mitral valve prolapse",
    "tr": "tricuspid regurgitation",
    "asd": "atrial septal defect",
    "vsd": "ventricular septal defect",
    "pfo": "patent foramen ovale",
    "pda": "patent ductus arteriosus",
    "copd": "chronic obstructive pulmonary disease",
    "urti": "upper respiratory tract infection",
    "lrti": "lower respiratory tract infection",
    "bron": "bronchitis",
    "plueral effusion": "pleural effusion",
    "covid-19": "COVID-19",
}
_HEART_DISEASE = re.compile(
    r"mitral|aortic|tricuspid|pulmon(ary|ic) (valve|stenosis|regurg)|valv|septal|foramen|ductus"
    r"|murmur|cardiomyopathy|tetralogy"
)
_LUNG_DISEASE = re.compile(
    r"copd|obstructive|asthma|bronch|pneumon|pleural|lung|respiratory|wheez|crackl|rhonch|stridor"
    r"|breath"
)
_DIAGNOSIS_TEXT = re.compile(r"[^\W\d_][\w ,'()/&+.-]{0,119}")
ABBREVIATIONS = {
    "aortic regurgitation": "AR",
    "aortic stenosis": "AS",
    "mitral regurgitation": "MR",
    "mitral stenosis": "MS",
    "mitral valve prolapse": "MVP",
    "atrial septal defect": "ASD",
    "ventricular septal defect": "VSD",
    "patent foramen ovale": "PFO",
    "patent ductus arteriosus": "PDA",
    "chronic obstructive pulmonary disease": "COPD",
    "upper respiratory tract infection": "URTI",
    "lower respiratory tract infection": "LRTI",
}
_NOT_A_DIAGNOSIS = re.compile(
    r"(?i)^error|recommend|advis|advice|follow.?up|refer|correlat|suggest|should|consult"
)


def read_diagnosis(value: str, column: str = "diagnosis") -> str:
    """The name of a diagnosis: abbreviations spelt out, several joined by "and", else as it stands.

    Diagnoses are an open list, so any plain words pass (letters first, 120 characters at most).

    Raises:
      ReportError: not plain words, advice, or the text of a failure ("Error: ...").
    """
    text = " ".join(value.split())
    if not _DIAGNOSIS_TEXT.fullmatch(text) or _NOT_A_DIAGNOSIS.search(text):
        raise ReportError(
            f"column {column!r}: unknown value {value!r}; allowed: the name of a diagnosis in "
            "plain words, of at most 120 characters, or an abbreviation such as "
            f"{', '.join(ABBREVIATIONS.values())}"
        )
    parts = re.split(r"\s*\+\s*|\s+and\s+|\s*&\s*", text)
    return " and ".join(_diagnosis_name(part) for part in parts if part)


def _diagnosis_name(text: str) -> str:
    if severity := re.fullmatch(r"(?i)copd ?([0-4])", text):
        return f"COPD of severity level {severity[1]}"
    if found := _DIAGNOSES.get(text.lower()):
        return found
    # Sentence case would read oddly inside a sentence; abbreviations keep their capitals.
    return " ".join(word if word.isupper() else word.lower() for word in text.split())


_READERS: dict[str, Callable[[str, str], str]] = {
    "organ": _one_of("heart", "lung", lungs="lung", cardiac="heart", respiratory="lung"),
    "murmur": _one_of("Present", "Absent", "Unknown"),
    "murmur_locations": _valve_list,
    "most_audible_location": _one_of(*VALVES),
    "valve_area": _one_of(*VALVES),  # where the recording was made, murmur or none
    "posture": _one_of("supine", "sitting", "standing"),
    "outcome": _one_of("Normal", "Abnormal"),
    "heart_rate": _number(20, 300),
    "crackles": _event("fine", "coarse"),
    "wheezes": _event(),
    "sound_type": _sound_type,
    "chest_location": _chest_location,
    "respiratory_rate": _number(3, 120),
    "diagnosis": lambda column, value: read_diagnosis(value, column),
}
_TIMINGS = {
    "systolic": ("Early-systolic", "Mid-systolic", "Late-systolic", "Holosystolic"),
    "diastolic": ("Early-diastolic", "Mid-diastolic", "Late-diastolic", "Holodiastolic"),
}
for _phase in PHASES:
    # CirCor grades systolic murmurs out of six and diastolic ones out of four.
    _out_of_four = [f"{grade}/IV" for grade in _GRADES[:4]] if _phase == "diastolic" else []
    _READERS |= {
        f"{_phase}_murmur_timing": _one_of(*_TIMINGS[_phase]),
        f"{_phase}_murmur_shape": _one_of("Plateau", "Diamond", "Decrescendo", "Crescendo"),
        f"{_phase}_murmur_grading": _one_of(*(f"{g}/VI" for g in _GRADES), *_out_of_four),
        f"{_phase}_murmur_pitch": _one_of("High", "Medium", "Low"),
        f"{_phase}_murmur_quality": _one_of("Harsh", "Blowing", "Musical"),
    }


def read_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Canonical values of the columns that this package knows; empty cells are left out.

    Args:
      metadata: column -> value of one row, in the data set's own headers or in this package's.
        Columns that are not in `METADATA_COLUMNS` are not looked at.

    Raises:
      ReportError: an unknown value (names column, value and what is allowed), two columns that
        mean the same and disagree, or a murmur described where the row says there is none.
    """
    canonical: dict[str, str] = {}
    for name, value in metadata.items():
        column = normalise_column(name)
        if column not in METADATA_COLUMNS or says_nothing(column, value):
            continue
        if column == "diagnosis" and str(value).strip().lower() == "unknown":
            continue
        text = _READERS[column](column, str(value).strip())
        if canonical.setdefault(column, text) != text:
            raise ReportError(
                f"column {name!r} says {value!r} and another column of the same meaning, "
                f"{column!r}, says {canonical[column]!r}; keep one of them"
            )
    _check_murmur(canonical)
    return canonical


def _check_murmur(canonical: Mapping[str, str]) -> None:
    if canonical.get("murmur", "Present") == "Present":
        return
    for column in sorted(canonical):
        if "murmur_" in column or column == "most_audible_location":
            raise ReportError(
                f"column 'murmur' says {canonical['murmur']!r}, but column {column!r} describes a "
                f"murmur ({canonical[column]!r}); empty one of them"
            )


def organ_of(canonical: Mapping[str, str]) -> str:
    """`heart` or `lung` where the row says so or implies it, otherwise an empty text."""
    if organ := canonical.get("organ"):
        return organ
    heart, lung = (bool(columns & set(canonical)) for columns in (HEART_COLUMNS, LUNG_COLUMNS))
    if heart != lung:
        return "heart" if heart else "lung"
    return "" if heart else organ_of_diagnosis(canonical.get("diagnosis", ""))


def organ_of_diagnosis(diagnosis: str) -> str:
    """`heart` or `lung` for a disease of that organ, an empty text for any other word."""
    text = diagnosis.lower()
    heart, lung = bool(_HEART_DISEASE.search(text)), bool(_LUNG_DISEASE.search(text))
    return "" if heart == lung else "heart" if heart else "lung"
