"""A small disk, which tests fill."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class Disk:
    """A tmpfs; sizes in KiB."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._mount("size=64m")

    def _mount(self, options: str) -> None:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", self.folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount a small disk here: {done.stderr.strip()}")

    def resize(self, size: int) -> None:
        self._mount(f"remount,size={size}k")

    def leave(self, size: int) -> None:
        """Only so much space is left."""
        usage = os.statvfs(self.folder)
        self.resize((usage.f_blocks - usage.f_bfree) * usage.f_frsize // 1024 + size)

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", self.folder], check=False, capture_output=True)


@contextmanager
def small_disk(folder: Path) -> Iterator[Disk]:
    """folder: where it is mounted; skips the test where that cannot be."""
    if os.geteuid():
        pytest.skip("mounting a small disk needs root")
    disk = Disk(folder)
    try:
        yield disk
    finally:
        disk.close()
