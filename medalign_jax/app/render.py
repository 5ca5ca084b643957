"""What the app shows of a recording, as HTML: every text is escaped by the templates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import signal

from medalign_jax.app.listener import Heard, Listened, read_sound, shown_name
from medalign_jax.audio.io import AudioError
from medalign_jax.page import media
from medalign_jax.page.recordings import Sound
from medalign_jax.page.templating import environment
from medalign_jax.search.judge import COVERAGE
from medalign_jax.text.reasoning import ReasoningError, parse_response

_TOP_DB = 70.0  # of the picture
_HIGHEST = 4000.0  # Hz; above it there is little in auscultation


def sound(heard: Listened, name: str) -> str:
    """Player, waveform and spectrogram in step."""
    shown = Sound(name, heard.waveform, heard.rate)
    picture = _spectrogram(shown.played, heard.rate)
    return _render("sound.html", sound=shown, picture=picture, note=heard.note)


def heard(found: Sequence[Heard]) -> str:
    """What the checkpoints say, side by side."""
    sounds = {hit.path: _similar(hit.path) for each in found for hit in each.similar}
    return _render("heard.html", found=found, sounds=sounds, coverage=COVERAGE)


def problem(text: str) -> str:
    """Why there is no answer."""
    return _render("problem.html", text=text)


def response(text: str) -> str:
    """An audio language model's answer, with its four stages where it wrote them."""
    try:
        stages, answer = parse_response(text)
    except ReasoningError:
        return _render("response.html", stages={}, answer=text.strip())
    parts = {"Planning": stages.planning, "What is heard": stages.caption,
             "Reasoning": stages.reasoning, "Summary": stages.summary}  # fmt: skip
    return _render("response.html", stages=parts, answer=answer)


def _similar(path: str) -> Sound:
    name = shown_name(path)
    try:
        heard = read_sound(path)
    except AudioError as error:
        gone = "the file is no longer where it was"
        return Sound(name, None, problem=error.reason if Path(path).exists() else gone)
    return Sound(name, heard.waveform, heard.rate)


def _spectrogram(waveform: np.ndarray, rate: int) -> str:
    """A picture of decibels below the loudest, 0 to `_HIGHEST` Hz."""
    window = min(1024, len(waveform))
    pitch, _, power = signal.spectrogram(waveform, rate, "hann", window, window * 3 // 4)
    decibels = 10 * np.log10(np.maximum(power[pitch <= _HIGHEST].T, 1e-20))
    return media.spectrogram_uri(np.maximum(decibels, decibels.max() - _TOP_DB))


def _render(name: str, **values: object) -> str:
    return environment("medalign_jax.app").get_template(name).render(values)


def asset(name: str) -> str:
    """A file of the folder `assets`."""
    return (Path(__file__).parent / "assets" / name).read_text(encoding="utf-8")
