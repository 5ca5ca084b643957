"""Trimming, cutting and padding of waveforms on the host, by the rules of OPERA and AcuLA.

All functions take and return (samples,) arrays and keep the dtype. The rules are those of OPERA's
`src/util.py` and of AcuLA's data set class; their odd corners are kept, because published
encoders and numbers depend on them.
"""

from collections.abc import Callable

import numpy as np


def trim_silence(
    waveform: np.ndarray, top_db: float = 60.0, frame_length: int = 1600, hop: int = 800
) -> np.ndarray:
    """Cuts off the beginning and end that lie `top_db` or more below the loudest frame.

    Equal to `librosa.effects.trim` with these settings (OPERA's). Frames are centred, padded with
    zeros. A silent waveform comes back whole.
    """
    _require_samples(waveform)
    power = _frame_power(waveform, frame_length, hop)
    decibels = 10 * np.log10(np.maximum(power, 1e-10) / max(power.max(), 1e-10))
    loud = np.flatnonzero(decibels > -top_db)
    return waveform[loud[0] * hop : min(len(waveform), (loud[-1] + 1) * hop)]


def crop_or_zero_pad(waveform: np.ndarray, samples: int) -> np.ndarray:
    """AcuLA's rule: the first `samples`, zeros at the end of a shorter waveform."""
    _require_samples(waveform)
    return np.pad(waveform[:samples], (0, max(0, samples - len(waveform))))


def repeat_pad(waveform: np.ndarray, samples: int, source: np.ndarray | None = None) -> np.ndarray:
    """OPERA's 'repeat': the waveform at the end, repetitions of `source` in front of it.

    Args:
      waveform: at most `samples` long.
      samples: length of the result.
      source: what is repeated; None: the waveform itself. The last sample of a repetition
        touches the first of the waveform.
    """
    source = waveform if source is None else source
    _require_samples(source)
    left = _missing(waveform, samples)
    copies = -(-left // len(source))
    front = np.tile(source, copies)[copies * len(source) - left :]
    return np.concatenate([front, waveform])


def tile_pad(waveform: np.ndarray, samples: int) -> np.ndarray:
    """OPERA's 'zero': whole copies if less than half is filled, then zeros at the end.

    A copy is added only while it ends before the last sample, so one zero at least remains.
    """
    _require_samples(waveform)
    _missing(waveform, samples)
    if 2 * len(waveform) < samples:
        waveform = np.tile(waveform, (samples - 1) // len(waveform))
    return np.pad(waveform, (0, samples - len(waveform)))


def repeat_whole(waveform: np.ndarray, samples: int) -> np.ndarray:
    """CLAP's 'repeatpad': as many whole copies as fit, then zeros.

    Where copies fill the result exactly `tile_pad` leaves the last one out; this does not.
    """
    _require_samples(waveform)
    _missing(waveform, samples)
    waveform = np.tile(waveform, samples // len(waveform))
    return np.pad(waveform, (0, samples - len(waveform)))


# Which of them applies: `data.pad` in training, `evaluate.pad` in a run's evaluation, else what an
# encoder was published with (`models.Window`). Both of the first two put zeros behind; an `Encoder`
# looks at those of "silence" only.
PADDINGS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "zero": crop_or_zero_pad,
    "silence": crop_or_zero_pad,
    "repeat": repeat_pad,
    "tile": tile_pad,
    "repeat_whole": repeat_whole,
}


def fit(waveform: np.ndarray, samples: int, rule: str = "zero", start: int = 0) -> np.ndarray:
    """Gives a waveform exactly `samples` samples.

    Args:
      waveform: of any length but 0.
      samples: length of the result.
      rule: how a shorter waveform is padded: one of `PADDINGS` (see the functions).
      start: where the cut from a longer waveform begins.

    Raises:
      ValueError: unknown rule, or a start that leaves fewer than `samples`.
    """
    if rule not in PADDINGS:
        raise ValueError(f"unknown padding rule {rule!r}; choose from {sorted(PADDINGS)}")
    if len(waveform) > samples:
        if not 0 <= start <= len(waveform) - samples:
            raise ValueError(
                f"start {start} does not leave {samples} of {len(waveform)} samples; "
                f"choose 0 to {len(waveform) - samples}"
            )
        return waveform[start : start + samples]
    if start:
        raise ValueError(f"start is {start}, but {len(waveform)} samples leave nothing to cut")
    return PADDINGS[rule](waveform, samples)


def split_windows(
    waveform: np.ndarray, samples: int, rule: str = "repeat", trim_tail: bool = False
) -> np.ndarray:
    """Cuts a (trimmed) waveform of any length into windows.

    Args:
      waveform: of any length but 0.
      samples: length of a window.
      rule: 'repeat' (OPERA-GT's extraction): windows overlap by half, and one more always
        starts half a window after the last, its end padded as in `repeat_pad` with the whole
        waveform as the source. 'tile' (OPERA's 'zero'): as few equal pieces as possible, each
        padded as in `tile_pad`; a remainder of fewer samples than pieces is lost.
      trim_tail: with 'repeat', leave out the last window if the waveform fills less than half
        of a window beyond whole ones.

    Returns:
      (windows, samples).

    Raises:
      ValueError: unknown rule.
    """
    _require_samples(waveform)
    length = len(waveform)
    if rule == "tile":
        pieces = -(-length // samples)
        size = length // pieces
        return np.stack(
            [tile_pad(waveform[i * size : (i + 1) * size], samples) for i in range(pieces)]
        )
    if rule != "repeat":
        raise ValueError(f"unknown splitting rule {rule!r}; choose 'repeat' or 'tile'")
    if length <= samples:
        return repeat_pad(waveform, samples)[None]
    hop = samples // 2
    count = (length - samples) // hop + 1
    windows = [waveform[i * hop : i * hop + samples] for i in range(count)]
    if not (trim_tail and 2 * (length % samples) < samples):
        windows.append(repeat_pad(waveform[count * hop :], samples, source=waveform))
    return np.stack(windows)


def _frame_power(waveform: np.ndarray, frame_length: int, hop: int) -> np.ndarray:
    """Mean square of centred frames, zeros beyond both ends; (1 + samples // hop,) float64."""
    total = np.concatenate([[0.0], np.cumsum(np.square(waveform, dtype=np.float64))])
    begins = np.arange(1 + len(waveform) // hop) * hop - frame_length // 2
    ends = np.minimum(begins + frame_length, len(waveform))
    return (total[ends] - total[np.maximum(begins, 0)]) / frame_length


def _missing(waveform: np.ndarray, samples: int) -> int:
    if len(waveform) > samples:
        raise ValueError(f"{len(waveform)} samples do not fit into {samples}; cut them first")
    return samples - len(waveform)


def _require_samples(waveform: np.ndarray) -> None:
    if waveform.ndim != 1 or len(waveform) == 0:
        raise ValueError(f"expected (samples,) with at least one sample, got {waveform.shape}")
