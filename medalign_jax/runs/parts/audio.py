"""An audio encoder, what is trained around it, and its batches."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from medalign_jax.architecture import Architecture, architecture
from medalign_jax.audio.augment import Augment
from medalign_jax.core.errors import UserError
from medalign_jax.core.mesh import local_rows, make_mesh, shardings
from medalign_jax.core.rounding import round_up
from medalign_jax.data.pipeline import BatchSpec, make_iterator
from medalign_jax.data.recordings.dataset import AudioDataset
from medalign_jax.encoder import Encoder, open_encoder
from medalign_jax.methods.student import AudioStudent
from medalign_jax.runs.export import host_params
from medalign_jax.runs.parts.blocks import typed
from medalign_jax.train.loop import Data
from medalign_jax.weights.load import check_weights, identity, load


def architecture_of(config: ConfigDict) -> Architecture:
    """The encoder's architecture; published weights or an export bring their sizes along."""
    block = config.encoder
    source, settings = open_encoder(block.source) if block.source else (None, {})
    if settings.get("name", block.name) != block.name:
        raise UserError(
            f"config.encoder.name is {block.name!r}, but {block.source} holds a "
            f"{settings['name']!r} encoder"
        )
    made = architecture(
        block.name,
        settings.get("overrides", {}) | block.overrides.to_dict(),
        settings.get("front_end_overrides", {}) | block.front_end.to_dict(),
        source.config if source else None,
        source.preprocessor if source else None,
    )
    try:
        made.check_window(samples_of(config, made.front_end.sample_rate))
    except UserError as error:
        raise UserError(f"config.data.seconds is {config.data.seconds:g}: {error}") from error
    return made


def samples_of(config: ConfigDict, sample_rate: int) -> int:
    """Samples of a clip at a rate in Hz."""
    return round(config.data.seconds * sample_rate)


def audio_student_of(config: ConfigDict, made: Architecture, params: Any | None) -> AudioStudent:
    """The trainable audio side; `params` from an earlier stage or published weights."""
    block, rate = config.augment.copy_and_resolve_references(), made.front_end.sample_rate
    with block.unlocked():
        block.sample_rate = rate
    augment = typed(Augment, block, "augment")
    ssm = made.entry.ssm if config.loss.ssm == "auto" else config.loss.ssm
    if not config.loss.get("ssm_weight", 1.0):
        ssm = "none"  # so that an encoder need not have what it is made of
    return AudioStudent(made.module, made.front_end, samples_of(config, rate), augment, params, ssm)


def encoder_of(config: ConfigDict, made: Architecture, params: Any, mesh: Mesh) -> Encoder:
    """The same encoder for embedding recordings of any length.

    Where there are several processes each has it on all of its own devices, for its share of the
    recordings. All of them have to call this.
    """
    evaluate = config.evaluate
    if mesh is not None:
        mesh = _own_part(mesh)
    samples = samples_of(config, made.front_end.sample_rate)
    return Encoder(
        made, evaluation_params(made, params, mesh), samples, evaluate.pad, evaluate.trim, mesh,
        pooling=evaluate.pooling, layer=evaluate.layer,
    )  # fmt: skip


def evaluation_params(made: Architecture, params: Any, mesh: Mesh | None) -> Any:
    """Parameters where embedding finds them: laid out on this process's part of the mesh, or
    without one on its first device. All processes have to call this."""
    if mesh is None:
        return jax.device_put(host_params(params))
    if jax.process_count() > 1:
        params, mesh = host_params(params), _own_part(mesh)
    return jax.device_put(params, shardings(params, made.sharding, mesh))


def _own_part(mesh: Mesh) -> Mesh:
    """The devices of this process; the mesh itself where it is alone."""
    return mesh if jax.process_count() == 1 else make_mesh(devices=jax.local_devices())


def check_source(config: ConfigDict, made: Architecture) -> None:
    """Raises WeightError where config.encoder.source has other tensors than the encoder; none is
    read."""
    if config.encoder.source:
        source, _ = open_encoder(config.encoder.source)
        check_weights(source, made.table, made.abstract_params(), dtype=jnp.float32)


def published_params(config: ConfigDict, made: Architecture, mesh: Mesh) -> tuple[Any, str]:
    """Parameters from config.encoder.source, and the hash of the weights they came from."""
    source, _ = open_encoder(config.encoder.source)
    abstract = made.abstract_params(mesh)
    params = load(source, made.table, abstract, dtype=jnp.float32)
    return params, identity(source, made.table, abstract)


def spec_of(config: ConfigDict, sample_rate: int, batch_size: int, shuffle: bool) -> BatchSpec:
    """Shape and order of batches."""
    data = config.data
    return BatchSpec(
        batch_size=batch_size,
        samples=samples_of(config, sample_rate),
        pad=data.pad,
        random_crop=data.random_crop and shuffle,
        shuffle=shuffle,
        one_per_subject=data.one_per_subject and shuffle,
        seed=config.seed,
        epochs=None if shuffle else 1,
        workers=data.workers if shuffle else 0,
    )


def data_of(
    config: ConfigDict,
    mesh: Mesh,
    train: AudioDataset,
    valid: AudioDataset | None,
    names: tuple[str, ...],
    train_extras: Any = None,
    valid_extras: Any = None,
) -> Data:
    """Training batches, and held-out ones if there is a validation split."""
    spec = spec_of(config, train.sample_rate, config.train.batch_size, True)
    iterator = make_iterator(train, spec, train_extras, local_rows(mesh, spec.batch_size))
    held_out = None
    if valid is not None:
        size = _held_out_batch(config, len(valid))
        unshuffled = spec_of(config, valid.sample_rate, size, False)
        rows = local_rows(mesh, unshuffled.batch_size)

        def held_out():
            return make_iterator(valid, unshuffled, valid_extras, rows)

    return Data(iterator, names, held_out)


def _held_out_batch(config: ConfigDict, records: int) -> int:
    """Evaluation in batches no larger than a training chunk, spread over all devices."""
    ways = jax.device_count()
    chunk = max(config.train.batch_size // config.train.accumulate, ways)
    return round_up(min(chunk, records), ways)
