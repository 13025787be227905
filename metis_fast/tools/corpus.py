"""Local corpora: checked when a toolbox opens, and the derived files (indexes) kept beside them."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from metis_fast.errors import ToolSetupError
from metis_fast.types import ToolName

_HASHED_BYTES = 1 << 20  # at each end; a Parquet file's last bytes hold its schema and the statistics of every column


def check_corpus(tool: ToolName, corpus: Path | None, columns: Sequence[str]) -> Path:
    """The corpus of a search tool, if it is there and has `columns`.

    Raises:
        ToolSetupError: it is not.
    """
    if corpus is None:
        raise ToolSetupError(f"{tool} has no corpus; set tools.{tool}.corpus or remove {tool} from tools.enabled")
    try:
        names = pq.read_schema(corpus).names
    except OSError as error:
        raise ToolSetupError(f"cannot read the corpus of {tool}, {corpus}: {error}; set tools.{tool}.corpus") from None
    except pa.ArrowInvalid:
        raise ToolSetupError(f"the corpus of {tool}, {corpus}, is not a Parquet file; set tools.{tool}.corpus") from None
    missing = [name for name in columns if name not in names]
    if missing:
        raise ToolSetupError(f"the corpus of {tool}, {corpus}, has no column {missing[0]!r}; it needs {', '.join(columns)}")
    return corpus


def page_text(text: str | None) -> str:
    """A corpus cell as one line, in which nothing stands for an image."""
    return " ".join((text or "").split()).replace("<image>", "< image >")


def corpus_key(corpus: Path, layout: str) -> str:
    """16 hex digits that change with the corpus (size, modification time, hash of both ends) and with `layout`."""
    status = corpus.stat()
    digest = hashlib.sha256(f"{layout}:{status.st_size}:{status.st_mtime_ns}".encode())
    with corpus.open("rb") as file:
        digest.update(file.read(_HASHED_BYTES))
        file.seek(max(0, status.st_size - _HASHED_BYTES))
        digest.update(file.read())
    return digest.hexdigest()[:16]


def derived_folder(corpus: Path, kind: str, layout: str, build: Callable[[Path], None]) -> Path:
    """The folder `<corpus>.<kind>-<key>`; `build` fills it if it is not there.

    It appears whole or not at all. Two processes may build at the same time: the first to finish wins, the other's is dropped.

    Raises:
        OSError: the corpus's folder cannot be written.
    """
    target = corpus.with_name(f"{corpus.name}.{kind}-{corpus_key(corpus, layout)}")
    if target.is_dir():
        return target
    building = Path(tempfile.mkdtemp(prefix=f"{target.name}.tmp-", dir=corpus.parent))
    try:
        build(building)
        building.chmod(0o755)
        os.rename(building, target)
    except OSError:
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target
