"""Questions about simulated recordings, with true answers, for tests and the demo.

Three kinds, as an audio language model meets them:

* acoustic: something that only the sound shows (the recorder's noise), answered directly;
* plain: one fact, heard (the murmur) or read (the site), answered directly;
* reasoning: what is heard (the murmur's pitch) and what is read (where the stethoscope lay) lead
  over the valve and its lesion to the answer, in the four stages of `text.reasoning`.

`textual_questions` are the plain and reasoning ones without a recording: a description stands for
it, and there are as many as one likes. The world is that of `simulated_cases`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from medalign_jax.data.questions.prompts import PromptFormat
from medalign_jax.data.questions.question import Question
from medalign_jax.datasets.simulated.cases import (
    LOUDNESS,
    NOISES,
    PITCHES,
    VALVES,
    Case,
    random_cases,
    read_cases,
)
from medalign_jax.text.reasoning import STAGES, Stages, format_response

NO_MURMUR = "no murmur"
LESIONS = ("stenosis", "regurgitation")
DIAGNOSES = ("normal heart", *(f"{v} {k}" for v in VALVES.values() for k in LESIONS))
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

_Kind = tuple[str, tuple[str, ...], Callable[[Case], str]]  # question, all answers, right answer

_TOPICS: dict[str, _Kind] = {
    "diagnosis": ("Which diagnosis is most likely ?", DIAGNOSES, lambda c: c.diagnosis),
    "lesion": (
        "What is wrong with the valve ?",
        (*LESIONS, "nothing"),
        lambda c: c.lesion or "nothing",
    ),
    "phase": (
        "In which phase is the murmur ?",
        ("systolic", "diastolic", NO_MURMUR),
        lambda c: c.phase or NO_MURMUR,
    ),
    "chamber": (
        "Which chamber bears the load ?",
        (*_CHAMBER.values(), "none"),
        lambda c: _CHAMBER[c.valve] if c.pitch else "none",
    ),
    "radiation": (
        "Where does the murmur radiate ?",
        (*_RADIATES.values(), "nowhere", NO_MURMUR),
        lambda c: _RADIATES.get(c.diagnosis, "nowhere") if c.pitch else NO_MURMUR,
    ),
}
TOPICS = tuple(_TOPICS)

_FACTS: dict[str, _Kind] = {
    "valve": ("Which valve is heard ?", tuple(VALVES.values()), lambda c: c.valve),
    "pitch": (
        "Which pitch has the murmur ?",
        (*PITCHES, NO_MURMUR),
        lambda c: c.pitch or NO_MURMUR,
    ),
    "loudness": (
        "How loud is the murmur ?",
        (*LOUDNESS, NO_MURMUR),
        lambda c: c.loudness or NO_MURMUR,
    ),
}
FACTS = tuple(_FACTS)

# Tags of a response, which a tokeniser has to split off.
MARKS = tuple(f"<{end}{name}>" for name in ("THINK", *STAGES, "RESPONSE") for end in ("", "/"))


def describe(case: Case, rng: np.random.Generator) -> str:
    """A textualised recording: what a listener to the heart writes down, the noise passed over."""
    begin = (
        f"The heart is {case.speed} .",
        f"Two heart sounds at a {case.speed} rate .",
        f"A {case.speed} heart is heard .",
    )
    murmur = (
        (
            f"There is a {case.loudness} murmur of {case.pitch} pitch .",
            f"A {case.loudness} murmur is {case.pitch} .",
            f"One hears a {case.pitch} murmur , {case.loudness} .",
        )
        if case.pitch
        else (
            "There is no murmur .",
            "One hears no murmur .",
            "Nothing is heard between the sounds .",
        )
    )
    return f"{begin[rng.integers(3)]} {murmur[rng.integers(3)]}"


def acoustic(case: Case, audio: str, **where: str) -> Question:
    """The recorder's noise: four classes that only the sound shows."""
    return Question(
        id=f"{where.get('name', audio)}/noise",
        audio=(audio,),
        question="Which noise does the recorder make ?",
        choices=NOISES,
        answer=case.noise,
        task="acoustic",
        **_place(where),
    )


def plain(case: Case, audio: str, fact: str, rng: np.random.Generator, **where: str) -> Question:
    """One of `FACTS`, heard, or read off the site or the description."""
    text, choices, right = _FACTS[fact]
    return Question(
        id=f"{where.get('name', audio)}/{fact}",
        audio=(audio,) if audio else (),
        question=f"The site is {case.site} . {text}",
        choices=choices,
        answer=right(case),
        description=describe(case, rng),
        task="plain",
        sub_category=fact,
        **_place(where),
    )


