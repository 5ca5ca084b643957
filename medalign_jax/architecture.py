"""An audio encoder by name: its module, its front end, its table of weights; no weights yet."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from medalign_jax.audio.frontend import FRONT_ENDS, front_end
from medalign_jax.audio.preprocessor_config import front_end_numbers
from medalign_jax.core.errors import UserError
from medalign_jax.core.mesh import Rules, placed, shardings
from medalign_jax.models import ENCODERS, EncoderEntry
from medalign_jax.weights.table import Table, first_layers


@dataclass(frozen=True)
class Architecture:
    """A registered encoder put together: module, front end, table of its weights, sharding.

    Attributes:
      name: in `models.ENCODERS`.
      module: Linen module with `embed`, see `medalign_jax.models`.
      front_end: waveforms (B, S) -> features (B, T, M).
      table: mapping table of its published weights.
      sharding: table for `core.mesh.shardings`.
      entry: line of `models.ENCODERS`.
      settings: JSON-able; `architecture(**settings)` makes the same again.
    """

    name: str
    module: nn.Module
    front_end: Callable[[jax.Array], jax.Array]
    table: Table
    sharding: Rules
    entry: EncoderEntry
    settings: dict[str, Any]

    def abstract_params(self, mesh: Mesh | None = None) -> Any:
        """Shapes (and shardings, given a mesh) of the parameters."""
        tree = jax.tree.map(lambda leaf: leaf, _parameter_shapes(self.module))  # a caller's own
        if mesh is None:
            return tree
        return placed(tree, shardings(tree, self.sharding, mesh))

    @property
    def most_samples(self) -> int | None:
        """Samples of the longest window of which the model reads all; None for any length."""
        most = self.module.config.most_frames
        return None if most is None else self.front_end.samples(most + 1) - 1

    @property
    def window(self) -> int:
        """Samples of the window that it was published with, as far as the model reads."""
        published = int(self.entry.window.seconds * self.front_end.sample_rate)
        return published if self.most_samples is None else min(published, self.most_samples)

    def check_window(self, samples: int) -> None:
        """Refuses a window of which the model would not read all.

        Raises:
          UserError: naming both lengths.
        """
        most, rate = self.most_samples, self.front_end.sample_rate
        if most is not None and samples > most:
            raise UserError(
                f"encoder {self.name!r} reads at most {self.module.config.most_frames} frames at "
                f"once, windows of {most / rate:g} s ({most} samples), not of {samples / rate:g} s "
                f"({samples}); take shorter windows: longer recordings are cut into several"
            )


@functools.lru_cache(maxsize=64)
def _parameter_shapes(module: nn.Module) -> Any:
    """Tracing an initialisation takes a second or two: once for each size, not for each load."""
    config = module.config
    features = jax.ShapeDtypeStruct((1, config.frames, config.mels), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), features)["params"]


def architecture(
    name: str,
    overrides: Mapping[str, Any] | None = None,
    front_end_overrides: Mapping[str, Any] | None = None,
    published: Mapping[str, Any] | None = None,
    preprocessor: Mapping[str, Any] | None = None,
) -> Architecture:
    """Looks an encoder up and applies changes to its sizes and to its front end.

    Args:
      name: in `models.ENCODERS`.
      overrides: of fields of its config; `dtype` may be a name. A `depth` below the published one
        takes the first blocks of published weights, where they are stacked (Whisper's family).
      front_end_overrides: of fields of its front end.
      published: the parsed ``config.json`` beside published weights, where the architecture is
        one whose sizes are read from it; takes precedence over the preset, and `overrides` over
        both.
      preprocessor: the parsed ``preprocessor_config.json`` beside them; the front end's numbers
        come from it (`audio.preprocessor_config`); `front_end_overrides` take precedence.

    Raises:
      UserError: an unknown name, size or front-end number, or published settings that ask for what
        the architecture does not have.
    """
    if name not in ENCODERS:
        raise UserError(f"unknown encoder {name!r}; there are {', '.join(ENCODERS)}")
    entry, changes = ENCODERS[name], dict(overrides or {})
    config = preset = entry.part("config")
    if published and entry.read_config:
        config = entry.part("read_config")(published)
    known = {field.name for field in dataclasses.fields(config)}
    if unknown := sorted(set(changes) - known):
        raise UserError(
            f"encoder {name!r} has no setting {unknown}; it has {sorted(known)}. Those of another "
            "encoder go with --config.encoder.overrides={} --config.encoder.front_end={}"
        )
    changes = {k: _tuples(v) for k, v in changes.items()}
    try:
        if isinstance(changes.get("dtype"), str):
            changes["dtype"] = jnp.dtype(changes["dtype"])
        whole, config = config, dataclasses.replace(config, **changes)
    except (ValueError, TypeError) as error:
        raise UserError(f"encoder {name!r}: {error}") from error
    asked = dict(front_end_overrides or {})
    if preprocessor:
        asked = _read_front_end(entry, preprocessor, whole) | asked
    front_end_changes = _front_end_of(entry, config) | asked
    return Architecture(
        name=name,
        module=entry.part("module")(config),
        front_end=front_end(entry.front_end, **front_end_changes),
        table=_table(entry, config, whole),
        sharding=entry.sharding,
        entry=entry,
        settings={
            "name": name,
            "overrides": _differences(preset, config),
            "front_end_overrides": asked,
        },
    )


def _front_end_of(entry: EncoderEntry, config: Any) -> dict[str, Any]:
    """What the front end takes from the encoder's sizes: bands, frames, CLAP's kind of filters."""
    fields = {field.name for field in dataclasses.fields(FRONT_ENDS[entry.front_end])}
    shared = {
        "n_mels": config.mels, "pad_to": config.frames, "fusion": getattr(config, "fusion", None)
    }  # fmt: skip
    return {name: value for name, value in shared.items() if name in fields}


def _read_front_end(entry: EncoderEntry, preprocessor: Mapping[str, Any], sizes: Any) -> dict:
    """Where the published numbers are other ones than the front end's own."""
    own = {field.name: field.default for field in dataclasses.fields(FRONT_ENDS[entry.front_end])}
    read = front_end_numbers(entry.front_end, preprocessor, sizes)
    return {name: value for name, value in read.items() if value != own[name]}


def _table(entry: EncoderEntry, config: Any, whole: Any) -> Table:
    """A table, or what a function of the config gives; `whole` has the published sizes."""
    found = entry.part("table")
    table = found if isinstance(found, Table) else found(config)
    if config.depth >= whole.depth:
        return table
    return first_layers(table, config.depth, whole.depth)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def _differences(preset: Any, config: Any) -> dict[str, Any]:
    """Fields in which a config is not the preset, so that JSON can hold them."""
    changed = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(preset, field.name)
    }
    if "dtype" in changed:
        changed["dtype"] = jnp.dtype(changed["dtype"]).name
    return json.loads(json.dumps(changed))
