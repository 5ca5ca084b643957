"""How much sound a file holds by its own structure, before anything of it is decoded.

libsndfile reads what is there and says nothing of what is missing: half of a file is half of a
recording to it. Here every kind of file that `audio.io` accepts is asked how long it has to be.
"""

from __future__ import annotations

import dataclasses
import mmap
import struct
from collections.abc import Iterator
from typing import BinaryIO

from medalign_jax.audio import mpeg, ogg

ACCEPTED = (
    "WAV",
    "WAVEX",
    "RF64",
    "W64",
    "AIFF",
    "AU",
    "CAF",
    "NIST",
    "FLAC",
    "OGG",
    "MP3",
    "MPEG",
)
"""libsndfile's names of the containers whose length is checked: here, or (FLAC) there."""

_UNKNOWN = (0x7F00_0000, 0x8000_0000, 0x1_0000_0000)  # what encoders write when they cannot go back
_NEAR = 1 << 16  # less the length of headers, or rounded to whole blocks
_MOST_CHUNKS = 10_000
_FILLING = 8  # bytes that may fill up behind the samples
_FLAC = b"fLaC"
_W64_RIFF, _W64_DATA = b"riff\x2e\x91\xcf\x11", b"data\xf3\xac\xd3\x11"


class ContainerError(ValueError):
    """Why a file is not a whole recording; ``str`` is a reason without the path."""


@dataclasses.dataclass(frozen=True)
class Extent:
    """What the structure says.

    Attributes:
      content: bytes for libsndfile to read in the file's place, where it would misread that.
      samples: about how many a channel has; None where libsndfile reads it from the header.
    """

    content: bytes | None = None
    samples: int | None = None


@dataclasses.dataclass(frozen=True)
class _Sound:
    """Where the samples of an uncompressed file lie.

    Attributes:
      start: place of the first byte.
      promised: bytes; 0 and the sizes of `_is_unknown` may stand for "as long as it lasts".
      field: place and `struct` format of the number that says so, where libsndfile takes a 0 as it
        stands.
      chunks: order of the bytes where further chunks may follow, "<" or ">"; else "".
      to_the_end: whether libsndfile takes all that follows for samples, whatever is promised.
    """

    start: int
    promised: int
    field: tuple[int, str] | None = None
    chunks: str = ""
    to_the_end: bool = False


def extent(file: BinaryIO, size: int) -> Extent:
    """Looks through a file's structure.

    Args:
      file: opened for reading, at its beginning.
      size: bytes, above 0.

    Raises:
      ContainerError: it is cut off, damaged, or holds more than one recording.
    """
    magic = file.read(16)
    if len(magic) < 16:
        return Extent()  # too short to be any kind; libsndfile says so
    if magic[:4] == b"OggS" or magic[:3] == b"ID3" or (magic[0] == 0xFF and magic[1:2] >= b"\xe0"):
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _ogg(data) if magic[:4] == b"OggS" else _mpeg(data)
    if magic[:4] == _FLAC:
        _check_flac(file)
    sound = _sound(file, magic)
    if sound is None or _is_unknown(sound.promised):
        return Extent()
    there = size - sound.start
    if there < 0:
        raise ContainerError(
            f"is truncated: its header promises samples from byte {sound.start} on, and it has "
            f"{size}; copy it again or remove it"
        )
    if sound.promised == 0 and sound.field and not _is_silent(file, sound, size):
        return Extent(content=_with_size(file, sound, there))
    if sound.promised - there > 1:  # one byte: some count the byte that fills up to an even number
        raise ContainerError(
            f"is truncated: its header promises {sound.promised} bytes of samples and "
            f"{there} are there; copy it again or remove it"
        )
    _check_behind(file, size, sound, magic[:4])
    return Extent()


def _check_behind(file: BinaryIO, size: int, sound: _Sound, magic: bytes) -> None:
    """Refuses what follows the samples, where it is another recording or would be heard."""
    end = sound.start + sound.promised
    file.seek(end)
    if (place := file.read(_FILLING + 4).find(magic)) >= 0:
        raise _second(end + place)
    for name, _, place in _chunks(file, end + end % 2, sound.chunks) if sound.chunks else ():
        if name == magic:  # behind lists of tags, say
            raise _second(place - 8)
    if sound.to_the_end and size - end > _FILLING:
        raise ContainerError(
            f"holds {size - end} bytes behind its samples, which would be heard as such; {CONVERT}"
        )


def _second(place: int) -> ContainerError:
    words = f"holds a second recording from byte {place} on, which would not be read"
    return ContainerError(f"{words}; cut it there into two files")


