"""AcuLa end to end: reports to vectors, pre-train if asked, align, compare.

manifest -> data set -> suite (tasks, folds) -> texts -> teacher -> cached vectors
                                                                        |
a fold:  weights | pre-training ---> alignment (method `Acula`), one per arm ---> export
              |          |                       |
              |          +--- supervised reference (method `Supervised`)
              |                       |          |
              +-----> "before"   "supervised"  "after", controls  -> embeddings
                                                                        |
all folds pooled, beside baselines:           evaluation.json, evaluation.csv, report.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from medalign_jax.architecture import Architecture
from medalign_jax.evaluate.baseline_stages import check_baselines
from medalign_jax.evaluate.context import check_metadata
from medalign_jax.evaluate.copies import search
from medalign_jax.evaluate.embeddings import EmbeddingStore
from medalign_jax.evaluate.leaks import Findings, describe_subjects
from medalign_jax.evaluate.stages import Settings
from medalign_jax.evaluate.suite import Options, Suite
from medalign_jax.evaluate.trained import describe_trained
from medalign_jax.runs import checks, choosing, measuring, texts
from medalign_jax.runs.alignment import (
    Aligned,
    Part,
    Run,
    align,
    export_aligned,
    random_params,
    starting_params,
    supervise,
)
from medalign_jax.runs.arms import MAIN, Arm, arms_of
from medalign_jax.runs.data import data_name, open_data
from medalign_jax.runs.identity import digest
from medalign_jax.runs.parts.audio import architecture_of, encoder_of, evaluation_params
from medalign_jax.runs.parts.blocks import mesh_of
from medalign_jax.runs.recordings import bind_dataset
from medalign_jax.runs.workdir import alone, begin_anew, bind, open_workdir, record_config


@alone
def run(
    config: ConfigDict,
    workdir: Path,
    defaults: ConfigDict | None = None,
    restart: bool = False,
) -> None:
    """``--config=configs/acula.py``: everything from the manifest to the page."""
    made, options = architecture_of(config), options_of(config)
    arms = arms_of(config, made.module.config.depth)
    measuring.check_sentences(config, arms)
    checks.check_alignment(config, made, arms)
    workdir = open_workdir(workdir, config, defaults, restart)
    this = _prepare(config, workdir, made, options, arms)
    if restart:
        begin_anew(workdir, config)
    _bind(this, arms)
    record_config(workdir, config, defaults)
    for part in this.parts:
        for arm in arms:  # what the reports do not allow is said before anything is trained
            part.whitening(arm)
    embed = _Embedding(this)
    outcomes = [_train(part, arms, embed) for part in this.parts]
    if config.evaluate.enabled:
        _measure(this, arms, embed, outcomes)


def _train(part: Part, arms: Sequence[Arm], embed: _Embedding) -> dict[str, Aligned]:
    """Every alignment of a fold by its arm's name; arms that would train the same are one."""
    start = starting_params(part)
    embed.add("before", start)
    done: dict[str, Aligned] = {}
    for arm in arms:
        if arm.identity not in done:
            done[arm.identity] = align(part, arm, start)
        embed.add(arm.name, done[arm.identity].encoder)
    if part.run.config.supervised.enabled:
        embed.add("supervised", supervise(part, start))
    return {arm.name: done[arm.identity] for arm in arms}


def _measure(
    this: Run, arms: Sequence[Arm], embed: _Embedding, outcomes: Sequence[Mapping[str, Aligned]]
) -> None:
    """What came of it, with the alignment that each fold has chosen as the run's own."""
    if "random" in tuple(this.config.evaluate.baselines):
        embed.random(random_params(this))
    chosen = choosing.settle(this.suite, arms, embed.found)
    main = [done[name] for done, name in zip(outcomes, chosen.names, strict=True)]
    for part, aligned, name in zip(this.parts, main, chosen.names, strict=True):
        if name != MAIN:  # what is measured as "after" is what is exported
            export_aligned(this, aligned, part.folder)
    measuring.measure_run(this, arms, embed.found, main, {MAIN: chosen.describe()})