def reasoning(
    case: Case,
    audio: str,
    topic: str,
    rng: np.random.Generator,
    label_noise: float = 0.0,
    **where: str,
) -> Question:
    """A question of one of `TOPICS`, with its description and its four stages of reasoning.

    Of many possible answers four are offered, the given one among them.

    Args:
      label_noise: how often the trace, after naming the findings right, concludes as from another
        murmur, and answers so; the description stays right.
    """
    text, answers, right = _TOPICS[topic]
    concluded = case
    if rng.random() < label_noise:
        concluded = _with_other_murmur(case, rng)
    answer = right(concluded)
    others = [a for a in answers if a != answer]
    kept = [others[i] for i in rng.permutation(len(others))[:3]]
    return Question(
        id=f"{where.get('name', audio)}/{topic}",
        audio=(audio,) if audio else (),
        question=f"The site is {case.site} . {text}",
        choices=tuple(a for a in answers if a == answer or a in kept),
        answer=answer,
        reasoning=_think(case, concluded, answer, rng),
        description=describe(case, rng),
        task="reasoning",
        sub_category=topic,
        **_place(where),
    )


def _with_other_murmur(case: Case, rng: np.random.Generator) -> Case:
    others = [pitch for pitch in ("", *PITCHES) if pitch != case.pitch]
    return replace(case, pitch=others[rng.integers(len(others))])


def _think(case: Case, concluded: Case, answer: str, rng: np.random.Generator) -> Stages:
    """The four stages, each in one of several wordings, as writers of traces vary too."""

    def one_of(*wordings: str) -> str:
        return wordings[rng.integers(len(wordings))]

    heard = f"a {case.pitch} murmur" if case.pitch else NO_MURMUR
    where = one_of(
        f"{case.site} is the {case.valve} site .",
        f"At {case.site} one hears the {case.valve} valve .",
        f"The {case.valve} valve is heard at {case.site} .",
    )
    return Stages(
        planning=one_of(
            "Listen for a murmur and its pitch , then think of the valve .",
            "First the pitch of any murmur , then the valve at the site .",
            "Find out how a murmur sounds and which valve it is .",
        ),
        caption=one_of(
            f"One hears {heard} .", f"The recording has {heard} .", f"There is {heard} ."
        ),
        reasoning=f"{where} {one_of(*_conclusions(concluded))}",
        summary=f"{concluded.diagnosis} : {answer} .",
    )


def _conclusions(case: Case) -> Sequence[str]:
    """From the valve and the murmur to the diagnosis, in several wordings."""
    if not case.pitch:
        return (
            "The valve is silent , so this is a normal heart .",
            "Nothing but two sounds , which makes it a normal heart .",
        )
    leaks = case.lesion == "regurgitation"
    blood = "falls back" if leaks else "is forced through"
    valve = "leaking" if leaks else "narrow"
    when = "systole" if case.phase == "systolic" else "diastole"
    return (
        f"Blood that {blood} sounds {case.pitch} , so this is {case.diagnosis} , heard in {when} .",
        f"A {valve} valve sounds {case.pitch} in {when} , which makes it {case.diagnosis} .",
        f"What sounds in {when} is a {valve} valve , which tells of {case.diagnosis} .",
    )


def textual_questions(count: int, seed: int) -> list[Question]:
    """Questions with a description and no recording: what a text teacher learns from.

    Two of three are to be reasoned about, the third is plain.
    """
    rng, found = np.random.default_rng((seed, 23)), []
    for number, case in enumerate(random_cases(count, seed)):
        name = f"text-{number:06d}"
        if rng.integers(3):
            topic = TOPICS[rng.integers(len(TOPICS))]
            found.append(reasoning(case, "", topic, rng, name=name))
        else:
            found.append(plain(case, "", FACTS[rng.integers(len(FACTS))], rng, name=name))
    return found


def recorded_questions(
    listing: str | Path, seed: int, topics: int = 1, facts: int = 1, label_noise: float = 0.0
) -> list[Question]:
    """All three kinds for every recording of `simulated_cases.write_cases`.

    Args:
      listing: its ``cases.jsonl``.
      seed: of the topics, wordings and options.
      topics, facts: reasoning and plain questions per recording.
      label_noise: see `reasoning`.
    """
    found: list[Question] = []
    for number, (case, audio) in enumerate(read_cases(listing)):
        rng = np.random.default_rng((seed, 29, number))
        where = {"name": Path(audio).stem, "subject_id": Path(audio).stem}
        found.append(acoustic(case, audio, **where))
        chosen = [TOPICS[i] for i in rng.permutation(len(TOPICS))[:topics]]
        found += [reasoning(case, audio, topic, rng, label_noise, **where) for topic in chosen]
        chosen = [FACTS[i] for i in rng.permutation(len(FACTS))[:facts]]
        found += [plain(case, audio, fact, rng, **where) for fact in chosen]
    return found


def _place(where: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in where.items() if key == "subject_id"}


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
