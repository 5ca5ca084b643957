"""A simulator of auscultation with known truth.

The findings of a simulated recording are those of its metadata, in the columns that real data sets
use, and where each event lies in time is known exactly. What else real recordings differ in
(site, device, room, level, friction, the other organ in the background) is drawn independently of
the findings, so that it carries no label.

    medalign simulate --out=DIR --count=300 --seed=0
"""

import argparse
import csv
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import soundfile

from medalign_jax.core import commands
from medalign_jax.core.files import write_whole, writing_whole
from medalign_jax.datasets.simulated import heart as simulate_heart
from medalign_jax.datasets.simulated import lung as simulate_lung
from medalign_jax.datasets.simulated import synthesis
from medalign_jax.datasets.simulated import valves as simulate_valves
from medalign_jax.datasets.simulated.synthesis import SAMPLE_RATE, SimulationError
from medalign_jax.reports.vocabulary import HEART_COLUMNS, LUNG_COLUMNS, PHASES, read_metadata

__all__ = ["LABELS", "SAMPLE_RATE", "Simulated", "SimulationError", "simulate", "write_dataset"]

LABELS: Mapping[str, tuple[str, ...]] = {
    "heart": ("normal", "systolic murmur", "diastolic murmur"),
    "lung": ("normal", "wheeze", "crackle"),
    "valves": ("normal", "systolic murmur", "diastolic murmur"),
}
_HEART = {"heart": simulate_heart.draw_heart, "valves": simulate_valves.draw_heart}
_DRAW = {"heart": simulate_heart.draw_metadata, "valves": simulate_valves.draw_metadata}
SPLIT_CYCLE = (
    "train",
    "test",
    "train",
    "valid",
    "train",
    "train",
    "test",
    "train",
    "train",
    "train",
)
_COLUMNS = ("audio_path", "subject_id", "split", "label", "organ")
_LENGTHS = (2.0, 600.0)
_RATES = {"heart_rate": (40, 160), "respiratory_rate": (6, 60)}


@dataclass(frozen=True)
class Simulated:
    """One simulated recording.

    Attributes:
      waveform: float32, (samples,), 16 kHz, peak below 1.
      metadata: `label`, `organ`, and the findings in the columns of
        `reports.vocabulary.METADATA_COLUMNS`.
      truth: what is where in the sound; see `heart.render`, `lung.render` and `synthesis.record`.
        Plain lists, numbers and texts.
    """

    waveform: np.ndarray
    metadata: dict[str, str]
    truth: dict[str, object]


def simulate(
    kind: str,
    seed: int,
    *,
    label: str | None = None,
    seconds: float = 8.0,
    subject: int | None = None,
    metadata: Mapping[str, str] | None = None,
    nuisance: bool = True,
) -> Simulated:
    """One recording; the same arguments give the same samples, bit for bit.

    Args:
      kind: "heart", "lung", or "valves": hearts whose findings go together as lesions do.
      seed: of the recording.
      label: one of `LABELS[kind]`; if None, what `metadata` say, or else drawn from the subject.
      seconds: length, 2 to 600.
      subject: seed of the subject. Recordings of one subject share anatomy, rate and findings;
        by default every recording has its own.
      metadata: values to set in place of the drawn ones, such as `{"heart_rate": "80"}` or
        `{"systolic_murmur_timing": "Holosystolic"}`. All else stays as it would have been.
      nuisance: False leaves out device, ambient noise, friction and the other organ.

    Raises:
      SimulationError: an unknown kind or label, a length out of range, metadata that belongs to
        the other organ or that no sound can be made from, or events that do not fit the length.
      ReportError: an unknown value in `metadata`.
    """
    _check_request(kind, label, seconds)
    subject = seed if subject is None else subject
    row = _row(kind, seed, label, subject, metadata or {})
    facts, organ = read_metadata(row), row["organ"]
    if organ == "heart":
        heart = _HEART[kind](subject)
        sound, truth = simulate_heart.render(facts, heart, seconds, seed)
        row["heart_rate"] = f"{truth['heart_rate']:.0f}"
    else:
        lung = simulate_lung.draw_lung(subject)
        sound, truth = simulate_lung.render(facts, lung, seconds, seed)
        row["respiratory_rate"] = f"{truth['respiratory_rate']:.0f}"
    if nuisance:
        sound = _add_other_organ(sound, organ, subject, seed, seconds)
        sound, recording = _record(sound, kind, seed)
        truth |= recording
    return Simulated(synthesis.level(sound, seed), row, truth)


