"""Questions about recordings: the record type, its checks, and folds.

`readers` and `emotions` read files of them. Readers never stop at the first bad row: what
cannot be used is listed with row and reason (`manifest.Problem`), and too much of it raises a
`QuestionsError` that holds the whole list.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path

from medalign_jax.audio import io as audio_io
from medalign_jax.core.local_paths import ADVICE, is_remote, place_of
from medalign_jax.core.words import did_you_mean, is_missing
from medalign_jax.data.recordings.manifest import (
    LINES_IN_MESSAGE,
    SPLIT_ALIASES,
    ManifestError,
    Problem,
    problem_table,
)
from medalign_jax.data.recordings.subjects import in_two_splits
from medalign_jax.data.tables import LONGEST_CELL, BadRecord
from medalign_jax.text.options import find_option
from medalign_jax.text.reasoning import STAGES, ReasoningError, Stages

SAMPLE_RATE = 16_000  # of every audio language model served here
_SURROGATE = re.compile("[\ud800-\udfff]")  # what surrogateescape makes of a byte that is not text


class QuestionsError(ManifestError):
    """A file of questions, or too much of it, cannot be used; `.problems` has everything."""


@dataclass(frozen=True)
class Question:
    """One question about one or more recordings.

    Attributes:
      id: unique in its file.
      audio: files, relative paths already joined to their folder; in the prompt's order. Empty
        for a question without audio, asked by its description.
      question: text, without the options.
      choices: options, or empty for a free answer.
      answer: one of the options where there are any.
      reasoning: four stages, a free text, or None.
      description: the recording put into words, which a text-only teacher reads, or None.
      task, category, sub_category, difficulty: for tables of results; "" where unknown.
      subject_id: who was recorded; "" where unknown. Never in two splits.
      split: "train", "valid", "test" or a benchmark's own name; "" where folds decide.
      extra: whatever else is to be kept, as text. "response", if there, is the wording around
        the answer (CoTA's <RESPONSE>).
    """

    id: str
    audio: tuple[str, ...]
    question: str
    choices: tuple[str, ...]
    answer: str
    reasoning: Stages | str | None = None
    description: str | None = None
    task: str = ""
    category: str = ""
    sub_category: str = ""
    difficulty: str = ""
    subject_id: str = ""
    split: str = ""
    extra: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Loaded:
    """The questions that can be used, and every problem of the others (and notes)."""

    questions: tuple[Question, ...]
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class Checks:
    """What is asked of a file of questions.

    Attributes:
      require_audio: every question has recordings, and they are there; without it they are
        not looked at.
      decode: decode them to the last sample; else only their headers are read.
      max_seconds: longest recording that the model takes; None for no limit.
      max_bad_fraction: share of rows that may be unusable, 0 to 1.
    """

    require_audio: bool = True
    decode: bool = True
    max_seconds: float | None = None
    max_bad_fraction: float = 0.01

    def __post_init__(self):
        if not 0 <= self.max_bad_fraction <= 1:
            raise QuestionsError(f"max_bad_fraction is {self.max_bad_fraction}; give 0 to 1")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise QuestionsError(f"max_seconds is {self.max_seconds}; give a time above 0, or None")


DEFAULT_CHECKS = Checks()
FIELDS = tuple(f.name for f in fields(Question))
_TEXTS = ("question", "answer", "task", "category", "sub_category", "difficulty", "subject_id",
          "split", "id")  # fmt: skip
_ABOUT = ("task", "category", "sub_category", "difficulty", "subject_id", "split")  # may be missing


class Collector:
    """Rows of a file become questions or problems; `finish` checks what holds between them.

    Args:
      path: the file (or folder) read, for messages.
      folder: where relative audio paths begin.
    """

    def __init__(self, path: str | Path, folder: str | Path):
        self.path, self.folder = Path(path), Path(folder)
        self.rows: list[tuple[int, Question]] = []
        self.problems: list[Problem] = []
        self.total = 0

    def bad(self, row: int, reason: str, audio: str = "") -> None:
        """Counts a row that cannot be used, with why."""
        self.total += 1
        self.problems.append(Problem(row, audio, reason, fatal=True))

    def note(self, reason: str, row: int | None = None, audio: str = "") -> None:
        """Something to be said that stops nothing."""
        self.problems.append(Problem(row, audio, reason, fatal=False))

    def add(self, row: int, record: Mapping[str, object] | BadRecord) -> None:
        """Takes a record with (some of) the fields of `Question`, of whatever types it has."""
        if isinstance(record, BadRecord):
            self.bad(row, record.reason)
            return
        question, wrong = _question(row, record, self.path, self.folder)
        self.total += 1
        name = _name(question) if question else ""
        self.problems += [Problem(row, name, reason, fatal=True) for reason in wrong]
        if question is None:
            return
        if len(set(question.choices)) < len(question.choices):
            self.note("an option is there twice", row, name)
        self.rows.append((row, question))

    def finish(self, checks: Checks) -> Loaded:
        """Checks recordings, ids and splits.

        Raises:
          QuestionsError: a subject in two splits, more unusable rows than allowed, or none left.
        """
        self.problems += _same_ids(self.rows)
        named = ((row, q.subject_id, q.split) for row, q in self.rows if q.subject_id)
        self.problems += [Problem(None, "", why, fatal=True) for why in in_two_splits(named)]
        if checks.require_audio:
            self.problems += _audio_problems(self.rows, checks)
        self.problems.sort(key=lambda p: (not p.fatal, p.row is not None, p.row or 0))
        fatal = [problem for problem in self.problems if problem.fatal]
        bad = {problem.row for problem in fatal}
        kept = tuple(question for row, question in self.rows if row not in bad)
        count = len(bad - {None})
        if None in bad:
            why = "a subject is in more than one split"
        elif not kept:
            why = f"no row is left: {count} of {self.total} cannot be used"
        elif count > checks.max_bad_fraction * self.total:
            share = f"{count} of {self.total} rows ({count / self.total:.1%}) cannot be used"
            why = f"{share}, more than max_bad_fraction allows ({checks.max_bad_fraction:.1%})"
        else:
            return Loaded(kept, tuple(self.problems))
        table = problem_table(fatal, limit=LINES_IN_MESSAGE)
        raise QuestionsError(
            f"'{self.path}': {why}. Mend or remove the rows:\n{table}", tuple(self.problems)
        )


def _question(
    row: int, record: Mapping[str, object], path: Path, folder: Path
) -> tuple[Question | None, list[str]]:
    wrong: list[str] = []
    texts = {name: _text(name, record.get(name), wrong) for name in _TEXTS}
    texts |= {name: "" for name in _ABOUT if is_missing(texts[name])}
    texts["id"] = texts["id"] or f"{path.stem}/{row}"
    audio = _texts("audio", record.get("audio"), wrong)
    choices = _texts("choices", record.get("choices"), wrong)
    description = _text("description", record.get("description"), wrong) or None
    reasoning = _reasoning(record.get("reasoning"), wrong)
    if extra := record.get("extra"):
        extra = {str(k): _text(f"extra.{k}", v, wrong) for k, v in dict(extra).items()}
    if wrong:
        return None, wrong
    if not audio and not description:
        wrong.append("no audio path (nor a description to read in its place)")
    if any("\0" in name for name in audio):
        wrong.append("the audio path holds a NUL character")
    wrong += [f"'{name}' is not a local path: {ADVICE}" for name in audio if is_remote(name)]
    wrong += [f"no {name}" for name in ("question", "answer") if not texts[name]]
    if choices and texts["answer"]:
        option = find_option(texts["answer"], choices)
        if option is None:
            near = did_you_mean(texts["answer"], [c.lower() for c in choices])
            wrong.append(f"the answer '{texts['answer']}' is not among the options{near}")
        texts["answer"] = option or ""
    if wrong:
        return None, wrong
    texts["split"] = SPLIT_ALIASES.get(texts["split"].lower(), texts["split"])
    joined = tuple(place_of(folder, name) for name in audio)
    return Question(audio=joined, choices=choices, reasoning=reasoning, description=description,
                    extra=extra or {}, **texts), []  # fmt: skip


def _text(name: str, value: object, wrong: list[str]) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        wrong.append(f"'{name}' holds a {type(value).__name__}, not a text")
        return ""
    if found := _SURROGATE.search(str(value)):
        byte = f" (byte 0x{ord(found[0]) - 0xDC00:02x})" if ord(found[0]) >= 0xDC80 else ""
        wrong.append(f"'{name}' is not UTF-8 text{byte}; save the file as UTF-8")
        return ""
    if len(str(value)) > LONGEST_CELL:
        wrong.append(f"'{name}' holds {len(str(value))} characters, more than {LONGEST_CELL}")
        return ""
    return str(value).strip()


def _texts(name: str, value: object, wrong: list[str]) -> tuple[str, ...]:
    values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    found = tuple(_text(name, each, wrong) for each in values)
    if "" in found and not wrong:
        wrong.append(f"'{name}' holds an empty text")
    return found


def _reasoning(value: object, wrong: list[str]) -> Stages | str | None:
    if not isinstance(value, Mapping):
        return value if isinstance(value, Stages) else _text("reasoning", value, wrong) or None
    names = tuple(name.lower() for name in STAGES)
    if set(value) != set(names):
        wrong.append(f"'reasoning' has the stages {', '.join(value)}, not {', '.join(names)}")
        return None
    texts = {name: _text(f"reasoning.{name}", value[name], wrong) for name in names}
    try:
        return None if wrong else Stages(**texts)
    except ReasoningError as error:
        wrong.append(str(error))
        return None


def _name(question: Question) -> str:
    return question.audio[0] if question.audio else ""


def _same_ids(rows: Sequence[tuple[int, Question]]) -> list[Problem]:
    first: dict[str, int] = {}
    return [
        Problem(row, _name(q), f"the id '{q.id}' is that of row {first[q.id]}", fatal=True)
        for row, q in rows
        if first.setdefault(q.id, row) != row
    ]


def _audio_problems(rows: Sequence[tuple[int, Question]], checks: Checks) -> list[Problem]:
    """Each file is looked at once, however many questions ask about it."""

    def look(path: str) -> str:
        try:
            info = audio_io.probe(path)
            if checks.max_seconds is not None and info.seconds > checks.max_seconds:
                limit = f"longer than the {checks.max_seconds:g} s that the model takes"
                return f"lasts {info.seconds:.1f} s, {limit}; cut it or remove the row"
            if checks.decode:
                audio_io.check_waveform(audio_io.read(path, SAMPLE_RATE), path)
        except audio_io.AudioError as error:
            return error.reason
        return ""

    paths = list(dict.fromkeys(path for _, question in rows for path in question.audio))
    with ThreadPoolExecutor(max_workers=min(16, (os.cpu_count() or 1) + 2)) as pool:
        wrong = dict(zip(paths, pool.map(look, paths), strict=True))
    found = [Problem(row, "", "no audio path", fatal=True) for row, q in rows if not q.audio]
    return found + [
        Problem(row, path, wrong[path], fatal=True)
        for row, question in rows
        for path in question.audio
        if wrong[path]
    ]


@dataclass(frozen=True)
class Fold:
    """What is trained and tested on when one group is left out."""

    name: str
    train: tuple[Question, ...]
    test: tuple[Question, ...]


def leave_one_out(questions: Sequence[Question], group: Callable[[Question], str]) -> list[Fold]:
    """One fold per group: tested on it, trained on all others.

    Args:
      questions: all of them.
      group: names a question's group, for example ``lambda q: q.subject_id``.

    Raises:
      QuestionsError: fewer than two groups, a question without one, or a subject in two.
    """
    groups: dict[str, list[Question]] = {}
    of_subject: dict[str, str] = {}
    for question in questions:
        name = group(question)
        if not name:
            raise QuestionsError(f"question '{question.id}' belongs to no group to be left out")
        groups.setdefault(name, []).append(question)
        subject = question.subject_id
        if subject and of_subject.setdefault(subject, name) != name:
            raise QuestionsError(
                f"subject '{subject}' is in the groups '{of_subject[subject]}' and '{name}': "
                "training would see subjects of the test; group by subject, or mend the ids"
            )
    if len(groups) < 2:
        raise QuestionsError(f"{len(groups)} group(s) of questions; leaving one out needs two")
    return [
        Fold(name, tuple(q for other in groups if other != name for q in groups[other]),
             tuple(groups[name]))
        for name in sorted(groups)
    ]  # fmt: skip
