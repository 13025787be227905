"""The Parquet files that settings and commands name, and short names for them."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from metis_fast.errors import DataError

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})")  # as files of data sets on the Hugging Face hub are called
_SPLIT = re.compile(r"(?:.*[-_.])?(train|test|val|valid|validation|dev|eval|held_?out)(?:[-_.]?\d+)?", re.IGNORECASE)
_NAMED = 3  # missing files in an error


def expand(paths: Sequence[Path]) -> list[Path]:
    """Files, with folders and patterns replaced by the Parquet files in them, by name.

    A folder stands for every `*.parquet` in it, or in its folder `data`, as downloads from the Hugging Face hub have them. A
    name with `*` stands for what fits it. Symlinks are kept: their names, not their targets', are what a user knows.

    Raises:
        DataError: no file, a folder without any or with several splits of a set, one part of several missing, or a file that
            is given twice.
    """
    files: list[Path] = []
    for path in paths:
        found = _of_folder(path) if path.is_dir() else _of_pattern(path)
        if found != [path]:
            _check_parts(found, "*.parquet" if path.is_dir() else path.name)
        files += found
    if not files:
        raise DataError("no data files given; name at least one Parquet file (data.train=[FILE])")
    for path, times in Counter(Path(os.path.abspath(path)) for path in files).items():
        if times > 1:
            raise DataError(f"{path}: given {times} times; name each file once")
    return files


def first(path: Path) -> Path:
    """One of the files that a path stands for, by which their form is known, also where `expand` refuses them together.

    Raises:
        DataError: there is none.
    """
    return (_in_folder(path) if path.is_dir() else _of_pattern(path))[0]


def _of_folder(folder: Path) -> list[Path]:
    found = _in_folder(folder)
    _check_one_split(folder, found)
    return found


def _in_folder(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet"))
    if not found:
        inside = sorted({path.parent.name for path in folder.glob("*/*.parquet")})
        advice = f"give one of its folders ({', '.join(inside[:5])})" if inside else "give another folder or a file"
        raise DataError(f"{folder}: expected *.parquet files in this folder, found none; {advice}")
    return found


def _check_one_split(folder: Path, found: Sequence[Path]) -> None:
    """
    Raises:
        DataError: the names are of several splits: what is held out would be trained on.
    """
    sharded = {path: match[1] for path in found if (match := _SHARD.fullmatch(path.stem))}
    names = {path: sharded.get(path, path.stem) for path in found}
    words = {name: match[1].lower() for name in names.values() if (match := _SPLIT.fullmatch(name))}
    splits = set(sharded.values()) if len(set(sharded.values())) > 1 else set(words.values())
    if len(splits) < 2:
        return
    example = next((path for path, name in names.items() if words.get(name) == "train"), found[0])
    wanted = example.with_name(f"{names[example]}-*.parquet") if example in sharded else example
    raise DataError(
        f"{folder}: expected files of one split, got {len(splits)} ({', '.join(sorted(splits))}); name the files, for example "
        f"{wanted}"
    )


def _check_parts(found: Sequence[Path], pattern: str) -> None:
    """
    Raises:
        DataError: of names like `train-00000-of-00003`, some that fit the pattern are not there.
    """
    names = {path.name for path in found}
    sets = {(path.parent, match[1], match[3]) for path in found if (match := _SHARD.fullmatch(path.stem))}
    for folder, name, number in sorted(sets):
        parts = (f"{name}-{part:05}-of-{number}.parquet" for part in range(int(number)))
        lacking = [part for part in parts if part not in names and fnmatchcase(part, pattern)]
        if lacking:
            more = f" and {len(lacking) - _NAMED} more" if len(lacking) > _NAMED else ""
            raise DataError(
                f"{folder}: expected all {int(number)} parts of {name}, got none called {', '.join(lacking[:_NAMED])}{more}; "
                "get what is missing, or name the files to read one by one"
            )


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
