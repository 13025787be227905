"""Files in shared memory that processes of one machine hand each other: groups on their way to ranks, weights on their way out.

A process has a folder of its own, which ends with it (`metis_fast.own_folder`).
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from metis_fast.own_folder import OwnFolder
from metis_fast.sync.segment import FOLDER, free_bytes
from metis_fast.types import Rollout

_PREFIX = "metis-fast-ranks-"


class Kept(Protocol):
    """What is handed over: a `Group` is one."""

    @property
    def rollouts(self) -> Sequence[Rollout]:
        """Whole."""
        ...


@dataclass(frozen=True, slots=True)
class Ungrouped:
    """Rollouts of no prompt's group."""

    rollouts: tuple[Rollout, ...]


class Shared:
    """A folder of this process's own. Close it to remove it with all that is in it."""

    def __init__(self) -> None:
        self._folder = OwnFolder(FOLDER, _PREFIX)

    def path(self, name: str) -> Path:
        """Of a file in it."""
        return self._folder.path / name

    def write(self, number: int, group: Kept) -> Path:
        """A group into a file of its own.

        Raises:
            OSError: there is no room; `no_room` says what to do.
        """
        path = self.path(f"group-{number}")
        with path.open("wb") as file:
            pickle.dump(group, file, protocol=5)
        return path

    def close(self) -> None:
        """Remove it."""
        self._folder.close()


def read(path: str) -> Kept:
    """A group that was written by a process of this run."""
    with open(path, "rb") as file:
        return pickle.load(file)


def no_room(error: OSError) -> str:
    """What to say of a folder that cannot be written."""
    return (
        f"cannot hand groups to the ranks through {FOLDER} ({error.strerror or error}, {free_bytes() / 1e6:.0f} MB are free); "
        "it has to hold those of one step: enlarge it (containers: --shm-size) or lower rollout.prompts_per_step"
    )
