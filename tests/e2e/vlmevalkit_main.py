"""VLMEvalKit's own command line, with stand-ins taken for the published files; it would load those anew, as the MD5 differs.

Run by the Python of its environment. Nothing else of it is changed.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from vlmeval import run
from vlmeval.dataset import DATASET_CLASSES

FOLDERS = [Path(os.environ[name]) for name in ("LMUData", "HF_HUB_CACHE")]


def trust(path: Path) -> None:
    """Take the MD5 of a file for the published one."""
    for kind in DATASET_CLASSES:
        if path.stem in getattr(kind, "DATASET_MD5", {}):
            kind.DATASET_MD5[path.stem] = hashlib.md5(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    for folder in FOLDERS:
        for found in folder.rglob("*.tsv"):
            trust(found)
    run.main()