def _row(
    kind: str, seed: int, label: str | None, subject: int, given: Mapping[str, str]
) -> dict[str, str]:
    """`label`, `organ` and findings of a recording, before there is any sound."""
    findings = _findings(kind, subject, seed, label, given)
    facts = read_metadata(findings)
    made = _label(kind, facts)
    if label not in (None, made):
        raise SimulationError(
            f"label {label!r} contradicts the metadata, which make it {made!r}; leave one out"
        )
    _check_rate(facts)
    return {"label": made, "organ": "lung" if kind == "lung" else "heart"} | findings


def _record(sound: np.ndarray, kind: str, seed: int) -> tuple[np.ndarray, dict[str, object]]:
    if kind == "valves":
        return simulate_valves.record(sound, seed)
    devices = synthesis.HEART_DEVICES if kind == "heart" else synthesis.LUNG_DEVICES
    return synthesis.record(sound, seed, devices)


def _check_request(kind: str, label: str | None, seconds: float) -> None:
    if kind not in LABELS:
        raise SimulationError(f"unknown kind {kind!r}; allowed: {', '.join(LABELS)}")
    if label is not None and label not in LABELS[kind]:
        raise SimulationError(
            f"unknown label {label!r} for kind {kind!r}; allowed: {', '.join(LABELS[kind])}"
        )
    if not _LENGTHS[0] <= seconds <= _LENGTHS[1]:
        raise SimulationError(
            f"{seconds:g} s cannot be simulated; ask for {_LENGTHS[0]:g} to {_LENGTHS[1]:g} s"
        )


def _check_rate(facts: Mapping[str, str]) -> None:
    for column, (low, high) in _RATES.items():
        if column in facts and not low <= float(facts[column]) <= high:
            raise SimulationError(
                f"column {column!r}: {facts[column]} per minute cannot be simulated; "
                f"ask for {low:g} to {high:g}"
            )


def _findings(
    kind: str, subject: int, seed: int, label: str | None, given: Mapping[str, str]
) -> dict[str, str]:
    """The drawn findings with the given ones in their place."""
    allowed = LUNG_COLUMNS - {"sound_type"} if kind == "lung" else HEART_COLUMNS
    if unknown := sorted(set(given) - allowed):
        raise SimulationError(
            f"column {unknown[0]!r} cannot be set for kind {kind!r}; "
            f"allowed: {', '.join(sorted(allowed))}"
        )
    decisive = {column for column in given if "murmur" in column} | (
        {"crackles", "wheezes", "most_audible_location"} & set(given)
    )
    if label is None and not decisive:
        label = str(synthesis.stream(subject, "label").choice(LABELS[kind]))
    if kind != "lung":
        return _heart_findings(kind, subject, label, given)
    row = simulate_lung.draw_metadata(subject, label or "normal")
    return row | {"chest_location": simulate_lung.draw_location(seed)} | dict(given)


def _heart_findings(
    kind: str, subject: int, label: str | None, given: Mapping[str, str]
) -> dict[str, str]:
    """A given feature brings the rest of its murmur with it; without one a murmur is systolic."""
    murmur = read_metadata(given).get("murmur")
    if murmur == "Unknown":
        raise SimulationError("a murmur is either Present or Absent in a simulated sound")
    phases = [p for p in PHASES if any(column.startswith(f"{p}_murmur") for column in given)]
    wanted = murmur == "Present" or (label is None and murmur is None)
    if not phases and wanted and label in (None, "normal"):
        phases = ["systolic"]
    row: dict[str, str] = {}
    for name in [f"{phase} murmur" for phase in phases] or [label or "normal"]:
        row |= _DRAW[kind](subject, name)
    if "murmur_locations" in given:
        row["most_audible_location"] = given["murmur_locations"].split("+")[0]
    elif "most_audible_location" in given:
        row["murmur_locations"] = given["most_audible_location"]
    return row | dict(given)


