"""Audio files to mono float32 waveforms, with an error that explains itself for every bad file."""

import dataclasses
import os
import struct
from pathlib import Path

import numpy as np
import soundfile
import soxr

from medalign_jax.errors import UserError

LONGEST_SECONDS = 3600.0
"""Longest file that `read` decodes without `max_seconds`: an hour at 16 kHz is 230 MB."""

LARGEST_SAMPLE = 1e9
"""Beyond this a power spectrum may overflow float32; integers kept as floats stay far below."""

SAMPLE_RATES = (1_000, 384_000)
"""Plausible sample rates, Hz, lowest and highest; others come from damaged headers."""

_BLOCK_FRAMES = 1 << 20
_MP3_SLACK_FRAMES = 2 * 1152  # without a Xing header the length is an estimate
_UNKNOWN_RIFF_SIZES = (0, 0x7FFFFFFF, 0xFFFFFFFF)  # left by encoders that write to a pipe


class AudioError(UserError):
    """An audio file or waveform that cannot be used.

    Attributes:
        path: the file.
        reason: what is wrong with it and what to do, without the path.
    """

    def __init__(self, path: str | os.PathLike, reason: str):
        """Joins path and reason into the message."""
        super().__init__(f"{os.fspath(path)}: {reason}")
        self.path = os.fspath(path)
        self.reason = reason

    def __reduce__(self):
        """Lets the error cross from a loading process to the main one."""
        return type(self), (self.path, self.reason)


@dataclasses.dataclass(frozen=True)
class AudioInfo:
    """What a file's header says.

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
    """Reads a file's header; decodes no sample.

    Truncation of wav and ogg shows here; that of flac and mp3 only when `read` decodes them.

    Raises:
        AudioError: missing, empty, truncated or not audio.
    """
    with _open(path) as file:
        return AudioInfo(file.frames, file.samplerate, file.channels, file.frames / file.samplerate)


def read(
    path: str | os.PathLike, sample_rate: int = 16_000, max_seconds: float | None = None
) -> np.ndarray:
    """Decodes a file, mixes its channels to their mean and resamples (soxr, quality HQ).

    Whether the samples are worth using (silence, NaN) is for `check_waveform` to say.

    Args:
        path: wav, flac, ogg, mp3 or another format of libsndfile; any rate and bit depth.
        sample_rate: of the result, Hz.
        max_seconds: no more than this much of the beginning is decoded; None: all of it, up to
            `LONGEST_SECONDS`.

    Returns:
        (samples,) float32, full scale at 1.

    Raises:
        AudioError: missing, empty, truncated, not audio, or too long to be read whole.
    """
    if max_seconds is not None and not max_seconds > 0:
        raise AudioError(path, f"max_seconds is {max_seconds}; give a time above 0")
    with _open(path) as file:
        source_rate = file.samplerate
        seconds = file.frames / source_rate
        if max_seconds is None and seconds > LONGEST_SECONDS:
            raise AudioError(
                path,
                f"lasts {seconds / 3600:.1f} h, too long to be read whole; "
                "set max_seconds, or cut the file into parts",
            )
        wanted = file.frames
        if max_seconds is not None:
            wanted = min(wanted, max(1, round(max_seconds * source_rate)))
        waveform = _decode_mono(file, wanted, path)
    if source_rate == sample_rate:
        return waveform
    resampled = soxr.resample(waveform, source_rate, sample_rate, quality="HQ")
    if resampled.size == 0:
        raise AudioError(
            path,
            f"holds {waveform.size} samples at {source_rate} Hz, too few to be resampled; "
            "record it again or remove it",
        )
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


def _open(path: str | os.PathLike) -> soundfile.SoundFile:
    """Opens for reading; every way in which a header can be bad raises AudioError."""
    path = Path(path)
    try:
        if not path.exists():
            raise AudioError(path, "no such file; correct the path or remove the row")
        if not path.is_file():
            raise AudioError(path, "is not a file; give the path of an audio file")
        size = path.stat().st_size
        if size == 0:
            raise AudioError(path, "is empty (0 bytes); copy it again or remove it")
        _check_complete(path, size)
        file = soundfile.SoundFile(path)
    except AudioError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a path that cannot be encoded
        raise AudioError(path, f"cannot be opened ({error}); check path and rights") from error
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: headerless .raw
        raise AudioError(
            path,
            f"is not audio that libsndfile can read ({_reason(error)}); "
            "convert it to wav, flac, ogg or mp3, or copy it again",
        ) from error
    problem = None
    if not SAMPLE_RATES[0] <= file.samplerate <= SAMPLE_RATES[1]:
        problem = (
            f"claims a sample rate of {file.samplerate} Hz, outside {SAMPLE_RATES[0]} to "
            f"{SAMPLE_RATES[1]} Hz; correct its header or remove it"
        )
    elif file.frames <= 0:
        problem = "has a header and no samples; record it again or remove it"
    if problem:
        file.close()
        raise AudioError(path, problem)
    return file


def _decode_mono(file: soundfile.SoundFile, wanted: int, path) -> np.ndarray:
    """Decodes `wanted` frames block by block, so that memory follows the data, not the header."""
    blocks, got = [], 0
    try:
        while got < wanted:
            block = file.read(min(_BLOCK_FRAMES, wanted - got), dtype="float32", always_2d=True)
            if len(block) == 0:
                break
            got += len(block)
            blocks.append(block[:, 0] if block.shape[1] == 1 else block.mean(axis=1))
    except soundfile.LibsndfileError as error:
        raise AudioError(
            path,
            f"is damaged or truncated: decoding fails after {got} of {file.frames} samples "
            f"({_reason(error)}); copy it again or remove it",
        ) from error
    slack = _MP3_SLACK_FRAMES if file.format in ("MP3", "MPEG") and got else 0
    if got + slack < wanted:
        raise AudioError(
            path,
            f"is truncated: {got} of the {file.frames} samples that its header promises are "
            "there; copy it again or remove it",
        )
    return np.concatenate(blocks)


def _reason(error: Exception) -> str:
    """The library's own words, if it has any."""
    text = getattr(error, "error_string", None) or str(error)
    return text.strip().rstrip(".:") or "the decoder lost its place"


