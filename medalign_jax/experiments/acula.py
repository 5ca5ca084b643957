"""AcuLa end to end: reports to vectors, pre-train if asked, align, fine-tune the ceiling, compare.

manifest -> data set -> texts -> teacher -> cached vectors
               |                                |
encoder: weights | pre-training ----> alignment (method `Acula`) -> export
               |         |                      |
               +---------+---- ceiling (method `Supervised`)
                         |          |           |
                      "before"  "ceiling"    "after"  -> evaluation.json, report.html
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from medalign_jax.data.dataset import AudioDataset
from medalign_jax.encoder import Architecture, Encoder
from medalign_jax.errors import UserError
from medalign_jax.experiments import build, page
from medalign_jax.experiments import comparison as compare
from medalign_jax.experiments.export import export_encoder, export_heads, host_params
from medalign_jax.experiments.pretrain import pretrain
from medalign_jax.experiments.workdir import note_provenance, open_workdir
from medalign_jax.methods.acula import Acula
from medalign_jax.methods.pretrain import Supervised
from medalign_jax.models.heads import ProjectionHead
from medalign_jax.teachers import Teacher
from medalign_jax.teachers.whitening import Whitening, fit_whitening
from medalign_jax.train.loop import Fit, fit
from medalign_jax.train.progress import Progress


@dataclass
class Run:
    """What the stages of one run share.

    Attributes:
      data: all recordings of the manifest.
      train: the training split and the simulated recordings mixed in.
      teacher: the frozen language model.
      vectors: (U, H) embeddings of all unique texts, whitened if the config says so.
      row: text -> row of `vectors`.
      whitening: what was applied to `vectors`, fitted on the training split; None for nothing.
      stages: name -> encoder.
    """

    config: ConfigDict
    workdir: Path
    mesh: Mesh
    made: Architecture
    data: AudioDataset
    train: AudioDataset
    teacher: Teacher
    vectors: np.ndarray
    row: dict[str, int]
    reports: build.Reports
    train_reports: build.Reports
    whitening: Whitening | None = None
    stages: dict[str, Encoder] = field(default_factory=dict)


def run(config: ConfigDict, workdir: Path) -> None:
    """``--config=configs/acula.py``: everything from the manifest to the page."""
    workdir = open_workdir(workdir, config)
    this = _prepare(config, workdir)
    before = _starting_encoder(this)
    this.stages["before"] = build.encoder_of(config, this.made, before, this.mesh)
    fitted = _align(this, before)
    after = host_params(fitted.best_params)
    this.stages["after"] = build.encoder_of(config, this.made, after["encoder"], this.mesh)
    export_encoder(workdir / "export", this.stages["after"])
    export_heads(workdir / "export", after["heads"])
    if config.ceiling.enabled:
        ceiling = _ceiling(this, before)
        this.stages["ceiling"] = build.encoder_of(
            config, this.made, ceiling.best_params["encoder"], this.mesh
        )
    if config.evaluate.enabled:
        _evaluate(this, after["heads"])


def _prepare(config: ConfigDict, workdir: Path) -> Run:
    """Data, reports and their vectors."""
    mesh, made = build.mesh_of(config), build.architecture_of(config)
    data = build.open_data(config, workdir, made)
    train = build.training_part(config, data, workdir)
    count = config.reports.wordings
    reports = build.Reports.of(data, count, config.seed)
    train_reports = build.Reports.of(train, count, config.seed)
    teacher = build.teacher_of(config, mesh)
    cache = Path(config.teacher.cache or workdir / "teacher_cache")
    vectors, row = build.cached_texts(teacher, (reports, train_reports), cache)
    note_provenance(workdir, teacher_weights=teacher.identity)
    whitening = None
    if config.teacher.whiten:
        means = [vectors[rows].mean(0) for rows in build.rows_of(train_reports, row)]
        whitening = fit_whitening(np.stack(means), config.teacher.whiten)
        vectors = whitening(vectors)
    return Run(
        config, workdir, mesh, made, data, train, teacher, vectors, row, reports, train_reports,
        whitening,
    )  # fmt: skip


def _starting_encoder(this: Run) -> Any:
    """Published weights > pre-training here > random (refused unless asked for)."""
    config = this.config
    if config.encoder.source:
        params, identity = build.published_params(config, this.made, this.mesh)
        note_provenance(this.workdir, encoder_weights=identity)
        return params
    if config.pretrain.enabled:
        folder = this.workdir / "pretrain"
        block = config.copy_and_resolve_references()
        with block.unlocked():
            block.update(config.pretrain.changes)
        folder.mkdir(exist_ok=True)
        fitted = pretrain(block, folder, this.data, this.made, this.mesh)
        encoder = build.encoder_of(config, this.made, fitted.best_params["encoder"], this.mesh)
        export_encoder(folder / "export", encoder)
        return fitted.best_params["encoder"]
    print("warning: aligning a randomly initialised encoder; the paper shows that this fails")
    student = build.student_of(config, this.made, None)
    return jax.jit(student.init)(jax.random.key(config.seed))["encoder"]


def _align(this: Run, params: Any) -> Fit:
    """The AcuLa stage."""
    config = this.config
    student = build.student_of(config, this.made, params)
    settings = build.acula_config(config)
    online = config.teacher.mode == "online"
    extra = {}
    if online:
        extra = {
            "frozen": this.teacher.params,
            "frozen_rules": this.teacher.sharding_rules,
            "teacher_apply": _online_teacher(this),
        }
    method = Acula(student, this.vectors.shape[1], settings, this.made.sharding, **extra)
    loop, optimizer = build.loop_of(config, this.train)
    valid = this.data.split("valid") if "valid" in this.data.splits() else None
    arrays = _text_arrays(this, online)
    names = ("waveform", *arrays)
    train_column = build.TextColumn(
        arrays, build.rows_of(this.train_reports, this.row), config.reports.use
    )
    valid_column = None
    if valid is not None:
        reports = build.Reports.of(valid, config.reports.wordings, config.seed)
        use = "first" if online else "mean"
        valid_column = build.TextColumn(arrays, build.rows_of(reports, this.row), use)
    data = build.data_of(config, this.mesh, this.train, valid, names, train_column, valid_column)
    return fit(method, data, optimizer, loop, this.workdir, this.mesh, "align")


def _online_teacher(this: Run) -> Any:
    """(params, ids, mask) -> vectors as the cache holds them."""
    if this.whitening is None:
        return this.teacher.apply
    mean, matrix = jnp.asarray(this.whitening.mean), jnp.asarray(this.whitening.matrix)
    return lambda params, ids, mask: (this.teacher.apply(params, ids, mask) - mean) @ matrix


def _text_arrays(this: Run, online: bool) -> dict[str, np.ndarray]:
    """What stands for a text in a batch: its vector, or its tokens."""
    if not online:
        return {"text": this.vectors}
    if this.config.reports.use == "mean":
        raise UserError(
            "teacher.mode=online reads one wording a step and cannot average vectors: set "
            "reports.use=fresh, or teacher.mode=cached"
        )
    ids, mask = this.teacher.tokenize(list(this.row))
    return {"text_ids": ids, "text_mask": mask}


def _ceiling(this: Run, params: Any) -> Fit:
    """The same encoder fine-tuned with the labels of the training split."""
    config = this.config
    block = config.copy_and_resolve_references()
    with block.unlocked():
        block.update(config.ceiling.changes)
    train = this.data.split("train").select(lambda row: bool(row.label))
    valid = this.data.split("valid") if "valid" in this.data.splits() else None
    classes = sorted({row.label for row in train.rows})
    folder = this.workdir / "ceiling"
    folder.mkdir(exist_ok=True)
    method = Supervised(
        build.student_of(block, this.made, params), len(classes), this.made.sharding
    )
    loop, optimizer = build.loop_of(block, train)

    def column(dataset: AudioDataset | None) -> Any:
        return None if dataset is None else _LabelColumn.of(dataset, classes)

    columns = (column(train), column(valid))
    data = build.data_of(block, this.mesh, train, valid, ("waveform", "label"), *columns)
    return fit(method, data, optimizer, loop, folder, this.mesh, "ceiling")


@dataclass(frozen=True)
class _LabelColumn:
    """Adds a recording's class number to a batch."""

    numbers: tuple[int, ...]

    @classmethod
    def of(cls, dataset: AudioDataset, classes: list[str]) -> _LabelColumn:
        return cls(tuple(classes.index(row.label) for row in dataset.rows))

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        del rng
        return {"label": np.int32(self.numbers[index])}


