"""Turns the blocks of a config into the parts of a run. The only place that reads both."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from medalign_jax import processes
from medalign_jax.architecture import Architecture, architecture
from medalign_jax.audio.augment import Augment
from medalign_jax.data.dataset import AudioDataset, check_joined, concatenate, open_dataset
from medalign_jax.data.manifest import Row, read_manifest, write_problems
from medalign_jax.data.pipeline import BatchSpec, make_iterator
from medalign_jax.data.simulate import write_dataset
from medalign_jax.data.tables import did_you_mean, read_table
from medalign_jax.datasets.leaks import check_no_copies
from medalign_jax.encoder import Encoder, open_encoder
from medalign_jax.errors import UserError
from medalign_jax.evaluate.context import context_columns
from medalign_jax.evaluate.tasks import columns_of
from medalign_jax.experiments.export import host_params
from medalign_jax.methods.acula import AculaConfig
from medalign_jax.methods.student import AudioStudent
from medalign_jax.teachers import EmbeddingCache, Teacher, load_teacher
from medalign_jax.teachers.teacher import teacher_width as width_of_teacher
from medalign_jax.train.loop import Data, LoopConfig
from medalign_jax.train.mesh import local_rows, make_mesh, shardings
from medalign_jax.train.optimizer import OptimizerConfig
from medalign_jax.train.progress import Progress
from medalign_jax.weights.load import check_weights, identity, load

DTYPES = ("bfloat16", "float32")
_MIX_SEED = 1000  # added: simulated recordings beside simulated ones must be others


def typed(kind: type, block: ConfigDict, name: str) -> Any:
    """A frozen dataclass from a config block of the same keys.

    Raises:
      UserError: a key that the dataclass does not have.
    """
    values = {k: _plain(v) for k, v in block.items()}
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - known):
        raise UserError(f"config.{name} has unknown keys {unknown}; it takes {sorted(known)}")
    return kind(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, ConfigDict):
        return value.to_dict()
    return tuple(_plain(v) for v in value) if isinstance(value, list | tuple) else value


def mesh_of(config: ConfigDict) -> Mesh:
    """The mesh that config.mesh asks for."""
    return make_mesh(**config.mesh.to_dict())


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
        made.check_window(samples_of(config, made))
    except UserError as error:
        raise UserError(f"config.data.seconds is {config.data.seconds:g}: {error}") from error
    return made


def samples_of(config: ConfigDict, made: Architecture) -> int:
    """Samples of a clip at the encoder's rate."""
    return round(config.data.seconds * made.front_end.sample_rate)


def student_of(config: ConfigDict, made: Architecture, params: Any | None) -> AudioStudent:
    """The trainable audio side; `params` from an earlier stage or published weights."""
    block = config.augment.copy_and_resolve_references()
    with block.unlocked():
        block.sample_rate = made.front_end.sample_rate
    augment = typed(Augment, block, "augment")
    ssm = made.entry.ssm if config.loss.ssm == "auto" else config.loss.ssm
    return AudioStudent(made.module, made.front_end, samples_of(config, made), augment, params, ssm)


def acula_config(config: ConfigDict) -> AculaConfig:
    """The alignment's own settings; `loss.ssm` belongs to the student."""
    block = config.loss.copy_and_resolve_references()
    with block.unlocked():
        del block.ssm
    return typed(AculaConfig, block, "loss")


