"""The tokens of a rollout as text, each id decoded once."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

_FILE = "tokenizer.json"


class Pieces:
    """id -> text. Without a tokenizer an id is its own text."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    @staticmethod
    def of(given: Path | None, run: Path, model: object) -> Pieces:
        """given: that of the command line. model: `model.path` of the run's settings. Without `given` that of the run's export
        counts, or that of the model it began with."""
        folders = [given] if given else [run / "trained", *([Path(model)] if isinstance(model, str) else ())]
        for folder in folders:
            path = folder / _FILE if folder.is_dir() else folder
            if path.name.endswith(".json") and path.is_file():
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
