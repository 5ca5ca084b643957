"""Audio files to mono float32 waveforms, with an error that explains itself for every bad file."""

import dataclasses
import io
import math
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
import soxr

from medalign_jax.audio.containers import ACCEPTED, CONVERT, ContainerError, Extent, extent
from medalign_jax.core.errors import UserError
from medalign_jax.core.files import printable

LONGEST_SECONDS = 3600.0
"""Longest file that `read` decodes without `max_seconds`: an hour at 16 kHz is 230 MB."""

LARGEST_SAMPLE = 1e9
"""Beyond this a power spectrum may overflow float32; integers kept as floats stay far below."""

SAMPLE_RATES = (1_000, 384_000)
"""Plausible sample rates, Hz, lowest and highest; others come from damaged headers."""

_BLOCK_FRAMES = 1 << 20
_MOST_FRAMES = 1 << 60  # libsndfile's number is beyond where a header does not say how many
_WEEKS = 14 * 24 * 3600.0  # seconds
_MPEG_SLACK = 2 * 1152  # samples that decoders take off for their delay


class AudioError(UserError):
    """An audio file or waveform that cannot be used.

    Attributes:
      path: the file, with bytes that are not text escaped.
      reason: what is wrong with it and what to do, without the path.
    """

    def __init__(self, path: str | os.PathLike, reason: str):
        """Joins path and reason into the message."""
        self.path = printable(path)
        self.reason = reason
        super().__init__(f"{self.path}: {reason}")

    def __reduce__(self):
        """Lets the error cross from a loading process to the main one."""
        return type(self), (self.path, self.reason)


@dataclasses.dataclass(frozen=True)
class AudioInfo:
    """How long a recording is, and how it is sampled.

    Attributes:
      frames: samples in each channel.
      sample_rate: Hz.
      channels: number of channels.
      seconds: duration.
    """

    frames: int
    sample_rate: int
    channels: int
    seconds: float


def probe(path: str | os.PathLike) -> AudioInfo:
    """Finds how long a recording is; decodes it only where its header does not say that.

    Truncation shows here, but for flac, where it shows when `read` decodes it.

    Raises:
      AudioError: missing, empty, truncated, damaged or not audio.
    """
    with _open(path) as file:
        frames = file.frames
        if frames >= _MOST_FRAMES:
            frames = sum(len(block) for block in _blocks(file, None, path))
        _check_frames(frames, path)
        return AudioInfo(frames, file.samplerate, file.channels, frames / file.samplerate)


def read(
    path: str | os.PathLike, sample_rate: int = 16_000, max_seconds: float | None = None
) -> np.ndarray:
    """Decodes a file, mixes its channels to their mean and resamples (soxr, quality HQ).

    Whether the samples are worth using (silence, NaN) is for `check_waveform` to say.

    Args:
      path: wav, flac, ogg, opus, mp3, aiff or another of `containers.ACCEPTED`; any rate and bit
        depth.
      sample_rate: of the result, Hz.
      max_seconds: no more than this much of the beginning is decoded; None: all of it, up to
        `LONGEST_SECONDS`.

    Returns:
      (samples,) float32, full scale at 1.

    Raises:
      AudioError: missing, empty, truncated, damaged, not audio, or too long to be read whole.
    """
    if max_seconds is not None and not max_seconds > 0:
        raise AudioError(path, f"max_seconds is {max_seconds}; give a time above 0")
    with _open(path) as file:
        source_rate = file.samplerate
        known = file.frames < _MOST_FRAMES
        if max_seconds is not None:
            wanted = max(1, round(max_seconds * source_rate))
            wanted = min(file.frames, wanted) if known else wanted
        else:
            longest = round(LONGEST_SECONDS * source_rate)
            wanted = file.frames if known else longest + 1
            if known:
                _check_length(file.frames, source_rate, path)
        blocks = list(_blocks(file, wanted, path))
    waveform = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    if max_seconds is None:
        _check_length(len(waveform), source_rate, path)
    _check_frames(len(waveform), path)
    return resample(waveform, source_rate, sample_rate, path)


def _check_length(frames: int, sample_rate: int, path: str | os.PathLike) -> None:
    if frames > round(LONGEST_SECONDS * sample_rate):
        raise AudioError(
            path,
            f"lasts {frames / sample_rate / 3600:.1f} h, too long to be read whole; "
            "set max_seconds, or cut the file into parts",
        )


def resample(
    waveform: np.ndarray, source_rate: float, sample_rate: int, path: str | os.PathLike
) -> np.ndarray:
    """Resamples a waveform (soxr, quality HQ).

    Args:
      waveform: (samples,) float32.
      source_rate: its rate, Hz.
      sample_rate: of the result, Hz.
      path: of the recording, or another name for it, for the error.

    Returns:
      (samples,) float32, contiguous.

    Raises:
      AudioError: a rate that is not above 0 or at which the waveform lasts for weeks, or so few
        samples that none are left.
    """
    if not 0 < source_rate < math.inf:
        raise AudioError(path, f"has a sample rate of {source_rate} Hz; give one above 0")
    if waveform.size / source_rate > _WEEKS:
        raise AudioError(
            path, f"has {waveform.size} samples at a sample rate of {source_rate:g} Hz, which "
            "would last for weeks; give the rate at which it was recorded"
        )  # fmt: skip
    if source_rate == sample_rate:
        return waveform
    resampled = soxr.resample(waveform, source_rate, sample_rate, quality="HQ")
    if resampled.size == 0:
        few = f"holds {waveform.size} samples at {source_rate:g} Hz, too few to be resampled; "
        raise AudioError(path, few + "record it again or remove it")
    return np.ascontiguousarray(resampled, dtype=np.float32)


