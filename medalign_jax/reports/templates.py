"""Clinical sentences from a recording's metadata, by templates.

Every text says all that the row says and nothing that it does not: an empty cell is not mentioned,
`Murmur: Unknown` stays undetermined, a bare diagnosis brings no auscultatory finding with it, and
there is never advice. One row has many wordings, so that a model that is aligned with them does
not learn a fixed text by heart.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from medalign_jax.reports import phrases as say
from medalign_jax.reports.grammar import Chain, Choice, Literal, Node, Shuffle, distinct, fill
from medalign_jax.reports.vocabulary import (
    ABBREVIATIONS,
    FEATURES,
    HEART_COLUMNS,
    LUNG_COLUMNS,
    METADATA_COLUMNS,
    PHASES,
    ReportError,
    normalise_column,
    organ_of,
    organ_of_diagnosis,
    read_diagnosis,
    read_metadata,
)

__all__ = [
    "HEART_COLUMNS",
    "LUNG_COLUMNS",
    "METADATA_COLUMNS",
    "ReportError",
    "infer_organ",
    "normalise_column",
    "prompts",
    "wordings",
    "wordings_without",
]

NOTHING = Literal("")
_PROMPT_TEMPLATES = 4  # the plain ones that a table of diagnosis sentences begins with


@dataclass(frozen=True)
class Section:
    """One matter of a report, as sentences and as a telegraphic note."""

    prose: Node
    note: Node


def wordings(metadata: Mapping[str, str], count: int, seed: int) -> tuple[str, ...]:
    """Different ways to put one row's metadata into words.

    Args:
      metadata: column -> value, published headers or this package's (`METADATA_COLUMNS`; others
        are not looked at). Empty cells and the text "nan" are left out.
      count: how many are wanted. Fewer come back only where fewer exist.
      seed: the same seed gives the same texts in the same order.

    Returns:
      Distinct texts of one or more sentences.

    Raises:
      ReportError: a value that is not known, a contradiction, or nothing that could be said.
    """
    facts = read_metadata(metadata)
    return distinct(_report(facts), count, seed, finish=_tidy)


def wordings_without(
    metadata: Mapping[str, str], leave_out: Collection[str], count: int, seed: int
) -> tuple[str, ...]:
    """`wordings` that say nothing of some columns.

    Where nothing else is known of a recording the one sentence says that it is a recording.

    Args:
      metadata, count, seed: as `wordings` takes them.
      leave_out: columns by this package's names (`METADATA_COLUMNS`).

    Raises:
      ReportError: as `wordings`; no row says too little.
    """
    facts = read_metadata(metadata)
    kept = {column: value for column, value in facts.items() if column not in leave_out}
    if kept.keys() <= {"organ"}:
        return (say.NOTHING_SAID[kept.get("organ", "")],)
    return distinct(_report(kept), count, seed, finish=_tidy)


def prompts(diagnosis: str, organ: str = "") -> tuple[str, ...]:
    """The sentences that stand for a class, to find the nearest (embed them, and average).

    Args:
      diagnosis: a diagnosis, "normal", or the name of a sound such as "systolic murmur", "wheeze".
      organ: "heart", "lung", or "" to infer it from the diagnosis.

    Raises:
      ReportError: not the name of a diagnosis, or an unknown organ.
    """
    facts = read_metadata({"diagnosis": diagnosis, "organ": organ})
    if "diagnosis" not in facts:
        raise ReportError(f"no prompt can be made from the diagnosis {diagnosis!r}; give its name")
    name = Literal(facts["diagnosis"])
    node = _diagnosis_only(facts["diagnosis"], name, organ_of(facts), _PROMPT_TEMPLATES)
    return tuple(dict.fromkeys(_tidy(text) for text in node.expand({})))


def infer_organ(diagnoses: Iterable[str]) -> str:
    """`heart` or `lung` if the diagnoses of a data set name diseases of that organ only.

    A row that says just "normal" cannot say which organ was listened to; its data set can.
    """
    organs = {organ_of_diagnosis(read_diagnosis(text)) for text in set(diagnoses)} - {""}
    return organs.pop() if len(organs) == 1 else ""


def _report(facts: Mapping[str, str]) -> Node:
    stated = set(facts) - {"organ"}
    if not stated:
        raise ReportError(
            "no report can be made: none of the metadata columns holds a value; fill one of "
            f"{', '.join(sorted(METADATA_COLUMNS - {'organ'}))}, or give a report"
        )
    if stated == {"diagnosis"}:
        name = _diagnosis_name(facts["diagnosis"])
        return _diagnosis_only(facts["diagnosis"], name, organ_of(facts))
    sections = [
        *_recording_section(facts),
        *_murmur_sections(facts),
        *_lung_sections(facts),
        *_value_section(facts, "heart_rate", say.HEART_RATE, say.HEART_RATE_NOTE),
        *_value_section(facts, "respiratory_rate", say.RESPIRATORY_RATE, say.RESPIRATORY_RATE_NOTE),
        *_value_section(facts, "outcome", say.OUTCOME, say.OUTCOME_NOTE),
        *_diagnosis_section(facts),
    ]
    prose = Shuffle(tuple(section.prose for section in sections), ". ", ". ")
    notes = Shuffle(tuple(section.note for section in sections), "; ", "; ")
    headed = Chain((fill(say.NOTES_HEAD), notes))
    return Choice((prose, prose, headed))  # prose twice: reports are mostly sentences


def _tidy(text: str) -> str:
    """Capitals at sentence starts, "an" before a vowel, one space between words, a full stop."""
    text = re.sub(r"\s+", " ", text).strip().rstrip(".")
    text = re.sub(r"\b(a) (?=[aeio])", r"\1n ", text)
    text = re.sub(r"(^|\. )([a-z])", lambda m: m[1] + m[2].upper(), text)
    return text + "."


def _value_section(
    facts: Mapping[str, str], column: str, prose: tuple[str, ...], note: tuple[str, ...]
) -> list[Section]:
    if column not in facts:
        return []
    value = facts[column].lower()
    return [Section(fill(prose, value=value), fill(note, value=value))]


def _recording_section(facts: Mapping[str, str]) -> list[Section]:
    """Where and how a recording was made."""
    parts: list[Node] = []
    if area := facts.get("valve_area"):
        parts.append(fill(say.AT_AREA, area=_sites([area])))
    if posture := facts.get("posture"):
        parts.append(fill(say.IN_POSTURE, posture=posture))
    if not parts:
        return []
    place = Shuffle(tuple(parts), "", "")
    return [Section(fill(say.RECORDED, place=place), fill(say.RECORDED_NOTE, place=place))]


# --- Heart -------------------------------------------------------------------------------------


def _murmur_sections(facts: Mapping[str, str]) -> list[Section]:
    if facts.get("murmur") == "Absent":
        return [Section(fill(say.MURMUR_ABSENT), fill(say.MURMUR_ABSENT_NOTE))]
    if facts.get("murmur") == "Unknown":
        return [Section(fill(say.MURMUR_UNKNOWN), fill(say.MURMUR_UNKNOWN_NOTE))]
    where = _where(facts)
    described = [phase for phase in PHASES if _features(facts, phase)]
    if len(described) == 1:
        return [_described_murmur(facts, described[0], where)]
    if described:
        sections = [_described_murmur(facts, phase, NOTHING) for phase in described]
        if where is not NOTHING:
            sentence = fill(say.SEVERAL_MURMURS_WHERE, where=where)
            sections.append(Section(sentence, sentence))
        return sections
    if "murmur" in facts or where is not NOTHING:
        slots = {"where": where}
        return [Section(fill(say.MURMUR_PRESENT, **slots), fill(say.MURMUR_PRESENT_NOTE, **slots))]
    return []


def _features(facts: Mapping[str, str], phase: str) -> dict[str, str]:
    columns = {feature: f"{phase}_murmur_{feature}" for feature in FEATURES}
    return {feature: facts[column] for feature, column in columns.items() if column in facts}


def _described_murmur(facts: Mapping[str, str], phase: str, where: Node) -> Section:
    features = _features(facts, phase)
    timing = fill(say.TIMING[features.pop("timing")]) if "timing" in features else Literal(phase)
    adjectives, nouns, notes = (
        {feature: _feature(feature, value, form) for feature, value in features.items()}
        for form in range(3)
    )
    murmur = Choice(
        tuple(_murmur_phrase(timing, adjectives, nouns, after) for after in _after_noun(features))
    )
    noted = [Chain((Literal(", "), note)) for note in notes.values()]
    slots = {"murmur": murmur, "timing": timing, "where": where}
    prose = [fill(say.DESCRIBED_MURMUR, **slots)]
    if nouns:
        listed = Shuffle(tuple(nouns.values()))
        prose.append(fill(say.STEPWISE_MURMUR, nouns=listed, **slots))
    return Section(
        Choice(tuple(prose)),
        fill(say.DESCRIBED_MURMUR_NOTE, notes=Shuffle(tuple(noted), "", ""), **slots),
    )


def _feature(feature: str, value: str, form: int) -> Node:
    shaped = "-shaped" if value in ("Plateau", "Diamond") else ""
    text = value if feature == "grading" else value.lower()
    return fill(f"({say.FEATURE[feature][form]})", value=text, shaped=shaped)


def _after_noun(features: Mapping[str, str]) -> list[frozenset[str]]:
    """Which features stand after the word murmur: none, all, the grade, the shape, or both."""
    given = frozenset(features)
    options = [frozenset(), given, given & {"grading"}, given & {"shape"}]
    options.append(given & {"grading", "shape"})
    return list(dict.fromkeys(options))


def _murmur_phrase(
    timing: Node, adjectives: Mapping[str, Node], nouns: Mapping[str, Node], after: frozenset[str]
) -> Node:
    before = [node for feature, node in adjectives.items() if feature not in after]
    behind = [node for feature, node in nouns.items() if feature in after]
    parts: list[Node] = [Literal("a ")]
    if before:
        parts += [Shuffle(tuple(before), ", ", ", "), Literal(" ")]
    parts += [timing, Literal(" murmur")]
    if behind:
        parts += [Literal(" with "), Shuffle(tuple(behind))]
    return Chain(tuple(parts))


def _where(facts: Mapping[str, str]) -> Node:
    """Where the murmur is heard, ready to stand behind the verb."""
    sites = facts["murmur_locations"].split("+") if "murmur_locations" in facts else []
    best = facts.get("most_audible_location")
    others = [site for site in sites if site != best]
    if not best:
        return fill(say.WHERE_SITES, sites=_sites(sites)) if sites else NOTHING
    loudest = fill(say.LOUDEST, best=_sites([best]))
    if not sites:
        return fill(say.WHERE_BEST, loudest=loudest)
    if not others:
        return fill(say.WHERE_ONE, best=_sites([best]))
    slots = {"loudest": loudest, "others": _sites(others), "sites": _sites([best, *others])}
    return fill(say.WHERE_BEST_AND_OTHERS, **slots)


def _sites(sites: list[str]) -> Node:
    valves = tuple(fill(say.VALVE[site]) for site in sites if site in say.VALVE)
    places: list[Node] = []
    if valves:
        template = say.ONE_VALVE if len(valves) == 1 else say.SEVERAL_VALVES
        places.append(fill(template, valves=Shuffle(valves)))
    if len(valves) < len(sites):
        places.append(fill(say.OTHER_SITE))
    return Shuffle(tuple(places))


# --- Lung --------------------------------------------------------------------------------------


def _lung_sections(facts: Mapping[str, str]) -> list[Section]:
    site = facts.get("chest_location")
    at = fill(say.AT_CHEST, site=site) if site else NOTHING
    sections = []
    if "sound_type" in facts:
        sounds = facts["sound_type"].replace("normal", "normal breath sounds").split(",")
        sections.append(_sounds_present(sounds, at))
        at = NOTHING  # the place is said once
    if events := _event_section(facts, at):
        sections.append(events)
    elif site and not sections:
        sections.append(
            Section(fill(say.CHEST_ONLY, site=site), fill(say.CHEST_ONLY_NOTE, site=site))
        )
    return sections


def _event_section(facts: Mapping[str, str], at: Node) -> Section | None:
    present, absent = [], []
    for column in ("crackles", "wheezes"):
        if (value := facts.get(column)) == "0":
            absent.append(column)
        elif value:
            present.append(column if value == "1" else f"{value} {column}")
    if present and absent:
        slots = {"present": present[0], "absent": absent[0], "at": at}
        return Section(fill(say.SOUNDS_MIXED, **slots), fill(say.SOUNDS_MIXED_NOTE, **slots))
    if present:
        return _sounds_present(present, at)
    return _sounds_absent(absent, at) if absent else None


def _sounds_present(sounds: list[str], at: Node) -> Section:
    slots = {"sounds": Shuffle(tuple(map(Literal, sounds))), "at": at}
    return Section(fill(say.SOUNDS_PRESENT, **slots), fill(say.SOUNDS_PRESENT_NOTE, **slots))


def _sounds_absent(sounds: list[str], at: Node) -> Section:
    names = tuple(map(Literal, sounds))
    slots = {"sounds": Shuffle(names, last=" or "), "at": at}
    verb = Literal(" are")
    both = Chain((Shuffle(names), verb))
    neither = Chain((Literal("neither "), Shuffle(names, last=" nor "), Literal(" are")))
    sentences = [fill(say.SOUNDS_ABSENT, sounds_not=both, **slots)]
    if len(sounds) == 2:
        heard = fill("{neither} (heard|present|audible){at}", neither=neither, at=at)
        sentences.append(heard)
    return Section(Choice(tuple(sentences)), fill(say.SOUNDS_ABSENT_NOTE, **slots))


# --- Diagnosis ---------------------------------------------------------------------------------


def _diagnosis_name(diagnosis: str) -> Node:
    """The name, at times with its abbreviation; lung diseases also go by that alone."""
    parts = []
    for part in diagnosis.split(" and "):
        options = [part]
        if short := ABBREVIATIONS.get(part):
            options += [part, f"{part} ({short})"]
            if organ_of_diagnosis(part) == "lung":
                options.append(short)
        parts.append(Choice(tuple(map(Literal, options))))
    return Shuffle(tuple(parts))


def _diagnosis_section(facts: Mapping[str, str]) -> list[Section]:
    if not (diagnosis := facts.get("diagnosis")):
        return []
    if diagnosis in ("normal", "healthy"):
        prose, note = say.DIAGNOSIS_STATE, say.DIAGNOSIS_STATE_NOTE
    else:
        prose, note = say.DIAGNOSIS, say.DIAGNOSIS_NOTE
    name = _diagnosis_name(diagnosis)
    return [Section(fill(prose, name=name), fill(note, name=name))]


_FINDING = re.compile(r"((?:[\w-]+ )*)(murmur|wheeze|crackle|crepitation|rhonchi|stridor)s?")


def _diagnosis_only(diagnosis: str, name: Node, organ: str, first: int | None = None) -> Node:
    """Sentences for a bare diagnosis; `first` keeps only that many of the templates."""
    if diagnosis == "normal":
        return fill(say.NORMAL_ONLY[organ][:first])
    if diagnosis == "healthy":
        return fill(say.HEALTHY_ONLY[organ][:first])
    if finding := _FINDING.fullmatch(diagnosis):
        sounds, auscultation = say.ORGAN_WORDS[organ]
        one = finding[2] in ("murmur", "stridor") and not diagnosis.endswith("s")
        article = "a " if finding[2] == "murmur" and one else ""
        plural = "" if one or diagnosis.endswith(("s", "i")) else "s"
        return fill(
            say.FINDING_ONLY[:first],
            name=f"{article}{diagnosis}{plural}",
            be="is" if one else "are",
            sounds=sounds,
            auscultation=auscultation,
        )
    return fill(say.DISEASE_ONLY[organ][:first], name=name)
