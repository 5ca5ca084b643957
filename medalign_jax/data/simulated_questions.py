"""Questions about simulated heart recordings, with true answers, for tests and the demo.

Three kinds, as an audio language model meets them:

* acoustic: something that only the sound tells (the murmur's pitch), answered directly;
* plain: one fact, heard or read, answered directly;
* reasoning: what is heard (the murmur's phase) and what is read (where the stethoscope lay) lead
  over the valve and its lesion to the answer, in the four stages of `data.reasoning`.

`textual_questions` are the reasoning ones without a recording: a description stands for it, and
there are as many as one likes. The medicine is that of any textbook of auscultation, simplified to
single lesions heard at their own site; it is a world for experiments, not advice.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medalign_jax.data.prompts import PromptFormat
from medalign_jax.data.questions import Question
from medalign_jax.data.reasoning import STAGES, Stages, format_response

VALVES = {"AV": "aortic", "PV": "pulmonary", "TV": "tricuspid", "MV": "mitral"}
PHASES = ("systolic", "diastolic")
PITCHES = ("low", "medium", "high")
LOUDNESS = {"I": "faint", "II": "faint", "III": "moderate", "IV": "loud", "V": "loud", "VI": "loud"}
NO_MURMUR = "no murmur"
_OUTFLOW = ("aortic", "pulmonary")
_CHAMBER = {
    "aortic": "left ventricle",
    "pulmonary": "right ventricle",
    "mitral": "left atrium",
    "tricuspid": "right atrium",
}
_RADIATES = {
    "aortic stenosis": "neck",
    "aortic regurgitation": "sternum",
    "pulmonary stenosis": "shoulder",
    "mitral regurgitation": "axilla",
}


@dataclass(frozen=True)
class Case:
    """What is true of one recording.

    Attributes:
      site: where the stethoscope lay, a key of `VALVES`.
      phase: "systolic", "diastolic", or "" without a murmur.
      pitch, loudness: of the murmur, or "".
      rate: heart beats a minute.
    """

    site: str
    phase: str = ""
    pitch: str = ""
    loudness: str = ""
    rate: int = 80

    @property
    def valve(self) -> str:
        """The valve that is heard best at the site."""
        return VALVES[self.site]

    @property
    def lesion(self) -> str:
        """Stenosis where the valve is open in the murmur's phase, else regurgitation; or ""."""
        if not self.phase:
            return ""
        opened = (self.valve in _OUTFLOW) == (self.phase == "systolic")
        return "stenosis" if opened else "regurgitation"

    @property
    def diagnosis(self) -> str:
        """For example "aortic stenosis"; "normal heart" without a murmur."""
        return f"{self.valve} {self.lesion}" if self.phase else "normal heart"


LESIONS = ("stenosis", "regurgitation")
DIAGNOSES = ("normal heart", *(f"{v} {k}" for v in VALVES.values() for k in LESIONS))

# Reasoning: name -> (question, all answers, right answer).
_TOPICS: dict[str, tuple[str, tuple[str, ...], Callable[[Case], str]]] = {
    "diagnosis": ("Which diagnosis is most likely ?", DIAGNOSES, lambda c: c.diagnosis),
    "lesion": (
        "What is wrong with the valve ?",
        (*LESIONS, "nothing"),
        lambda c: c.lesion or "nothing",
    ),
    "chamber": (
        "Which chamber bears the load ?",
        (*_CHAMBER.values(), "none"),
        lambda c: _CHAMBER[c.valve] if c.phase else "none",
    ),
    "inspiration": (
        "Does the murmur grow with inspiration ?",
        ("yes", "no", NO_MURMUR),
        lambda c: NO_MURMUR if not c.phase else "yes" if c.site in ("PV", "TV") else "no",
    ),
    "radiation": (
        "Where does the murmur radiate ?",
        (*_RADIATES.values(), "nowhere", NO_MURMUR),
        lambda c: _RADIATES.get(c.diagnosis, "nowhere") if c.phase else NO_MURMUR,
    ),
}
TOPICS = tuple(_TOPICS)

# Tags of a response, which a tokeniser has to split off.
MARKS = tuple(f"<{end}{name}>" for name in ("THINK", *STAGES, "RESPONSE") for end in ("", "/"))


def read_cases(manifest: str | Path) -> list[tuple[Case, Mapping[str, str]]]:
    """Cases of a folder that `simulate.write_dataset` made, with their rows of the manifest.

    A recording without a murmur has no best site; one is dealt out by its number.
    """
    with Path(manifest).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [(_case(row, number), row) for number, row in enumerate(rows)]


def _case(row: Mapping[str, str], number: int) -> Case:
    phase = next((p for p in PHASES if row.get(f"{p}_murmur_timing")), "")
    site = row.get("most_audible_location") or tuple(VALVES)[number % len(VALVES)]
    if not phase:
        return Case(site, rate=round(float(row["heart_rate"])))
    grade = row[f"{phase}_murmur_grading"].removesuffix("/VI")
    pitch = row[f"{phase}_murmur_pitch"].lower()
    return Case(site, phase, pitch, LOUDNESS[grade], round(float(row["heart_rate"])))


def random_cases(count: int, seed: int) -> list[Case]:
    """Cases without a recording, the phases (none, systolic, diastolic) equally often."""
    rng = np.random.default_rng((seed, 17))
    found = []
    for number in range(count):
        phase = ("", *PHASES)[number % 3]
        site, rate = str(rng.choice(tuple(VALVES))), int(rng.integers(50, 120))
        pitch, loud = rng.choice(PITCHES), rng.choice(("faint", "moderate", "loud"))
        found.append(Case(site, phase, *((str(pitch), str(loud)) if phase else ("", "")), rate))
    return found


