"""Files of questions: our own JSONL, CoTA and MMAU (`datasets.emotions` has speech emotion).

Every reader gives `questions.Loaded`: the questions that can be used, and row and reason of the
others. To convert any of them, for example data that is put into words already, read it and
`write_questions`.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from medalign_jax.core.files import encoded, writing_whole
from medalign_jax.core.words import did_you_mean
from medalign_jax.data.questions.question import (
    DEFAULT_CHECKS,
    FIELDS,
    Checks,
    Collector,
    Loaded,
    Question,
    QuestionsError,
)
from medalign_jax.data.tables import BadRecord
from medalign_jax.text.options import claimed_options
from medalign_jax.text.reasoning import ReasoningError, parse_response

_AUDIO_TAG = re.compile(r"<audio>", re.IGNORECASE)
_COTA_NAMES = {
    "audio": ("audio", "audios", "audio_path", "audio_paths"),
    "question": ("question", "query", "instruction"),
    "response": ("response", "output"),
    "choices": ("choices", "options"),
}


def read_objects(path: str | Path) -> Iterator[dict[str, object] | BadRecord]:
    """The records of a JSON file: an array of objects, or one object per line (`.jsonl`).

    Bytes that are not UTF-8 stay in the texts as lone surrogates, so that `Collector` can name
    the row and the field.

    Raises:
      QuestionsError: no such file, or a `.json` that is not an array of objects.
    """
    path = Path(path)
    if not path.is_file():
        raise QuestionsError(f"no file of questions at '{path}'; check the path")
    data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:4096]:
        raise QuestionsError(f"'{path}' is not UTF-8 text (UTF-16 or binary?); save it as UTF-8")
    data = data.removeprefix(b"\xef\xbb\xbf")
    if path.suffix.lower() == ".json":
        records = _json_array(path, data)
    else:
        records = (_json_line(line) for line in data.split(b"\n") if line.strip())
    for record in records:
        if isinstance(record, dict | BadRecord):
            yield record
        else:
            yield BadRecord(f"not a JSON object but {type(record).__name__}", {})


def _json_array(path: Path, data: bytes) -> list[object]:
    try:
        found = json.loads(data.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise QuestionsError(
            f"'{path}' is not JSON ({error}); one object per line belongs in a .jsonl file"
        ) from None
    if not isinstance(found, list):
        raise QuestionsError(f"'{path}' holds a {type(found).__name__}, not an array of objects")
    return found


def _json_line(line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        return BadRecord(f"not a JSON object ({error})", {})


def read_questions(path: str | Path, checks: Checks = DEFAULT_CHECKS) -> Loaded:
    """Reads a JSONL file with the fields of `Question`.

    `audio` is a path or a list of paths, relative to the file's folder or absolute; `reasoning` a
    text or an object of the four stages; `extra` an object of texts. Other fields are not used,
    with a note.

    Raises:
      QuestionsError: see `Collector.finish`.
    """
    collector = Collector(path, Path(path).parent)
    unused: dict[str, int] = {}
    for row, record in enumerate(read_objects(path), start=1):
        if isinstance(record, dict):
            for name in record.keys() - set(FIELDS):
                unused.setdefault(name, row)
            if not isinstance(record.get("extra"), (dict, type(None))):
                record = BadRecord("'extra' is not an object of texts", {})
        collector.add(row, record)
    for name, row in unused.items():
        collector.note(f"field '{name}' (first in row {row}) is not used"
                       f"{did_you_mean(name, FIELDS)}")  # fmt: skip
    return collector.finish(checks)


def write_questions(path: str | Path, questions: Iterable[Question]) -> None:
    """Writes one JSON object per question; the file appears whole or not at all.

    Recordings inside the file's folder are written relative to it, so that it can be moved.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing_whole(path) as part, open(part, "wb") as file:
        for question in questions:
            content = {k: v for k, v in asdict(question).items() if v not in (None, "", (), {})}
            content["audio"] = [_seen_from(path.parent, name) for name in question.audio]
            file.write(encoded(json.dumps(content, ensure_ascii=False) + "\n"))


def _seen_from(folder: Path, name: str) -> str:
    relative = os.path.relpath(name, folder)
    return os.path.abspath(name) if relative.startswith(os.pardir) else relative


