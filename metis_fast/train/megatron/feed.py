"""What a rank's passes are made of, each when it is needed: groups of this replica, and pictures of the next pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from metis_fast.pictures import ImagePreparer, Picture
from metis_fast.summary import Outline
from metis_fast.train.megatron import shared
from metis_fast.train.minibatch import Scored
from metis_fast.types import ImageBlob, Rollout


class GroupReader:
    """Groups of an update by their number, read from files of this machine when something of them is first asked for.

    num_bytes: of what was read.
    """

    def __init__(self, groups: Sequence[Scored], files: Mapping[int, str]) -> None:
        self._place = {id(r): (number, i) for number, group in enumerate(groups) for i, r in enumerate(group.rollouts)}
        self._files = files
        self._read: dict[int, shared.Kept] = {}
        self.num_bytes: dict[int, int] = {}

    def rollout(self, outline: Outline) -> Rollout:
        """Of an outline in the groups; one that is whole is here already."""
        if isinstance(outline, Rollout):
            return outline
        number, i = self._place[id(outline)]
        if number not in self._read:
            self._read[number] = shared.read(self._files[number])
            self.num_bytes[number] = Path(self._files[number]).stat().st_size
        return self._read[number].rollouts[i]


class PicturesAhead:
    """Pictures of passes one after the other, as they run; the next one's are made in a thread meanwhile."""

    def __init__(self, images: ImagePreparer, thread: ThreadPoolExecutor, wanted: Sequence[Sequence[ImageBlob]]) -> None:
        self._images, self._thread, self._wanted = images, thread, wanted
        self._coming: dict[int, Future[list[Picture]]] = {}

    def take(self, number: int) -> tuple[Picture, ...]:
        """Of a pass."""
        for coming in (number, number + 1):
            if coming < len(self._wanted) and coming not in self._coming:
                self._coming[coming] = self._thread.submit(self._images.pictures, self._wanted[coming])
        return tuple(self._coming.pop(number).result())
