"""The file of a recording: SQLite, each answer and each image once, by its hash. Many processes may write it at once."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from metis_fast.errors import RecordingError, one_line
from metis_fast.recording.asking import Answer, Asked

_APPLICATION, _FORMAT = 0x4D465243, 3  # "MFRC"; the format goes up when keys, tables or answers change
_WAIT_S = 60.0  # for another process that writes
_CONNECTION: dict[str, Any] = {"timeout": _WAIT_S, "isolation_level": None, "check_same_thread": False}
_TABLES = (
    "CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE images (sha256 TEXT PRIMARY KEY, data BLOB NOT NULL)",
    "CREATE TABLE answers (sha256 TEXT PRIMARY KEY, body TEXT NOT NULL)",
    """CREATE TABLE calls (key TEXT, rollout TEXT, what TEXT NOT NULL, request TEXT NOT NULL, answer TEXT NOT NULL,
       PRIMARY KEY (key, rollout)) WITHOUT ROWID""",
)
_FIND = """SELECT answers.body FROM calls JOIN answers ON answers.sha256 = calls.answer
    WHERE calls.key = ? AND calls.rollout IN (?, '') ORDER BY calls.rollout DESC LIMIT 1"""


class Recording:
    """An open recording. Thread-safe; belongs to no event loop.

    Raises:
        RecordingError: the file is missing (to read), is no recording, has another format, or cannot be read or written. A full
            disk is one, too: it ends the run, with the last whole step saved.
    """

    def __init__(self, path: Path, writable: bool) -> None:
        """writable: to record, into a new file or one that is there; else to replay."""
        self.path, self.writable = path, writable
        self._lock = threading.Lock()
        if not writable and not path.is_file():
            raise RecordingError(f"{self}: expected a recording, found no such file; set it to one that tools.record made")
        try:
            self._database = self._open()
        except (sqlite3.Error, OSError) as error:
            raise self._unusable(error) from None

    def __str__(self) -> str:
        """The setting, for errors."""
        return f"tools.{'record' if self.writable else 'replay'}={self.path}"

    def _open(self) -> sqlite3.Connection:
        if self.writable:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return self._connected(sqlite3.connect(self.path, **_CONNECTION), self._create)
        # a file whose writer was killed is made whole by its first reader; where that cannot write, it must be whole already
        name = f"file:{quote(str(self.path.absolute()))}?mode="
        try:
            return self._connected(sqlite3.connect(f"{name}rw", uri=True, **_CONNECTION), self._check_format)
        except sqlite3.OperationalError:
            unfinished = self.path.with_name(f"{self.path.name}-wal")
            if unfinished.exists() and unfinished.stat().st_size:
                raise
        return self._connected(sqlite3.connect(f"{name}ro&immutable=1", uri=True, **_CONNECTION), self._check_format)

    @staticmethod
    def _connected(database: sqlite3.Connection, check: Callable[[sqlite3.Connection], None]) -> sqlite3.Connection:
        try:
            check(database)
        except BaseException:  # whatever it is, it goes on when this is closed
            database.close()
            raise
        return database

    def _create(self, database: sqlite3.Connection) -> None:
        """The tables, unless they are there. Several processes may come at once."""
        if database.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0] == 0:
            with self._transaction(database):
                if database.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0] == 0:
                    for table in _TABLES:
                        database.execute(table)
                    database.execute(f"PRAGMA application_id = {_APPLICATION}")
                    database.execute(f"PRAGMA user_version = {_FORMAT}")
        self._check_format(database)  # before anything of another program's file is changed
        deadline = time.monotonic() + _WAIT_S
        while True:  # SQLite itself does not wait for the lock that this takes
            try:
                database.execute("PRAGMA journal_mode = WAL")
                break
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        database.execute("PRAGMA synchronous = NORMAL")  # nothing waits for the disk; a power cut may take the last answers
        with self._transaction(database):
            pass  # it can be written, or the run ends here

    def _check_format(self, database: sqlite3.Connection) -> None:
        (application,) = database.execute("PRAGMA application_id").fetchone()
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if application != _APPLICATION:
            raise RecordingError(f"{self}: expected a recording, found a SQLite file of another kind; name another file")
        if version != _FORMAT:
            raise RecordingError(
                f"{self}: expected a recording in format {_FORMAT}, found format {version}; use the release that "
                "recorded it, or record into a new file"
            )

    # -- reading ------------------------------------------------------------------------------------------------------

    def find(self, asked: Asked, rollout: str = "") -> Answer | None:
        """What was answered, to that rollout if it has an answer of its own; None: nothing is known."""
        with self._reading():
            row = self._database.execute(_FIND, (asked.key, rollout)).fetchone()
        return None if row is None else Answer(row[0], {})

    def image(self, sha256: str) -> bytes:
        """An image of an answer."""
        with self._reading():
            row = self._database.execute("SELECT data FROM images WHERE sha256 = ?", (sha256,)).fetchone()
        if row is None:
            raise RecordingError(f"{self}: lacks the image {sha256[:16]} of an answer; restore it from a copy")
        return row[0]

    def about(self, name: str) -> str | None:
        """What `describe` was given."""
        with self._reading():
            row = self._database.execute("SELECT value FROM about WHERE name = ?", (name,)).fetchone()
        return None if row is None else row[0]

    # -- writing ------------------------------------------------------------------------------------------------------

    def keep(self, asked: Asked, answer: Answer) -> Answer:
        """Record an answer that is as good as another; returns the one that was there first, for everyone to use."""
        with self._writing():
            self._insert(asked, "", answer, "IGNORE")
            (body,) = self._database.execute(_FIND, (asked.key, "")).fetchone()
        return answer if body == answer.body else Answer(body, {})

    def keep_own(self, asked: Asked, rollout: str, answer: Answer) -> None:
        """Record what a tool with a state answered to a rollout.

        The first answer is everyone's; who gets another one has a line of its own, which the rollout's next try replaces.
        """
        known = self.find(asked, rollout)
        if known is not None and (known.body == answer.body or not rollout):
            return
        with self._writing():
            self._insert(asked, "", answer, "IGNORE")
            (first,) = self._database.execute(_FIND, (asked.key, "")).fetchone()
            if first != answer.body:
                self._insert(asked, rollout, answer, "REPLACE")
            else:
                self._database.execute(
                    "DELETE FROM calls WHERE key = ? AND rollout = ? AND rollout != ''", (asked.key, rollout)
                )

    def describe(self, values: Mapping[str, str]) -> None:
        """Keep something of the run that records."""
        with self._writing():
            self._database.executemany("INSERT OR REPLACE INTO about VALUES (?, ?)", values.items())

    def _insert(self, asked: Asked, rollout: str, answer: Answer, otherwise: str) -> None:
        for sha256, data in answer.images.items():
            if self._database.execute("SELECT 1 FROM images WHERE sha256 = ?", (sha256,)).fetchone() is None:
                self._database.execute("INSERT INTO images VALUES (?, ?)", (sha256, data))
        self._database.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", (answer.sha256, answer.body))
        line = (asked.key, rollout, asked.what, asked.request, answer.sha256)
        self._database.execute(f"INSERT OR {otherwise} INTO calls VALUES (?, ?, ?, ?, ?)", line)

    def close(self) -> None:
        """Close the file; the last to do so leaves it alone, without SQLite's files beside it. May be called twice."""
        with self._lock:
            if self.writable:
                with suppress(sqlite3.Error):  # others have it open, or it is closed
                    self._database.execute("PRAGMA busy_timeout = 0")
                    self._database.execute("PRAGMA journal_mode = DELETE")
            self._database.close()

    # -- errors -------------------------------------------------------------------------------------------------------

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except sqlite3.Error as error:
                raise self._unusable(error) from None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._lock:
            try:
                with self._transaction(self._database):
                    yield
            except sqlite3.Error as error:
                raise self._unusable(error) from None

    @staticmethod
    @contextmanager
    def _transaction(database: sqlite3.Connection) -> Iterator[None]:
        database.execute("BEGIN IMMEDIATE")
        try:
            yield
            database.execute("COMMIT")
        except BaseException:  # whatever it is, it goes on; nothing of the transaction may stay
            with suppress(sqlite3.Error):  # a full disk has ended it already
                database.execute("ROLLBACK")
            raise

    def _unusable(self, error: sqlite3.Error | OSError) -> RecordingError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        advice = {
            sqlite3.SQLITE_FULL: "make room on that disk, then resume",
            sqlite3.SQLITE_BUSY: "another process held it too long: put it on a local disk",
            sqlite3.SQLITE_NOTADB: "name a recording, or a new file"
            if self.writable
            else "set it to one that tools.record made",
        }.get(
            code, "give a file that you can write, on a local disk" if self.writable else "give a recording that you can read"
        )
        verb = "written" if self.writable else "read"
        return RecordingError(f"{self} cannot be {verb}: {one_line(error)}; {advice}")
