"""A version of the trainer's weights on its way to the nodes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from threading import Lock

from torch import Tensor


class TrainerWeights:
    """See `node.protocol.Weights`.

    tensors: gives them out anew at each call, once at a time. publish: puts them into a cluster's store.
    """

    def __init__(
        self, version: int, tensors: Callable[[], Iterator[tuple[str, Tensor]]], publish: Callable[[], object]
    ) -> None:
        self.version, self.tensors = version, tensors
        self.turn = asyncio.Lock()
        self._publish, self._publishing = publish, Lock()
        self._objects: object = None

    def objects(self) -> object:
        """See there. From any thread; as long as this object lives, so do they."""
        with self._publishing:
            if self._objects is None:
                self._objects = self._publish()
            return self._objects
