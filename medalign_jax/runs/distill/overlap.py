"""Training and tests of a distillation share no subject, no file, and no sound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from medalign_jax.audio import io
from medalign_jax.core import processes
from medalign_jax.core.progress import Progress
from medalign_jax.data.questions.overlap import OverlapError, refuse_overlap
from medalign_jax.data.questions.question import Question
from medalign_jax.data.recordings.manifest import Problem, write_problems
from medalign_jax.datasets.near_copies import near_copies

_RATE = 4_000  # Hz; near-copies are compared below 450 Hz
_NAMED = 5  # in a message
Tests = Mapping[str, Sequence[Question]]


def check_overlap(
    train: Sequence[Question], tests: Tests, listing: Path, copies: bool, max_seconds: float = 60.0
) -> None:
    """Refuses training on what a test asks about; every overlap is written to `listing`.

    Args:
      train: questions to train on or to choose by.
      tests: questions of each test, by its name.
      listing: JSONL of `manifest.Problem`.
      copies: whether near-copies are looked for, too: each recording is decoded once for it.
      max_seconds: what is read of a recording.

    Raises:
      OverlapError: naming subjects and recordings.
    """

    def check() -> None:
        try:
            refuse_overlap(train, tests)
            if copies:
                refuse_near_copies(train, tests, max_seconds)
        except OverlapError as error:
            listing.parent.mkdir(parents=True, exist_ok=True)
            write_problems(error.problems, listing)
            raise

    processes.by_first(check)


def refuse_near_copies(train: Sequence[Question], tests: Tests, max_seconds: float) -> None:
    """Refuses a test recording that is a training recording re-encoded, cut or with noise on it.

    Raises:
      OverlapError: naming the test questions and both files.
    """
    ours = dict.fromkeys(path for question in train for path in question.audio)
    theirs = dict.fromkeys(path for test in tests.values() for q in test for path in q.audio)
    paths = [*ours, *(path for path in theirs if path not in ours)]
    if not ours or len(paths) == len(ours):
        return
    progress = Progress(len(paths), "looking for near-copies of test recordings", "recording")
    found = near_copies(
        lambda i: io.read(paths[i], _RATE, max_seconds), len(paths), _RATE,
        progress=lambda done, total: progress.advance(),
    )  # fmt: skip
    progress.close()
    copy_of = {
        paths[j]: paths[i] for i, j in found.pairs.tolist() if i < len(ours) <= j
    }  # of a test recording, the last: one is enough
    problems = tuple(
        Problem(number, question.id, f"'{path}' of {name} is a near-copy of '{copy_of[path]}', "
                "which is trained on", fatal=True)
        for name, questions in tests.items()
        for number, question in enumerate(questions, start=1)
        for path in question.audio
        if path in copy_of
    )  # fmt: skip
    if problems:
        lines = "\n".join(f"  {problem.reason}" for problem in problems[:_NAMED])
        more = f"\n  ... and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise OverlapError(
            f"recordings of {len(problems)} test questions sound like training recordings:\n"
            f"{lines}{more}\nTake them out of the training questions, or set "
            "config.data.copies=False where they are meant to be alike",
            problems,
        )
