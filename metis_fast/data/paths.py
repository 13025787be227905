"""The Parquet files that settings and commands name, and short names for them."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from metis_fast.errors import DataError

_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")  # as files of data sets on the Hugging Face hub are called


def expand(paths: Sequence[Path]) -> list[Path]:
    """Files, with folders and patterns replaced by the Parquet files in them, by name.

    A folder stands for every `*.parquet` in it, or in its folder `data`, as downloads from the Hugging Face hub have them. A
    name with `*` stands for what fits it. Symlinks are kept: their names, not their targets', are what a user knows.

    Raises:
        DataError: no file, a folder without any or with several splits of a set, or a file that is given twice.
    """
    files: list[Path] = []
    for path in paths:
        files += _of_folder(path) if path.is_dir() else _of_pattern(path)
    if not files:
        raise DataError("no data files given; name at least one Parquet file (data.train=[FILE])")
    for path, times in Counter(Path(os.path.abspath(path)) for path in files).items():
        if times > 1:
            raise DataError(f"{path}: given {times} times; name each file once")
    return files


def _of_folder(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet"))
    if not found:
        inside = sorted({path.parent.name for path in folder.glob("*/*.parquet")})
        advice = f"give one of its folders ({', '.join(inside[:5])})" if inside else "give another folder or a file"
        raise DataError(f"{folder}: expected *.parquet files in this folder, found none; {advice}")
    splits = {match[1] for path in found if (match := _SHARD.fullmatch(path.stem))}
    if len(splits) > 1:
        names = ", ".join(sorted(splits))
        raise DataError(
            f"{folder}: expected files of one split, got {len(splits)} ({names}); name the files, for example "
            f"{found[0].parent / sorted(splits)[-1]}-*.parquet"
        )
    return found


def _of_pattern(path: Path) -> list[Path]:
    """A file, or those that fit a name with a `*`."""
    if "*" not in path.name or path.exists():
        return [path]
    found = sorted(path.parent.glob(path.name))
    if not found:
        raise DataError(f"{path}: expected Parquet files of such a name, found none; look at the folder")
    return found


def unique_names(paths: Sequence[Path]) -> list[str]:
    """The stem of each file, with as many parent folders as it takes to tell files apart."""
    full = [Path(os.path.abspath(path)) for path in paths]
    stems = [path.with_suffix("").parts for path in full]
    if len(set(stems)) < len(stems):  # a.parquet beside a.pq
        stems = [path.parts for path in full]
    depths = [1] * len(stems)
    while True:
        tails = [stem[-depth:] for stem, depth in zip(stems, depths, strict=True)]
        times = Counter(tails)
        if max(times.values()) == 1:
            return ["/".join(tail) for tail in tails]
        depths = [depth + (times[tail] > 1) for depth, tail in zip(depths, tails, strict=True)]
