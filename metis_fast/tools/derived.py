"""Files derived from a corpus (indexes), kept beside it, or in the user's cache if need be, and checked when opened."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from metis_fast.errors import ToolSetupError

_LOG = logging.getLogger(__name__)
_CHECKSUMS = "checksums.json"


def derived_folder(path: Path, kind: str, key: str, build: Callable[[Path], None]) -> Path:
    """The folder `<path>.<kind>-<key>`; `build` fills it if it is not there, or damaged.

    path: absolute, of the corpus. key: changes with the corpus and with what `build` makes of it.

    It appears whole or not at all. Two processes may build at the same time: the first to finish wins, the other's is dropped.

    Raises:
        ToolSetupError: it can be written neither beside the corpus nor in `$XDG_CACHE_HOME/metis_fast` (`~/.cache/metis_fast`).
    """
    targets = [place / f"{path.name}.{kind}-{key[:16]}" for place in _places(path)]
    reasons = []
    for target in targets:
        if target.is_dir() and os.access(target, os.W_OK):  # tantivy locks an index to read it
            if _is_intact(target):
                return target
            _LOG.warning("%s is damaged or incomplete; building it again", target)
    for target in targets:
        if target.exists() and not os.access(target, os.W_OK):
            reasons.append(f"{target} is not writable")
            continue
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            building = Path(tempfile.mkdtemp(prefix=f"{target.name}.tmp-", dir=target.parent))
        except OSError as error:
            reasons.append(str(error))
            continue
        try:
            build(building)
            _write_checksums(building)
            building.chmod(0o755)
            _put(building, target)
        except ToolSetupError:
            raise
        except (OSError, ValueError) as error:  # tantivy raises ValueError for a full disk
            raise ToolSetupError(f"cannot write {target}: {' '.join(str(error).split())}; mend that") from None
        finally:
            shutil.rmtree(building, ignore_errors=True)
        return target
    raise ToolSetupError(f"cannot write the {kind} of {path}: {'; '.join(reasons)}; make one of the folders writable")


def _places(path: Path) -> list[Path]:
    """Beside the corpus, then the user's cache; without an absolute one (no HOME) there is none."""
    caches = (os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache"))
    return [path.parent, *(Path(cache, "metis_fast") for cache in caches if os.path.isabs(cache))][:2]


def _put(built: Path, target: Path) -> None:
    """Rename `built` to `target`, unless another process was faster; a damaged folder there makes way."""
    if target.is_dir() and not _is_intact(target):
        damaged = Path(tempfile.mkdtemp(prefix=f"{target.name}.tmp-", dir=target.parent))
        with contextlib.suppress(FileNotFoundError):  # another process moved it
            target.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    try:
        built.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def _hashes(folder: Path, names: list[str]) -> dict[str, str]:
    hashes = {}
    for name in names:
        with (folder / name).open("rb") as file:
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def _write_checksums(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")  # tantivy's
    (folder / _CHECKSUMS).write_text(json.dumps(_hashes(folder, names), indent=1))


def _is_intact(folder: Path) -> bool:
    try:
        written = json.loads((folder / _CHECKSUMS).read_text())
        return bool(written) and written == _hashes(folder, list(written))
    except (OSError, ValueError, TypeError, RecursionError):  # a missing file; a damaged list of them
        return False