def encoder_of(config: ConfigDict, made: Architecture, params: Any, mesh: Mesh) -> Encoder:
    """The same encoder for embedding recordings of any length.

    Where there are several processes each has it on all of its own devices, for its share of the
    recordings. All of them have to call this.
    """
    evaluate = config.evaluate
    if mesh is not None:
        mesh = _own_part(mesh)
    return Encoder(
        made, evaluation_params(made, params, mesh), samples_of(config, made), evaluate.pad,
        evaluate.trim, mesh, pooling=evaluate.pooling, layer=evaluate.layer,
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


def open_data(
    config: ConfigDict,
    workdir: Path,
    made: Architecture,
    check: Callable[[Sequence[Row]], object] | None = None,
) -> AudioDataset:
    """All recordings of the manifest (or, without one, simulated ones); problems are listed.

    Rows that cannot be used are written to ``unusable_rows.jsonl`` in the workdir and counted on
    the screen.

    Args:
      config: Of the run.
      workdir: Its folder.
      made: The encoder, for its sample rate.
      check: Called with the rows of a manifest before any recording is opened; raises where a
        task cannot be answered.
    """
    data = config.data
    path = Path(data.manifest or simulated_manifest(config, workdir, data.simulated, "simulated"))
    targets = _targets(config, path)
    reports_required = config.method == "acula"
    if check is not None and path.is_file():
        rows, _ = read_manifest(path, targets, reports_required=reports_required)
        if rows:  # else `open_dataset` says what is wrong with them
            check(rows)
    progress = Progress(None, f"checking {path}", "file")
    dataset = open_dataset(
        path,
        targets=targets,
        sample_rate=made.front_end.sample_rate,
        max_seconds=data.max_seconds,
        max_bad_fraction=data.max_bad_fraction,
        reports_required=reports_required,
        progress=lambda done, total: progress.advance(),
    )
    progress.close()
    if jax.process_index() == 0:  # one writer
        write_problems(dataset.problems, workdir / "unusable_rows.jsonl")
    bad = sum(problem.fatal for problem in dataset.problems)
    splits = ", ".join(f"{count} {name}" for name, count in sorted(dataset.splits().items()))
    print(f"{path}: {len(dataset)} recordings ({splits})", flush=True)
    if bad:
        print(f"{bad} unusable rows are listed in {workdir / 'unusable_rows.jsonl'}", flush=True)
    return dataset


def _targets(config: ConfigDict, path: Path) -> tuple[str, ...]:
    """Columns to keep: those named, the tasks', and, of a file, those that tell circumstances."""
    evaluate = config.evaluate
    tasks = tuple(evaluate.get("tasks", ()))
    named = [*config.data.targets, *columns_of(tasks), *evaluate.get("metadata", ())]
    if path.is_file() and "metadata" in evaluate.get("baselines", ()):
        named += context_columns(read_table(path, "audio_path").columns, tasks)
    return tuple(dict.fromkeys(named))


def data_name(config: ConfigDict) -> str:
    """A name for the data: the folder of the manifest."""
    if not config.data.manifest:
        return "simulated auscultation"
    path = Path(config.data.manifest).resolve()
    return path.name if path.is_dir() else path.parent.name


def simulated_manifest(config: ConfigDict, workdir: Path, count: int, name: str) -> Path:
    """Simulated recordings under ``workdir/name``, written once (anew for another request)."""
    folder = workdir / name
    if not (folder / "metadata.csv").exists():
        print(f"simulating {count} recordings of auscultation", flush=True)

    def write() -> Path:
        return write_dataset(
            folder,
            count,
            config.seed,
            seconds=config.data.simulated_seconds,
            kinds=tuple(config.data.simulated_kinds),
            anew=True,
        )

    processes.by_first(write)
    return write()  # finds what is there


def training_part(config: ConfigDict, dataset: AudioDataset, workdir: Path) -> AudioDataset:
    """The training split, with config.data.mix simulated recordings joined to it."""
    train = dataset.split("train")
    if not config.data.mix:
        return train
    block = config.copy_and_resolve_references()
    with block.unlocked():
        block.seed += _MIX_SEED
    manifest = simulated_manifest(block, workdir, config.data.mix, "simulated_mix")
    mixed = open_dataset(
        manifest, max_seconds=config.data.max_seconds, sample_rate=dataset.sample_rate
    )
    added = mixed.split("train")
    check_joined(dataset, added)
    check_no_copies(dataset, added)
    return concatenate([train, added])


def spec_of(config: ConfigDict, sample_rate: int, batch_size: int, shuffle: bool) -> BatchSpec:
    """Shape and order of batches."""
    data = config.data
    return BatchSpec(
        batch_size=batch_size,
        samples=round(data.seconds * sample_rate),
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
    return -(-min(chunk, records) // ways) * ways


def check_batch(config: ConfigDict) -> None:
    """Raises UserError unless parts and devices share a batch."""
    size, parts = config.train.batch_size, config.train.accumulate
    if size % (parts * jax.device_count()):
        raise UserError(
            f"train.batch_size {size} must be a multiple of train.accumulate {parts} times "
            f"the {jax.device_count()} devices"
        )


def check_loss(config: ConfigDict) -> None:
    """Raises UserError where the alignment's loss is wrong by what the config says alone."""
    loss = acula_config(config)
    if loss.align != "cka" and loss.text_head != "mlp" and config.teacher.whiten:
        raise UserError(
            f"loss.align={loss.align} compares vectors of equal width, and whitened reports have "
            "one of their own: set loss.audio_head=mlp and loss.text_head=mlp, or "
            "teacher.whiten=0"
        )


def loop_of(config: ConfigDict, train: AudioDataset) -> tuple[LoopConfig, OptimizerConfig]:
    """Length and rhythm of a run; `steps` goes before `epochs` where it is given."""
    block = config.train
    steps = block.steps or (len(train) // block.batch_size) * block.epochs
    if steps < 1:
        raise UserError(
            f"{len(train)} training recordings fill no batch of {block.batch_size}: lower "
            "train.batch_size"
        )
    check_batch(config)
    loop = LoopConfig(
        total_steps=steps,
        log_every=block.log_every,
        eval_every=block.eval_every,
        accumulate=block.accumulate,
        seed=config.seed,
        patience=block.patience,
    )
    return loop, typed(OptimizerConfig, config.optimizer, "optimizer")


def teacher_width(config: ConfigDict) -> int:
    """H of the language model's vectors, from its files' headers alone.

    Raises:
      UserError: it is not there, or config.teacher asks it for what it does not have.
    """
    block = config.teacher
    return width_of_teacher(
        block.source,
        layer=block.layer,
        pooling=block.pooling,
        max_tokens=block.max_tokens,
        dtype=dtype_of(config, "teacher"),
    )


def teacher_of(config: ConfigDict, mesh: Mesh) -> Teacher:
    """The frozen language model."""
    block = config.teacher
    return load_teacher(
        block.source,
        mesh,
        layer=block.layer,
        pooling=block.pooling,
        max_tokens=block.max_tokens,
        lowercase=block.lowercase,
        dtype=dtype_of(config, "teacher"),
    )


def dtype_of(config: ConfigDict, block: str) -> jnp.dtype:
    """What the key `dtype` of a block asks for.

    Raises:
      UserError: it is neither bfloat16 nor float32.
    """
    name = config[block].dtype
    if name not in DTYPES:
        raise UserError(
            f"{block}.dtype is {name!r}{did_you_mean(name, DTYPES)}; it is {' or '.join(DTYPES)}"
        )
    return jnp.dtype(name)


@dataclasses.dataclass(frozen=True)
class Reports:
    """Every recording's wordings: K texts each, the last repeated where fewer exist.

    Attributes:
      texts: one tuple of wordings a recording.
    """

    texts: tuple[tuple[str, ...], ...]

    @classmethod
    def of(
        cls, dataset: AudioDataset, count: int, seed: int, leave_out: Sequence[str] = ()
    ) -> Reports:
        """Up to `count` wordings of each recording of a data set."""
        of_one = functools.partial(dataset.reports, count=count, seed=seed, leave_out=leave_out)
        return cls(tuple(of_one(i) for i in range(len(dataset))))

    @classmethod
    def asked(cls, dataset: AudioDataset, config: ConfigDict) -> Reports:
        """What `config.reports` asks for."""
        block = config.reports
        return cls.of(dataset, block.wordings, config.seed, tuple(block.leave_out))

    def unique(self) -> list[str]:
        """All texts, each once, in a fixed order."""
        return sorted({text for texts in self.texts for text in texts})


@dataclasses.dataclass(frozen=True)
class TextColumn:
    """Adds a recording's report to a batch: a fresh wording each time, or the mean of all.

    Attributes:
      arrays: name -> (U, ...), one row a unique text.
      rows: for each recording, the rows of its wordings.
      use: "fresh" draws one, "mean" averages ("text" only), "first" always takes the first.
      marks: (N, K) of the reports, see `report_marks`; None leaves them out of the batch.
    """

    arrays: dict[str, np.ndarray]
    rows: tuple[np.ndarray, ...]
    use: str
    marks: np.ndarray | None = None

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        rows, told = self.rows[index], {}
        if self.marks is not None:
            told["report"] = self.marks[index]
        if self.use == "mean":
            return told | {"text": self.arrays["text"][rows].mean(0)}
        row = rows[rng.integers(len(rows))] if self.use == "fresh" else rows[0]
        return told | {name: array[row] for name, array in self.arrays.items()}


def report_marks(*parts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """(N, 8) float32 for each part: equal for recordings that have the same wordings.

    Args:
      *parts: for each recording the rows of its wordings.
    """
    number = {tuple(rows): 0 for part in parts for rows in part}
    number = {wordings: i for i, wordings in enumerate(number)}
    marks = np.random.default_rng(0).standard_normal((len(number), 8)).astype(np.float32)
    return [marks[[number[tuple(rows)] for rows in part]] for part in parts]


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


def rows_of(reports: Reports, row: dict[str, int]) -> tuple[np.ndarray, ...]:
    """For each recording the rows of its wordings."""
    return tuple(np.array([row[text] for text in texts]) for texts in reports.texts)
