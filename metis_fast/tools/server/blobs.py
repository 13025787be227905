"""Images of prompts in the server, by their hash: sixteen rollouts of a prompt send its images once."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence

from metis_fast.types import ImageBlob

_HASH = re.compile(r"[0-9a-f]{64}")


def is_hash(text: str) -> bool:
    """Whether this is a SHA-256 as `ImageBlob` spells it."""
    return _HASH.fullmatch(text) is not None


class BlobStore:
    """In memory, up to `max_bytes`; beyond, those that were not used for the longest time go. Sessions keep theirs."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._blobs: OrderedDict[str, ImageBlob] = OrderedDict()
        self.num_bytes = 0

    def __contains__(self, sha256: str) -> bool:
        return sha256 in self._blobs

    def put(self, blob: ImageBlob) -> None:
        """Keep it; the last one stays, however large."""
        if blob.sha256 not in self._blobs:
            self._blobs[blob.sha256] = blob
            self.num_bytes += len(blob.data)
        self._blobs.move_to_end(blob.sha256)
        while self.num_bytes > self._max_bytes and len(self._blobs) > 1:
            _, gone = self._blobs.popitem(last=False)
            self.num_bytes -= len(gone.data)

    def missing(self, hashes: Sequence[str]) -> tuple[str, ...]:
        """Those that are not here, each once."""
        return tuple(sha256 for sha256 in dict.fromkeys(hashes) if sha256 not in self._blobs)

    def take(self, hashes: Sequence[str]) -> tuple[ImageBlob, ...]:
        """All of them, none of which is `missing`."""
        for sha256 in hashes:
            self._blobs.move_to_end(sha256)
        return tuple(self._blobs[sha256] for sha256 in hashes)
