"""A run's recordings and questions as it is known by them (`identity.Recording`).

What a manifest's recordings sound like is known from its check, which decodes them, and that of a
prepared folder from its table: nothing is read again. The recordings of questions are known by the
SHA-256 of their files, which the first process of a run reads once more (about a second for 1.5 GB,
some tenth of the time that decoding them takes).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from medalign_jax.core.errors import UserError
from medalign_jax.data.questions.question import Question
from medalign_jax.data.recordings.dataset import AudioDataset
from medalign_jax.data.recordings.records import sha256
from medalign_jax.evaluate import exchange
from medalign_jax.evaluate.folds import Fold
from medalign_jax.runs.identity import Recording, digest, recording
from medalign_jax.runs.workdir import bind_recordings


def bind_dataset(
    workdir: Path,
    data: AudioDataset,
    folds: Sequence[Fold] = (),
    reports: Sequence[Sequence[str]] | None = None,
    subjects: bool = False,
) -> None:
    """Sees that a run goes on with the recordings of its beginning (`workdir.bind_recordings`).

    Args:
      workdir: of the run.
      data: N recordings.
      folds: over them, one model each; one without a name has the manifest's splits.
      reports: N tuples of wordings, where they are trained on.
      subjects: whether it matters for training who was recorded.
    """
    dealt = [fold.split_of(len(data)) for fold in folds if fold.name]
    splits = dealt or [[row.split for row in data.rows]]
    found = []
    for i, row in enumerate(data.rows):
        more: dict[str, str | Sequence[str]] = {"split": ",".join(of[i] or "-" for of in splits)}
        if reports is not None:
            more["reports"] = reports[i]
        if subjects:
            more["subject"] = row.subject_id
        found.append(recording(row.audio_path, data.sounds[i], **more))
    bind_recordings(workdir, found)


def bind_questions(workdir: Path, parts: Mapping[str, Sequence[Question]]) -> None:
    """The same for the questions that are trained on, by the part that they play.

    Raises:
      UserError: other questions than at the beginning, or a recording that cannot be read.
    """

    def read_and_bind() -> None:
        if jax.process_index() == 0:
            bind_recordings(workdir, _of_questions(parts))

    exchange.all_or_none(read_and_bind, "take the questions")


def _of_questions(parts: Mapping[str, Sequence[Question]]) -> list[Recording]:
    return [
        recording(f"{part}: {question.id}", sound, text=_texts(question))
        for part, questions in parts.items()
        for question, sound in zip(questions, sounds_of(questions), strict=True)
    ]


def sounds_of(questions: Sequence[Question]) -> list[str]:
    """What each question's recordings sound like, in short; a file is read once by a process.

    Raises:
      UserError: a file that cannot be read.
    """
    paths = list(dict.fromkeys(path for question in questions for path in question.audio))
    with ThreadPoolExecutor() as pool:
        sounds = dict(zip(paths, pool.map(_sound, paths), strict=True))
    return [digest([sounds[path] for path in question.audio]) for question in questions]


def _texts(question: Question) -> str:
    q = question
    reasoning = q.reasoning if isinstance(q.reasoning, str | None) else repr(q.reasoning)
    content = [q.question, q.choices, q.answer, reasoning, q.description, q.extra.get("response")]
    return digest(content)


@functools.cache
def _sound(path: str) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
