"""Properties of the report templates; the expected words are written down here a second time."""

import csv
import itertools
import re

import pytest

from medalign_jax.reports.templates import (
    METADATA_COLUMNS,
    ReportError,
    infer_organ,
    normalise_column,
    prompts,
    wordings,
)

SYSTOLIC_TIMING = {
    "Early-systolic": r"early[- ]systolic",
    "Mid-systolic": r"mid-?systolic",
    "Late-systolic": r"late[- ]systolic",
    "Holosystolic": r"holosystolic",
}
DIASTOLIC_TIMING = {
    "Early-diastolic": r"early[- ]diastolic",
    "Mid-diastolic": r"mid-?diastolic",
    "Holodiastolic": r"holodiastolic",
}
SHAPE = {
    "Plateau": "plateau",
    "Diamond": "diamond",
    "Decrescendo": "decrescendo",
    "Crescendo": r"\bcrescendo",
}
GRADE = {f"{g}/VI": rf"(?<!\w){g.lower()}/vi\b" for g in ("I", "II", "III", "IV", "V", "VI")}
PITCH = {
    value: rf"\b{value}(-pitched| pitch)|pitch {value}".lower()
    for value in ("High", "Medium", "Low")
}
QUALITY = {value: rf"\b{value}\b".lower() for value in ("Harsh", "Blowing", "Musical")}
FEATURES = {
    "timing": SYSTOLIC_TIMING,
    "shape": SHAPE,
    "grading": GRADE,
    "pitch": PITCH,
    "quality": QUALITY,
}
FEATURE_WORDS = {
    "timing": r"early|\bmid|late\b|holo",
    "shape": r"shape|contour|configuration|plateau|diamond|crescendo",
    "grading": r"grade|intensity|loudness|[iv]/[iv]+",
    "pitch": r"pitch",
    "quality": r"quality|character |tone|harsh|blowing|musical",
}
VALVE = {
    "AV": r"\baortic",
    "PV": r"\bpulmon(ic|ary)",
    "TV": r"\btricuspid",
    "MV": r"\bmitral",
    "Phc": "other than the four",
}
ADVICE = re.compile(
    r"recommend|advi[sc]e|follow.?up|refer|correlat|suggest|should|consult|consider|further|"
    r"evaluat|treat|monitor|urgent|warrant"
)
HEART_FINDINGS = re.compile(
    r"murmur|systol|diastol|grade|pitch|harsh|blowing|musical|area|outcome|heart rate|valve area"
)
LUNG_FINDINGS = re.compile(
    r"crackl|wheez|crepit|rhonch|bronchial breath|inspir|expir|trachea|\brate\b"
)


def check_text(text):
    assert not ADVICE.search(text.lower()), text
    assert re.fullmatch(r"[A-Z0-9].*[^.]\.", text) and "  " not in text, text
    assert not re.search(r"[{}|]|\ba [aeio]|\ban [^aeio]|nan\b|\(\)|,,|\. [a-z]", text), text


def texts_of(row, count=4, seed=0):
    texts = wordings(row, count, seed)
    assert len(set(texts)) == len(texts) > 0
    for text in texts:
        check_text(text)
    return [text.lower() for text in texts]


def optional(values):
    return [None, *values]


def test_every_combination_of_systolic_features_is_said_and_nothing_else():
    for seed, combination in enumerate(itertools.product(*map(optional, FEATURES.values()))):
        given = dict(zip(FEATURES, combination, strict=True))
        row = {f"systolic_murmur_{f}": v or "nan" for f, v in given.items()} | {"murmur": "Present"}
        for text in texts_of(row, 3, seed):
            assert "murmur" in text and "diastolic" not in text and "outcome" not in text
            for feature, value in given.items():
                if value is None:
                    assert not re.search(FEATURE_WORDS[feature], text), (feature, text)
                for other, pattern in FEATURES[feature].items():
                    assert bool(re.search(pattern, text)) == (other == value), (other, text)
            if any(given.values()):
                assert "systolic" in text
            assert not any(re.search(pattern, text) for pattern in VALVE.values()), text


def test_both_phases_at_once():
    for systolic, diastolic in itertools.product(SYSTOLIC_TIMING, DIASTOLIC_TIMING):
        row = {
            "murmur": "Present",
            "systolic_murmur_timing": systolic,
            "systolic_murmur_pitch": "High",
            "diastolic_murmur_timing": diastolic,
            "diastolic_murmur_grading": "II/IV",
            "most_audible_location": "PV",
        }
        for text in texts_of(row, 8):
            assert re.search(SYSTOLIC_TIMING[systolic], text), text
            assert re.search(DIASTOLIC_TIMING[diastolic], text), text
            assert "ii/iv" in text and re.search(PITCH["High"], text), text
            assert re.search(VALVE["PV"], text) and "harsh" not in text


