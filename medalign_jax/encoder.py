"""A loaded audio encoder: waveforms of any length and rate in, one vector each out."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import inspect
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from medalign_jax.architecture import Architecture, architecture
from medalign_jax.audio import clip
from medalign_jax.audio.io import resample
from medalign_jax.core.errors import UserError
from medalign_jax.core.mesh import batch_sharding, batch_ways
from medalign_jax.core.rounding import power_of_two, round_up
from medalign_jax.models import ENCODERS
from medalign_jax.models.layers.pooling import check_pooling, embed_pooled
from medalign_jax.weights import WeightSource, resolve
from medalign_jax.weights.identity import parameter_count, params_identity
from medalign_jax.weights.load import check_weights, load

SETTINGS_FILE = "encoder.json"
NOT_FINITE = (
    "its embedding holds NaN or infinite numbers: the weights are damaged, or the sound is beyond "
    "what their precision carries; look at the weights, and scale the sound to 1"
)
_MOST_CHANNELS = 16  # of a recording; an array with more is not taken for channels
_ROUND = 64  # windows collected before a batch is formed, so that batches are full


class Encoder:
    """An encoder with parameters.

    Attributes:
      architecture: what it is made of.
      params: its parameters.
      samples: length of a window at `sample_rate`; longer recordings are cut into windows that
        overlap by half, and their embeddings averaged (as OPERA-GT's are extracted).
      pad: how shorter recordings are filled, see `audio.clip.fit`. With "zero" (the default of
        most), what is filled is not looked at by an architecture that takes lengths (Whisper's
        family), whose short windows share shorter batches, and it is the filter bank that is filled
        up where the published front end does so (AST, AudioMAE). With "silence" the waveform gets
        zeros up to a whole window and all of it is looked at: for Whisper that is the published
        use, the mean over `WhisperFeatureExtractor`'s 30 s, and not the default.
      trim: cut silence from both ends first, as OPERA does.
      pooling, layer: how a window's tokens become one vector, see
        `models.layers.pooling.embed_pooled`; by default the published feature.
      sharding: of a batch over a mesh; None without one.
      width: D.
    """

    def __init__(
        self,
        architecture: Architecture,
        params: Any,
        samples: int,
        pad: str = "repeat",
        trim: bool = False,
        mesh: Mesh | None = None,
        batch_size: int = 16,
        pooling: str = "mean",
        layer: int | None = None,
    ):
        """Raises `UserError` for a pooling or a layer that the architecture does not have, or a
        window that is longer than it takes."""
        architecture.check_window(samples)
        check_pooling(architecture.module.config, pooling, layer)
        self.architecture, self.params = architecture, params
        self.samples, self.pad, self.trim = samples, pad, trim
        self.pooling, self.layer = pooling, layer
        self.sample_rate = architecture.front_end.sample_rate
        self.sharding = None if mesh is None else batch_sharding(mesh)
        self._batch_size = round_up(batch_size, batch_ways(mesh))
        takes = inspect.signature(type(architecture.module).embed).parameters
        self._lengths = pad == "zero" and "lengths" in takes
        takes = inspect.signature(type(architecture.front_end).__call__).parameters
        self._pads_features = pad == "zero" and "lengths" in takes
        self._features = jax.jit(self._embed_features)
        self._waveforms = jax.jit(self._embed_waveforms)
        self.width = self._width()

    def _width(self) -> int:
        config = self.architecture.module.config
        if self.pooling == "mean" and self.layer is None:
            return config.width
        frames = self.architecture.front_end.frames(self.samples)
        window = jax.ShapeDtypeStruct((1, frames, config.mels), jnp.float32)
        return jax.eval_shape(self._embed_features, self.params, window).shape[1]

    def _embed_features(self, params: Any, features: jax.Array, *lengths: jax.Array) -> jax.Array:
        kept = {"pooling": self.pooling, "layer": self.layer}
        return embed_pooled(self.architecture.module, params, features, *lengths, **kept)

    def _embed_waveforms(self, params: Any, waveforms: jax.Array, samples: jax.Array) -> jax.Array:
        """(B, S) waveforms of which the first `samples` (B,) are real -> (B, D)."""
        front_end = self.architecture.front_end
        lengths = (front_end.valid_frames(samples),) if self._lengths else ()
        own = (samples,) if self._pads_features else ()
        return self._embed_features(params, front_end(waveforms, *own), *lengths)

    def embed_features(self, features: jax.Array) -> jax.Array:
        """(B, T, M) features of this encoder's front end -> (B, D) float32."""
        return self._features(self.params, jnp.asarray(features, jnp.float32))

    def embed(self, waveforms: Sequence[np.ndarray], sample_rate: int) -> np.ndarray:
        """Embeddings of recordings of any length.

        Args:
          waveforms: N arrays (samples,), mono, any float type, full scale at 1.
          sample_rate: theirs, Hz; other rates than the encoder's are resampled.

        Returns:
          (N, D) float32.

        Raises:
          UserError: a recording that is a path, empty, not 1-D, not of floats or holds NaN, a
            sample rate that is not above 0 or leaves no sample, or an embedding that is not
            finite; names its index and says what to do.
        """
        rows = [frames.mean(axis=0) for frames in self.embed_frames(waveforms, sample_rate)]
        return np.stack(rows) if rows else np.zeros((0, self.width), np.float32)

    def embed_frames(self, waveforms: Sequence[np.ndarray], sample_rate: int) -> list[np.ndarray]:
        """For each recording the embeddings (F, D) of its windows of `samples`, in time.

        Arguments and errors are those of `embed`, which gives their mean. Windows overlap by half
        (`audio.clip.split_windows`); a recording of one window or less has F = 1.
        """
        if isinstance(waveforms, str | Path):
            raise UserError(f"embed takes a list of waveforms; {self._how_to_read(waveforms)}")
        if isinstance(waveforms, np.ndarray):
            _check_one_per_row(waveforms)
        found = list(self._windowed((w, sample_rate) for w in waveforms))
        for index, frames in enumerate(found):
            if not np.isfinite(frames).all():
                raise UserError(f"recording {index}: {NOT_FINITE}")
        return found

    def _how_to_read(self, path: str | Path) -> str:
        return (
            f"read the file first, [medalign_jax.audio.read({os.fspath(path)!r}, "
            f"{self.sample_rate})] with sample_rate={self.sample_rate}, or embed files with "
            "python -m medalign_jax.embed"
        )

    def __repr__(self) -> str:
        name, count = self.architecture.name, parameter_count(self.params)
        read = self.pooling if self.layer is None else f"{self.pooling} of layer {self.layer}"
        return (
            f"Encoder {name!r} of {count:,} parameters: waveforms at any rate (read at "
            f"{self.sample_rate} Hz, in windows of {self.samples / self.sample_rate:g} s, shorter "
            f"ones filled up by {self.pad!r}) become vectors of {self.width} numbers (pooling "
            f"{read}). .embed([waveform], sample_rate) gives (N, {self.width})."
        )

    def stream(self, recordings: Iterable[tuple[np.ndarray, int]]) -> Iterator[np.ndarray]:
        """Embeds (waveform, sample rate) pairs as they come; yields (D,) float32 each, in order.

        Windows of several recordings share a batch, so memory does not grow with their number.
        """
        for frames in self._windowed(recordings):
            yield frames.mean(axis=0)

    def _windowed(self, recordings: Iterable[tuple[np.ndarray, int]]) -> Iterator[np.ndarray]:
        """(F, D) of each recording's windows, in order."""
        waiting: list[int] = []  # windows of each recording that has not been yielded
        windows: list[np.ndarray] = []
        for index, (waveform, rate) in enumerate(recordings):
            cut = self._windows(index, waveform, rate)
            waiting.append(len(cut))
            windows.extend(cut)
            if len(windows) >= max(_ROUND, self._batch_size):
                yield from self._drain(waiting, windows)
                waiting, windows = [], []
        if waiting:
            yield from self._drain(waiting, windows)

    def _drain(self, counts: list[int], windows: list[np.ndarray]) -> Iterator[np.ndarray]:
        # Windows of like length share a batch; sorting is stable where all are equal.
        order = sorted(range(len(windows)), key=lambda i: len(windows[i]))
        embedded = np.empty((len(windows), self.width), np.float32)
        for start in range(0, len(order), self._batch_size):
            chosen = order[start : start + self._batch_size]
            embedded[chosen] = self._batch([windows[i] for i in chosen])
        ends = np.cumsum(counts)
        for end, count in zip(ends, counts, strict=True):
            yield embedded[end - count : end]

    def _batch(self, windows: list[np.ndarray]) -> np.ndarray:
        """Embeddings of at most a batch of windows, filled up to one of a few lengths."""
        length = self._bucket(max(map(len, windows)))
        batch = np.zeros((self._batch_size, length), np.float32)
        samples = np.full(self._batch_size, length, np.int32)
        for row, window in enumerate(windows):
            batch[row, : len(window)] = window
            samples[row] = len(window)
        batch, samples = jax.device_put((batch, samples), self.sharding)
        return np.asarray(self._waveforms(self.params, batch, samples))[: len(windows)]

    def _bucket(self, samples: int) -> int:
        """Least of 1, 2, 4, ... seconds and a whole window that holds so many; few compilations."""
        if not self._lengths:
            return self.samples
        second = self.sample_rate
        # A little more, so that the frames at the end see the zeros that a longer batch has there.
        seconds = -(-(samples + second // 10) // second)
        return min(second * power_of_two(seconds), self.samples)

    def _windows(self, index: int, waveform: np.ndarray, rate: int) -> list[np.ndarray]:
        if isinstance(waveform, str | Path):
            raise UserError(f"recording {index} is a path; {self._how_to_read(waveform)}")
        waveform = np.asarray(waveform)
        if waveform.ndim != 1 or waveform.size < 2 or waveform.dtype.kind != "f":
            raise UserError(
                f"recording {index} must be a float array (samples,) with at least 2 samples, got "
                f"{waveform.dtype} {waveform.shape}{_remedy(waveform)}"
            )
        if not np.isfinite(waveform).all():
            raise UserError(f"recording {index} holds NaN or infinite samples")
        waveform = resample(
            waveform.astype(np.float32), rate, self.sample_rate, f"recording {index}"
        )
        if self.trim:
            waveform = clip.trim_silence(waveform)
        if len(waveform) <= self.samples:
            as_it_is = self._lengths or self._pads_features
            return [waveform if as_it_is else clip.fit(waveform, self.samples, self.pad)]
        return list(clip.split_windows(waveform, self.samples, "repeat"))

    def settings(self) -> dict[str, Any]:
        """What `load_encoder` needs beside the weights; JSON-able."""
        return self.architecture.settings | {
            "samples": self.samples,
            "pad": self.pad,
            "trim": self.trim,
            "pooling": self.pooling,
            "layer": self.layer,
        }

    def identity(self) -> str:
        """Hex SHA-256 of all that decides an embedding: parameters, sizes, front end, windows.

        The same for a run's workdir, its export, and the encoder in memory, on whatever mesh.
        Where processes hold parts of the parameters, all of them have to call this.
        """
        made = self.architecture
        parts = {
            "settings": self.settings(),
            "sizes": dataclasses.asdict(made.module.config),
            "front_end": dataclasses.asdict(made.front_end),
            "params": params_identity(self.params),
        }
        text = json.dumps(parts, sort_keys=True, default=lambda dtype: jnp.dtype(dtype).name)
        return hashlib.sha256(text.encode()).hexdigest()

    def with_params(self, params: Any) -> Encoder:
        """The same encoder with other parameters; compiled programs are shared."""
        other = copy.copy(self)
        other.params = params
        return other


def _check_one_per_row(waveforms: np.ndarray) -> None:
    """Refuses arrays that are one recording: (samples,), or (samples, channels)."""
    if waveforms.ndim == 1:
        raise UserError("embed takes a list of waveforms; put this one into a list: [waveform]")
    if waveforms.ndim == 2 and waveforms.shape[1] <= _MOST_CHANNELS < waveforms.shape[0]:
        raise UserError(
            f"embed takes a list of waveforms, got one array {waveforms.shape}: {len(waveforms)} "
            f"recordings of {waveforms.shape[1]} samples? If these are channels, mix them: "
            "[waveform.mean(axis=1)]"
        )


def _remedy(waveform: np.ndarray) -> str:
    """What makes an array one that `Encoder.embed` takes; "" where nothing does."""
    if waveform.ndim == 2 and min(waveform.shape) <= _MOST_CHANNELS:
        axis = int(waveform.shape[1] < waveform.shape[0])
        return f"; mix its channels: waveform.mean(axis={axis})"
    if waveform.ndim == 1 and waveform.dtype.kind in "iu" and waveform.size > 1:
        if waveform.dtype == np.uint8:
            return "; scale it to 1: (waveform.astype(np.float32) - 128) / 128"
        full = -int(np.iinfo(waveform.dtype).min) or np.iinfo(waveform.dtype).max
        return f"; scale it to 1: waveform.astype(np.float32) / {full}"
    return ""


def load_encoder(
    name: str | None,
    source: Any,
    mesh: Mesh | None = None,
    *,
    samples: int | None = None,
    pad: str | None = None,
    trim: bool | None = None,
    pooling: str | None = None,
    layer: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Encoder:
    """Loads an encoder from published or exported weights.

    Args:
      name: in `models.ENCODERS`; None takes the name that an export carries.
      source: Hub id, local folder or file, mapping of upstream tensor names, or the workdir (or
        its ``export`` folder) of a training run.
      mesh: lay the parameters out over it; None for the default device.
      samples, pad, trim, pooling, layer: see `Encoder`; by default as exported, else as the encoder
        was published (`models.ENCODERS`). A pooling that is named goes with the layer that is.
      overrides: of fields of the architecture's config, e.g. {"mark_longer": True} for what the
        published extractor makes of a clip that comes alone (fused CLAP).

    Raises:
      UserError: unknown name, pooling or layer, a name that is not the export's, or a window that
        is longer than the model takes.
      WeightError: the weights do not fit; lists every difference.
    """
    options = {"samples": samples, "pad": pad, "trim": trim, "pooling": pooling, "layer": layer}
    opened = _opened(name, source, options, overrides)
    return opened.encoder(opened.load(mesh), mesh)


def check_encoder(
    name: str | None,
    source: Any,
    *,
    pooling: str | None = None,
    layer: int | None = None,
) -> None:
    """Refuses what `load_encoder` would refuse; no parameter is read.

    Args:
      name, source, pooling, layer: as for `load_encoder`.

    Raises:
      UserError: as `load_encoder`.
      WeightError: the weights do not fit; lists every difference.
    """
    opened = _opened(name, source, {"pooling": pooling, "layer": layer}, None)
    abstract = opened.made.abstract_params()
    check_weights(opened.source, opened.made.table, abstract, dtype=jnp.float32)
    opened.encoder(abstract, None)


@dataclass(frozen=True)
class _Opened:
    """What `load_encoder` knows before it reads a parameter; `options` are of `Encoder`."""

    source: WeightSource
    made: Architecture
    options: Mapping[str, Any]

    def load(self, mesh: Mesh | None) -> Any:
        abstract = self.made.abstract_params(mesh)
        return load(self.source, self.made.table, abstract, dtype=jnp.float32)

    def encoder(self, params: Any, mesh: Mesh | None) -> Encoder:
        return Encoder(self.made, params, mesh=mesh, **self.options)


def _opened(
    name: str | None,
    source: Any,
    asked: Mapping[str, Any],
    overrides: Mapping[str, Any] | None,
) -> _Opened:
    """Settings > what is exported > what was published."""
    source, settings = open_encoder(source)
    if name is None and "name" not in settings:
        raise UserError(
            f"{source.label} does not say which encoder it is; name one of {list(ENCODERS)}"
        )
    if name is not None and settings.get("name", name) != name:
        raise UserError(f"{source.label} holds a {settings['name']!r} encoder, not {name!r}")
    made = architecture(
        name or settings["name"],
        settings.get("overrides", {}) | dict(overrides or {}),
        settings.get("front_end_overrides"),
        source.config,
        source.preprocessor,
    )
    window, trim = made.entry.window, asked.get("trim")
    pooling, layer = asked["pooling"], asked["layer"]
    if pooling is None:
        pooling = settings.get("pooling", "mean")
        layer = settings.get("layer") if layer is None else layer
    options = {
        "samples": asked.get("samples") or settings.get("samples") or made.window,
        "pad": asked.get("pad") or settings.get("pad", window.pad),
        "trim": settings.get("trim", window.trim) if trim is None else trim,
        "pooling": pooling,
        "layer": layer,
    }
    made.check_window(options["samples"])
    check_pooling(made.module.config, pooling, layer)
    return _Opened(source, made, options)


def open_encoder(source: Any) -> tuple[WeightSource, dict[str, Any]]:
    """The weights, and the settings beside them if they are an export of ours.

    Args:
      source: what `load_encoder` takes.
    """
    if isinstance(source, str | Path) and Path(source).is_dir():
        for folder in (Path(source), Path(source) / "export"):
            if (folder / SETTINGS_FILE).is_file():
                settings = _read_settings(folder / SETTINGS_FILE)
                return resolve(folder / "encoder.safetensors"), settings
    weights = resolve(source)
    if weights.from_hub and (path := weights.beside(SETTINGS_FILE)):
        return weights, _read_settings(path)
    return weights, {}


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:  # no JSON, or no text
        raise UserError(f"{path} is not JSON: {error}") from error
    blocks = ("overrides", "front_end_overrides")
    if not isinstance(settings, dict) or not all(
        isinstance(settings.get(block, {}), dict) for block in blocks
    ):
        raise UserError(f"{path} does not hold the settings of an encoder; export it again")
    return settings
