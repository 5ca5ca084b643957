"""The pages of an Ogg file (RFC 3533): whether all are there, whole, and of one recording."""

from __future__ import annotations

import dataclasses
import struct
import zlib
from collections.abc import Iterator

_FIRST, _LAST = 2, 4  # flags of a stream's first and last page
_HEADER = 27
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


class OggError(ValueError):
    """Why the pages are not those of one whole recording; ``str`` has the reason alone."""


@dataclasses.dataclass(frozen=True)
class Page:
    """One page.

    Attributes:
      start, end: bytes.
      flags: of its header.
      serial: of its stream.
      number: in its stream.
      open: whether its last packet goes on in the next page.
    """

    start: int
    end: int
    flags: int
    serial: int
    number: int
    open: bool


def checked(data: bytes) -> bytes | None:
    """Checks every page of a file.

    Args:
      data: the whole file.

    Returns:
      None if libsndfile can read it as it is; else, where only the flag is missing that ends a
      stream (some encoders do not set it), the same with the flag.

    Raises:
      OggError: a page is damaged, missing or cut off, or one recording follows another.
    """
    pages = list(_pages(data))
    number: dict[int, int] = {}
    for before, page in zip([None, *pages], pages, strict=False):
        first = bool(page.flags & _FIRST)
        if first and before is not None and not before.flags & _FIRST:
            raise OggError(
                f"holds a second recording from byte {page.start} on, which would not be read"
            )
        if not first and page.number != number.get(page.serial, -1) + 1:
            raise OggError(f"is damaged: pages before byte {page.start} are missing")
        number[page.serial] = page.number
    last = pages[-1]
    if last.open:
        raise OggError("is truncated: its last packet goes on where the file ends")
    return None if last.flags & _LAST else _ended(data, last)


def _pages(data: bytes) -> Iterator[Page]:
    """Pages whose checksums are right, until the file ends; bytes after the last stream are left.

    Raises:
      OggError: a page that is cut off or damaged, or bytes between pages that belong to none.
    """
    start, flags = 0, 0
    while start < len(data):
        if data[start : start + 4] != b"OggS":
            if flags & _LAST and data.find(b"OggS", start) < 0:
                return
            partial = b"OggS".startswith(data[start : start + 4])
            raise OggError(_CUT if partial else f"is damaged: byte {start} begins no page")
        page = _page(data, start)
        if page is None or page.end > len(data):
            raise OggError(_CUT)
        if _checksum(data[start : page.end]) != data[start + 22 : start + 26]:
            raise OggError(f"is damaged: the page at byte {start} does not match its checksum")
        yield page
        start, flags = page.end, page.flags


_CUT = "is truncated: its last page is cut off"


def _page(data: bytes, start: int) -> Page | None:
    """The page whose header stands at `start`; None where the header itself is cut off."""
    header = data[start : start + _HEADER]
    if len(header) < _HEADER:
        return None
    sizes = data[start + _HEADER : start + _HEADER + header[26]]
    if len(sizes) < header[26]:
        return None
    serial, number = struct.unpack_from("<II", header, 14)
    end = start + _HEADER + len(sizes) + sum(sizes)
    return Page(start, end, header[5], serial, number, bool(sizes) and sizes[-1] == 255)


def _ended(data: bytes, last: Page) -> bytes:
    page = bytearray(data[last.start : last.end])
    page[5] |= _LAST
    page[22:26] = _checksum(page)
    return data[: last.start] + bytes(page)


def _checksum(page: bytes | bytearray) -> bytes:
    """The four bytes of a page's checksum: zlib's polynomial, with the bits the other way round."""
    plain = bytes(page[:22]) + bytes(4) + bytes(page[26:])
    turned = zlib.crc32(plain.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return turned.to_bytes(4, "big").translate(_REVERSED)
