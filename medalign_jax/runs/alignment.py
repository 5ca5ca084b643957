"""One fold of an AcuLa run: where its encoder starts, its alignments, its supervised reference."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from medalign_jax.architecture import Architecture
from medalign_jax.data.recordings.dataset import AudioDataset
from medalign_jax.data.recordings.wordings import Reports, TextColumn, report_marks
from medalign_jax.evaluate.folds import Fold
from medalign_jax.evaluate.leaks import Findings
from medalign_jax.evaluate.suite import Suite
from medalign_jax.evaluate.tasks import Task
from medalign_jax.methods.acula import Acula
from medalign_jax.methods.supervised import Supervised
from medalign_jax.runs.arms import Arm
from medalign_jax.runs.data import training_part
from medalign_jax.runs.export import export_encoder, export_heads, host_params
from medalign_jax.runs.parts.alignment import acula_config, teacher_of
from medalign_jax.runs.parts.audio import audio_student_of, data_of, encoder_of, published_params
from medalign_jax.runs.parts.blocks import loop_config, optimizer_config
from medalign_jax.runs.pretrain import pretrain
from medalign_jax.runs.texts import Targets, Texts, reports_of, targets_of
from medalign_jax.runs.workdir import bind
from medalign_jax.teachers import Teacher
from medalign_jax.teachers.whitening import Whitening
from medalign_jax.train.loop import Fit, fit


@dataclass
class Run:
    """What all folds and arms share.

    Attributes:
      data: all recordings of the manifest.
      reports: wordings of each of them.
      suite: tasks and folds.
      findings: what may have leaked from training into testing.
    """

    config: ConfigDict
    workdir: Path
    mesh: Mesh
    made: Architecture
    data: AudioDataset
    reports: Reports
    suite: Suite
    findings: Findings = field(default_factory=Findings)

    def __post_init__(self) -> None:
        self._teachers: dict[str, Teacher] = {}
        self._texts: dict[tuple[str, ...], Texts] = {}

    def texts(self, config: ConfigDict) -> Texts:
        """Vectors of all texts that this config asks for; each teacher reads a text once."""
        reports = config.reports
        key = (
            config.teacher.to_json_best_effort(), str(reports.wordings), *sorted(reports.leave_out)
        )  # fmt: skip
        if key not in self._texts:
            parts = [self.data, *(part.train for part in self.parts if config.data.mix)]
            asked = [reports_of(part, config) for part in parts]
            self._texts[key] = Texts.of(config, self.workdir, self._teacher(config), asked)
        return self._texts[key]

    def _teacher(self, config: ConfigDict) -> Teacher:
        key = config.teacher.to_json_best_effort()
        if key not in self._teachers:
            teacher = teacher_of(config, self.mesh)
            name = "teacher_weights"
            if self._teachers:
                name += f" {config.teacher.source}"
            bind(self.workdir, shown=True, **{name: teacher.identity})
            self._teachers[key] = teacher
        return self._teachers[key]

    @functools.cached_property
    def parts(self) -> tuple[Part, ...]:
        """One per fold."""
        return tuple(Part.of(self, fold) for fold in self.suite.training_folds())


@dataclass
class Part:
    """One fold: the recordings with its splits.

    Attributes:
      run: what is shared.
      fold: over recordings.
      folder: the workdir, or a folder in it where there are several folds.
      data: all recordings, split as the fold says.
      train: those of training, and the simulated ones mixed in.
    """

    run: Run
    fold: Fold
    folder: Path
    data: AudioDataset
    train: AudioDataset

    @classmethod
    def of(cls, run: Run, fold: Fold) -> Part:
        """The recordings with the splits of a fold over them."""
        data = run.data
        if fold.name:
            data = data.with_splits(fold.split_of(len(data)))
        train = training_part(run.config, data, run.workdir)
        folder = run.workdir / fold.name.replace(" ", "_")
        folder.mkdir(exist_ok=True)
        return cls(run, fold, folder, data, train)

    @functools.cached_property
    def train_reports(self) -> Reports:
        """Of the training recordings, as the run's own config asks for them."""
        return reports_of(self.train, self.run.config)

    @property
    def valid(self) -> AudioDataset | None:
        """Recordings for choices, if the fold keeps any."""
        return self.data.split("valid") if "valid" in self.data.splits() else None

    def __post_init__(self) -> None:
        self._whitenings: dict[str, Whitening | None] = {}

    def whitening(self, arm: Arm) -> Whitening | None:
        """Of an arm's teacher vectors, fitted on the training reports; None where it has none.

        Raises:
          UserError: the reports do not allow it, see `fit_whitening`.
        """
        if arm.identity not in self._whitenings:
            config, run = arm.config, self.run
            train = reports_of(self.train, config)
            found = run.texts(config).whitening(config, train, _classes(run.suite))
            if found is not None:
                print(f"{self.what}{arm.name}: {found.describe()}", flush=True)
            self._whitenings[arm.identity] = found
        return self._whitenings[arm.identity]

    @property
    def what(self) -> str:
        """For the progress bar."""
        return f"{self.fold.name}: " if self.fold.name else ""