def check_waveform(waveform: np.ndarray, path: str | os.PathLike) -> None:
    """Refuses a waveform that cannot carry any information.

    Args:
      waveform: (samples,) float.
      path: named in the error.

    Raises:
      AudioError: empty, a single sample, NaN or infinite, out of any scale, or all zero.
    """
    if waveform.ndim != 1:
        raise AudioError(path, f"has shape {waveform.shape}; give one channel, (samples,)")
    if waveform.size == 0:
        raise AudioError(path, "holds no samples; record it again or remove it")
    if waveform.size == 1:
        raise AudioError(path, "holds a single sample; record it again or remove it")
    # The extremes are NaN if any sample is: no boolean copy of a long waveform is needed.
    low, high = waveform.min(), waveform.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        index = int(np.argmin(np.isfinite(waveform)))
        raise AudioError(
            path,
            f"sample {index} is {waveform[index]}; repair the file (write it as 16-bit integers) "
            "or remove it",
        )
    if max(-low, high) > LARGEST_SAMPLE:
        raise AudioError(
            path,
            f"reaches {max(-low, high):.3g} where full scale is 1; the file is damaged or its "
            "sample format is misread: write it as 16-bit integers or remove it",
        )
    if low == 0 and high == 0:
        raise AudioError(
            path, "is digital silence (every sample is 0); record it again or remove it"
        )


class _Forwards(soundfile.SoundFile):
    """A file that is read from beginning to end.

    soundfile would seek to where it is after each block, which fails at the end of a flac file of
    unknown length.
    """

    def seekable(self) -> bool:
        return False


def _open(path: str | os.PathLike) -> soundfile.SoundFile:
    """Opens for reading; every way in which a header can be bad raises AudioError."""
    path = Path(path)
    try:
        if not path.exists():
            raise AudioError(
                path, f"no such file{_spelt_otherwise(path)}; correct the path or remove the row"
            )
        if not path.is_file():
            raise AudioError(path, "is not a file; give the path of an audio file")
        size = path.stat().st_size
        if size == 0:
            raise AudioError(path, "is empty (0 bytes); copy it again or remove it")
        with path.open("rb") as raw:
            found = extent(raw, size)
        # As bytes, since a name need not be text.
        content = os.fsencode(path) if found.content is None else io.BytesIO(found.content)
        file = _Forwards(content)
    except ContainerError as error:
        raise AudioError(path, str(error)) from error
    except AudioError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a path that cannot be encoded
        raise AudioError(path, f"cannot be opened ({error}); check path and rights") from error
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: headerless .raw
        raise AudioError(
            path,
            f"is not audio that libsndfile can read ({_reason(error)}); {CONVERT}, or copy it "
            "again",
        ) from error
    if problem := _problem(file, found):
        file.close()
        raise AudioError(path, problem)
    return file


def _spelt_otherwise(path: Path) -> str:
    """A file that is there under the name in another system's writing, in words; "" if none is."""
    text = os.fspath(path)
    slashes = text.replace("\\", "/")
    for other in (slashes, *(unicodedata.normalize(form, slashes) for form in ("NFC", "NFD"))):
        if other != text and os.path.isfile(other):
            how = "with / for \\" if "\\" in text else "its letters with marks are coded otherwise"
            return f" (there is '{other}': {how})"
    return ""


def _problem(file: soundfile.SoundFile, found: Extent) -> str | None:
    """What is wrong with a file that opened."""
    if file.format not in ACCEPTED:
        return f"is a {file.format} file, which does not show whether it is whole; {CONVERT}"
    if not SAMPLE_RATES[0] <= file.samplerate <= SAMPLE_RATES[1]:
        return (
            f"claims a sample rate of {file.samplerate} Hz, outside {SAMPLE_RATES[0]} to "
            f"{SAMPLE_RATES[1]} Hz; correct its header or remove it"
        )
    if found.samples is not None and abs(file.frames - found.samples) > _MPEG_SLACK:
        return f"would be read as {file.frames} samples and holds {found.samples}; {CONVERT}"
    return None


def _check_frames(frames: int, path: str | os.PathLike) -> None:
    if frames <= 0:
        raise AudioError(path, "has a header and no samples; record it again or remove it")


def _blocks(file: soundfile.SoundFile, wanted: int | None, path) -> Iterator[np.ndarray]:
    """Decodes `wanted` frames (None: all) block by block and mixes their channels to their mean.

    So memory follows the data, not the header.

    Yields:
      (samples,) float32.

    Raises:
      AudioError: decoding fails, or ends before the number that the header promises.
    """
    got, wanted = 0, file.frames if wanted is None else wanted
    try:
        while got < wanted:
            block = file.read(min(_BLOCK_FRAMES, wanted - got), dtype="float32", always_2d=True)
            if len(block) == 0:
                break
            got += len(block)
            yield block[:, 0] if block.shape[1] == 1 else block.mean(axis=1)
    except soundfile.LibsndfileError as error:
        raise AudioError(
            path,
            f"is damaged or truncated: decoding fails after {got} samples ({_reason(error)}); "
            "copy it again or remove it",
        ) from error
    if got < wanted and file.frames < _MOST_FRAMES:
        raise AudioError(
            path,
            f"is truncated: {got} of the {file.frames} samples that its header promises are "
            "there; copy it again or remove it",
        )


def _reason(error: Exception) -> str:
    """The library's own words, if it has any."""
    text = getattr(error, "error_string", None) or str(error)
    return text.strip().rstrip(".:") or "the decoder lost its place"
