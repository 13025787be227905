"""Append-only JSON lines that somebody else writes: read without a lock, only what is new, and never with an error.

A last line without its end is still being written, or was cut by a kill: it is left for the next reading. A line that is no
record of a kind that we know is counted and passed over; fields that we do not know are named.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from metis_fast.errors import one_line

T = TypeVar("T")
_TAIL = 256  # last bytes that were read: a file that was written anew has others there, whatever its inode
_NAMED = 5  # unknown fields
_DIGITS = 18  # more is no number that a run counts to, and none that a curve can show


@dataclass(frozen=True, slots=True)
class Lines(Generic[T]):
    """What a file holds. notes: what is missing of it, a line each."""

    records: tuple[T, ...]
    notes: tuple[str, ...]


class JsonLines(Generic[T]):
    """One file, which need not be there. Not for several threads at once."""

    def __init__(
        self,
        path: Path,
        make: Callable[[dict[str, Any]], T],
        unknown: Callable[[dict[str, Any]], Iterable[str]] = lambda record: (),
    ) -> None:
        """make: a record of a line; it may raise ValueError, TypeError, KeyError, AttributeError or OverflowError. unknown: the
        fields that it leaves out."""
        self._path, self._make, self._unknown = path, make, unknown
        self._forget()

    def _forget(self) -> None:
        self._tail, self._offset, self._number = b"", 0, 0
        self._records = list[T]()
        self._bad = list[str]()
        self._newer = dict[str, None]()

    def read(self) -> Lines[T]:
        """All records by now."""
        name = self._path.name
        try:
            if not S_ISREG(self._path.stat().st_mode):  # a pipe would never end
                self._forget()
                return Lines((), (f"{name} is no file",))
            with self._path.open("rb") as file:
                file.seek(self._offset - len(self._tail))
                if file.read(len(self._tail)) != self._tail:
                    self._forget()
                file.seek(self._offset)
                rest = file.read()
        except FileNotFoundError:
            self._forget()
            return Lines((), (f"{name} is missing",))
        except OSError as error:
            self._forget()
            return Lines((), (f"{name} cannot be read: {error.strerror}",))
        whole = rest.rfind(b"\n") + 1
        for line in rest[:whole].splitlines():
            self._take(line)
        self._offset += whole
        self._tail = (self._tail + rest[:whole])[-_TAIL:]
        notes = []
        if self._bad:
            notes.append(f"{name}: {len(self._bad)} lines are no records of this version and are left out; {self._bad[0]}")
        if self._newer:
            notes.append(f"{name}: fields of a newer version are left out: {named([*self._newer])}")
        if len(rest) > whole:
            notes.append(f"{name}: its last line has no end yet and is left out")
        return Lines(tuple(self._records), tuple(notes))

    def _take(self, line: bytes) -> None:
        self._number += 1
        try:
            record = json.loads(line, parse_int=_whole)
            self._records.append(self._make(record))
            self._newer.update(dict.fromkeys(self._unknown(record)))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            self._bad.append(f"the first is line {self._number}: {why(error)}")


def _whole(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def named(fields: Sequence[str]) -> str:
    """The first few of them."""
    more = f" and {len(fields) - _NAMED} more" if len(fields) > _NAMED else ""
    return ", ".join(one_line(field)[:60] for field in fields[:_NAMED]) + more


def why(error: Exception) -> str:
    """What is wrong with a record, in a line: of a library's long message its first finding."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc']))[:80]}: {first['msg']}"
    return one_line(repr(error))[:160]