def _check_complete(path: Path, size: int) -> None:
    """Finds wav and ogg files that were cut off, which libsndfile reads without a word.

    Raises:
        AudioError: the file ends before its own structure says that it does.
    """
    with path.open("rb") as file:
        magic = file.read(12)
        if magic[:4] == b"RIFF" and magic[8:] == b"WAVE":
            promised, found = _wav_data_bytes(file, size)
            if found < promised:
                raise AudioError(
                    path,
                    f"is truncated: its header promises {promised} bytes of samples and {found} "
                    "are there; copy it again or remove it",
                )
        elif magic[:4] == b"OggS" and not _ogg_has_end(file, size):
            raise AudioError(
                path,
                "is truncated: the end of its ogg stream is missing; copy it again or remove it",
            )


def _wav_data_bytes(file, size: int) -> tuple[int, int]:
    """Bytes in the data chunk, promised and found; (0, 0) if none is declared with a size."""
    while len(header := file.read(8)) == 8:
        name, length = struct.unpack("<4sI", header)
        if name == b"data":
            if length in _UNKNOWN_RIFF_SIZES:
                return 0, 0
            return length, min(length, size - file.tell())
        file.seek(length + length % 2, os.SEEK_CUR)
    return 0, 0


def _ogg_has_end(file, size: int) -> bool:
    """Whether the last page carries the end-of-stream flag (RFC 3533, section 6) and is whole."""
    file.seek(max(0, size - 2 * 65_307))  # the largest page is 65,307 bytes
    tail = file.read()
    start = tail.rfind(b"OggS\0")
    if start < 0 or len(tail) < start + 27:
        return False
    segments = tail[start + 26]
    table = tail[start + 27 : start + 27 + segments]
    whole = len(table) == segments and len(tail) >= start + 27 + segments + sum(table)
    return whole and bool(tail[start + 5] & 0x04)
