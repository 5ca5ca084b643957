"""What `medalign_jax.evaluate` takes beside the time of embedding alone, on this machine.

Embedding alone is one encoder after another over recordings that are in memory. `evaluate` checks
and decodes them, embeds them with all encoders and keeps that, fits and tests the probe of every
task, fold and encoder, and writes tables and page; the manifest is opened on both sides. Weights
and recordings are random. Both sides run in turn, after one round on few recordings that compiles.

    python -m benchmarks.evaluate --recordings=2000 --encoders=3 --tasks=5 --folds=5
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
from pathlib import Path

import jax
import numpy as np
import soundfile

from benchmarks.turns import in_turns, seconds
from medalign_jax.architecture import architecture
from medalign_jax.data.recordings.dataset import open_dataset
from medalign_jax.encoder import Encoder, load_encoder
from medalign_jax.runs import evaluate as command
from medalign_jax.runs.export import export_encoder

RATE = 4_000


def write_recordings(folder: Path, count: int, length: float, tasks: int) -> Path:
    """A manifest of noises, two per subject, with labels that say nothing."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    columns = [f"task{n}" for n in range(tasks)]
    lines = [",".join(["audio_path", "subject_id", *columns])]
    for i in range(count):
        noise = rng.uniform(-0.5, 0.5, round(length * RATE))
        soundfile.write(folder / f"{i}.wav", noise, RATE, subtype="PCM_16")
        labels = rng.choice(["no", "yes"], tasks)
        lines.append(",".join([f"{i}.wav", f"s{i // 2}", *labels]))
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder / "manifest.csv"


def write_encoder(folder: Path, name: str, seed: int) -> Path:
    """An encoder of random weights as an export."""
    made, rng = architecture(name), np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: (0.05 * rng.standard_normal(leaf.shape)).astype(leaf.dtype),
        made.abstract_params(),
    )
    window = made.entry.window
    samples = int(window.seconds * made.front_end.sample_rate)
    folder.mkdir()
    export_encoder(folder, Encoder(made, params, samples, window.pad, window.trim))
    return folder


def embed_alone(encoders: list[Path], manifest: Path) -> None:
    """One encoder after another, nothing kept."""
    dataset = open_dataset(manifest, reports_required=False)
    rate = dataset.sample_rate
    for path in encoders:
        encoder = load_encoder(None, path)
        for _ in encoder.stream((dataset.waveform(i), rate) for i in range(len(dataset))):
            pass


def evaluate(encoders: list[Path], manifest: Path, args: argparse.Namespace, *more: str) -> None:
    """The whole command, quietly, with nothing kept from before."""
    tasks = [f"task{n}" for n in range(args.tasks)]
    arguments = ["--manifest", str(manifest), "--tasks", *tasks, "--folds", str(args.folds), *more]
    for path in encoders:
        arguments += ["--encoder", str(path)]
    with tempfile.TemporaryDirectory() as out, open(os.devnull, "w") as quiet:
        with contextlib.redirect_stdout(quiet):
            status = command.main([*arguments, "--out", out])
        if status:
            raise SystemExit(f"medalign_jax.evaluate ended with status {status}")


def main() -> None:
    """Prints both times and their ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recordings", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=8.0, help="of a recording")
    parser.add_argument("--encoder", default="vit_mae_small", help="name of the architecture")
    parser.add_argument("--encoders", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=5)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--baselines", action="store_true", help="also time all baselines")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        encoders = [
            write_encoder(folder / f"encoder{n}", args.encoder, n) for n in range(args.encoders)
        ]
        manifest = write_recordings(folder / "all", args.recordings, args.seconds, args.tasks)
        few = write_recordings(folder / "few", 60, args.seconds, args.tasks)
        none = ("--baselines", "majority")
        contestants = {
            "embedding alone": lambda path=manifest: embed_alone(encoders, path),
            "evaluate": lambda path=manifest: evaluate(encoders, path, args, *none),
        }
        if args.baselines:
            contestants["with all baselines"] = lambda path=manifest: evaluate(encoders, path, args)
        for contestant in contestants.values():
            seconds(lambda run=contestant: run(few))
        times = in_turns(contestants, args.rounds)
    print(
        f"{args.recordings} recordings of {args.seconds:g} s, {args.encoders} encoders "
        f"({args.encoder}), {args.tasks} tasks, {args.folds} folds; "
        f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    )
    least = statistics.median(times["embedding alone"])
    for label, taken in times.items():
        median = statistics.median(taken)
        print(f"{label:>20}: {median:8.1f} s, {median / least:.2f} x embedding alone")


if __name__ == "__main__":
    main()
