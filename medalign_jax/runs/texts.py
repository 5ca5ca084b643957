"""What a recording is aligned with: its report's vectors, or a control in their place."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from medalign_jax.core.errors import UserError
from medalign_jax.core.progress import Progress
from medalign_jax.core.words import did_you_mean
from medalign_jax.data.recordings.dataset import AudioDataset
from medalign_jax.data.recordings.manifest import Row
from medalign_jax.data.recordings.wordings import Reports, rows_of
from medalign_jax.reports.templates import METADATA_COLUMNS
from medalign_jax.runs.arms import Arm
from medalign_jax.teachers import EmbeddingCache, Teacher
from medalign_jax.teachers.whitening import Whitening, fit_whitening

PAIRINGS = ("own", "shuffled", "classes", "random")
USES = ("fresh", "mean", "first")
MODES = ("cached", "online")


def check_texts(config: ConfigDict) -> None:
    """Refuses what config.reports and config.teacher ask for and there is not.

    Raises:
      UserError: an unknown name, or what does not go with a teacher in the step.
    """
    reports, mode = config.reports, config.teacher.mode
    for key, value, known in (
        ("reports.pairing", reports.pairing, PAIRINGS),
        ("reports.use", reports.use, USES),
        ("teacher.mode", mode, MODES),
    ):
        if value not in known:
            raise UserError(
                f"{key} is {value!r}{did_you_mean(value, known)}; it is one of {', '.join(known)}"
            )
    for name in reports.leave_out:
        if name not in METADATA_COLUMNS:
            near = did_you_mean(name, METADATA_COLUMNS)
            raise UserError(
                f"reports.leave_out names {name!r}, of which reports say nothing{near}; they say "
                f"of {', '.join(sorted(METADATA_COLUMNS))}"
            )
    if mode == "online" and reports.pairing != "own":
        raise UserError(
            f"reports.pairing={reports.pairing} needs cached vectors: set teacher.mode=cached"
        )
    if mode == "online" and reports.use == "mean":
        raise UserError(
            "teacher.mode=online reads one wording per step and cannot average vectors: set "
            "reports.use=fresh, or teacher.mode=cached"
        )


def check_reports(arm: Arm, reports: Reports) -> None:
    """Refuses an arm that leaves out all that tells its recordings apart.

    Args:
      arm: of a run.
      reports: of all recordings, as the arm asks for them.

    Raises:
      UserError: names the arm, and what it leaves out.
    """
    left_out = arm.config.reports.leave_out
    if left_out and len(set(reports.texts)) == 1:
        raise UserError(
            f"reports.leave_out ({arm.name}): without {', '.join(left_out)} the reports of all "
            "recordings are the same, so that there is nothing to align with; leave out less"
        )


@dataclasses.dataclass(frozen=True)
class Texts:
    """A teacher and its vectors of every text of a run.

    Attributes:
      teacher: the frozen language model.
      vectors: (U, H) embeddings of all distinct texts, as the teacher gives them.
      row: text -> row of `vectors`.
    """

    teacher: Teacher
    vectors: np.ndarray
    row: dict[str, int]

    @classmethod
    def of(
        cls,
        config: ConfigDict,
        workdir: Path,
        teacher: Teacher,
        reports: Sequence[Reports],
    ) -> Texts:
        """Read from the cache, or computed once."""
        folder = Path(config.teacher.cache or workdir / "teacher_cache")
        return cls(teacher, *cached_texts(teacher, reports, folder))

    def rows(self, reports: Reports) -> tuple[np.ndarray, ...]:
        """For each recording the rows of its wordings."""
        return rows_of(reports, self.row)

    def means(self, reports: Reports) -> np.ndarray:
        """(N, H): for each recording the mean over its wordings."""
        return np.stack([self.vectors[rows].mean(axis=0) for rows in self.rows(reports)])

    def whitening(self, config: ConfigDict, train: Reports, classes: int) -> Whitening | None:
        """Fitted on the reports of a training split; None where the config asks for none.

        Reports that leave something out need not tell the classes apart.
        """
        share = config.teacher.whiten
        if config.reports.leave_out:
            classes = 0
        if not share or config.reports.pairing in ("classes", "random"):
            return None
        return fit_whitening(self.means(train), share, classes=classes or None)


def reports_of(dataset: AudioDataset, config: ConfigDict) -> Reports:
    """What `config.reports` asks for."""
    block = config.reports
    return Reports.of(dataset, block.wordings, config.seed, tuple(block.leave_out))


def cached_texts(
    teacher: Teacher, reports: Sequence[Reports], folder: Path
) -> tuple[np.ndarray, dict[str, int]]:
    """Embeddings (U, H) of all unique texts, computed once and cached, and each text's row."""
    unique = sorted({text for part in reports for text in part.unique()})
    progress = Progress(len(unique), "embedding reports", "text")
    seen = 0

    def advance(done: int, total: int) -> None:
        nonlocal seen
        progress.advance(done - seen)
        seen = done

    array = EmbeddingCache(folder).embeddings(teacher, unique, progress=advance)
    progress.close()
    if note := teacher.overlong(unique):
        print(f"reports: {note}", flush=True)
    return array, {text: row for row, text in enumerate(unique)}


