"""Log-mel on this machine: ours, one jitted function on the default device, beside librosa.

librosa runs in as many worker processes as there are cores, with the clips already in each
worker's memory. Both sides work through the same clips, in turn, and each prints the median and
the best of the rounds.

    python -m benchmarks.logmel --clips=16 --samples=131000 --rounds=30
"""

import argparse
import importlib.util
import itertools
import multiprocessing
import os
import statistics

import numpy as np

from benchmarks.turns import in_turns

_CLIPS: np.ndarray | None = None


def make_clips(count: int, samples: int) -> np.ndarray:
    """(count, samples) float32 noise; the same in every process."""
    return 0.1 * np.random.default_rng(0).standard_normal((count, samples)).astype(np.float32)


def start_worker(count: int, samples: int) -> None:
    """Puts the clips into the worker's memory and warms librosa up, on a single thread."""
    global _CLIPS
    _CLIPS = make_clips(count, samples)
    librosa_log_mel(slice(0, 1))


def librosa_log_mel(part: slice) -> np.ndarray:
    """The features of some of the resident clips, (n, frames, 64)."""
    import librosa

    features = []
    for clip in _CLIPS[part]:
        power = librosa.feature.melspectrogram(
            y=clip, sr=16_000, n_fft=1024, hop_length=512, n_mels=64, fmin=50, fmax=8000
        )
        decibels = librosa.power_to_db(power, ref=np.max)
        low, high = decibels.min(), decibels.max()
        features.append(((decibels - low) / (high - low)).T)
    return np.stack(features)


def librosa_compute_only(part: slice) -> int:
    """As `librosa_log_mel`; the features stay in the worker, so that no copy is timed."""
    return len(librosa_log_mel(part))


def main() -> None:
    """Prints clips/s of both and their ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=16, help="clips in a batch")
    parser.add_argument("--samples", type=int, default=131_000, help="samples in a clip, 16 kHz")
    parser.add_argument("--rounds", type=int, default=30, help="timed rounds of each side")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="librosa processes")
    args = parser.parse_args()
    if importlib.util.find_spec("librosa") is None:  # workers that die are started again for ever
        parser.error("librosa is not installed; bash launch/test.sh installs requirements-dev.txt")

    # Workers start before JAX does, and each keeps to one thread.
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))
    context = multiprocessing.get_context("spawn")
    bounds = np.linspace(0, args.clips, args.workers + 1).round().astype(int)
    parts = [slice(int(a), int(b)) for a, b in itertools.pairwise(bounds) if a < b]
    with context.Pool(args.workers, start_worker, (args.clips, args.samples)) as pool:
        theirs = np.concatenate(pool.map(librosa_log_mel, parts, chunksize=1))

        import jax

        from medalign_jax.audio import LogMel

        log_mel = LogMel()
        resident = jax.device_put(make_clips(args.clips, args.samples))
        difference = np.abs(np.asarray(log_mel(resident)) - theirs).max()

        contestants = {
            "librosa": lambda: pool.map(librosa_compute_only, parts, chunksize=1),
            "medalign_jax": lambda: log_mel(resident).block_until_ready(),
        }
        times = in_turns(contestants, args.rounds)

    print(f"{args.clips} clips of {args.samples} samples, {args.rounds} rounds in turn")
    print(f"largest difference of the features: {difference:.1e}")
    where = {
        "librosa": f"{args.workers} processes",
        "medalign_jax": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
    }
    for name, values in times.items():
        median, best = statistics.median(values), min(values)
        print(
            f"{name:>13} ({where[name]}): {args.clips / median:7.0f} clips/s median, "
            f"{args.clips / best:7.0f} best; {1e3 * median:.1f} ms per batch"
        )
    for label, pick in (("median", statistics.median), ("best", min)):
        ratio = pick(times["librosa"]) / pick(times["medalign_jax"])
        print(f"ratio medalign_jax / librosa, {label}: {ratio:.2f}")


if __name__ == "__main__":
    main()
