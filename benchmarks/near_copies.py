"""Near-copies: what the detector finds of planted ones, what it reports besides, and its time.

    python -m benchmarks.near_copies planted --shared=../shared/data   # each change, each set
    python -m benchmarks.near_copies sets --shared=../shared/data      # heart sounds, BMD-HS
    python -m benchmarks.near_copies scaling                           # 600 to 4,800 recordings

`planted`: parts of 1.5 s of real and simulated sounds, changed, among the unchanged recordings.
A pair is false where its recordings, or those that its parts were cut from, are in different
groups of near-copies before anything is planted.
"""

import argparse
import csv
import io
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import soxr

from medalign_jax.datasets.near_copies import near_copies
from medalign_jax.datasets.simulated.simulate import simulate

RATE = 8000
COMMON_SECONDS = 1.5


def noisy(x: np.ndarray, rng: np.random.Generator, pink: bool) -> np.ndarray:
    """With noise 20 dB below."""
    spectrum = np.fft.rfft(rng.standard_normal(len(x)))
    if pink:
        spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
    noise = np.fft.irfft(spectrum, len(x))
    return x + 0.1 * noise * np.sqrt(np.mean(x**2) / np.mean(noise**2))


def coded(x: np.ndarray, rate: int, kind: str) -> np.ndarray:
    """To MP3 or Ogg Vorbis and back."""
    file = io.BytesIO()
    subtype = {"MP3": "MPEG_LAYER_III", "OGG": "VORBIS"}[kind]
    soundfile.write(file, x * (0.5 / np.abs(x).max()), rate, format=kind, subtype=subtype)
    file.seek(0)
    return soundfile.read(file)[0]


def resampled(x: np.ndarray, rate: int, there: int) -> np.ndarray:
    """To another rate and back."""
    return soxr.resample(soxr.resample(x, rate, there), there, rate)


CHANGES: dict[str, Callable] = {
    "cut": lambda x, rng: x,
    "gain": lambda x, rng: -0.07 * x,
    "4 kHz": lambda x, rng: resampled(x, RATE, 4000),
    "44.1 kHz": lambda x, rng: resampled(x, RATE, 44_100),
    "mp3": lambda x, rng: coded(x, RATE, "MP3"),
    "ogg": lambda x, rng: coded(x, RATE, "OGG"),
    "white noise": lambda x, rng: noisy(x, rng, False),
    "pink noise": lambda x, rng: noisy(x, rng, True),
    "all": lambda x, rng: coded(noisy(resampled(3.0 * x, RATE, 4000), rng, True), RATE, "MP3"),
}


def read(path: Path) -> np.ndarray:
    """A file as (samples,) at `RATE`."""
    x, rate = soundfile.read(path, always_2d=True)
    return soxr.resample(x.mean(axis=1), rate, RATE) if rate != RATE else x.mean(axis=1)


def simulated(
    count: int, seconds: float = 8.0, kinds: tuple[str, ...] = ("heart", "lung")
) -> list[np.ndarray]:
    """Hearts and lungs of different subjects, (samples,) at `RATE`."""
    made = (simulate(kinds[i % len(kinds)], i, seconds=seconds).waveform for i in range(count))
    return [np.float32(soxr.resample(x, 16_000, RATE)) for x in made]


def planted(shared: Path, copies: int) -> None:
    """Prints found and false pairs for every set and change."""
    files = {
        "heart sounds": sorted((shared / "heart_sounds/audio").glob("*.wav")),
        "ICBHI": sorted((shared / "icbhi_sample").rglob("*.wav")),
        "BMD-HS": sorted((shared / "bmd_hs/train").glob("*.wav"))[::4],
        "emodb": sorted((shared / "emodb/audio").glob("*.flac"))[::2],
    }
    sets = {name: [read(path) for path in paths] for name, paths in files.items()}
    for name, sounds in (sets | {"simulated": simulated(100)}).items():
        plant(name, sounds, copies)


