"""What the app asks of a checkpoint: one recording in, what it is like and what it may be out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medalign_jax.audio import io
from medalign_jax.core.errors import UserError
from medalign_jax.core.files import printable
from medalign_jax.core.progress import Progress
from medalign_jax.encoder import Encoder, load_encoder
from medalign_jax.search.common_space import CommonSpace, Nearest, SpaceError, load_space
from medalign_jax.search.files import Item, embedded
from medalign_jax.search.index import EmbeddingIndex, Hit
from medalign_jax.search.judge import Judge, Judgement

MAX_SECONDS = 60.0  # what is read of a recording
MIN_SECONDS = 1.0  # about a heart cycle
NEAREST = 3


@dataclasses.dataclass(frozen=True)
class Heard:
    """What a checkpoint says of one recording; a part that it cannot say is empty.

    Attributes:
      name: of the checkpoint.
      reports: nearest training reports.
      texts: the user's own words, most alike first.
      similar: recordings most like it.
      judgement: calibrated probabilities of the labels, or None.
      problem: why something was left out, or "".
    """

    name: str
    reports: tuple[Nearest, ...] = ()
    texts: tuple[Nearest, ...] = ()
    similar: tuple[Hit, ...] = ()
    judgement: Judgement | None = None
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class Listener:
    """A checkpoint, ready to listen.

    Attributes:
      name: shown to the user.
      encoder: what embeds.
      space: where sounds and words meet, or None.
      index: recordings to compare with, or None.
      judge: of their labels, or None.
    """

    name: str
    encoder: Encoder
    space: CommonSpace | None = None
    index: EmbeddingIndex | None = None
    judge: Judge | None = None

    def listen(self, waveform: np.ndarray, rate: int, texts: Sequence[str] = ()) -> Heard:
        """All that can be said of a recording, (samples,) float32 at `rate` Hz."""
        vector = self.encoder.embed([waveform], rate)
        if not np.isfinite(vector).all():
            return Heard(self.name, problem="the embedding of this recording is not finite")
        reports, near, problem = (), (), ""
        if self.space is not None:
            sound = self.space.meeting.sounds(vector)
            if self.space.meeting.reports:
                (reports,) = self.space.nearest(sound, NEAREST)
            if texts:
                near, problem = self._compared(sound, texts)
        elif texts:
            problem = "this checkpoint has no words to compare with: it was not aligned"
        similar = () if self.index is None else self.index.similar(vector, NEAREST)[0]
        judgement = None if self.judge is None else self.judge(vector)[0]
        return Heard(self.name, reports, near, similar, judgement, problem)

    def _compared(self, sound: np.ndarray, texts: Sequence[str]) -> tuple[tuple[Nearest, ...], str]:
        try:
            cosines = (sound @ self.space.embed_texts(list(texts)).T)[0]
        except UserError as error:  # the language model is not there, or another one
            return (), str(error)
        order = np.argsort(-cosines, kind="stable")
        return tuple(Nearest(texts[n], float(cosines[n])) for n in order), ""


def open_listener(name: str, checkpoint: str, encoder: str | None) -> Listener:
    """Loads a checkpoint.

    Args:
      name: shown to the user.
      checkpoint: workdir or export of an AcuLa run, or weights.
      encoder: its name, for weights that do not say it.

    Raises:
      UserError: what `load_encoder` refuses.
    """
    try:
        space = load_space(checkpoint) if encoder is None else None
    except SpaceError:
        space = None
    loaded = load_encoder(encoder, checkpoint) if space is None else space.encoder
    return Listener(name, loaded, space)


def compared_with(listener: Listener, recordings: Sequence[Item], label: str) -> Listener:
    """Embeds the recordings that a checkpoint compares with.

    Args:
      listener: the checkpoint.
      recordings: with their table's columns beside; may be empty.
      label: column of their labels; "" for none.

    Raises:
      UserError: none of them can be read, or labels that nothing can be learnt from.
    """
    loaded, name = listener.encoder, listener.name
    index, judge = _compared_with(loaded, recordings, label, name)
    listener = dataclasses.replace(listener, index=index, judge=judge)
    # What is compiled now need not be waited for when somebody listens.
    seconds = np.random.default_rng(0).standard_normal(10 * loaded.sample_rate)
    listener.listen(seconds.astype(np.float32), loaded.sample_rate, ["murmur"])
    return listener


def _compared_with(
    encoder: Encoder, recordings: Sequence[Item], label: str, name: str
) -> tuple[EmbeddingIndex | None, Judge | None]:
    if not recordings:
        return None, None
    progress = Progress(len(recordings), f"{name}: embedding", "file")
    found = []
    for each in embedded(encoder, recordings, MAX_SECONDS):
        if each.problem is not None:
            progress.say(each.problem)
        else:
            found.append(each)
        progress.advance()
    progress.close()
    if not found:
        raise UserError("none of the recordings to compare with can be read")
    vectors = np.stack([each.vector for each in found])
    names = dict.fromkeys(column for each in found for column in each.item.beside)
    columns = {c: [each.item.beside.get(c, "") for each in found] for c in names}
    columns["audio_path"] = [str(each.item.path) for each in found]
    judge = None
    if label:
        subjects = columns.get("subject_id", [""] * len(found))
        of = [
            subject or path for subject, path in zip(subjects, columns["audio_path"], strict=True)
        ]
        judge = Judge.fit(vectors, columns[label], of)
    return EmbeddingIndex(vectors, columns), judge


@dataclasses.dataclass(frozen=True)
class Listened:
    """What is listened to of a file.

    Attributes:
      waveform: (samples,) float32.
      rate: Hz.
      note: what was left out, or "".
    """

    waveform: np.ndarray
    rate: int
    note: str = ""


def read_sound(path: str) -> Listened:
    """The first `MAX_SECONDS` of a file at 16 kHz, checked.

    Raises:
      AudioError: it is not a recording that can be read, silent, or shorter than `MIN_SECONDS`.
    """
    info, rate = io.probe(path), 16_000
    seconds, note = info.frames / info.sample_rate, ""
    waveform = io.read(path, rate, MAX_SECONDS)
    if seconds > MAX_SECONDS + 0.5:
        note = f"The first {MAX_SECONDS:.0f} s of {seconds:.0f} s were listened to."
        if not waveform.any():
            raise io.AudioError(
                path, f"is silent for its first {MAX_SECONDS:.0f} s, which are all that is read; "
                "cut them off"
            )  # fmt: skip
    io.check_waveform(waveform, Path(path).name)
    if len(waveform) < MIN_SECONDS * rate:
        length = len(waveform) / rate
        raise io.AudioError(path, f"is {length:.2f} s long; record {MIN_SECONDS:.0f} s or more")
    return Listened(waveform, rate, note)


def shown_name(path: str) -> str:
    """A file's name as it can be printed."""
    return printable(Path(path).name)
