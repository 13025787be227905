"""Past verdicts of an LLM judge."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from metis_fast.errors import JudgeError
from metis_fast.score.llm_reply import Said


class VerdictCache:
    """Past verdicts, in memory or in a SQLite file that several runs may share.

    Raises:
        JudgeError: the file cannot be opened, read or written, or is no SQLite file.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path or ":memory:", timeout=30, isolation_level=None, check_same_thread=False)
            # A verdict lost in a power cut is asked for again, so no write waits for the disk.
            self._database.execute("PRAGMA synchronous = OFF")
            self._database.execute("CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, correct INTEGER NOT NULL)")
            # beside them: caches of earlier versions have verdicts without
            self._database.execute("CREATE TABLE IF NOT EXISTS thoughts (key TEXT PRIMARY KEY, thought TEXT NOT NULL)")
        except (sqlite3.Error, OSError) as error:
            if hasattr(self, "_database"):  # it opens whatever it is given, and finds out at the first statement
                self._database.close()
            raise self._unusable(error) from None

    def get(self, key: str) -> Said | None:
        """The verdict stored under `key`, None where there is none."""
        query = "SELECT correct, thought FROM verdicts LEFT JOIN thoughts ON thoughts.key = verdicts.key WHERE verdicts.key = ?"
        try:
            row = self._database.execute(query, (key,)).fetchone()
        except sqlite3.Error as error:
            raise self._unusable(error) from None
        return Said(bool(row[0]), str(row[1] or "")) if row is not None and row[0] in (0, 1) else None

    def put(self, key: str, said: Said) -> None:
        """Store a verdict."""
        try:
            if said.thought:  # first: another run that finds the verdict finds its thought
                self._database.execute("INSERT OR REPLACE INTO thoughts VALUES (?, ?)", (key, said.thought))
            self._database.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?)", (key, said.correct))
        except sqlite3.Error as error:
            raise self._unusable(error) from None

    def close(self) -> None:
        """Close the file. May be called twice."""
        self._database.close()

    def _unusable(self, error: Exception) -> JudgeError:
        return JudgeError(f"score.llm.cache={self._path} cannot be used: {error}; give a writable SQLite file, or none")