def test_every_set_of_locations_with_every_loudest_one():
    subsets = [s for n in range(6) for s in itertools.combinations(VALVE, n)]
    for subset, best in itertools.product(subsets, optional(VALVE)):
        row = {"murmur": "Present", "murmur_locations": "+".join(subset + subset[:1]) or "nan"}
        row["most_audible_location"] = best or "nan"
        for text in texts_of(row, 6):
            for valve, pattern in VALVE.items():
                stated = valve in subset or valve == best
                assert bool(re.search(pattern, text)) == stated, (valve, text)
            loudest = r"loudest|most audible|most prominent|point of (maximum|greatest)"
            assert bool(re.search(loudest, text)) == (best is not None), text


@pytest.mark.parametrize("diagnosis", [None, "N", "AS+MR"])
@pytest.mark.parametrize("posture", [None, "supine", "sitting", "standing"])
def test_where_a_recording_was_made_says_nothing_of_a_murmur(posture, diagnosis):
    for area in optional(VALVE):
        row = {"organ": "heart", "posture": posture, "valve_area": area, "diagnosis": diagnosis}
        if not any(list(row.values())[1:]):
            continue
        for text in texts_of(row, 12):
            assert "murmur" not in text, text
            for word in ("supine", "sitting", "standing"):
                assert (word in text) == (word == posture), text
            place = re.sub(r"aortic stenosis|mitral regurgitation", "", text)
            for valve, pattern in VALVE.items():
                assert bool(re.search(pattern, place)) == (valve == area), text
            for name in ("aortic stenosis", "mitral regurgitation"):
                assert (name in text) == (diagnosis == "AS+MR"), text
            assert ("normal" in text) == (diagnosis == "N"), text


@pytest.mark.parametrize("outcome", [None, "Normal", "Abnormal"])
@pytest.mark.parametrize("murmur", ["Present", "Absent", "Unknown"])
def test_murmur_and_outcome(murmur, outcome):
    row = {"Murmur": murmur, "Outcome": outcome or "nan", "Campaign": "CC2014", "Age": "Child"}
    no = (
        r"\bno (heart |cardiac )?murmur|without (a )?murmur|murmur(:)? absent|murmurs: none|absence"
    )
    unsure = r"could not be determined|un(clear|known|determined|certain)|not known|neither"
    for text in texts_of(row, 60):
        assert bool(re.search(no, text)) == (murmur == "Absent"), text
        assert bool(re.search(unsure, text)) == (murmur == "Unknown"), text
        assert "child" not in text
        assert ("outcome" in text) == (outcome is not None)
        assert bool(re.search(r"\bnormal", text)) == (outcome == "Normal"), text
        assert ("abnormal" in text) == (outcome == "Abnormal"), text


@pytest.mark.parametrize("location", [None, "Tc", "Al", "Ar", "Pl", "Pr", "Ll", "Lr"])
@pytest.mark.parametrize("diagnosis", [None, "COPD", "Healthy", "Pneumonia"])
def test_every_icbhi_row(location, diagnosis):
    faces = {"a": "anterior", "p": "posterior", "l": "lateral"}
    for crackles, wheezes in itertools.product(
        [None, "0", "1", "fine", "coarse"], [None, "0", "1"]
    ):
        row = {"Crackles": crackles, "Wheezes": wheezes, "Chest_Location": location or "nan"}
        row["Diagnosis"] = diagnosis or ""
        if not any((crackles, wheezes, location, diagnosis)):
            continue
        for text in texts_of(row, 8):
            assert ("crackles" in text) == (crackles is not None), text
            assert ("wheezes" in text) == (wheezes is not None), text
            assert ("fine" in text, "coarse" in text) == (crackles == "fine", crackles == "coarse")
            if crackles == "0" or wheezes == "0":
                assert re.search(r"\bno\b|without|neither|absent", text), text
            else:
                assert not re.search(r"\bno\b|without|neither|absent", text), text
            check_place(text, location, faces)
            check_diagnosis(text, diagnosis)
            assert "murmur" not in text and "heart" not in text


def check_place(text, location, faces):
    if location == "Tc":
        assert "trachea" in text
    elif location:
        side = "left" if location[1] == "l" else "right"
        assert f"{side} {faces[location[0].lower()]} chest" in text, text
    else:
        assert not re.search("left|right|trachea|anterior|posterior|lateral", text), text


def check_diagnosis(text, diagnosis):
    words = {
        "COPD": r"\bcopd\b|chronic obstructive pulmonary disease",
        "Healthy": r"\bhealthy\b",
        "Pneumonia": r"\bpneumonia\b",
    }
    for name, pattern in words.items():
        assert bool(re.search(pattern, text)) == (name == diagnosis), text