def read_cota(
    path: str | Path, audio_folder: str | Path | None = None, checks: Checks = DEFAULT_CHECKS
) -> Loaded:
    """Reads question answering with four-stage reasoning (CoTA, Audio-Reasoner).

    JSON (an array) or JSONL, each record with

    * `audio` (or `audios`, `audio_path`): a path or a list of paths;
    * `question` (or `query`, `instruction`); placeholders ``<audio>`` in it are taken out;
    * `response` (or `output`): the four stages and <RESPONSE>, see `text.reasoning`; instead of
      question and response also `messages`, a list of {"role": "user" or "assistant", "content"};
    * optional: `choices` (or `options`), `answer`, `id`, and other fields of `Question`.

    With options and no `answer`, the answer is the option that <RESPONSE> names by its text or
    its letter. Without options it is <RESPONSE> itself; options written into the question stay
    there. The wording of <RESPONSE> is kept in ``extra["response"]``.

    Args:
      path: the file.
      audio_folder: where relative audio paths begin; the file's folder by default.
      checks: see `Checks`.

    Raises:
      QuestionsError: see `Collector.finish`.
    """
    collector = Collector(path, audio_folder or Path(path).parent)
    for row, record in enumerate(read_objects(path), start=1):
        if isinstance(record, dict):
            record = _cota_record(record)
        collector.add(row, record)
    return collector.finish(checks)


def _cota_record(record: dict[str, object]) -> dict[str, object] | BadRecord:
    found = {name: record[name] for name in FIELDS if name in record}
    found |= {to: next((record[n] for n in names if n in record), None)
              for to, names in _COTA_NAMES.items()}  # fmt: skip
    if "messages" in record:
        turns = _turns(record["messages"])
        if isinstance(turns, BadRecord):
            return turns
        found["question"], found["response"] = turns
    response = found.pop("response")
    if not isinstance(response, str):
        return BadRecord("no response with the four stages", {})
    try:
        found["reasoning"], said = parse_response(response)
    except ReasoningError as error:
        return BadRecord(f"its response cannot be taken apart: {error}", {})
    if isinstance(found["question"], str):
        found["question"] = _AUDIO_TAG.sub("", found["question"])
    choices = found["choices"]
    texts = isinstance(choices, list) and all(isinstance(c, str) for c in choices)
    if not found.get("answer"):
        found["answer"] = said
        if choices and texts:
            named = claimed_options(said, [c.strip() for c in choices])
            if len(named) > 1:
                which = " or ".join(map(repr, named))
                return BadRecord(f"<RESPONSE> could name {which}: {said[:60]!r}", {})
            if not named or named[0] not in [c.strip() for c in choices]:
                return BadRecord(f"<RESPONSE> names none of the options: {said[:60]!r}", {})
            found["answer"] = named[0]
    found["extra"] = {"response": said}
    return found


def _turns(messages: object) -> tuple[str, str] | BadRecord:
    """The user's and the assistant's text of one exchange."""
    said: dict[str, str] = {}
    for message in messages if isinstance(messages, list) else [messages]:
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "user", "assistant") or not isinstance(
            message.get("content"), str
        ):
            return BadRecord("'messages' is not a list of {role, content} with texts", {})
        if role in said:
            return BadRecord(f"'messages' has more than one turn of the {role}", {})
        said[role] = message["content"]
    if not {"user", "assistant"} <= said.keys():
        return BadRecord("'messages' lacks a turn of the user or of the assistant", {})
    return said["user"], said["assistant"]


def read_mmau(
    path: str | Path, audio_folder: str | Path | None = None, checks: Checks = DEFAULT_CHECKS
) -> Loaded:
    """Reads the benchmark MMAU (Sakshi et al., ICLR 2025): a JSON array of

    `id, audio_id, question, choices, answer, dataset, task, split, category, sub-category,
    difficulty`. `audio_id` is a path relative to `audio_folder` (the file's folder by default).
    Some rows of the published file have a list of categories, which are joined by a comma.
    To read the questions without the recordings use ``Checks(require_audio=False)``.

    Raises:
      QuestionsError: see `Collector.finish`.
    """
    collector = Collector(path, audio_folder or Path(path).parent)
    for row, record in enumerate(read_objects(path), start=1):
        if isinstance(record, dict):
            fields = {name: record.get(name) for name in FIELDS}
            record = fields | {
                "audio": record.get("audio_id"),
                "sub_category": record.get("sub-category"),
                "extra": {"dataset": record.get("dataset") or ""},
            }
            if isinstance(record["category"], list) and record["category"]:
                record["category"] = ", ".join(map(str, record["category"]))
            if not record["choices"]:
                record = BadRecord("no choices", {})
        collector.add(row, record)
    return collector.finish(checks)
