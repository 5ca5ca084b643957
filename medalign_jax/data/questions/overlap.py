"""Training and tests have no subject and no recording in common, in whatever files they lie."""

import functools
import hashlib
import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence

from medalign_jax.data.questions.question import Question, QuestionsError
from medalign_jax.data.recordings.manifest import Problem

_ENDS = 1 << 16  # bytes at either end of a file that distinguish it from others of its size
_NAMED = 10  # in a message


class OverlapError(QuestionsError):
    """Training and a test share subjects or recordings; `.problems` has every one."""

    @classmethod
    def of(cls, problems: Sequence[Problem], what: str, remedy: str) -> "OverlapError":
        """The first of them in words: `what` of test questions, a line each, and what helps."""
        lines = [f"  {problem.reason}" for problem in problems[:_NAMED]]
        if more := len(problems) - len(lines):
            lines.append(f"  ... and {more} more")
        return cls("\n".join([f"{what}:", *lines, remedy]), tuple(problems))


def refuse_overlap(train: Sequence[Question], tests: Mapping[str, Sequence[Question]]) -> None:
    """Refuses training on what a test asks about.

    Recordings are the same where size and both ends (64 KiB) of their files are, so that a copy
    under another name is found too.

    Args:
      train: questions to train on or to choose by.
      tests: questions of each test, by its name.

    Raises:
      OverlapError: naming subjects and recordings.
    """
    content = functools.cache(_content)
    # A look at the size spares reading nearly all files of a large training set.
    sizes = {os.path.getsize(path) for test in tests.values() for q in test for path in q.audio}
    trained: dict[tuple, Question] = {}
    for question in train:
        for trace in _traces(question, content, sizes):
            trained.setdefault(trace, question)
    problems = []
    for name, questions in tests.items():
        for number, question in enumerate(questions, start=1):
            traces = _traces(question, content, sizes)
            if same := next((trace for trace in traces if trace in trained), None):
                reason = _shared(same, trained[same], question, name)
                problems.append(Problem(number, question.id, reason, fatal=True))
    if problems:
        raise OverlapError.of(
            problems,
            f"training and tests share subjects or recordings in {len(problems)} test questions",
            "Take them out of the training questions; where two people only have the same "
            "subject_id, rename one",
        )


def _traces(
    question: Question, content: Callable[[str], bytes], sizes: Container[int]
) -> Iterator[tuple]:
    """What a question must not have in common with another."""
    if question.subject_id:
        yield "subject", question.subject_id
    for path in question.audio:
        size = os.path.getsize(path)
        if size in sizes:
            yield "recording", size, content(os.path.realpath(path))


def _content(path: str) -> bytes:
    """A digest of both ends of a file."""
    with open(path, "rb") as file:
        digest = hashlib.blake2b(file.read(_ENDS), digest_size=16)
        file.seek(max(0, os.path.getsize(path) - _ENDS))
        digest.update(file.read(_ENDS))
    return digest.digest()


def _shared(trace: tuple, ours: Question, theirs: Question, test: str) -> str:
    both = f"training question '{ours.id}' and in '{theirs.id}' of {test}"
    if trace[0] == "subject":
        return f"subject '{trace[1]}' is in {both}"
    return f"a recording is in {both} ({', '.join(ours.audio)}; {', '.join(theirs.audio)})"
