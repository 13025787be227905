"""Ops of ranks of the trainer, which are processes of their own on the run's machine, for its trace.

The run names a folder in their environment, and puts a file there while their ops are wanted. Ranks that something else has
started, or on other machines, know of no folder; of them the trace has the calls alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FOLDER = "METIS_PROFILE_RANKS"
"""Environment variable with the folder."""
_WANTED = "wanted"


@contextmanager
def folder_of_ranks(folder: Path) -> Iterator[None]:
    """Ranks that start meanwhile are told of a folder, which is made."""
    folder.mkdir()
    os.environ[FOLDER] = str(folder.resolve())
    try:
        yield
    finally:
        del os.environ[FOLDER]


def want(folder: Path, wanted: bool) -> None:
    """Whether calls that begin from here on are recorded."""
    if wanted:
        (folder / _WANTED).touch()
    else:
        with suppress(FileNotFoundError):
            (folder / _WANTED).unlink()


def traces_in(folder: Path) -> list[tuple[str, Path]]:
    """Traces of torch's profiler that ranks have written, with labels."""
    return [(path.stem, path) for path in sorted(folder.glob("rank *.json"))]


@contextmanager
def recorded(rank: int, name: str, number: int) -> Iterator[None]:
    """Around a call that a rank answers. Its ops are written where and when the run wants them. number: of the call."""
    folder = os.environ.get(FOLDER)
    if not folder or not Path(folder, _WANTED).exists():
        yield
        return
    from metis_fast.torch_profiler import profiler  # torch's profiler, which a rank does not need otherwise

    with profiler() as one:
        yield
    one.export_chrome_trace(f"{folder}/rank {rank} {name} {number}.json")
