"""Masked-reconstruction pre-training, as a run of its own or as the first stage of another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from medalign_jax.architecture import Architecture
from medalign_jax.data.recordings.dataset import AudioDataset
from medalign_jax.data.recordings.manifest import Row
from medalign_jax.methods.pretrain import Pretrain
from medalign_jax.runs import checks
from medalign_jax.runs.data import open_data, training_part
from medalign_jax.runs.export import export_encoder
from medalign_jax.runs.parts.audio import (
    architecture_of,
    audio_student_of,
    check_source,
    data_of,
    encoder_of,
    published_params,
)
from medalign_jax.runs.parts.blocks import loop_config, mesh_of, optimizer_config
from medalign_jax.runs.recordings import bind_dataset
from medalign_jax.runs.workdir import alone, begin_anew, bind, open_workdir, record_config
from medalign_jax.train.loop import Fit, fit


@alone
def run(
    config: ConfigDict,
    workdir: Path,
    defaults: ConfigDict | None = None,
    restart: bool = False,
) -> None:
    """``--config=configs/pretrain.py``: data, training, export."""
    mesh, made = mesh_of(config), architecture_of(config)
    check_source(config, made)
    checks.check_training(config, made, self_supervised=True)
    workdir = open_workdir(workdir, config, defaults, restart)

    def check(rows: Sequence[Row]) -> None:
        checks.check_fills(config, (), [row for row in rows if row.split == "train"])

    dataset = open_data(config, workdir, made, check)
    if restart:
        begin_anew(workdir, config)
    params = None
    if config.encoder.source:
        params, identity = published_params(config, made, mesh)
        bind(workdir, shown=True, encoder_weights=identity)
    bind_dataset(workdir, dataset, subjects=config.data.one_per_subject)
    record_config(workdir, config, defaults)
    fitted = pretrain(config, workdir, dataset, made, mesh, params)
    encoder = encoder_of(config, made, fitted.best_params["encoder"], mesh)
    export_encoder(workdir / "export", encoder)
    print(f"encoder of step {fitted.best_step} is in {workdir / 'export'}", flush=True)


def pretrain(
    config: ConfigDict,
    workdir: Path,
    dataset: AudioDataset,
    made: Architecture,
    mesh: Mesh,
    params: Any | None = None,
) -> Fit:
    """Trains on the training split (and simulated recordings, if the config mixes some in)."""
    train = training_part(config, dataset, workdir)
    valid = dataset.split("valid") if "valid" in dataset.splits() else None
    method = Pretrain(audio_student_of(config, made, params), made.sharding)
    loop = loop_config(config, len(train), "recordings")
    data = data_of(config, mesh, train, valid, ("waveform",))
    return fit(method, data, optimizer_config(config), loop, workdir, mesh, "pre-train")
