"""What a call has written so far, in memory that outlives the session, so that a call that is killed still shows it.

The memory is the beginning of a file without a name, which the trainer makes for each session. It holds three transcripts: all
in the order of writing, stdout by itself, stderr by itself. Each is the first output and a ring with the latest; the first one
also knows where images stood. Behind them child processes and C code append, through the descriptors 1 and 2; which of the two
they used cannot be told, so it counts as stdout.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from mmap import mmap

from metis_fast.tools.sandbox.wire import MAX_IMAGES

_HEADER = struct.Struct(f"<{5 + MAX_IMAGES}Q")  # as in `_save`
_BYTES_A_CHARACTER = 4  # in UTF-8, at most
_CHUNK = 1 << 20


def transcript_size(limit: int) -> int:
    """Bytes that a transcript of `limit` characters takes."""
    return _HEADER.size + 2 * _BYTES_A_CHARACTER * ((limit + 1) // 2)


def output_size(limit: int) -> int:
    """Bytes of the memory of an `Output`."""
    return 3 * transcript_size(limit)


def open_output(limit: int) -> int:
    """A descriptor of a new file for a session: memory for transcripts of `limit` characters, then what is appended.

    Nothing makes it shorter: opening /dev/stdout to write would, and the next access to the memory would kill the session.
    """
    output = os.memfd_create("output", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(output, output_size(limit))
    fcntl.fcntl(output, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    fcntl.fcntl(output, fcntl.F_SETFL, os.O_APPEND)
    return output


class Transcript:
    """Text and images in the order written. Text beyond `limit` characters is cut in the middle; memory is of fixed size."""

    def __init__(self, memory: memoryview, limit: int, behind: int = 0) -> None:
        """memory: `transcript_size(limit)` bytes, zeros at first. Takes over what stands there, whoever wrote it.

        behind: where in the file that begins what is appended.
        """
        self._memory = memory
        self._behind = behind
        self._limit = limit
        self._room = _BYTES_A_CHARACTER * ((limit + 1) // 2)  # of the head, and of the ring
        values = [min(value, 1 << 62) for value in _HEADER.unpack_from(memory)]  # the agent's code can write here, too
        self.call, self._bytes, self._chars, self._taken, self._images = values[:5]
        self._num_spent = 0
        self._marks = values[5:]

    def _save(self) -> None:
        _HEADER.pack_into(self._memory, 0, self.call, self._bytes, self._chars, self._taken, self._images, *self._marks)

    def begin(self, call: int) -> None:
        """Forget all; what comes now belongs to this call."""
        self.call, self._bytes, self._chars, self._images = call, 0, 0, 0
        self._save()

    def write(self, data: bytes) -> None:
        """Add text, in UTF-8."""
        head = data[: max(0, self._room - self._bytes)]
        self._put(self._bytes, head)
        tail = data[len(head) :][-self._room :]
        at = (self._bytes + len(data) - len(tail)) % self._room
        first = tail[: self._room - at]
        self._put(self._room + at, first)
        self._put(self._room, tail[len(first) :])
        self._bytes += len(data)
        self._chars += len(data) if data.isascii() else len(data.decode("utf-8", "replace"))
        self._save()

    def _put(self, at: int, data: bytes) -> None:
        self._memory[_HEADER.size + at : _HEADER.size + at + len(data)] = data

    def add_image(self) -> bool:
        """Note that an image stands here; False if there are too many."""
        fits = self._images < MAX_IMAGES
        if fits:
            self._marks[self._images] = self._bytes
        self._images += 1
        self._save()
        return fits

    def take(self, fd: int) -> Iterator[bytes]:
        """Add what child processes and C code have appended to the file since the last time; gives it, too."""
        while chunk := os.pread(fd, _CHUNK, self._behind + self._taken):
            self._taken += len(chunk)
            self.write(chunk)
            yield chunk

    def spent(self) -> tuple[int, int]:
        """Start and size of what was taken and not yet named here, once it is a lot: the file need not hold it any longer."""
        start, size = self._behind + self._num_spent, self._taken - self._num_spent
        if size <= _CHUNK:
            return start, 0
        self._num_spent = self._taken
        return start, size

    def _items(self) -> list[str | int]:
        """All that is still there; numbers are images."""
        start = max(0, self._bytes - 2 * self._room) + self._room  # of the ring
        head = bytes(self._memory[_HEADER.size : _HEADER.size + min(self._bytes, self._room)])
        ring = bytes(self._memory[_HEADER.size + self._room : _HEADER.size + 2 * self._room])
        ring = (ring[start % self._room :] + ring[: start % self._room])[: max(0, self._bytes - start)]
        pieces = [(0, head), (start, ring)] if start > self._room else [(0, head + ring)]  # a character may stand in both
        marks = self._marks[: min(self._images, MAX_IMAGES)]
        items: list[str | int] = []
        image = 0
        for offset, piece in pieces:
            at = 0
            while image < len(marks) and (marks[image] <= offset + len(piece) or offset == pieces[-1][0]):
                stop = min(max(at, marks[image] - offset), len(piece))
                items += [piece[at:stop].decode("utf-8", "replace"), image]
                at, image = stop, image + 1
            items.append(piece[at:].decode("utf-8", "replace"))
        return [item for item in items if item != ""]

    def parts(self) -> tuple[str | int, ...]:
        """Text, and the numbers of the images of this call, from 0 on."""
        items = self._items()
        if max(self._chars, sum(len(item) for item in items if isinstance(item, str))) > self._limit:
            items = self._without_middle(items)
        if self._images > MAX_IMAGES:
            items.append(f"\n{self.unshown}\n")
        return tuple(items)

    @property
    def text(self) -> str:
        """All text, where there are no images."""
        return "".join(part for part in self.parts() if isinstance(part, str))

    @property
    def unshown(self) -> str:
        """Says how many images were left out, or nothing."""
        left = self._images - MAX_IMAGES
        return f"... {left} more images not shown ..." if left > 0 else ""

    def _without_middle(self, items: list[str | int]) -> list[str | int]:
        head, tail = _take_text(items, (self._limit + 1) // 2, 1)
        tail, _ = _take_text(tail[::-1], self._limit // 2, -1)
        return [*head, f"\n... {max(0, self._chars - self._limit)} characters left out ...\n", *tail[::-1]]


class Output:
    """The three transcripts of a session."""

    def __init__(self, memory: mmap | bytearray, limit: int) -> None:
        """memory: `output_size(limit)` bytes, as `Transcript` takes them."""
        view, size = memoryview(memory), transcript_size(limit)
        self.all = Transcript(view[:size], limit, behind=len(view))
        self._streams = {1: Transcript(view[size : 2 * size], limit), 2: Transcript(view[2 * size :], limit)}

    @property
    def call(self) -> int:
        """Which one this is the output of."""
        return self.all.call

    def begin(self, call: int) -> None:
        """Forget all; what comes now belongs to this call."""
        for transcript in (self.all, *self._streams.values()):
            transcript.begin(call)

    def write(self, data: bytes, fd: int, alone: bytes | None = None) -> None:
        """Add text, in UTF-8. fd: 1 or 2. alone: what stands in the stream by itself, where that is something else."""
        self.all.write(data)
        self._streams[fd].write(data if alone is None else alone)

    def take(self, fd: int) -> None:
        """Add what was appended to the file since the last time."""
        for chunk in self.all.take(fd):
            self._streams[1].write(chunk)

    def stream(self, fd: int) -> str:
        """What was written to stdout (1) or stderr (2). Images that were left out are told of in stdout."""
        text = self._streams[fd].text
        unshown = self.all.unshown if fd == 1 else ""
        return f"{text}\n{unshown}".lstrip("\n") if unshown else text


def _take_text(items: list[str | int], room: int, step: int) -> tuple[list[str | int], list[str | int]]:
    """`room` characters from the front (step 1) or the end (step -1) of each text, and the rest; images stay where they are."""
    taken: list[str | int] = []
    rest: list[str | int] = []
    for item in items:
        if isinstance(item, int):
            (rest if rest and step > 0 else taken).append(item)
            continue
        size = min(room, len(item))
        split = size if step > 0 else len(item) - size
        mine, other = (item[:split], item[split:]) if step > 0 else (item[split:], item[:split])
        room -= size
        taken += [mine] if mine else []
        rest += [other] if other else []
    return taken, rest