def _embed(this: Run) -> dict[str, np.ndarray]:
    """Embeddings (N, D) of every recording, by stage."""
    stages = {}
    for name, encoder in this.stages.items():
        progress = Progress(len(this.data), f"embedding ({name})", "recording")
        recordings = ((this.data.waveform(i), this.data.sample_rate) for i in range(len(this.data)))
        rows = []
        for row in encoder.stream(recordings):
            rows.append(row)
            progress.advance()
        progress.close()
        stages[name] = np.stack(rows)
    return stages


def _evaluate(this: Run, heads: Any) -> None:
    """Probes and zero-shot of every stage; evaluation.json and report.html."""
    settings, name = this.config.evaluate, page.data_name(this.config)
    tasks = [compare.make_task(this.data.rows, column, name) for column in settings.tasks]
    labelled = next((t for t in tasks if t.name == "label" and settings.zero_shot), None)
    class_text = None if labelled is None else _class_text(this, labelled)  # by all processes
    if jax.process_index():
        return
    embeddings = _embed(this)
    probe = compare.ProbeSettings(
        settings.per_class, settings.draws, settings.seeds, settings.resamples
    )
    outcome = compare.Comparison()
    for task in tasks:
        compare.compare_probes(task, embeddings, probe, outcome)
    if labelled is not None:
        _zero_shot(this, labelled, class_text, embeddings, heads, probe, outcome)
    page.write(this, tasks, embeddings, outcome)