@dataclasses.dataclass(frozen=True)
class Targets:
    """Vectors of the recordings of a fold's parts, row by row.

    Attributes:
      arrays: name -> (K, ...): "text", or with a teacher in the step "text_ids" and "text_mask".
      train, valid: for each recording the rows that stand for it.
    """

    arrays: dict[str, np.ndarray]
    train: tuple[np.ndarray, ...]
    valid: tuple[np.ndarray, ...]

    @property
    def width(self) -> int:
        """H of "text"."""
        return self.arrays["text"].shape[1]


def targets_of(
    config: ConfigDict,
    texts: Texts,
    whitening: Whitening | None,
    parts: tuple[AudioDataset, AudioDataset | None],
    tasks: Sequence[str],
) -> Targets:
    """What the two parts of a fold are aligned with.

    `config.reports.pairing` is "own", or a control: "shuffled" (each part's subjects get one
    another's reports, none its own: recordings of one subject keep sharing what they share, and
    only what the reports say of the sound is broken; a subject of more recordings than the one
    whose reports it gets has them again from the first), "classes" (one vector for each answer to
    the tasks, all at right angles), "random" (one random vector for each distinct report).

    Args:
      config: of the run or of an arm.
      texts: vectors of all texts.
      whitening: applied to them.
      parts: training and validation recordings; the second may be None.
      tasks: columns that "classes" reads.

    Raises:
      UserError: see `check_texts`.
    """
    check_texts(config)
    how = config.reports.pairing
    reports = [Reports(()) if part is None else reports_of(part, config) for part in parts]
    rng = np.random.default_rng((config.seed, 13))
    if how == "classes":
        names = [() if part is None else answers_of(part.rows, tasks) for part in parts]
        return _one_per_name(names, lambda n: np.eye(n, dtype=np.float32))
    if how == "random":
        width = texts.vectors.shape[1]
        made = [part.texts for part in reports]
        return _one_per_name(made, lambda n: rng.standard_normal((n, width)).astype(np.float32))
    rows = [texts.rows(part) for part in reports]
    if how == "shuffled":
        rows = [
            tuple(own[i] for i in _shuffled([] if part is None else part.rows, rng))
            for part, own in zip(parts, rows, strict=True)
        ]
    return Targets(_arrays(config, texts, whitening), *rows)


def _shuffled(rows: Sequence[Row], rng: np.random.Generator) -> list[int]:
    """For each recording the one whose report it gets: another subject's, subject by subject."""
    of_subject: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        of_subject.setdefault(row.subject_id or f"row {row.row}", []).append(i)
    own, found = list(of_subject.values()), [0] * len(rows)
    for recordings, giver in zip(own, _others(len(own), rng), strict=True):
        for k, i in enumerate(recordings):
            found[i] = own[giver][k % len(own[giver])]
    return found


def _others(count: int, rng: np.random.Generator) -> np.ndarray:
    """A random order of 0..count - 1 in which none stays at its place, where there are two.

    Those that a permutation leaves are passed on in turn, one alone with the one behind it.
    """
    order = rng.permutation(count)
    stay = np.flatnonzero(order == np.arange(count))
    if len(stay) == 1:
        stay = np.array([stay[0], (stay[0] + 1) % count])
    order[stay] = np.roll(order[stay], 1)
    return order


def answers_of(rows: Sequence[Row], tasks: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Each recording's answers to some tasks, as text."""
    columns = [task.partition(":")[0] for task in tasks]
    return tuple(
        tuple((row.label if c == "label" else row.targets.get(c)) or "" for c in columns)
        for row in rows
    )


def _one_per_name(names: Sequence[Sequence], vectors) -> Targets:
    """One row for each distinct name, the training part's first."""
    number = {name: i for i, name in enumerate(dict.fromkeys(n for part in names for n in part))}
    rows = [tuple(np.array([number[name]]) for name in part) for part in names]
    return Targets({"text": vectors(len(number))}, *rows)


def _arrays(config: ConfigDict, texts: Texts, whitening: Whitening | None):
    """What stands for a text in a batch: its vector, or its tokens."""
    if config.teacher.mode != "online":
        return {"text": texts.vectors if whitening is None else whitening(texts.vectors)}
    ids, mask = texts.teacher.tokenize(list(texts.row))
    return {"text_ids": ids, "text_mask": mask}
