"""An engine's view of a staged version: checked whole, then read in place."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from metis_fast.errors import SyncError
from metis_fast.sync.manifest import Manifest
from metis_fast.sync.segment import Opened, checksums, tensor_at


class Reader:
    """Opens a version and verifies all of it: manifest, segment, every bucket.

    newest: the newest version that this engine has loaded; the same one may come again, an older one may not.

    Raises:
        SyncError: it did not arrive as it was sent; nothing was loaded.
    """

    def __init__(self, manifest: Manifest, newest: int | None = None) -> None:
        manifest.check()
        if newest is not None and manifest.version < newest:
            raise SyncError(f"weight version {manifest.version} came after version {newest}; expected that one or a later one")
        self.manifest = manifest
        self._opened = Opened(manifest)
        found = checksums(self._opened.data, [(b.offset, b.nbytes) for b in manifest.buckets])
        for index, (bucket, crc) in enumerate(zip(manifest.buckets, found, strict=True)):
            if crc != bucket.crc32:
                raise SyncError(
                    f"weight version {manifest.version}, {manifest.in_bucket(index)}: {bucket.nbytes} bytes with CRC-32 "
                    f"{crc:08x}, expected {bucket.crc32:08x}; stage it again"
                )

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by its Hugging Face name; they share the segment's memory and are to be copied from."""
        for place in self.manifest.places:
            yield place.name, tensor_at(self._opened.data, place)

    def check_unchanged(self) -> None:
        """Whether the segment was left alone since it was verified; to be asked when everything has been copied.

        Raises:
            SyncError: somebody writes, or wrote, another version there.
        """
        self._opened.check_holds()
