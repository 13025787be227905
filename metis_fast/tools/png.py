"""A PNG from a session, which is in the agent's hands: taken as it is where it is nothing but pixels, refused otherwise."""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Iterator

from metis_fast.tools.sandbox.wire import MAX_SIDE

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHUNK = struct.Struct(">I4s")
_CRC = struct.Struct(">I")
_HEADER = struct.Struct(">IIBBBBB")  # width, height, bits, colours, compression, filter, interlace
_RGB = (8, 2, 0, 0, 0)
_MOST_FILTER = 4  # the last kind of a row's filter
_LEAST = 1 << 13  # bytes of a chunk of pixels, on average: an honest one has eight times as many
_SLACK = 1 << 12  # bytes of compressed data beyond those of the pixels, where these do not compress


def _chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Kind and content of each; what is none, or has a wrong checksum, is the last one and of no kind."""
    view, at = memoryview(data), len(_SIGNATURE)
    while at < len(data):
        length, kind = _CHUNK.unpack_from(data, at) if at + _CHUNK.size <= len(data) else (len(data), b"")
        end = at + _CHUNK.size + length
        if end + _CRC.size > len(data) or _CRC.unpack_from(data, end)[0] != zlib.crc32(view[at + 4 : end]):
            yield b"", view[at:]
            return
        yield kind, view[at + _CHUNK.size : end]
        at = end + _CRC.size


def is_plain(data: bytes, max_pixels: int) -> bool:
    """Whether it is a whole PNG of RGB pixels and nothing else: a header, their data, an end, and nothing behind that.

    Its pixels are unpacked, at most `max_pixels`; Pillow, which would keep or read more, has no part in it.
    """
    if not data.startswith(_SIGNATURE):
        return False
    found = list(itertools.islice(_chunks(data), 4 + len(data) // _LEAST))  # or there may be a million
    kinds = [kind for kind, _ in found]
    if len(found) < 3 or kinds != [b"IHDR", *[b"IDAT"] * (len(found) - 2), b"IEND"] or len(found[-1][1]):
        return False
    if len(found[0][1]) != _HEADER.size:
        return False
    width, height, *form = _HEADER.unpack(found[0][1])
    if tuple(form) != _RGB or not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE and width * height <= max_pixels):
        return False
    row = 1 + 3 * width
    packed = b"".join(part for _, part in found[1:-1])
    if len(packed) > row * height + (row * height >> 8) + _SLACK or any(not len(part) for _, part in found[1:-1]):
        return False
    unpacker = zlib.decompressobj()
    try:
        rows = unpacker.decompress(packed, row * height + 1)
    except zlib.error:
        return False
    whole = unpacker.eof and not unpacker.unused_data and len(rows) == row * height
    return whole and max(rows[::row]) <= _MOST_FILTER
