"""Writes trained parts under ``export/``: weights by their upstream names, settings as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax

from medalign_jax.core.files import write_whole
from medalign_jax.core.mesh import on_host
from medalign_jax.core.seals import seal
from medalign_jax.encoder import SETTINGS_FILE, Encoder
from medalign_jax.search.common_space import HEADS_FILE
from medalign_jax.weights.load import export, save
from medalign_jax.weights.tables import heads as heads_table


def host_params(params: Any) -> Any:
    """Whole arrays of a tree, on this host, wherever its parts are.

    Where processes hold parts, all of them have to call this.
    """
    return jax.tree.map(on_host, params)


def export_encoder(folder: Path, encoder: Encoder) -> None:
    """``encoder.safetensors`` under upstream names, and what `load_encoder` needs beside it."""
    tensors = export(host_params(encoder.params), encoder.architecture.table)
    if jax.process_index() == 0:
        save(folder / "encoder.safetensors", tensors)
        text = json.dumps(encoder.settings(), indent=2) + "\n"
        write_whole(folder / SETTINGS_FILE, text.encode())
        seal(folder)


def export_heads(folder: Path, heads: Any) -> None:
    """`HEADS_FILE`: projection heads, if any, under the released code's names.

    Without heads the file of an earlier export is removed.
    """
    path = folder / HEADS_FILE
    tensors = export(host_params(heads), heads_table.TABLE) if heads else None
    if jax.process_index():
        return
    if tensors is None:
        path.unlink(missing_ok=True)
    else:
        save(path, tensors)
    seal(folder)
