"""The frames of an MPEG audio file (ISO 11172-3, 13818-3), counted: no other length is certain.

An MP3 file is a row of frames. A first frame without sound may say how many follow (the headers of
Xing and LAME, "Xing" or "Info", and of Fraunhofer, "VBRI"); without it, and in spite of a "VBRI",
libsndfile guesses from the bit rate of the first frame.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator

_KBITS = {  # (MPEG 1, layer) -> bit rate by index, kbit/s
    (True, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
_HEADER = 4
_LONGEST_TAIL = 1 << 17


class MpegError(ValueError):
    """Why the frames are not those of one whole recording; ``str`` has the reason alone."""


@dataclasses.dataclass(frozen=True)
class Frame:
    """One frame.

    Attributes:
      start, size: bytes.
      kind: version, layer and sample rate, which a recording keeps from frame to frame.
      samples: per channel.
      mono: whether there is one channel.
    """

    start: int
    size: int
    kind: tuple[int, int, int]
    samples: int
    mono: bool

    @property
    def layer(self) -> int:
        """1, 2 or 3, as in MP3."""
        return self.kind[1]

    @property
    def end(self) -> int:
        """Where the next one starts."""
        return self.start + self.size


@dataclasses.dataclass(frozen=True)
class Recording:
    """All frames of a file.

    Attributes:
      frames: those with sound, in order.
      declared: how many the file says that there are, in a way that libsndfile reads; else None.
    """

    frames: tuple[Frame, ...]
    declared: int | None

    @property
    def samples(self) -> int:
        """Per channel, with what encoder and decoder add at the ends."""
        return sum(frame.samples for frame in self.frames)


def parse(data: bytes) -> Recording | None:
    """Counts the frames of a file.

    Args:
      data: the whole file.

    Returns:
      None where the file does not begin with MPEG audio (tags before it do not count).

    Raises:
      MpegError: it ends inside a frame or before the number that it declares, holds more frames
        than it declares, or bytes between frames that belong to none.
    """
    frames = tuple(_frames(data))
    declared, kind = _declared(data, frames[0]) if frames else (None, "")
    if len(frames) < 2 and not kind:
        return None  # four bytes that look like a header do not make a recording
    end = frames[-1].end
    if end > len(data):
        raise MpegError(f"is truncated: its last frame lacks {end - len(data)} bytes")
    frames = frames[1:] if kind else frames
    if not frames:
        raise MpegError("is truncated: behind the frame that has no sound there is none")
    if declared is not None and declared > len(frames) + 1:  # some count the silent frame too
        raise MpegError(
            f"is truncated: {len(frames)} of the {declared} frames that it declares are there"
        )
    if declared is not None and declared < len(frames) - 1:
        raise MpegError(
            f"holds {len(frames)} frames and declares {declared}: several files in one?"
        )
    return Recording(frames, declared if kind == "Xing" else None)


def with_length(data: bytes, recording: Recording) -> bytes:
    """The frames of layer III behind one without sound that declares how many there are.

    The decoder then takes off its own delay, 529 samples at the beginning.
    """
    first = recording.frames[0]
    header = bytearray(data[first.start : first.start + _HEADER])
    header[1] |= 1  # no checksum follows
    header[2] = 9 << 4 | header[2] & 0x0F  # a bit rate at which the tag fits, whatever the kind
    silent = header + bytes(_frame(bytes(header), 0).size - _HEADER)
    place = _place_of_xing(first)
    tag = b"Info" + struct.pack(">II", 1, len(recording.frames))
    silent[place : place + len(tag)] = tag
    return bytes(silent) + b"".join(data[f.start : f.end] for f in recording.frames)


def _frames(data: bytes) -> Iterator[Frame]:
    """Frames from the first on; the last may reach beyond the data.

    Raises:
      MpegError: bytes in between that are neither frames nor tags.
    """
    place = _after_tags(data, 0)
    frame = _frame(data, place)
    while frame is not None:
        yield frame
        place = _after_tags(data, frame.end)
        following = _frame(data, place)
        if following is None or following.kind != frame.kind:
            if (lost := _until_next(data, place, frame.kind)) > 0:
                raise MpegError(
                    f"is damaged: {lost} bytes at byte {place} are not frames of its sound"
                )
            if following is not None and _frame(data, following.end) is not None:
                raise MpegError(f"changes its sample rate or kind at byte {place}")
            return
        frame = following


def _frame(data: bytes, start: int) -> Frame | None:
    """The frame whose header stands at `start`, if one does."""
    header = data[start : start + _HEADER]
    if len(header) < _HEADER or header[0] != 0xFF or header[1] & 0xE0 != 0xE0:
        return None
    version, layer = header[1] >> 3 & 3, 4 - (header[1] >> 1 & 3)
    bits, rate, padding = header[2] >> 4, header[2] >> 2 & 3, header[2] >> 1 & 1
    if version == 1 or layer == 4 or rate == 3 or bits in (0, 15):
        return None
    kbits, hertz = _KBITS[version == 3, layer][bits], _RATES[version][rate]
    samples = 384 if layer == 1 else 576 if layer == 3 and version != 3 else 1152
    slot = 4 if layer == 1 else 1
    size = (samples // 8 // slot * kbits * 1000 // hertz + padding) * slot
    return Frame(start, size, (version, layer, rate), samples, header[3] >> 6 == 3)


def _until_next(data: bytes, start: int, kind: tuple[int, int, int]) -> int:
    """Bytes until two frames of that kind follow each other; 0 if none do in what is left.

    More than `_LONGEST_TAIL` bytes are not searched: no tag at the end is as long.
    """
    place, stop = start, min(start + _LONGEST_TAIL, len(data))
    while (place := data.find(b"\xff", place + 1, stop)) >= 0:
        found = _frame(data, place)
        if found is not None and found.kind == kind:
            after = _frame(data, found.end)
            if after is not None and after.kind == kind:
                return place - start
    return len(data) - start if stop < len(data) else 0


def _after_tags(data: bytes, start: int) -> int:
    """Past the tags of ID3 version 2 and APE that stand there."""
    while True:
        if data[start : start + 3] == b"ID3" and len(data) >= start + 10:
            size = 0
            for byte in data[start + 6 : start + 10]:
                size = size << 7 | byte & 0x7F
            start += 10 + size + (10 if data[start + 5] & 0x10 else 0)
        elif data[start : start + 8] == b"APETAGEX" and len(data) >= start + 32:
            start += 32 + int.from_bytes(data[start + 12 : start + 16], "little")
        else:
            return start


def _place_of_xing(frame: Frame) -> int:
    """Where the headers of Xing and LAME stand in a frame: after layer III's side information."""
    first_version = frame.kind[0] == 3
    if frame.mono:
        return _HEADER + (17 if first_version else 9)
    return _HEADER + (32 if first_version else 17)


def _declared(data: bytes, frame: Frame) -> tuple[int | None, str]:
    """How many frames the first one declares, and how: "Xing", "VBRI", or "" (it has sound)."""
    content = data[frame.start : frame.end]
    for kind, place, count in (("Xing", _place_of_xing(frame), 8), ("VBRI", _HEADER + 32, 14)):
        name = content[place : place + 4]
        if name == kind.encode() or (kind == "Xing" and name == b"Info"):
            tag = content[place : place + 18].ljust(18, b"\0")
            has_count = kind == "VBRI" or tag[7] & 1
            return struct.unpack_from(">I", tag, count)[0] or None if has_count else None, kind
    return None, ""
