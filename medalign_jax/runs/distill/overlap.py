"""Training and tests of a distillation share no subject, no file, and no sound."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from medalign_jax.audio import io
from medalign_jax.core import processes
from medalign_jax.core.files import write_whole
from medalign_jax.core.progress import Progress
from medalign_jax.data.questions.overlap import OverlapError, refuse_overlap
from medalign_jax.data.questions.question import Question
from medalign_jax.data.recordings.manifest import Problem, write_problems
from medalign_jax.datasets.near_copies import near_copies

RECORD = "near_copies.json"  # in the workdir
_RATE = 4_000  # Hz; near-copies are compared below 450 Hz
_MOST = 20_000  # recordings; a tenth of a second each
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
                refuse_near_copies(train, tests, max_seconds, listing.with_name(RECORD))
        except OverlapError as error:
            listing.parent.mkdir(parents=True, exist_ok=True)
            write_problems(error.problems, listing)
            raise

    processes.by_first(check)


def refuse_near_copies(
    train: Sequence[Question], tests: Tests, max_seconds: float, record: Path
) -> None:
    """Refuses a test recording that is a training recording re-encoded, cut or with noise on it.

    Args:
      train, tests, max_seconds: as `check_overlap`.
      record: JSON of what was found; the same files are not looked through again.

    Raises:
      OverlapError: naming the test questions and both files.
    """
    ours = {path for question in train for path in question.audio}
    theirs = {path for test in tests.values() for question in test for path in question.audio}
    if not ours or not theirs:
        return
    if (count := len(ours | theirs)) > _MOST:
        print(
            f"near-copies are not looked for among {count} recordings, more than {_MOST}: see that "
            "no test recording is trained on in another form",
            flush=True,
        )
        return
    copy_of = {}
    for pair in _pairs(sorted(ours | theirs), max_seconds, record):
        for one, other in (pair, pair[::-1]):
            if one in ours and other in theirs:
                copy_of[other] = one
    problems = tuple(
        Problem(number, question.id, f"'{path}' of {name} is a near-copy of '{copy_of[path]}', "
                "which is trained on", fatal=True)
        for name, questions in tests.items()
        for number, question in enumerate(questions, start=1)
        for path in question.audio
        if path in copy_of
    )  # fmt: skip
    if problems:
        raise OverlapError.of(
            problems,
            f"recordings of {len(problems)} test questions sound like training recordings",
            "Take them out of the training questions, or set config.data.copies=False where they "
            "are meant to be alike",
        )


def _pairs(paths: Sequence[str], max_seconds: float, record: Path) -> list[list[str]]:
    """Pairs of files that are near-copies; from the record where it is of these very files."""
    files = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths]
    digest = hashlib.sha256(json.dumps([files, max_seconds]).encode()).hexdigest()
    if record.is_file():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # damaged: looked for anew
            known = json.loads(record.read_text(encoding="utf-8"))
            if known["files"] == digest:
                return [[str(one), str(other)] for one, other in known["pairs"]]
    progress = Progress(len(paths), "looking for near-copies of test recordings", "recording")
    found = near_copies(
        lambda i: io.read(paths[i], _RATE, max_seconds), len(paths), _RATE,
        progress=lambda done, total: progress.advance(),
    )  # fmt: skip
    progress.close()
    pairs = [[paths[i], paths[j]] for i, j in found.pairs.tolist()]
    record.parent.mkdir(parents=True, exist_ok=True)
    write_whole(record, json.dumps({"files": digest, "pairs": pairs}).encode())
    return pairs
