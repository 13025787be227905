"""The tokens of a rollout as text, each id decoded once."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from stat import S_ISREG

from tokenizers import Tokenizer

_FILE = "tokenizer.json"


def tokenizer_files(given: Path | None, run: Path, model: object) -> dict[Path, os.stat_result]:
    """Where a tokenizer may be, the likeliest first. given: that of the command line. model: `model.path` of the settings.
    Without `given` that of the run's export counts, or that of the model it began with."""
    folders = [given] if given else [run / "trained", *([Path(model)] if isinstance(model, str) else ())]
    found = {}
    for folder in folders:
        path = folder / _FILE if os.path.isdir(folder) else folder
        if path.name.endswith(".json"):
            try:
                status = path.stat()
            except (OSError, ValueError):  # it is not there, is somebody else's, or has a name that no file can have
                continue
            if S_ISREG(status.st_mode):
                found[path] = status
    return found


class Pieces:
    """id -> text. Without a tokenizer an id is its own text."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    @staticmethod
    def of(files: Iterable[Path]) -> Pieces:
        """Of the first that can be used."""
        for path in files:
            try:
                return Pieces(Tokenizer.from_file(str(path)))
            except Exception:  # the tokenizers library has no narrower class for a file that it cannot use
                continue
        return Pieces(None)

    @property
    def found(self) -> bool:
        """Whether there is a tokenizer."""
        return self._tokenizer is not None

    def texts(self, ids: list[int]) -> list[str]:
        """The text of each id; parts of a character are U+FFFD."""
        if self._tokenizer is None:
            return [str(one) for one in ids]
        new = set(ids) - self._known.keys()
        for one in new:
            self._known[one] = self._tokenizer.decode([one], skip_special_tokens=False)
        return [self._known[one] for one in ids]
