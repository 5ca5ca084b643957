"""Speech emotion as questions with four options: IEMOCAP's folder, and tables of recordings."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from medalign_jax.core.words import is_missing
from medalign_jax.data.questions.question import (
    DEFAULT_CHECKS,
    Checks,
    Collector,
    Loaded,
    QuestionsError,
)
from medalign_jax.data.tables import BadRecord, ManifestError, read_table

EMOTIONS = ("angry", "happy", "sad", "neutral")
EMOTION_QUESTION = "Which emotion does the speaker express?"
_EMOTION_NAMES = {
    "ang": "angry", "anger": "angry", "angry": "angry",
    "hap": "happy", "happiness": "happy", "happy": "happy", "joy": "happy",
    "exc": "excited", "excitement": "excited", "excited": "excited",
    "sad": "sad", "sadness": "sad",
    "neu": "neutral", "neutral": "neutral",
}  # fmt: skip
_IEMOCAP_LINE = re.compile(
    r"\[(?P<start>[\d.]+) - (?P<end>[\d.]+)\]\t(?P<utterance>\S+)\t(?P<emotion>\w+)\t\[.*\]\s*"
)
_UTTERANCE = re.compile(r"(?P<dialog>(?P<session>Ses\d\d)[FM]_(?P<kind>impro|script)\w*)_"
                        r"(?P<speaker>[FM])\w*")  # fmt: skip
_COLUMNS = ("subject_id", "emotion", "split")  # of a table, beside audio_path


def read_emotions(
    path: str | Path, merge_excited: bool = True, checks: Checks = DEFAULT_CHECKS
) -> Loaded:
    """Reads a table of emotional speech as questions with the four options `EMOTIONS`.

    Args:
      path: CSV, JSONL or Parquet with the columns `audio_path`, `subject_id`, `emotion` and
        optionally `split`; emotions by name or by IEMOCAP's three letters.
      merge_excited: excited speech counts as happy, as is usual; else it is left out.
      checks: see `Checks`.

    Other emotions are left out and counted in a note. For folds by speaker:
    ``leave_one_out(questions, lambda q: q.subject_id)``.

    Raises:
      QuestionsError: a column is missing, or see `Collector.finish`.
    """
    collector = Collector(path, Path(path).parent)
    try:
        table = read_table(path, "audio_path", _COLUMNS, lambda name: False)
    except ManifestError as error:
        raise QuestionsError(str(error)) from None
    if lacking := [name for name in _COLUMNS[:2] if name not in table.columns]:
        raise QuestionsError(f"'{path}' has no column {', '.join(lacking)}")
    left_out: Counter[str] = Counter()
    for row, record in enumerate(table.records, start=1):
        if isinstance(record, BadRecord):
            collector.add(row, record)
            continue
        emotion = _emotion(record.get("emotion", ""), merge_excited)
        if emotion is None:
            left_out[record.get("emotion", "").strip()] += 1
            continue
        if is_missing(record.get("subject_id")):
            record = BadRecord("no subject_id: folds by speaker need one", {})
        else:
            record = _emotion_record(record["audio_path"], record["audio_path"], emotion) | {
                "subject_id": record["subject_id"], "split": record.get("split", "")
            }  # fmt: skip
        collector.add(row, record)
    _note_left_out(collector, left_out)
    return collector.finish(checks)


def read_iemocap(
    folder: str | Path, merge_excited: bool = True, checks: Checks = DEFAULT_CHECKS
) -> Loaded:
    """Reads IEMOCAP (Busso et al. 2008) from the folder of its full release.

    Emotions come from `Session*/dialog/EmoEvaluation/*.txt`, recordings from
    `Session*/sentences/wav/<dialog>/<utterance>.wav`. Classes are `EMOTIONS`; the others are left
    out and counted in a note. A subject is session and speaker: the speaker is the letter before
    the utterance's number, not the one after the session (that actor wears the markers). Rows
    count the utterances in order of their names. ``extra["session"]`` serves
    ``leave_one_out(questions, lambda q: q.extra["session"])``.

    Args:
      folder: holds Session1 to Session5.
      merge_excited: excited speech counts as happy (5531 utterances in all), as is usual.
      checks: see `Checks`.

    Raises:
      QuestionsError: no evaluation file, or see `Collector.finish`.
    """
    folder = Path(folder)
    files = sorted(p for p in folder.glob("Session*/dialog/EmoEvaluation/*.txt")
                   if not p.name.startswith("."))  # fmt: skip
    if not files:
        raise QuestionsError(
            f"'{folder}' has no Session*/dialog/EmoEvaluation/*.txt; give the folder "
            "IEMOCAP_full_release"
        )
    collector = Collector(folder, folder)
    left_out: Counter[str] = Counter()
    row = 0
    for file in files:
        for line in file.read_bytes().decode("utf-8", "surrogateescape").splitlines():
            if not line.startswith("[") or line.startswith("[START_TIME"):  # the file's header
                continue
            row += 1
            _iemocap_line(collector, row, file, line, merge_excited, left_out)
    _note_left_out(collector, left_out)
    return collector.finish(checks)


def _iemocap_line(
    collector: Collector, row: int, file: Path, line: str, merge_excited: bool, left_out: Counter
) -> None:
    found = _IEMOCAP_LINE.fullmatch(line)
    name = _UTTERANCE.fullmatch(found["utterance"]) if found else None
    if name is None:
        collector.bad(row, f"{file.name}: not a line of an utterance: {line[:60]!r}")
        return
    emotion = _emotion(found["emotion"], merge_excited)
    if emotion is None:
        left_out[found["emotion"]] += 1
        return
    session = file.parents[2]
    audio = session / "sentences" / "wav" / name["dialog"] / f"{found['utterance']}.wav"
    record = _emotion_record(found["utterance"], str(audio.absolute()), emotion)
    record |= {
        "subject_id": name["session"] + name["speaker"],
        "category": "improvised" if name["kind"] == "impro" else "scripted",
        "extra": {"session": name["session"], "emotion": found["emotion"]},
    }
    collector.add(row, record)


def _emotion(name: str, merge_excited: bool) -> str | None:
    emotion = _EMOTION_NAMES.get(name.strip().lower())
    if emotion == "excited":
        return "happy" if merge_excited else None
    return emotion


def _emotion_record(name: str, audio: str, emotion: str) -> dict[str, object]:
    return {"id": name, "audio": audio, "question": EMOTION_QUESTION, "choices": EMOTIONS,
            "answer": emotion, "task": "speech emotion"}  # fmt: skip


def _note_left_out(collector: Collector, left_out: Mapping[str, int]) -> None:
    if left_out:
        each = ", ".join(f"{name or '(none)'}: {n}" for name, n in sorted(left_out.items()))
        collector.note(f"{sum(left_out.values())} rows of other emotions are left out ({each})")