def _label(kind: str, facts: Mapping[str, str]) -> str:
    if kind == "lung":
        columns = {"wheeze": "wheezes", "crackle": "crackles"}
        present = [name for name, column in columns.items() if facts[column] != "0"]
    else:
        present = [f"{phase} murmur" for phase in PHASES if f"{phase}_murmur_timing" in facts]
    return " and ".join(present) or "normal"


def _add_other_organ(
    sound: np.ndarray, kind: str, subject: int, seed: int, seconds: float
) -> np.ndarray:
    """Quiet breathing behind the heart, or quiet heart sounds behind the breathing."""
    rng = synthesis.stream(seed, "other organ")
    if kind == "heart":
        facts = read_metadata(simulate_lung.draw_metadata(subject, "normal"))
        other, _ = simulate_lung.render(facts, simulate_lung.draw_lung(subject), seconds, seed)
        return sound + 10 ** (rng.uniform(-46, -34) / 20) * other
    facts = read_metadata(simulate_heart.draw_metadata(subject, "normal"))
    other, _ = simulate_heart.render(facts, simulate_heart.draw_heart(subject), seconds, seed)
    return sound + 10 ** (rng.uniform(-20, 6) / 20) * other


# --- Data sets ---------------------------------------------------------------------------------


def write_dataset(
    folder: str | os.PathLike,
    count: int,
    seed: int,
    *,
    seconds: float = 8.0,
    kinds: Sequence[str] = ("heart", "lung"),
    recordings_per_subject: int = 2,
    anew: bool = False,
    check: Callable[[list[dict[str, str]]], object] | None = None,
) -> Path:
    """Write `count` recordings with their metadata and truth.

    The classes of `LABELS` take turns by subject, and within each class the subjects are dealt
    7 : 1 : 2 to train, valid and test, so that no subject is in two splits.

    Args:
      folder: made if need be. One that already holds this very data set is left as it is.
      count: number of recordings.
      seed: the same seed gives the same files.
      seconds: length of each.
      kinds: of `LABELS`, one or several.
      recordings_per_subject: recordings that share a subject.
      anew: whether a data set that was simulated otherwise is removed, instead of refused.
      check: called with the rows of the manifest before there is any sound; measured rates may
        differ in them by a little.

    Returns:
      Path of `metadata.csv` (`audio_path, subject_id, split, label, organ`, of hearts with a
      murmur its `phase`, and findings); beside it lie `audio/*.wav` (16 kHz, 16 bit) and
      `truth.jsonl`, one object per recording.

    Raises:
      SimulationError: numbers out of range, or a folder that holds something else.
    """
    folder = Path(folder)
    for kind in kinds:
        _check_request(kind, None, seconds)
    if count < 1 or recordings_per_subject < 1 or seed < 0 or not kinds:
        raise SimulationError(
            "a data set takes at least one recording, one recording per subject, one kind and a "
            f"seed of 0 or more; got count={count}, seed={seed}, kinds={list(kinds)}, "
            f"recordings_per_subject={recordings_per_subject}"
        )
    request = {
        "count": count,
        "seed": seed,
        "seconds": float(seconds),
        "kinds": list(kinds),
        "recordings_per_subject": recordings_per_subject,
    }
    manifest = folder / "metadata.csv"
    if check is not None:
        check([_described(request, index)[2] for index in range(count)])
    if _already_there(folder, request, anew):
        return manifest
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    write_whole(folder / "simulation.json", json.dumps(request).encode())
    rows = _write_recordings(folder, request)
    columns = [*_COLUMNS, *sorted({column for row in rows for column in row} - set(_COLUMNS))]
    # Its presence means "done".
    with writing_whole(manifest) as part, part.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return manifest


def _already_there(folder: Path, request: Mapping[str, object], anew: bool) -> bool:
    if not folder.exists() or not any(folder.iterdir()):
        return False
    record = folder / "simulation.json"
    try:
        found = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None
    except ValueError:  # no JSON, or no text
        found = None
    if anew and found and found != request:
        shutil.rmtree(folder)
        return False
    if found != request:
        what = f"a data set simulated with {found}" if found else "other files"
        raise SimulationError(f"{folder} holds {what}; give an empty or a new folder")
    return (folder / "metadata.csv").is_file()