@pytest.mark.parametrize(
    "crackles, wheezes, present, absent",
    [
        ("1", "0", "crackles", "wheezes"),
        ("0", "1", "wheezes", "crackles"),
        ("coarse", "none", "coarse crackles", "wheezes"),
    ],
)
def test_the_right_sound_is_the_absent_one(crackles, wheezes, present, absent):
    for text in texts_of({"crackles": crackles, "wheezes": wheezes}, 200):
        assert re.search(rf"(no|without) {absent}|{absent} absent", text), text
        assert not re.search(rf"(no|without) ({present}|crackles and|wheezes and)", text), text


@pytest.mark.parametrize(
    "code, words",
    [
        ("N", "normal breath sounds"),
        ("I C E W", "inspiratory crackles|expiratory wheezes"),
        ("E W", "expiratory wheezes"),
        ("I E W", "inspiratory and expiratory wheezes"),
        ("Crep", "crepitations"),
        ("I C B", "inspiratory crackles|bronchial breath sounds"),
    ],
)
def test_kauh_sound_types(code, words):
    row = {"Sound_Type": code, "Location": "P L L ", "Diagnosis": "asthma", "Gender": "F"}
    for text in texts_of(row, 10):
        assert all(word in text for word in words.split("|")), text
        assert "left lower posterior chest" in text and "asthma" in text
        assert ("wheez" in text) == ("W" in code) and ("crack" in text) == ("C" in code.split())


@pytest.mark.parametrize(
    "code, words",
    [
        ("P L L", "left lower posterior"),
        ("P L R", "right lower posterior"),
        ("P R L", "right lower posterior"),
        ("P L U", "left upper posterior"),
        ("P U L", "left upper posterior"),
        ("A R U", "right upper anterior"),
        ("P L M", "left middle posterior"),
    ],
)
def test_kauh_locations(code, words):
    assert all(f"{words} chest" in text for text in texts_of({"location": code}, 10))


@pytest.mark.parametrize("column", ["heart_rate", "respiratory_rate"])
def test_rates(column):
    for value, said in (("72", "72"), ("72.0", "72"), ("56.5", "56.5")):
        for text in texts_of({column: value}, 10):
            assert re.search(rf"\b{said} (beats|bpm|breaths)", text), text
            assert ("heart" in text) == (column == "heart_rate")


DIAGNOSES = {
    "normal": "normal",
    "mitral regurgitation": "mitral regurgitation",
    "mitral stenosis": "mitral stenosis",
    "mitral valve prolapse": "mitral valve prolapse",
    "VSD": "ventricular septal defect",
    "Healthy": "healthy",
    "URTI": r"upper respiratory tract infection|\burti\b",
    "COPD4": "copd of severity level 4",
    "Asthma": "asthma",
    "heart failure": "heart failure",
    "Heart Failure + COPD": "heart failure.*(copd|chronic obst)|(copd|chronic obst).*heart failure",
    "Tetralogy of Fallot": "tetralogy of fallot",
    "Plueral Effusion": "pleural effusion",
    "covid-19": "covid-19",
}


@pytest.mark.parametrize("diagnosis", DIAGNOSES)
@pytest.mark.parametrize("organ", ["", "heart", "lung"])
def test_a_bare_diagnosis_has_many_wordings_and_no_finding(diagnosis, organ):
    texts = texts_of({"diagnosis": diagnosis, "organ": organ}, 500)
    assert len(texts) >= 12
    for text in texts:
        assert re.search(DIAGNOSES[diagnosis], text), text
        assert not HEART_FINDINGS.search(text) and not LUNG_FINDINGS.search(text), text
        assert "abnormal" not in text
        if organ:
            other = r"\b(lungs?|chest|breath)\b" if organ == "heart" else r"\bheart sounds?|cardiac"
            assert not re.search(other, text), text


@pytest.mark.parametrize(
    "sound", ["systolic murmur", "diastolic murmur", "wheeze", "crackle", "fine crackles"]
)
def test_a_sound_given_as_the_class(sound):
    texts = texts_of({"diagnosis": sound}, 100)
    assert len(texts) >= 12
    assert all(re.search(rf"\b{sound}", text) for text in texts)
    assert all(re.search(rf"\b{sound}", text.lower()) for text in prompts(sound))
    article = "a " if "murmur" in sound else ""
    assert f"{article}{sound.removesuffix('s')}" in texts[0]


def test_prompts_name_the_class_and_differ_between_classes():
    classes = ["normal", "mitral regurgitation", "mitral stenosis", "mitral valve prolapse"]
    sentences = {name: prompts(name, "heart") for name in classes}
    for name, texts in sentences.items():
        assert len(texts) >= 4 and all(name in text.lower() for text in texts)
        assert set(texts) <= set(wordings({"diagnosis": name, "organ": "heart"}, 1000, 0))
    assert len({text for texts in sentences.values() for text in texts}) == sum(
        map(len, sentences.values())
    )
    assert prompts("MVP") == prompts("mitral valve prolapse", "heart")