def _check_flac(file: BinaryIO) -> None:
    """Refuses a second stream; the block STREAMINFO of 34 bytes comes first in each."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for first in (b"\0\0\0\x22", b"\x80\0\0\x22"):
            if (place := data.find(_FLAC + first, len(_FLAC))) >= 0:
                raise _second(place)


def _is_unknown(promised: int) -> bool:
    """Whether a length is one of those that stand for "as long as it lasts"."""
    return promised >= 1 << 60 or any(abs(promised - size) <= _NEAR for size in _UNKNOWN)


def _sound(file: BinaryIO, magic: bytes) -> _Sound | None:
    """Where the samples lie; None for a kind of file that is not looked into here."""
    kind, form = magic[:4], magic[8:12]
    if kind in (b"RIFF", b"RIFX") and form == b"WAVE":
        return _riff_sound(file, b"data", "<" if kind == b"RIFF" else ">")
    if kind == b"RF64" and form == b"WAVE":
        return _rf64_sound(file)
    if kind == b"FORM" and form in (b"AIFF", b"AIFC"):
        return _riff_sound(file, b"SSND", ">")
    if kind in (b".snd", b"dns."):
        order = ">" if kind == b".snd" else "<"
        start, promised = struct.unpack(order + "II", magic[4:12])
        return _Sound(start, promised, (8, order + "I"))
    if magic[:8] == _W64_RIFF:
        return _w64_sound(file)
    if kind == b"caff":
        return _caf_sound(file)
    return _nist_sound(file) if magic[:7] == b"NIST_1A" else None


def _chunks(file: BinaryIO, place: int, order: str) -> Iterator[tuple[bytes, int, int]]:
    """Name, length and place of the content of each chunk of a RIFF or AIFF file.

    Up to the end, to what has no name of a chunk, or to more chunks than there ever are.
    """
    for _ in range(_MOST_CHUNKS):
        file.seek(place)
        header = file.read(8)
        if len(header) < 8 or not (header[:4].isascii() and header[:4].decode().isprintable()):
            return
        name, length = struct.unpack(order + "4sI", header)
        yield name, length, place + 8
        place += 8 + length + length % 2


def _riff_sound(file: BinaryIO, wanted: bytes, order: str) -> _Sound | None:
    for name, length, place in _chunks(file, 12, order):
        if name == wanted:
            return _Sound(place, length, (place - 4, order + "I"), order)
    return None


def _rf64_sound(file: BinaryIO) -> _Sound | None:
    """The chunk ds64 holds the length, as 64 bits; all set are as good as none."""
    field, declared = None, 0
    for name, length, place in _chunks(file, 12, "<"):
        if name == b"ds64" and len(header := file.read(16)) == 16:
            field, declared = (place + 8, "<Q"), struct.unpack("<QQ", header)[1]
        if name == b"data" and length == 0xFFFF_FFFF:
            return _Sound(place, 0 if declared >= 1 << 60 else declared, field, "<")
        if name == b"data":
            return _Sound(place, length, chunks="<")
    return None


def _w64_sound(file: BinaryIO) -> _Sound | None:
    """Chunks have names of 16 bytes, lengths of 64 bits (header included), and steps of 8."""
    place = 40  # after the names "riff" and "wave"
    while True:
        file.seek(place)
        header = file.read(24)
        if len(header) < 24:
            return None
        (length,) = struct.unpack("<q", header[16:])
        if header[:8] == _W64_DATA:
            return _Sound(place + 24, max(length - 24, 0), to_the_end=True)
        if length < 24:
            return None
        place += length + -length % 8


def _caf_sound(file: BinaryIO) -> _Sound | None:
    """Chunks have names of 4 bytes and lengths of 64 bits; -1 is "to the end of the file"."""
    place = 8
    for _ in range(_MOST_CHUNKS):
        file.seek(place)
        header = file.read(12)
        if len(header) < 12:
            return None
        name, length = struct.unpack(">4sq", header)
        place += 12
        if name == b"data":
            return _Sound(place, 1 << 60 if length == -1 else max(length, 0))
        if length < 0:
            return None
        place += length
    return None


def _nist_sound(file: BinaryIO) -> _Sound | None:
    """A header of text; compressed samples (shorten) are not ours to count."""
    file.seek(0)
    lines = file.read(1024).decode("ascii", "replace").split("\n")
    try:
        start = int(lines[1])
        fields = {line.split(" ", 2)[0]: line.split(" ", 2)[2] for line in lines if " -i " in line}
        promised = (int(fields["sample_count"]) * int(fields["channel_count"])
                    * int(fields["sample_n_bytes"]))  # fmt: skip
        return _Sound(start, promised, to_the_end=True)
    except (IndexError, ValueError, KeyError):
        return None


def _is_silent(file: BinaryIO, sound: _Sound, size: int) -> bool:
    """Whether a length of 0 is meant: nothing follows, or chunks up to the last byte do."""
    end = sound.start
    for _, length, place in _chunks(file, sound.start, sound.chunks) if sound.chunks else ():
        end = place + length
    return abs(end - size) <= 1  # a byte that fills up may be there or not


def _with_size(file: BinaryIO, sound: _Sound, there: int) -> bytes:
    """The file with the length of its samples put in."""
    file.seek(0)
    content = bytearray(file.read())
    place, kind = sound.field
    struct.pack_into(kind, content, place, there if "Q" in kind else min(there, 0xFFFF_FFFF))
    return bytes(content)


def _ogg(data: mmap.mmap) -> Extent:
    try:
        return Extent(content=ogg.checked(data))
    except ogg.OggError as error:
        raise ContainerError(f"{error}; {remedy(str(error))}") from error


def _mpeg(data: mmap.mmap) -> Extent:
    try:
        recording = mpeg.parse(data)
    except mpeg.MpegError as error:
        raise ContainerError(f"{error}; {remedy(str(error))}") from error
    if recording is None or recording.declared == len(recording.frames):
        return Extent()
    if recording.frames[0].layer != 3:
        return Extent(samples=recording.samples)
    return Extent(mpeg.with_length(data, recording), recording.samples)


def remedy(reason: str) -> str:
    """What helps: a copy where bytes are lost, another file where they are there."""
    if reason.startswith(("is truncated", "is damaged")):
        return "copy it again or remove it; to keep what can be read of it, " + CONVERT
    return CONVERT


CONVERT = "convert it to wav, for example with ffmpeg -i FILE NEW.wav"