def _class_text(this: Run, task: compare.Task) -> np.ndarray:
    """(C, K, H): vectors of the sentences that stand for each class, as many for each."""
    classes = compare.class_names(task)
    vectors = [this.teacher.embed(page.class_sentences(this.data, task, name)) for name in classes]
    least = min(len(v) for v in vectors)
    stacked = np.stack([v[:least] for v in vectors])
    return stacked if this.whitening is None else this.whitening(stacked)


def _zero_shot(this: Run, task, class_text, embeddings, heads, probe, outcome) -> None:
    config, classes = this.config, compare.class_names(task)
    rows = build.rows_of(this.reports, this.row)
    text = np.stack([this.vectors[r].mean(0) for r in rows])
    head = ProjectionHead(config.loss.hidden, config.loss.out, 0.0)

    def project(side: str, x: np.ndarray) -> np.ndarray:
        if side not in heads:
            return x
        flat = head.apply({"params": heads[side]}, x.reshape(-1, x.shape[-1]))
        return np.asarray(flat).reshape(*x.shape[:-1], -1)

    spaces = {"before": compare.Space(embeddings["before"], text, class_text)}
    if -1 in tuple(config.loss.layers):
        spaces["after"] = compare.Space(
            project("audio_last", embeddings["after"]),
            project("text", text),
            project("text", class_text),
        )
    texts = [this.reports.texts[i][0] for i in range(len(this.data))]
    compare.compare_zero_shot(task, classes, spaces, texts, config.evaluate.map, probe, outcome)