def options_of(config: ConfigDict) -> Options:
    """What config.evaluate asks for."""
    block = config.evaluate
    check_baselines(tuple(block.baselines))
    check_metadata(tuple(block.metadata), tuple(block.tasks))
    settings = Settings(tuple(block.probes), block.per_class, block.draws, block.seeds)
    return Options(tuple(block.tasks), block.folds, 1, config.seed, block.aggregate, settings)


def _prepare(
    config: ConfigDict,
    workdir: Path,
    made: Architecture,
    options: Options,
    arms: Sequence[Arm],
) -> Run:
    """Data, tasks, reports; what is wrong with them is said before anything is trained."""
    mesh, name = mesh_of(config), data_name(config)

    def suite_of(rows) -> Suite:
        suite = Suite.of(rows, options, name, validation=True)
        measuring.check_settings(config, suite)
        for fold in suite.training_folds():
            checks.check_fills(config, arms, [rows[i] for i in fold.train], fold.name)
        return suite

    data = open_data(config, workdir, made, check=suite_of)
    looked = config.evaluate.enabled and config.evaluate.copies
    searched = search(data, config.evaluate.aggregate, looked)
    data, suite = searched.data, suite_of(searched.data.rows)
    findings = Findings()
    if config.evaluate.enabled:
        found = tuple(searched.findings(suite))
        source = config.encoder.source
        trained = describe_trained(f"the encoder {source}", source, data, suite) if source else ()
        findings = Findings(found, describe_subjects(data.rows, suite), trained)
        print(*suite.descriptions, *findings.sentences, sep="\n", flush=True)
    for arm in arms:
        texts.check_reports(arm, texts.reports_of(data, arm.config))
    reports = texts.reports_of(data, config)
    return Run(config, workdir, mesh, made, data, reports, suite, findings)


def _bind(run: Run, arms: Sequence[Arm]) -> None:
    """Refuses to go on with other data than what is there was trained on."""
    grouped = any(arm.config.data.one_per_subject for arm in arms)
    folds = run.suite.training_folds()
    bind_dataset(run.workdir, run.data, folds, run.reports.texts, grouped)
    for arm in arms:
        if arm.name != MAIN:
            bind(run.workdir, arm.folder, **{f"arm {arm.name}": digest(arm.changes)})
        if arm.config.reports.pairing == "classes":
            answers = texts.answers_of(run.data.rows, run.suite.options.tasks)
            bind(run.workdir, arm.folder, **{f"answers of arm {arm.name}": digest(answers)})
    if run.config.supervised.enabled:
        answers = run.suite.answers(run.suite.tasks[0])
        learnt = np.unique(np.concatenate([[*fold.train, *fold.valid] for fold in folds]))
        bind(run.workdir, "supervised", supervised_labels=digest(answers[learnt].tolist()))


class _Embedding:
    """Embeds every stage's encoder of every fold, and keeps the vectors.

    Attributes:
      found: stage -> (N, D) of each fold.
    """

    def __init__(self, run: Run):
        self._run = run
        self._store = EmbeddingStore(run.workdir / "embeddings")
        self._encoder = None
        self.found: dict[str, list[np.ndarray]] = {}

    def add(self, stage: str, params: Any) -> None:
        """The recordings as the next fold's model of a stage embeds them."""
        run = self._run
        if not run.config.evaluate.enabled:
            return
        if self._encoder is None:
            self._encoder = encoder_of(run.config, run.made, params, run.mesh)
        encoder = self._encoder.with_params(evaluation_params(run.made, params, run.mesh))
        embedded: Mapping[str, np.ndarray] = self._store.embed({stage: encoder}, run.data)
        self.found.setdefault(stage, []).append(embedded[stage])

    def random(self, params: Any) -> None:
        """The encoder before any training, the same in all folds."""
        self.add("random weights", params)
