"""The model card beside an exported encoder: how it was made and measured, and its limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medalign_jax.core.files import write_text
from medalign_jax.core.seals import seal
from medalign_jax.evaluate.results import Result
from medalign_jax.evaluate.tables import Table, tables_of
from medalign_jax.models.catalogue import ENCODER_CHECKPOINTS, TEACHER_CHECKPOINTS
from medalign_jax.runs.alignment import Run

FILE = "README.md"
_KINDS = (
    "linear",
    "nearest_sentence",
    "zero_shot",
    "retrieval",
)  # the others are in evaluation.json
_HEAD = """---
library_name: medalign_jax
pipeline_tag: feature-extraction
tags: [audio, medical, {name}]
license: other
---
"""
_USE = """```python
import medalign_jax
from medalign_jax.audio import read

encoder = medalign_jax.load_encoder(None, "THIS FOLDER OR REPOSITORY")
vectors = encoder.embed([read("my.wav", {rate})], sample_rate={rate})  # (1, {width})
```
"""
_INTENDED = (
    "For research on recordings like those that it was trained on. Not a medical device: it gives "
    "no diagnosis, and nothing here says that it would help one patient."
)


def write(
    run: Run,
    width: int,
    results: Sequence[Result],
    facts: Mapping[str, Any],
    limits: Sequence[str],
    chosen: str = "",
) -> None:
    """The card beside the export of each fold; arguments as of `card_of`."""
    text = card_of(run, width, results, facts, limits, chosen)
    for part in run.parts:
        folder = part.folder / "export"
        write_text(folder / FILE, text)
        seal(folder)


def card_of(
    run: Run,
    width: int,
    results: Sequence[Result],
    facts: Mapping[str, Any],
    limits: Sequence[str],
    chosen: str = "",
) -> str:
    """The card as Markdown.

    Args:
      run: what was run.
      width: of an embedding.
      results: of all stages.
      facts: provenance of the run.
      limits: what a reader must not conclude.
      chosen: where the encoder is one of several candidates: which, and by what.
    """
    config, made = run.config, run.made
    tables = tables_of([result for result in results if _headline(result)])
    sections = [
        _HEAD.format(name=made.name),
        f"# An audio encoder ({made.name}) aligned with clinical reports by AcuLa\n",
        f"{_INTENDED}\n",
        "## Use\n",
        _USE.format(rate=made.front_end.sample_rate, width=width),
        "## How it was made\n",
        _lines([*_recipe(run, facts), *filter(None, [chosen])]),
        "## How it was measured\n",
        "Embeddings are frozen; 95 % intervals over subjects in brackets. `before` is the encoder "
        "before alignment; baselines stand beside it. Everything else is in evaluation.json.\n",
        *(_markdown(table) for table in tables),
        "## What may be wrong with these numbers\n",
        _lines(limits),
        "## Licences\n",
        _lines(
            [
                f"starting weights, {config.encoder.source or 'none'}: "
                f"{licence_of(config.encoder.source, ENCODER_CHECKPOINTS)}",
                f"language model of the reports, {config.teacher.source}: "
                f"{licence_of(config.teacher.source, TEACHER_CHECKPOINTS)}",
                "data: not known to the program; state it here before you share these weights",
            ]
        ),
    ]
    return "\n".join(sections)


def licence_of(source: str, checkpoints: Sequence[Any]) -> str:
    """Of published weights, as `medalign models` lists it."""
    if not source:
        return "trained from nothing"
    for checkpoint in checkpoints:
        if checkpoint.source == source:
            return f"{checkpoint.licence}{f' ({checkpoint.note})' if checkpoint.note else ''}"
    return "not known to the program; see where they came from"


def _headline(result: Result) -> bool:
    return result.kind.startswith(_KINDS)


def _recipe(run: Run, facts: Mapping[str, Any]) -> list[str]:
    config = run.config
    loss, data = config.loss, run.suite.dataset
    splits = ", ".join(f"{n} {name}" for name, n in sorted(run.data.splits().items()))
    start = config.encoder.source or (
        "pre-trained here by masked reconstruction" if config.pretrain.enabled else "random weights"
    )
    align = f"{loss.align} ({loss.estimator})" if loss.align == "cka" else loss.align
    length = (
        f"{config.train.steps} steps" if config.train.steps else f"{config.train.epochs} epochs"
    )
    lines = [
        f"encoder: {run.made.name}, from {start}",
        f"data: {data}, {len(run.data)} recordings ({splits})",
        f"loss: {align} x {loss.align_weight}, self-supervised term x {loss.ssm_weight}",
        f"reports: read by {config.teacher.source}, layer {config.teacher.layer}, "
        f"{config.teacher.pooling} over tokens",
        f"training: {length}, batches of "
        f"{config.train.batch_size}, rate {config.optimizer.learning_rate:g}, seed {config.seed}",
    ]
    for name in ("encoder_weights", "teacher_weights", "git_commit"):
        if facts.get(name):
            lines.append(f"{name.replace('_', ' ')}: {facts[name]}")
    packages = facts.get("packages", {})
    lines.append("made with " + ", ".join(f"{k} {v}" for k, v in packages.items()))
    return lines


def _lines(items: Sequence[str]) -> str:
    return "".join(f"- {item}\n" for item in items)


def _markdown(table: Table) -> str:
    rows = [table.head, ("---",) * len(table.head), *table.rows]
    cells = ("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    return f"{table.caption}\n\n" + "\n".join(cells) + "\n"