def plant(name: str, sounds: list[np.ndarray], copies: int) -> None:
    """Plants changed parts and prints how many are found; a false pair joins two groups."""
    rng = np.random.default_rng(0)
    groups = near_copies(sounds.__getitem__, len(sounds), RATE).groups
    size = round(COMMON_SECONDS * RATE)
    long = [i for i, x in enumerate(sounds) if len(x) >= size]
    source = rng.choice(long, (len(CHANGES), copies))
    parts = []
    for i, changed in zip(source.ravel(), np.repeat(list(CHANGES.values()), copies), strict=True):
        start = rng.integers(0, len(sounds[i]) - size + 1)
        parts.append(changed(sounds[i][start : start + size], rng))
    everything = sounds + parts
    found = near_copies(everything.__getitem__, len(everything), RATE)
    pairs = {tuple(pair) for pair in found.pairs.tolist()}
    number = len(sounds)
    for change, of in zip(CHANGES, source, strict=True):
        hits = sum((int(i), number + k) in pairs for k, i in enumerate(of))
        number += copies
        print(f"{name:13} {change:12} found {hits}/{copies}", flush=True)
    group = np.concatenate([groups, groups[source.ravel()]])
    alike = np.bincount(group)
    different = (len(group) ** 2 - np.sum(alike.astype(np.int64) ** 2)) // 2
    false = int(np.sum(group[found.pairs[:, 0]] != group[found.pairs[:, 1]]))
    print(f"{name:13} false pairs {false} of {different}", flush=True)


def sets(shared: Path) -> None:
    """Prints what is found in the heart sounds and in BMD-HS, and the time."""
    with open(shared / "heart_sounds/metadata.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = [row["audio_path"] for row in rows]
    found, label = (
        timed("heart sounds", [shared / "heart_sounds" / name for name in names]),
        [row["label"] for row in rows],
    )
    for column in ("split_by_recording", "split"):
        splits = [row[column] for row in rows]
        print(f"  {column}:", *found.leaks_between(splits, names), sep="\n    ")
    for least in (0.9, 0.95):
        strong = found.pairs[found.similarity > least]
        crossing = {
            j for a, b in strong for i, j in ((a, b), (b, a))
            if (rows[i]["split_by_recording"], rows[j]["split_by_recording"]) == ("train", "test")
        }  # fmt: skip
        print(f"  above {least}: {len(strong)} pairs, {len(crossing)} test recordings in train")
    mixed = [(i, j) for i, j in found.pairs if label[i] != label[j]]
    normal = len({g for g, kind in zip(found.groups, label, strict=True) if kind == "N"})
    print(f"  groups {found.groups.max() + 1} (normal: {normal}); across classes: {len(mixed)}")
    paths = sorted((shared / "bmd_hs/train").glob("*.wav"))
    patient = [path.stem.split("_")[1] for path in paths]
    found = timed("BMD-HS", paths)
    for (i, j), value, offset in zip(found.pairs, found.similarity, found.offset, strict=True):
        kind = "same patient" if patient[i] == patient[j] else "OTHER PATIENT"
        print(f"  {paths[i].stem} ~ {paths[j].stem} ({value:.4f}, {offset:+.3f} s): {kind}")


def timed(name: str, paths: list[Path]):
    """Near-copies among files, with the time that it took printed."""
    return timed_copies(name, lambda i: read(paths[i]), len(paths))


def timed_copies(name: str, waveform: Callable[[int], np.ndarray], count: int):
    """Near-copies among waveforms, with the time that it took printed."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = near_copies(waveform, count, RATE)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(
        f"{name}: {count} recordings, {len(found.pairs)} pairs, {wall:.1f} s, {cpu:.1f} s of CPU "
        f"({1000 * cpu / count:.1f} ms per recording)",
        flush=True,
    )
    return found


def scaling() -> None:
    """Prints the time for more and more simulated hearts of 4 s, made beforehand."""
    sounds = simulated(4800, 4.0, ("heart",))
    for count in (600, 1200, 2400, 4800):
        timed_copies("simulated", sounds.__getitem__, count)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("planted", "sets", "scaling"))
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"))
    parser.add_argument("--copies", type=int, default=40, help="planted for each set and change")
    flags = parser.parse_args()
    if flags.what == "planted":
        planted(flags.shared, flags.copies)
    elif flags.what == "sets":
        sets(flags.shared)
    else:
        scaling()


if __name__ == "__main__":
    main()
