"""Questions to show on the page of a distillation, with every stage's answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medalign_jax.audio import io as audio_io
from medalign_jax.data.questions.question import SAMPLE_RATE, Question
from medalign_jax.evaluate import answers
from medalign_jax.page.recordings import Example, Response, Sound
from medalign_jax.runs.distill import results as scoring

if TYPE_CHECKING:
    from medalign_jax.runs.distill.arms import Setting

_EXAMPLES = 4  # of each task
_NOTE = (
    "Of each task questions that some stages answer right and some wrong: in turn one that {main} "
    "gains over {first} and one that it loses, as far as there are any. Of several seeds the "
    "response is the first one's."
)


def note(setting: Setting, stages: Sequence[str]) -> str:
    """How the examples were chosen."""
    main = scoring.main_arm(setting.config, stages)
    if main is None:
        return "The first questions of each task."
    return _NOTE.format(main=main, first=stages[0])


def examples(setting: Setting, found: scoring.Found) -> list[Example]:
    """A few questions of each task on which the stages differ, chosen as `note` says."""
    main = scoring.main_arm(setting.config, tuple(found))
    shown = []
    for task in setting.tasks:
        runs = {
            stage: [scoring.predictions(task, run[task.name]) for run in seeds]
            for stage, seeds in found.items()
        }
        right = {
            stage: np.stack([answers.hits(task.questions, run) for run in said])
            for stage, said in runs.items()
        }
        for i in _telling({stage: hits[0] for stage, hits in right.items()}, main):
            question = task.questions[i]
            responses = tuple(
                _response(stage, question, found[stage][0][task.name], runs[stage][0], hits[:, i])
                for stage, hits in right.items()
            )
            sounds = tuple(map(_sound, question.audio))
            options, text = question.choices, question.question
            shown.append(Example(task.name, sounds, text, options, question.answer, responses))
    return shown


def _telling(right: Mapping[str, np.ndarray], main: str | None) -> list[int]:
    """Questions on which stages differ: gained, lost, gained, ..., then any others."""
    table = np.stack(list(right.values()))
    order = np.arange(table.shape[1])
    mixed = [int(i) for i in order if table[:, i].any() and not table[:, i].all()]
    if main is None or not mixed:
        return [int(i) for i in order[:_EXAMPLES]]
    gained = [i for i in mixed if right[main][i] > table[0, i]]
    lost = [i for i in mixed if right[main][i] < table[0, i]]
    turns = [i for pair in zip(gained, lost, strict=False) for i in pair]
    rest = [*gained[len(lost) :], *lost[len(gained) :]]
    others = [i for i in mixed if i not in gained and i not in lost]
    # At least one of those that only other arms answer differently, where there are any.
    first = (turns + rest)[: _EXAMPLES - bool(others)]
    return (first + others)[:_EXAMPLES]


def _response(
    stage: str,
    question: Question,
    responses: Mapping[str, str],
    said: Mapping[str, str],
    hits: np.ndarray,
) -> Response:
    note = f"{int(hits.sum())} of {len(hits)} seeds right" if len(hits) > 1 else ""
    text = responses.get(question.id) or ""
    return Response(stage, said.get(question.id) or "", bool(hits[0]), text, note)


def _sound(path: str) -> Sound:
    """The recording; what is wrong with it where it can no longer be read."""
    name = Path(path).name
    try:
        waveform = audio_io.read(path, SAMPLE_RATE)
        audio_io.check_waveform(waveform, path)
    except audio_io.AudioError as error:
        return Sound(name, None, SAMPLE_RATE, error.reason)
    return Sound(name, waveform, SAMPLE_RATE)
