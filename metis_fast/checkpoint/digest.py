"""What a file, or a folder of a model, a corpus or trajectories, is known by."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from metis_fast.checkpoint.export import COPIED

_WEIGHTS = (".safetensors", ".parquet", ".arrow")  # of a folder, these and what a model is copied with; not what lies beside
_BLOCK, _BLOCKS = 1 << 16, 64  # of large files so many bytes in so many places are read: weights of 17 GB are not read twice

_MODEL_FILES = frozenset({"config.json", "model.safetensors.index.json", *COPIED})


def files_digest(path: Path) -> str:
    """What a file, or the model, corpus or trajectories of a folder, are known by: names, sizes, and bytes from all over."""
    digest = sha256()
    inside = ("*", "images/*", "data/*.parquet")  # the last: as the hub has data sets
    found = [path] if path.is_file() else sorted(file for pattern in inside for file in path.glob(pattern))
    for file in found:
        if file != path and not (file.is_file() and (file.suffix in _WEIGHTS or file.name in _MODEL_FILES)):
            continue
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)}:{size}\n".encode(errors="surrogateescape"))
        with file.open("rb") as opened:
            if size <= _BLOCK * _BLOCKS:
                digest.update(opened.read())
                continue
            for block in range(_BLOCKS):  # the first and the last bytes are among them: shapes, and statistics of columns
                opened.seek((size - _BLOCK) * block // (_BLOCKS - 1))
                digest.update(opened.read(_BLOCK))
    return f"sha256 {digest.hexdigest()[:16]}"
