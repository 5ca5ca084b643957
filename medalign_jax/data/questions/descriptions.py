"""Descriptions that exist already, joined to their questions: data that is put into words.

    medalign join_descriptions \\
        --questions=q.jsonl --descriptions=d.csv --out=t.jsonl

Where there are none yet, an audio language model writes them: ``configs/textualize.py``.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medalign_jax.core import commands
from medalign_jax.core.local_paths import place_of
from medalign_jax.core.words import did_you_mean, is_missing
from medalign_jax.data.questions.question import Checks, Question, QuestionsError
from medalign_jax.data.questions.readers import read_cota, read_questions, write_questions
from medalign_jax.data.recordings.manifest import (
    LINES_IN_MESSAGE,
    Problem,
    list_problems,
    problem_table,
)
from medalign_jax.data.tables import BadRecord, ManifestError, Table, read_table

AUDIO_COLUMNS = ("audio_path", "audio")


@dataclass(frozen=True)
class Joined:
    """Questions with a description, and what is wrong with rows of descriptions.

    Attributes:
      questions: those that have one, in their own order.
      problems: rows of the descriptions, then (with no row) questions without one.
    """

    questions: tuple[Question, ...]
    problems: tuple[Problem, ...]


def join_descriptions(
    questions: Sequence[Question],
    path: str | Path,
    audio_folder: str | Path | None = None,
    max_bad_fraction: float = 0.01,
) -> Joined:
    """Gives each question the description that a table has for it.

    A row names a question by `id`, or else a recording by `audio_path` (or `audio`) and so all
    questions about that recording alone. Questions without a description are left out; one that
    they had before is replaced.

    Args:
      questions: from a reader.
      path: CSV, JSONL or Parquet with the column `description` and one of those above.
      audio_folder: where relative audio paths begin; the table's folder by default.
      max_bad_fraction: share of the table's rows that may be unusable.

    Raises:
      QuestionsError: no such table or column, too many unusable rows, or no question described.
    """
    try:
        table = read_table(path, "description", ("id", *AUDIO_COLUMNS), lambda name: False)
    except ManifestError as error:
        raise QuestionsError(str(error)) from None
    if not {"id", *AUDIO_COLUMNS} & set(table.columns):
        raise QuestionsError(
            f"'{path}' has neither a column 'id' nor {' nor '.join(map(repr, AUDIO_COLUMNS))} to "
            f"tell which question a description belongs to; its columns are "
            f"{', '.join(table.columns)}"
        )
    found, problems = _described(table, questions, Path(audio_folder or Path(path).parent))
    bad = len(problems)
    kept = tuple(replace(q, description=found[q.id][1]) for q in questions if q.id in found)
    problems += [
        Problem(None, ", ".join(q.audio), f"question '{q.id}' has no description", fatal=True)
        for q in questions
        if q.id not in found
    ]
    if not kept or bad > max_bad_fraction * len(table.records):
        table_text = problem_table(problems, limit=LINES_IN_MESSAGE)
        raise QuestionsError(
            f"'{path}': {bad} of {len(table.records)} rows cannot be used (max_bad_fraction is "
            f"{max_bad_fraction:g}) and {len(kept)} of {len(questions)} questions are described. "
            f"Mend or remove the rows:\n{table_text}",
            tuple(problems),
        )
    return Joined(kept, tuple(problems))


def _described(
    table: Table, questions: Sequence[Question], folder: Path
) -> tuple[dict[str, tuple[int, str]], list[Problem]]:
    """Row and text of each question's description, by its id; and the rows that give none."""
    known = {question.id for question in questions}
    of_audio: dict[str, list[str]] = {}
    for question in questions:
        if len(question.audio) == 1:
            of_audio.setdefault(_absolute(question.audio[0]), []).append(question.id)
    found: dict[str, tuple[int, str]] = {}
    problems = []
    for row, record in enumerate(table.records, start=1):
        cells = record.cells if isinstance(record, BadRecord) else record
        audio = next((cells[name] for name in AUDIO_COLUMNS if cells.get(name)), "").strip()
        if isinstance(record, BadRecord):
            problems.append(Problem(row, audio, record.reason, fatal=True))
            continue
        text = record.get("description", "").strip()
        ids, reason = _meant(record.get("id", "").strip(), audio, known, of_audio, folder)
        if is_missing(text):
            reason = "no description"
        elif not reason:
            reason = _taken(ids, found, text)
        if reason:
            problems.append(Problem(row, audio, reason, fatal=True))
        else:
            found |= {id: (row, text) for id in ids}
    return found, problems


def _meant(
    id: str, audio: str, known: set[str], of_audio: Mapping[str, list[str]], folder: Path
) -> tuple[list[str], str]:
    """Ids of the questions that a row describes, or why there are none."""
    if id:
        wrong = f"no question has the id '{id}'{did_you_mean(id, known)}"
        return ([id], "") if id in known else ([], wrong)
    if not audio:
        return [], "neither an id nor an audio path"
    ids = of_audio.get(_absolute(place_of(folder, audio)), [])
    return ids, "" if ids else "no question is about this recording alone"


def _taken(ids: Sequence[str], found: Mapping[str, tuple[int, str]], text: str) -> str:
    for id in ids:
        if id in found and found[id][1] != text:
            return f"question '{id}' has another description in row {found[id][0]}"
    return ""


def _absolute(path: str) -> str:
    return os.path.normpath(os.path.abspath(path))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = commands.ArgumentParser(prog="medalign join_descriptions",
                                     description=__doc__.split("\n")[0])  # fmt: skip
    parser.add_argument("--questions", required=True, help="file of questions")
    parser.add_argument("--format", choices=("questions", "cota"), default="questions",
                        help="of the questions (default questions: our own JSONL)")  # fmt: skip
    parser.add_argument("--descriptions", required=True, help="CSV, JSONL or Parquet file")
    parser.add_argument("--audio", help="folder where relative audio paths of descriptions and of "
                        "CoTA's records begin (default: the folder of each file)")  # fmt: skip
    parser.add_argument("--out", required=True, help="JSONL of questions to write")
    parser.add_argument("--max_bad_fraction", type=float, default=0.01,
                        help="share of rows that may be unusable (default 0.01)")  # fmt: skip
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    """Reads, joins, reports and writes.

    Raises:
      UserError: see the readers and `join_descriptions`.
    """
    # Whether the recordings can be used is asked when they are: here they need not be at hand.
    checks = Checks(require_audio=False, max_bad_fraction=arguments.max_bad_fraction)
    if arguments.format == "cota":
        loaded = read_cota(arguments.questions, arguments.audio, checks)
    else:
        loaded = read_questions(arguments.questions, checks)
    joined = join_descriptions(
        loaded.questions, arguments.descriptions, arguments.audio, arguments.max_bad_fraction
    )
    for name, problems in (
        (arguments.questions, loaded.problems),
        (arguments.descriptions, joined.problems),
    ):
        if problems:
            print(f"{name}:\n{problem_table(problems, limit=LINES_IN_MESSAGE)}\n")
    list_problems((*loaded.problems, *joined.problems), arguments.out)
    write_questions(arguments.out, joined.questions)
    print(f"{len(joined.questions)} of {len(loaded.questions)} questions: '{arguments.out}'")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    arguments = _arguments(argv)
    return commands.ended(
        lambda: run(arguments),
        lambda error: list_problems(getattr(error, "problems", ()), arguments.out),
        given=arguments,
    )