@dataclass(frozen=True)
class Aligned:
    """An alignment that is done.

    Attributes:
      encoder, heads: parameters on the host.
      targets: what it was aligned with.
      whitening: what was applied to the teacher's vectors.
    """

    encoder: Any
    heads: Any
    targets: Targets
    whitening: Whitening | None


def starting_params(part: Part) -> Any:
    """Published weights > pre-training here > random (refused unless asked for)."""
    run, config = part.run, part.run.config
    if config.encoder.source:
        params, identity = published_params(config, run.made, run.mesh)
        bind(run.workdir, shown=True, encoder_weights=identity)
        return params
    if config.pretrain.enabled:
        folder = part.folder / "pretrain"
        block = config.copy_and_resolve_references()
        with block.unlocked():
            block.update(config.pretrain.changes)
        folder.mkdir(exist_ok=True)
        fitted = pretrain(block, folder, part.data, run.made, run.mesh)
        encoder = encoder_of(config, run.made, fitted.best_params["encoder"], run.mesh)
        export_encoder(folder / "export", encoder)
        return fitted.best_params["encoder"]
    print("warning: aligning a randomly initialised encoder; the paper shows that this fails")
    return random_params(run)


def random_params(run: Run) -> Any:
    """Parameters of the encoder before any training."""
    student = audio_student_of(run.config, run.made, None)
    return jax.jit(student.init)(jax.random.key(run.config.seed))["encoder"]


def align(part: Part, arm: Arm, start: Any) -> Aligned:
    """The AcuLa stage of an arm, exported."""
    run, config = part.run, arm.config
    if config.encoder.random:
        start = random_params(run)
    texts, whitening = run.texts(config), part.whitening(arm)
    columns = run.suite.options.tasks
    targets = targets_of(config, texts, whitening, (part.train, part.valid), columns)
    folder = part.folder / arm.folder
    folder.mkdir(parents=True, exist_ok=True)
    fitted = _fit(part, config, start, texts, whitening, targets, folder, arm.name)
    params = host_params(fitted.best_params)
    aligned = Aligned(params["encoder"], params["heads"], targets, whitening)
    export_aligned(run, aligned, folder)
    return aligned


def export_aligned(run: Run, aligned: Aligned, folder: Path) -> None:
    """``FOLDER/export``: the encoder and its heads."""
    encoder = encoder_of(run.config, run.made, aligned.encoder, None)
    export_encoder(folder / "export", encoder)
    export_heads(folder / "export", aligned.heads)


