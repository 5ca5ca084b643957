"""Sound and pictures of recordings as data URIs, for the report page."""

from __future__ import annotations

import base64
import io
import struct
import zlib

import numpy as np
import soundfile
import soxr

WIDTH = 400  # of a waveform's box
_MP3_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)

# Black over violet and orange to pale yellow: lightness rises evenly, so it reads in grey too.
_ANCHORS = np.array(
    [[8, 6, 20], [55, 18, 95], [125, 36, 120], [195, 62, 88], [240, 125, 50], [250, 200, 110],
     [253, 250, 205]], np.float64,
)  # fmt: skip


def audio_uri(waveform: np.ndarray, sample_rate: int) -> str:
    """A mono waveform as an MP3 data URI, its peak brought to 0.9.

    Every browser plays MP3, and a page with twenty sounds stays small: 2 to 5 kB per second, the
    coding's own noise 50 dB below heart and lung sounds.

    Args:
      waveform: (samples,) float, any level.
      sample_rate: Hz; a rate that MP3 does not have becomes the next higher one.

    Raises:
      ValueError: empty, more than one channel, or not finite.
    """
    waveform = _check(waveform)
    peak = np.abs(waveform).max()
    scaled = waveform * (0.9 / peak) if peak > 0 else waveform
    rate = next((rate for rate in _MP3_RATES if rate >= sample_rate), _MP3_RATES[-1])
    if rate != sample_rate:
        scaled = np.clip(soxr.resample(scaled, sample_rate, rate), -1.0, 1.0)
    buffer = io.BytesIO()
    soundfile.write(
        buffer, scaled, rate, format="MP3", compression_level=0.3, bitrate_mode="VARIABLE"
    )
    return _uri("audio/mpeg", buffer.getvalue())


def waveform_path(waveform: np.ndarray, height: int) -> str:
    """The envelope (least and greatest sample of each of 400 stretches) as an SVG path.

    Its box is `WIDTH` by `height`.
    """
    waveform = _check(waveform)
    edges = np.linspace(0, len(waveform), min(WIDTH, len(waveform)) + 1).astype(int)[:-1]
    low, high = np.minimum.reduceat(waveform, edges), np.maximum.reduceat(waveform, edges)
    scale = (height / 2 - 1) / (np.abs(waveform).max() or 1.0)
    x = (np.arange(len(edges)) + 0.5) * WIDTH / len(edges)
    return "".join(
        f"M{a:.1f} {height / 2 - t * scale:.1f}V{height / 2 - b * scale + 0.4:.1f}"
        for a, t, b in zip(x, high, low, strict=True)
    )


def spectrogram_uri(features: np.ndarray) -> str:
    """A (frames, bands) log-mel picture as a PNG data URI: time to the right, pitch upwards."""
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or not features.size or not np.all(np.isfinite(features)):
        raise ValueError(f"log-mel features of shape {features.shape} cannot be drawn")
    low, high = features.min(), features.max()
    levels = (features - low) / (high - low) if high > low else np.zeros_like(features)
    return _uri("image/png", png(np.round(levels.T[::-1] * 255).astype(np.uint8), palette()))


def palette() -> np.ndarray:
    """(256, 3) uint8 colours, dark to light."""
    at = np.linspace(0, len(_ANCHORS) - 1, 256)
    columns = [np.interp(at, np.arange(len(_ANCHORS)), _ANCHORS[:, c]) for c in range(3)]
    return np.round(np.stack(columns, axis=1)).astype(np.uint8)


def png(indices: np.ndarray, colours: np.ndarray) -> bytes:
    """An 8-bit palette PNG (W3C PNG specification, colour type 3).

    Args:
      indices: (height, width) uint8 into the palette.
      colours: (up to 256, 3) uint8.
    """
    height, width = indices.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), indices], axis=1)  # filter 0
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", colours.astype(np.uint8).tobytes()),
        (b"IDAT", zlib.compress(rows.tobytes(), 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _check(waveform: np.ndarray) -> np.ndarray:
    waveform = np.asarray(waveform, np.float32)
    if waveform.ndim != 1 or not len(waveform) or not np.all(np.isfinite(waveform)):
        raise ValueError(f"a waveform to be shown is finite and (samples,); got {waveform.shape}")
    return waveform
