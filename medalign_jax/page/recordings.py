"""Recordings on the report page: with their reports, or with questions and answers."""

from __future__ import annotations

import dataclasses

import numpy as np

from medalign_jax.page import media
from medalign_jax.page.svg import escape

_PLAYED_SECONDS = 20


@dataclasses.dataclass(frozen=True)
class Nearest:
    """A report near a recording: its text, the cosine, and whether it is the recording's own."""

    text: str
    similarity: float
    own: bool = False


@dataclasses.dataclass(frozen=True)
class Recording:
    """A recording to listen to.

    Attributes:
      name: file name or id.
      waveform: (samples,) float.
      sample_rate: Hz.
      label: True class, or "".
      predicted: class that the model names, or "".
      report: its own report, or "".
      features: (frames, bands) log-mel, or None.
      nearest: nearest reports, best first.
    """

    name: str
    waveform: np.ndarray
    sample_rate: int
    label: str = ""
    predicted: str = ""
    report: str = ""
    features: np.ndarray | None = None
    nearest: tuple[Nearest, ...] = ()


@dataclasses.dataclass(frozen=True)
class Sound:
    """A recording that a question is about.

    Attributes:
      name: file name.
      waveform: (samples,) float, or None where it cannot be played.
      sample_rate: Hz.
      problem: why it cannot.
    """

    name: str
    waveform: np.ndarray | None
    sample_rate: int = 16_000
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class Response:
    """What a stage answered.

    Attributes:
      stage: its name.
      answer: what the response answers, "" for nothing.
      right: whether that is the right answer.
      text: the whole response.
      note: for example of how many seeds it is one.
    """

    stage: str
    answer: str
    right: bool
    text: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Example:
    """A question, and what each stage answered.

    Attributes:
      task: what the question belongs to.
      sounds: recordings that it is about.
      question: its text.
      options: to choose from, or none.
      answer: the right one.
      responses: one per stage.
    """

    task: str
    sounds: tuple[Sound, ...]
    question: str
    options: tuple[str, ...]
    answer: str
    responses: tuple[Response, ...]


def recording_card(recording: Recording) -> str:
    """The recording to see and hear, with its reports, as HTML."""
    played, length = _played(recording.waveform, recording.sample_rate)
    name = escape(recording.name)
    parts = [
        f'<header><h3>{name}</h3>{_chips(recording)}<span class="chip">{length}</span></header>',
        media.waveform_svg(played, f"Waveform of {recording.name}, {length}"),
    ]
    if recording.features is not None:
        parts.append(
            f'<img class="mel" src="{media.spectrogram_uri(recording.features)}" alt="Log-mel '
            f'spectrogram of {name}: time to the right, pitch upwards">'
        )
    parts.append(_player(recording.name, played, recording.sample_rate))
    if recording.report:
        parts.append(f'<div><p class="label">Its report</p><p>{escape(recording.report)}</p></div>')
    if recording.nearest:
        items = "".join(_nearest(n) for n in recording.nearest)
        parts.append(
            f'<div><p class="label">Nearest reports</p><ol class="nearest">{items}</ol></div>'
        )
    return f'<article class="card recording">{"".join(parts)}</article>'


def _chips(recording: Recording) -> str:
    label = f'<span class="chip">{escape(recording.label)}</span>' if recording.label else ""
    if not recording.predicted:
        return label
    right = recording.predicted == recording.label
    look, word = ("right", "✓ named") if right else ("wrong", "✗ named")
    return f'{label}<span class="chip {look}">{word} {escape(recording.predicted)}</span>'


def _nearest(nearest: Nearest) -> str:
    mark = ' <span class="own-mark">its own</span>' if nearest.own else ""
    text = f'<span class="own">{escape(nearest.text)}</span>' if nearest.own else None
    return (
        f'<li><span class="sim">{nearest.similarity:.3f}</span>'
        f"<span>{text or escape(nearest.text)}{mark}</span></li>"
    )


def _played(waveform: np.ndarray, sample_rate: int) -> tuple[np.ndarray, str]:
    """The beginning that is put on the page, and in words how long the recording is."""
    played = waveform[: _PLAYED_SECONDS * sample_rate]
    length = f"{len(waveform) / sample_rate:.1f} s"
    if len(played) < len(waveform):
        length += f", first {_PLAYED_SECONDS} s shown"
    return played, length


def _player(name: str, waveform: np.ndarray, sample_rate: int) -> str:
    uri = media.audio_uri(waveform, sample_rate)
    return f'<audio controls preload="none" aria-label="{escape(name)}" src="{uri}"></audio>'


def example_card(example: Example) -> str:
    """The question with its recordings to hear, its options and the answers, as HTML."""
    options = example.options or (example.answer,)
    items = "".join(_option(option, option == example.answer) for option in options)
    label = "Options, ✓ the right one" if example.options else "Right answer"
    responses = "".join(map(_response, example.responses))
    return (
        f'<article class="card recording"><header><h3>{escape(example.question)}</h3>'
        f'<span class="chip">{escape(example.task)}</span></header>'
        f"{''.join(map(_sound, example.sounds))}"
        f'<div><p class="label">{label}</p><ul class="options">{items}</ul></div>'
        f'<div><p class="label">Answers</p><ul class="answers">{responses}</ul></div></article>'
    )


def _sound(sound: Sound) -> str:
    if sound.waveform is None:
        return f'<p class="empty">{escape(sound.name)}: {escape(sound.problem)}</p>'
    played, length = _played(sound.waveform, sound.sample_rate)
    return (
        f'<div><p class="label">{escape(sound.name)}, {length}</p>'
        + media.waveform_svg(played, f"Waveform of {sound.name}, {length}", height=40)
        + f"{_player(sound.name, played, sound.sample_rate)}</div>"
    )


def _option(option: str, right: bool) -> str:
    if right:
        return f'<li class="chip right">✓ {escape(option)}</li>'
    return f'<li class="chip">{escape(option)}</li>'


def _response(response: Response) -> str:
    look, word = ("right", "✓ right") if response.right else ("wrong", "✗ wrong")
    note = f'<span class="label">{escape(response.note)}</span>' if response.note else ""
    answer = escape(response.answer) if response.answer else '<em class="empty">no answer</em>'
    whole = ""
    if response.text.strip() != response.answer:
        whole = (
            "<details><summary>whole response</summary>"
            f'<p class="whole">{escape(response.text)}</p></details>'
        )
    return (
        f'<li><div class="said"><span class="stage">{escape(response.stage)}</span>'
        f'<span class="chip {look}">{word}</span>{note}</div>'
        f'<p class="answer">{answer}</p>{whole}</li>'
    )
