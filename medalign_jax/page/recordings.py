"""Recordings on the report page: with their reports, or with questions and answers."""

from __future__ import annotations

import dataclasses

import numpy as np

PLAYED_SECONDS = 10  # of a recording are put on the page


class _Played:
    """What is seen and heard of a recording on the page."""

    waveform: np.ndarray | None
    sample_rate: int

    @property
    def played(self) -> np.ndarray:
        """The beginning that is put on the page."""
        return self.waveform[: PLAYED_SECONDS * self.sample_rate]

    @property
    def length(self) -> str:
        """In words."""
        seconds = f"{len(self.waveform) / self.sample_rate:.1f} s"
        cut = len(self.waveform) > PLAYED_SECONDS * self.sample_rate
        return f"{seconds}, first {PLAYED_SECONDS} s shown" if cut else seconds


@dataclasses.dataclass(frozen=True)
class Nearest:
    """A report near a recording: its text, the cosine, and whether it is the recording's own."""

    text: str
    similarity: float
    own: bool = False


@dataclasses.dataclass(frozen=True)
class Recording(_Played):
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
class Sound(_Played):
    """A recording to hear: one that a question is about, or a point of the map.

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
