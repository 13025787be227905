"""The bytes of an image, however a table holds it: bytes, a path, base64 or a data URL. Pixels are the business of `pixels`."""

from __future__ import annotations

import base64
import re
import reprlib
import stat
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes

from metis_fast.errors import one_line
from metis_fast.pixels import ImageError

_SHOW_PATH = reprlib.Repr()
_SHOW_PATH.maxstring = 300
_LONG_PATH = 1000
_MAX_BYTES = 256 << 20
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # two letters: C:/ is a disk
_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]{64,}={0,2}\s*")  # the smallest PNG has 90 characters
_URL_SAFE = str.maketrans("-_", "+/")


class _Place:
    """What stands at a place in a list, for an error."""

    def __init__(self, value: object, at: int) -> None:
        self._value, self._at = value, at

    def __repr__(self) -> str:
        return f"{self._value!r} at place {self._at}"


class NoImageError(ImageError):
    """There is no image where one should be. got: what came, which may be long."""

    def __init__(self, expected: str, got: object) -> None:
        super().__init__(f"expected {expected}, got {reprlib.repr(got)}")
        self.expected, self.got = expected, got


def is_inline(text: str) -> bool:
    """Whether text is an image itself, as a data URL or base64, and not the path of one."""
    return text[:5].lower() == "data:" or _BASE64.fullmatch(text) is not None


def read_image(entry: object, folder: Path) -> bytes:
    """The encoded bytes of an image; they need not be those of an image yet.

    entry: a cell of a table: {bytes, path}, bytes, integers in their place, or text (a path, a data URL, base64).
    folder: what relative paths start from.

    Raises:
        NoImageError: it is none of these, or there is no such file.
    """
    match entry:
        case {"bytes": bytes(data)} | bytes(data) if data:
            # text that was stored as bytes; an image that is itself plain text, like P3 of PPM, is none
            if data.isascii() and not data.startswith(b"P"):
                text = data.decode()
                if text[:5].lower() == "data:" or _BASE64.fullmatch(text):
                    return _from_text(text)
            return data
        case {"bytes": list(numbers)} | list(numbers) if numbers:
            return from_integers(numbers)
        case {"bytes": str(text)} if text:
            return _from_text(text)
        case {"path": str(text)} | str(text) if text:
            return _from_path(text, folder)
        case _:
            raise NoImageError("bytes, or the path of a file", entry)


def is_integers(value: object) -> bool:
    """Whether a list is of numbers, as bytes are that went through JSON."""
    return isinstance(value, list) and bool(value) and all(isinstance(entry, int) for entry in value)


def from_integers(numbers: list[object]) -> bytes:
    """Bytes that are given one by one.

    Raises:
        NoImageError: one of them is no byte.
    """
    found = bytearray()
    for at, number in enumerate(numbers):
        if not isinstance(number, int) or not 0 <= number <= 255:
            raise NoImageError("integers from 0 to 255, one for each byte", _Place(number, at))
        found.append(number)
    return bytes(found)


def _from_path(text: str, folder: Path) -> bytes:
    """The file at a path, which is absolute or starts from `folder`; or the image itself, where one stands instead of it."""
    if text[:5].lower() == "data:":
        return _from_text(text)
    if _URL.match(text):
        raise NoImageError("the image itself or the plain path of a file here, not a URL", text)
    try:
        return _read_file(folder / text)
    except (OSError, ValueError) as error:
        if _BASE64.fullmatch(text):
            return _from_text(text)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        place = text if len(text) > _LONG_PATH else str(folder / text)
        raise NoImageError(f"an image file at {_SHOW_PATH.repr(place)}", reason) from None


def _read_file(path: Path) -> bytes:
    """All of a regular file; a pipe could make us wait for ever, and a device could be endless.

    Raises:
        OSError: it is not there, is something else, or is too large. ValueError: it cannot be a path.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError("a folder" if stat.S_ISDIR(status.st_mode) else "a device or a pipe")
    if status.st_size > _MAX_BYTES:
        raise OSError(f"{status.st_size >> 20} MiB, more than {_MAX_BYTES >> 20} MiB")
    with path.open("rb") as file:
        return file.read(status.st_size)  # the size says 0 for what the kernel makes up, and some of that is endless, too


def _from_text(text: str) -> bytes:
    """A data URL (RFC 2397), or base64 in either alphabet, with or without padding and line breaks."""
    if text[:5].lower() == "data:":
        head, comma, body = text.partition(",")
        if not comma:
            raise NoImageError("a data URL like data:image/png;base64,...", text)
        if not head.lower().endswith(";base64"):
            return unquote_to_bytes(body)
        text = unquote(body)
    plain = "".join(text.translate(_URL_SAFE).split()).rstrip("=")
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except ValueError as error:
        raise NoImageError("an image as base64", f"{len(text)} characters: {one_line(error)}") from None