def _classes(suite: Suite) -> int:
    """How many classes whitened reports have to tell apart, of all tasks together.

    It is one more than the directions that the answers span: C classes of one task span C - 1, and
    five yes-or-no tasks up to five. 0 where no task has classes.
    """
    centred = [_centred(task) for task in suite.tasks if task.classes]
    if not centred:
        return 0
    table = np.concatenate(centred, axis=1)
    return int(np.linalg.matrix_rank(table - table.mean(axis=0))) + 1


def _centred(task: Task) -> np.ndarray:
    """(R, C) what a row's answer is, less the mean over the classes; zeros where it has none."""
    count = len(task.classes)
    return (task.answers[:, None] == np.arange(count)) - task.known[:, None] / count


def _fit(part, config, start, texts, whitening, targets, folder, name) -> Fit:
    run = part.run
    student = audio_student_of(config, run.made, start)
    extra = {}
    if config.teacher.mode == "online":
        extra = {
            "frozen": texts.teacher.params,
            "frozen_rules": texts.teacher.sharding_rules,
            "teacher_apply": _online(texts, whitening),
        }
    width = targets.width if not extra else _online_width(texts, whitening)
    method = Acula(student, width, acula_config(config), run.made.sharding, **extra)
    loop = loop_config(config, len(part.train), "recordings")
    names, marks = ("waveform", *targets.arrays), [None, None]
    if config.loss.align != "cka":  # two wordings of one report are not negatives
        names, marks = (*names, "report"), report_marks(targets.train, targets.valid)
    train = TextColumn(targets.arrays, targets.train, config.reports.use, marks[0])
    valid = None
    if part.valid is not None:
        use = "first" if extra else "mean"
        valid = TextColumn(targets.arrays, targets.valid, use, marks[1])
    data = data_of(config, run.mesh, part.train, part.valid, names, train, valid)
    what = part.what + ("align" if name == "after" else name)
    return fit(method, data, optimizer_config(config), loop, folder, run.mesh, what)


def _online(texts: Texts, whitening: Whitening | None) -> Any:
    """(params, ids, mask) -> vectors as the cache holds them."""
    teacher = texts.teacher
    if whitening is None:
        return teacher.apply
    mean, matrix = jnp.asarray(whitening.mean), jnp.asarray(whitening.matrix)
    return lambda params, ids, mask: (teacher.apply(params, ids, mask) - mean) @ matrix


def _online_width(texts: Texts, whitening: Whitening | None) -> int:
    return texts.vectors.shape[1] if whitening is None else whitening.width


def supervise(part: Part, start: Any) -> Any:
    """The same encoder fine-tuned with the labels of the first task, as a reference."""
    run, config = part.run, part.run.config
    task = run.suite.tasks[0]
    block = config.copy_and_resolve_references()
    with block.unlocked():
        block.update(config.supervised.changes)
    answers = run.suite.answers(task)
    train, train_column = _labelled(part.data, part.fold.train, answers)
    valid, valid_column = _labelled(part.data, part.fold.valid, answers)
    folder = part.folder / "supervised"
    folder.mkdir(exist_ok=True)
    student = audio_student_of(block, run.made, start)
    method = Supervised(student, len(task.classes), run.made.sharding)
    loop = loop_config(block, len(train), "recordings")
    data = data_of(block, run.mesh, train, valid, ("waveform", "label"), train_column, valid_column)
    fitted = fit(
        method, data, optimizer_config(block), loop, folder, run.mesh, f"{part.what}supervised"
    )
    return host_params(fitted.best_params["encoder"])


def _labelled(data: AudioDataset, rows: np.ndarray, answers: np.ndarray):
    """The recordings among `rows` that have an answer, and their column; (None, None) if none."""
    rows = rows[answers[rows] >= 0]
    if not len(rows):
        return None, None
    return data.select(rows), _LabelColumn(tuple(answers[rows].tolist()))


@dataclass(frozen=True)
class _LabelColumn:
    """Adds a recording's class number to a batch."""

    numbers: tuple[int, ...]

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        del rng
        return {"label": np.int32(self.numbers[index])}
