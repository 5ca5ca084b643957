"""A run's folder: its config, where everything came from, and the refusal to mix two runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import ml_collections

from medalign_jax.errors import UserError
from medalign_jax.provenance import provenance

_MISSING = "(absent)"


def open_workdir(folder: Path, config: ml_collections.ConfigDict) -> Path:
    """Makes the folder, or checks that it belongs to the very same config; writes config.json.

    Raises:
      UserError: a run with another config is there; names the keys that differ.
    """
    folder = Path(folder)
    path = folder / "config.json"
    given = json.loads(config.to_json_best_effort())
    if path.exists():
        before = _read(path)["config"]
        differences = compare(before, given)
        if differences:
            raise UserError(
                f"{folder} holds a run with another config:\n"
                + "\n".join(f"  {key}: {old} there, {new} now" for key, old, new in differences)
                + "\nGo on with the same values, or choose another --workdir"
            )
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    _write(path, {"config": given, "provenance": provenance()})
    return folder


def note_provenance(folder: Path, **facts: Any) -> dict[str, Any]:
    """Adds facts (weight hashes, counts) to config.json's provenance; gives all of it."""
    path = Path(folder) / "config.json"
    if not path.exists():  # another process writes it
        return provenance() | facts
    content = _read(path)
    content["provenance"] |= facts
    _write(path, content)
    return content["provenance"]


def compare(before: Any, now: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, old, new) of every leaf that differs between two JSON trees."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            difference
            for key in sorted(before.keys() | now.keys())
            for difference in compare(
                before.get(key, _MISSING),
                now.get(key, _MISSING),
                f"{prefix}.{key}" if prefix else key,
            )
        ]
    return [] if before == now else [(prefix, before, now)]


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is damaged ({error}); move the folder away or choose another --workdir"
        ) from error


def _write(path: Path, content: dict[str, Any]) -> None:
    if jax.process_index():  # one writer
        return
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(content, indent=2, default=str) + "\n")
    temporary.replace(path)