def _write_recordings(folder: Path, request: Mapping[str, object]) -> list[dict[str, str]]:
    """The recordings, on all cores, and truth.jsonl; the rows of the manifest."""
    write = partial(_write_recording, folder, request)
    rows = []
    # Threads suffice: numpy lets go of the interpreter while it computes.
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        (folder / "truth.jsonl").open("w", encoding="utf-8") as truths,
    ):
        for row, truth in pool.map(write, range(request["count"])):
            truths.write(json.dumps({"audio_path": row["audio_path"]} | truth) + "\n")
            rows.append(row)
    return rows


def _write_recording(
    folder: Path, request: Mapping[str, object], index: int
) -> tuple[dict[str, str], Mapping[str, object]]:
    """One recording: its row of the manifest, and its truth."""
    kind, seeds, row = _described(request, index)
    made = simulate(kind, label=row["label"], seconds=request["seconds"], **seeds)
    pcm = np.round(made.waveform * 32767).astype(np.int16)
    soundfile.write(folder / row["audio_path"], pcm, SAMPLE_RATE, subtype="PCM_16")
    return row | made.metadata, made.truth


def _described(
    request: Mapping[str, object], index: int
) -> tuple[str, dict[str, int], dict[str, str]]:
    """A recording's kind, its seeds, and its row of the manifest, before there is any sound."""
    classes = [(kind, label) for kind in request["kinds"] for label in LABELS[kind]]
    subject, take = divmod(index, request["recordings_per_subject"])
    kind, label = classes[subject % len(classes)]
    seeds = {
        "seed": _derived(request["seed"], subject, take + 1),
        "subject": _derived(request["seed"], subject, 0),
    }
    name = f"sim{request['seed']}-{subject:05d}"
    split = SPLIT_CYCLE[subject // len(classes) % len(SPLIT_CYCLE)]
    row = {"audio_path": f"audio/{name}-{take}.wav", "subject_id": name, "split": split}
    return kind, seeds, row | _row(kind, label=label, given={}, **seeds) | _phase(label)


def _phase(label: str) -> dict[str, str]:
    """A murmur's phase: a second thing to ask, of the subjects that have one."""
    phase, _, murmur = label.partition(" ")
    return {"phase": phase} if murmur == "murmur" else {}


def _derived(seed: int, *path: int) -> int:
    return int(np.random.SeedSequence([seed, *path]).generate_state(1, np.uint64)[0])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = commands.ArgumentParser(
        prog="medalign simulate",
        description="Write a data set of simulated heart and lung sounds with known truth: "
        "audio/*.wav (16 kHz, 16 bit), metadata.csv (a manifest that training takes as it is, "
        "splits disjoint by subject) and truth.jsonl (when each event happens).",
    )
    parser.add_argument("--out", required=True, help="folder to write; new or empty")
    parser.add_argument("--count", type=int, required=True, help="number of recordings")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same files (default 0)")
    parser.add_argument("--seconds", type=float, default=8.0, help="length of each (default 8)")
    parser.add_argument(
        "--kinds",
        default="heart,lung",
        help="one or several, by comma (default heart,lung). Classes: "
        + "; ".join(f"{kind}: {', '.join(labels)}" for kind, labels in LABELS.items()),
    )
    parser.add_argument(
        "--recordings_per_subject", type=int, default=2, help="recordings per subject (default 2)"
    )
    flags = parser.parse_args(arguments)
    return commands.ended(lambda: run(flags), given=flags)


def run(flags: argparse.Namespace) -> None:
    """Writes the data set.

    Raises:
      SimulationError: see `write_dataset`.
    """
    manifest = write_dataset(
        flags.out,
        flags.count,
        flags.seed,
        seconds=flags.seconds,
        kinds=tuple(kind.strip() for kind in flags.kinds.split(",")),
        recordings_per_subject=flags.recordings_per_subject,
    )
    subjects = math.ceil(flags.count / flags.recordings_per_subject)
    print(f"{flags.count} recordings of {subjects} subjects: {manifest}")
