"""Small sets in exactly the published formats: for tests, and for a rehearsal before a download.

`write_standin` writes them all; the same arguments give the same files, byte for byte under the same pyarrow and Pillow.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from metis_fast.errors import DataError, one_line
from metis_fast.standin.benchmark import write_benchmark
from metis_fast.standin.cold_start import write_cold_start
from metis_fast.standin.questions import ask
from metis_fast.standin.rl import write_rl
from metis_fast.standin.search_cache import write_search_cache

ROWS, PIXELS = 32, (2048, 1536)
_OWN = ".standin"  # names the files of a folder that were written here, a line each
_PLANNED = (  # what may be there while they are written, or after a call that was killed
    *(f"{name}/data/train-*.parquet" for name in ("rl", "rl_binary", "cold_start", "cold_start_binary")),
    "image_search/*.json",
    "image_search/cached_images/*.jpg",
    "benchmark/*.tsv",
)


@dataclass(frozen=True, slots=True)
class StandinPaths:
    """What `write_standin` wrote.

    rl, rl_binary: folders as the hub has them, Metis-RL with bytes as lists of integers and as binary; the same rows.
    cold_start, cold_start_binary: Metis-ColdStart with images as base64 text and as binary; the same rows.
    image_search_cache: pages by the index of a row, as JSON; their images lie beside it.
    benchmark: a TSV of VLMEvalKit's shape.
    """

    rl: Path
    rl_binary: Path
    cold_start: Path
    cold_start_binary: Path
    image_search_cache: Path
    benchmark: Path


def write_standin(
    folder: Path, rows: int = ROWS, pixels: tuple[int, int] = PIXELS, seed: int = 0, misfits: bool = True
) -> StandinPaths:
    """Write all sets into a folder: a new or an empty one, or one in which stand-ins are to be replaced.

    rows: of each set. pixels: (width, height) of most images; every fourth picture is smaller. misfits: whether one row of
    Metis-ColdStart in sixteen has more `<image>` marks than images, as published data may.

    Raises:
        DataError: the folder cannot be written, or holds other files.
    """
    paths = StandinPaths(
        rl=folder / "rl",
        rl_binary=folder / "rl_binary",
        cold_start=folder / "cold_start",
        cold_start_binary=folder / "cold_start_binary",
        image_search_cache=folder / "image_search" / "image_search_results_cache.json",
        benchmark=folder / "benchmark" / "StandIn.tsv",
    )
    _check_own(folder)
    asked = ask(rows, pixels, random.Random(f"standin/{seed}"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _OWN).write_text("".join(f"{name}\n" for name in _PLANNED), encoding="utf-8")
        write_rl(paths.rl, asked, integers=True)
        write_rl(paths.rl_binary, asked, integers=False)
        write_cold_start(paths.cold_start, asked, base64_text=True, misfits=misfits)
        write_cold_start(paths.cold_start_binary, asked, base64_text=False, misfits=misfits)
        write_search_cache(paths.image_search_cache, asked)
        write_benchmark(paths.benchmark, asked)
        (folder / _OWN).write_text("".join(f"{name}\n" for name in _files(folder)), encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write {folder}: {one_line(error)}; choose a folder that can be written") from None
    return paths


def _files(folder: Path) -> list[str]:
    """All below a folder but `_OWN`, by their paths in it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir() and path.name != _OWN)


def _check_own(folder: Path) -> None:
    """
    Raises:
        DataError: a file that no earlier call has written; it may be somebody's data.
    """
    own = folder / _OWN
    try:
        names = own.read_text(encoding="utf-8", errors="replace").splitlines() if own.is_file() else []
        strange = [name for name in _files(folder) if not any(fnmatchcase(name, own_name) for own_name in names)]
    except OSError as error:
        raise DataError(f"cannot read {folder}: {one_line(error)}; choose another folder") from None
    if strange:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise DataError(f"{folder} holds files that are no stand-ins: {strange[0]}{more}; name a new or an empty folder")
