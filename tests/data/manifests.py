"""Small recordings and manifests for the tests of this folder."""

import csv
from pathlib import Path

import numpy as np
import soundfile

COLUMNS = ("audio_path", "subject_id", "split", "label", "report")


def tone(seed: int, samples: int = 4000) -> np.ndarray:
    """A noise of its own, (samples,) float64 below 1."""
    return np.random.default_rng(seed).uniform(-0.5, 0.5, samples)


def write_wav(path: Path, seed: int = 0, samples: int = 4000, sample_rate: int = 16_000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(seed, samples), sample_rate, subtype="PCM_16")
    return path


def write_csv(path: Path, rows, columns=None, delimiter=",", encoding="utf-8") -> Path:
    columns = columns or list(rows[0])
    with open(path, "w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, columns, delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def rows_of(folder: Path, count: int, samples=4000, **columns) -> list[dict[str, str]]:
    """`count` good rows with their recordings, of one subject each; two in ten are test rows."""
    rows = []
    for i in range(count):
        write_wav(folder / "audio" / f"{i}.wav", i, samples + 10 * i)
        split = {8: "valid", 9: "test"}.get(i % 10, "train")
        row = {"audio_path": f"audio/{i}.wav", "subject_id": f"s{i}", "split": split,
               "label": "ab"[i % 2], "report": f"Report {i}."}  # fmt: skip
        rows.append(row | columns)
    return rows
