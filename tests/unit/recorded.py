"""Processes that write a recording; they import little, so that they start in a moment."""

from __future__ import annotations

import os
from pathlib import Path

from metis_fast.recording.asking import Answer, Asked, read_answer, write_answer
from metis_fast.recording.file import Recording
from metis_fast.tools.results import PythonResult
from metis_fast.types import ImageBlob

CALLS = 40


def asked(key: str = "k", scope: str | None = "python") -> Asked:
    """A call of that key."""
    return Asked(key, "python", "{}", scope)


def printed(text: str, *images: ImageBlob) -> Answer:
    """What a call printed and showed."""
    return write_answer(PythonResult((text,), text, "", images, True))


def said(recording: Recording, call: Asked, rollout: str = "") -> str:
    """What a call has printed, as recorded."""
    answer = recording.find(call, rollout)
    assert answer is not None
    result = read_answer(answer.body, recording.image)
    assert isinstance(result, PythonResult)
    return result.stdout


def write(path: Path, number: int) -> None:
    """As one of several processes: calls that all of them make, and calls of its own."""
    recording = Recording(path, writable=True)
    for i in range(CALLS):
        recording.keep_own(asked(f"own {i}"), str(number), printed(str(number)))
        recording.keep(asked(f"shared {i}", None), printed(str(number)))
        recording.keep_own(asked(f"{number} {i}"), str(number), printed(f"{number} {i}"))
    recording.close()


def die(path: Path) -> None:
    """Write, and end at once."""
    recording = Recording(path, writable=True)
    recording.keep_own(asked(), "a", printed("kept"))
    os._exit(1)