def describe(case: Case, rng: np.random.Generator) -> str:
    """A textualised recording: what a listener would write down. The pitch is passed over."""
    speed = "slow" if case.rate < 65 else "fast" if case.rate > 95 else "steady"
    begin = (
        f"The heart is {speed} .",
        f"Two heart sounds at a {speed} rate .",
        f"A {speed} heart is heard .",
    )
    murmur = (
        (
            f"There is a {case.loudness} {case.phase} murmur .",
            f"A {case.loudness} murmur is {case.phase} .",
            f"One hears a {case.phase} murmur , {case.loudness} .",
        )
        if case.phase
        else (
            "There is no murmur .",
            "One hears no murmur .",
            "Nothing is heard between the sounds .",
        )
    )
    return f"{begin[rng.integers(3)]} {murmur[rng.integers(3)]}"


def acoustic(case: Case, audio: str, **where: str) -> Question:
    """What pitch the murmur has: four classes that only the sound tells."""
    return Question(
        id=f"{where.get('name', audio)}/pitch",
        audio=(audio,),
        question="What pitch does the murmur have ?",
        choices=(*PITCHES, NO_MURMUR),
        answer=case.pitch or NO_MURMUR,
        task="acoustic",
        **_place(where),
    )


def plain(case: Case, audio: str, rng: np.random.Generator, **where: str) -> Question:
    """One fact: the valve at the site, whether there is a murmur, or how fast the heart is."""
    site = f"The site is {case.site} ."
    speed = "slow" if case.rate < 65 else "fast" if case.rate > 95 else "steady"
    facts = (
        (f"{site} Which valve is heard ?", tuple(VALVES.values()), case.valve),
        ("Is there a murmur ?", ("yes", "no"), "yes" if case.phase else "no"),
        ("How is the rate ?", ("slow", "steady", "fast"), speed),
    )
    text, choices, answer = facts[rng.integers(len(facts))]
    return Question(
        id=f"{where.get('name', audio)}/plain",
        audio=(audio,), question=text, choices=choices, answer=answer, task="plain",
        **_place(where),
    )  # fmt: skip


def reasoning(
    case: Case, audio: str, topic: str, rng: np.random.Generator, **where: str
) -> Question:
    """A question of one of `TOPICS`, with its description and its four stages of reasoning.

    Of many possible answers four are offered, the right one among them.
    """
    text, answers, right = _TOPICS[topic]
    answer = right(case)
    others = [a for a in answers if a != answer]
    kept = [others[i] for i in rng.permutation(len(others))[:3]]
    choices = tuple(a for a in answers if a == answer or a in kept)
    return Question(
        id=f"{where.get('name', audio)}/{topic}",
        audio=(audio,) if audio else (),
        question=f"The site is {case.site} . {text}",
        choices=choices,
        answer=answer,
        reasoning=_think(case, answer),
        description=describe(case, rng),
        task="reasoning",
        sub_category=topic,
        **_place(where),
    )


def _think(case: Case, answer: str) -> Stages:
    heard = f"a {case.phase} murmur" if case.phase else NO_MURMUR
    steps = f"{case.site} is the {case.valve} site ."
    if case.phase:
        opened = "open" if case.lesion == "stenosis" else "closed"
        when = "systole" if case.phase == "systolic" else "diastole"
        steps += (
            f" In {when} the {case.valve} valve should be {opened} , so this is {case.diagnosis} ."
        )
    else:
        steps += " The valve is silent , so this is a normal heart ."
    return Stages(
        planning="Listen for a murmur and its phase , then think of the valve .",
        caption=f"One hears {heard} .",
        reasoning=steps,
        summary=f"{case.diagnosis} : {answer} .",
    )


def textual_questions(count: int, seed: int) -> list[Question]:
    """Reasoning questions with a description and no recording: what a text teacher learns from."""
    rng = np.random.default_rng((seed, 23))
    return [
        reasoning(case, "", TOPICS[rng.integers(len(TOPICS))], rng, name=f"text-{number:06d}")
        for number, case in enumerate(random_cases(count, seed))
    ]


def recorded_questions(manifest: str | Path, seed: int, topics: int = 1) -> list[Question]:
    """All three kinds for every recording of a simulated data set.

    Args:
      manifest: `metadata.csv` of `simulate.write_dataset`, heart recordings.
      seed: of the topics, wordings and options.
      topics: reasoning questions a recording.
    """
    folder = Path(manifest).parent
    found: list[Question] = []
    for number, (case, row) in enumerate(read_cases(manifest)):
        rng = np.random.default_rng((seed, 29, number))
        audio = str(folder / row["audio_path"])
        where = {"name": Path(audio).stem, "subject_id": row["subject_id"], "split": row["split"]}
        found += [acoustic(case, audio, **where), plain(case, audio, rng, **where)]
        chosen = rng.permutation(len(TOPICS))[:topics]
        found += [reasoning(case, audio, TOPICS[i], rng, **where) for i in chosen]
    return found


def _place(where: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in where.items() if key in ("subject_id", "split")}


def words(questions: Iterable[Question], format: PromptFormat) -> list[str]:
    """Every word of the prompts and responses, once, sorted: a word-level vocabulary."""
    found: set[str] = set()
    for question in questions:
        texts = (
            format.described(question),
            format.response(question),
            format_response(None, question.answer),
        )
        found.update(word for text in texts for word in text.split())
    return sorted(found - set(MARKS))