def test_wordings_depend_on_the_seed_only():
    row = {"murmur": "Present", "systolic_murmur_timing": "Holosystolic", "outcome": "Abnormal"}
    assert wordings(row, 20, 3) == wordings(dict(reversed(row.items())), 20, 3)
    assert wordings(row, 20, 3) != wordings(row, 20, 4)
    assert wordings(row, 20, 3)[:5] == wordings(row, 5, 3)


def test_case_and_spelling_of_values_and_headers_do_not_matter():
    published = {"Systolic murmur timing": "Early-systolic", "Murmur": "Present"}
    ours = {"systolic_murmur_timing": "early systolic", "murmur": "present"}
    assert wordings(published, 10, 0) == wordings(ours, 10, 0)
    headers = ["Most audible location", "Chest_Location", "Location", "Sound_Type", "Diagnosis"]
    assert [normalise_column(header) for header in headers] == [
        "most_audible_location",
        "chest_location",
        "chest_location",
        "sound_type",
        "diagnosis",
    ]
    assert normalise_column("Recording locations:") == "recording_locations"
    assert {normalise_column(column) for column in METADATA_COLUMNS} == METADATA_COLUMNS


BAD = {
    "murmur": ("maybe", "Present, Absent, Unknown"),
    "murmur_locations": ("AV+XX", "AV, PV, TV, MV"),
    "most_audible_location": ("apex", "MV"),
    "valve_area": ("apex", "MV"),
    "posture": ("upside down", "supine, sitting"),
    "systolic_murmur_timing": ("Early-diastolic", "Early-systolic"),
    "systolic_murmur_grading": ("VII/VI", "VI/VI"),
    "systolic_murmur_pitch": ("shrill", "High, Medium, Low"),
    "diastolic_murmur_shape": ("Square", "Plateau"),
    "diastolic_murmur_quality": ("Soft", "Blowing"),
    "outcome": ("2", "Normal, Abnormal"),
    "heart_rate": ("fast", "20 to 300"),
    "respiratory_rate": ("inf", "3 to 120"),
    "crackles": ("2", "fine, coarse"),
    "wheezes": ("fine", "0, 1"),
    "sound_type": ("I X", "Crep"),
    "chest_location": ("P R R", "Tc, Al"),
    "organ": ("liver", "heart, lung"),
    "diagnosis": ("Error: request timed out", "plain words"),
}


@pytest.mark.parametrize("column", BAD)
def test_an_unknown_value_is_named_with_its_column_and_what_is_allowed(column):
    value, allowed = BAD[column]
    with pytest.raises(ReportError) as error:
        wordings({column: value}, 1, 0)
    wrong_part = value.split("+")[-1]
    assert repr(column) in str(error.value) and wrong_part in str(error.value)
    assert allowed in str(error.value)


@pytest.mark.parametrize("text", ["follow-up echo recommended", "42", "<script>", "x" * 200])
def test_a_diagnosis_has_to_be_plain_words_and_no_advice(text):
    with pytest.raises(ReportError, match="diagnosis"):
        wordings({"diagnosis": text}, 1, 0)


@pytest.mark.parametrize("row", [{}, {"murmur": "nan"}, {"organ": "heart"}, {"age": "Child"}])
def test_a_row_that_says_nothing_is_an_error(row):
    with pytest.raises(ReportError, match="none of the metadata columns"):
        wordings(row, 1, 0)


@pytest.mark.parametrize("murmur", ["Absent", "Unknown"])
def test_a_described_murmur_that_is_not_there_is_an_error(murmur):
    with pytest.raises(ReportError, match="systolic_murmur_timing"):
        wordings({"murmur": murmur, "systolic_murmur_timing": "Holosystolic"}, 1, 0)


def test_two_headers_of_one_column_must_agree():
    with pytest.raises(ReportError, match="chest_location"):
        wordings({"Location": "P L L", "Chest_Location": "Al"}, 1, 0)


def test_infer_organ():
    assert infer_organ(["normal", "mitral stenosis", "MVP"]) == "heart"
    assert infer_organ(["Healthy", "COPD", "URTI"]) == "lung"
    assert infer_organ(["normal"]) == infer_organ(["normal", "COPD", "VSD"]) == ""


def test_heart_sound_recordings(shared):
    with open(shared / "data/heart_sounds/metadata.csv", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 592
    organ = infer_organ(row["diagnosis"] for row in rows)
    assert organ == "heart"
    for number, row in enumerate(rows):
        texts = texts_of(row | {"organ": organ}, 12, number)
        assert len(texts) == 12 and all(row["diagnosis"] in text for text in texts)
