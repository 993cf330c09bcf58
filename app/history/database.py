"""The history file itself: opening it, transactions, and what can be wrong with it."""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from app.errors import GryphonError
from app.history.claims import Claims
from app.history.migrations import (
    ForeignDatabase,
    NewerSchema,
    migrate,
    remove_old_backups,
)
from app.history.words import prepared

BUSY_TIMEOUT_S = 2.0

_DAMAGE = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)
_MIN_SQLITE = (3, 35)


class Database:
    """An open history file. Several gryphons may have the same one open.

    A damaged file is set aside under another name and a new one begun; `notice` says so then.
    Nothing is ever deleted for being damaged.
    """

    def __init__(self, path: Path) -> None:
        """Open `path`, creating it (0600) and bringing its schema up to date.

        Raises:
            GryphonError: "history_unreadable" (another program's database, or damaged and open in
                another gryphon), "history_too_new", "history_not_writable", "history_disk_full",
                "history_busy" or "history_sqlite".
        """
        self.path = path
        self.notice = ""
        """What a person should be told about how it was opened; empty as a rule."""
        if sqlite3.sqlite_version_info < _MIN_SQLITE:
            raise _needs_sqlite(f"SQLite {sqlite3.sqlite_version} is too old")
        with self.faults():
            try:
                self._open()
            except sqlite3.DatabaseError as error:
                if not _is_damage(error):
                    raise
                self._begin_anew(str(error))
            with suppress(OSError):
                remove_old_backups(path)

    def _open(self) -> None:
        # Created before SQLite sees it: the -wal and -shm files copy the mode of this one.
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if stat.S_IMODE(os.fstat(file).st_mode) & 0o077:
                os.fchmod(file, 0o600)
        finally:
            os.close(file)
        self.claims = Claims(self.path.with_name(f"{self.path.name}-open"))
        try:
            self.connection = _connect(self.path)
        except BaseException:
            self.claims.close()
            raise
        try:
            self._check_after_damage()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.claims.close()
        self.connection.close()

    @property
    def _suspicion(self) -> Path:
        """There when damage was met after the file was opened, for the next start to look into."""
        return self.path.with_name(f"{self.path.name}-damaged")

    def _check_after_damage(self) -> None:
        if not self._suspicion.exists():
            return
        (verdict,) = self.connection.execute("PRAGMA integrity_check(1)").fetchone()
        if verdict != "ok":
            error = sqlite3.DatabaseError(f"integrity_check: {verdict.splitlines()[-1]}")
            error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
            raise error
        # The tables are whole, so it was the index of their words, which can be made again.
        with self.transaction() as db:
            for words in ("message_words", "conversation_words"):
                db.execute(f"INSERT INTO {words}({words}) VALUES ('rebuild')")
        self._suspicion.unlink(missing_ok=True)

    def _begin_anew(self, reason: str) -> None:
        """Set the file aside with what belongs to it, and open a new one."""
        claims = Claims(self.path.with_name(f"{self.path.name}-open"))
        try:
            if not claims.is_only_user():
                raise GryphonError(
                    "history_unreadable",
                    f"The chat history {self.path} is damaged ({reason}) and open in another "
                    "Gryphon. Close that one and start again: the file is then set aside and a "
                    "new one begun.",
                )
            aside = self._set_aside()
            claims.share()
            self._open()
        finally:
            claims.close()
        self.notice = (
            f"The chat history was damaged ({reason}). It is kept as {aside}, and a new one was "
            f'begun. `sqlite3 "{aside}" .recover` may bring back what is in it.'
        )

    def _set_aside(self) -> Path:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        aside = self.path.with_name(f"{self.path.name}.damaged-{stamp}")
        number = 1
        while aside.exists():
            number += 1
            aside = self.path.with_name(f"{self.path.name}.damaged-{stamp}-{number}")
        # The log goes first: a new database would take the old one's for its own.
        for suffix in ("-wal", "-shm", ""):
            with suppress(FileNotFoundError):
                os.rename(f"{self.path}{suffix}", f"{aside}{suffix}")
        self._suspicion.unlink(missing_ok=True)
        return aside

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All that is done within, or nothing.

        Raises:
            GryphonError: as `faults` says.
        """
        with self.faults():
            # IMMEDIATE waits for the other gryphon here; a lock upgraded later would fail at once.
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield self.connection
                self.connection.execute("COMMIT")
            except BaseException:
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")
                raise

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """One state of the file for all that is read within."""
        with self.faults():
            self.connection.execute("BEGIN")
            try:
                yield self.connection
            finally:
                # Some faults, such as a full disk, have ended it already.
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")

    @contextmanager
    def faults(self) -> Iterator[None]:
        """Turn faults of the file into one sentence that says where it is and what to do."""
        try:
            yield
        except NewerSchema as error:
            raise GryphonError(
                "history_too_new",
                f"The chat history {self.path} was written by a newer Gryphon. Update Gryphon, or "
                "set GRYPHON_HOME to another directory to start a separate history.",
            ) from error
        except ForeignDatabase as error:
            raise GryphonError(
                "history_unreadable",
                f"{self.path} is a database of another program, not a Gryphon history. It was left "
                "as it is: move it away to start a new one.",
            ) from error
        except (OSError, sqlite3.Error) as error:
            if _is_damage(error):
                with suppress(OSError):
                    os.close(os.open(self._suspicion, os.O_CREAT | os.O_WRONLY, 0o600))
            raise _explain(error, self.path) from error

    def scrub(self) -> None:
        """Leave nothing in the file of what was deleted."""
        with self.faults():
            # Words of deleted rows stay in the index's older parts until those are merged.
            for words in ("message_words", "conversation_words"):
                self.connection.execute(f"INSERT INTO {words}({words}) VALUES ('optimize')")
            self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
    try:
        db.create_function("prepared", 1, prepared, deterministic=True)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("PRAGMA secure_delete = ON")
        try:
            migrate(db, path)
        except sqlite3.OperationalError as error:
            if "no such module" in str(error):
                raise _needs_sqlite("this SQLite was built without full-text search") from error
            raise
        db.execute("PRAGMA foreign_keys = ON")
        # The first page that holds rows, so that damage shows now rather than later.
        db.execute("SELECT id FROM conversation ORDER BY updated DESC LIMIT 1").fetchone()
    except BaseException:
        db.close()
        raise
    return db


def _is_damage(error: BaseException) -> bool:
    return _code(error) in _DAMAGE


def _code(error: BaseException) -> int:
    # Extended result codes carry the primary one in their low byte.
    return (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF


def _needs_sqlite(why: str) -> GryphonError:
    return GryphonError(
        "history_sqlite",
        f"Python's sqlite3 cannot hold the chat history: {why}. Use a Python with SQLite 3.35 or "
        "newer and FTS5, as those of python.org, uv and Homebrew have.",
    )


def _explain(error: OSError | sqlite3.Error, path: Path) -> GryphonError:
    code = _code(error)
    if code in _DAMAGE:
        return GryphonError(
            "history_unreadable",
            f"The chat history {path} is damaged ({error}). Nothing was removed. The next start "
            "of Gryphon checks the file, and if it is beyond use sets it aside and begins a new "
            "one.",
        )
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return GryphonError(
            "history_busy",
            f"The chat history {path} is locked by another program. Close it and try again.",
        )
    if code == sqlite3.SQLITE_FULL or getattr(error, "errno", None) == errno.ENOSPC:
        return GryphonError(
            "history_disk_full", f"The disk is full: {path} cannot be saved. Free some space."
        )
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return GryphonError(
        "history_not_writable",
        f"The chat history {path} cannot be written: {reason}. Make it and its directory "
        "writable, or set GRYPHON_HOME to a directory you own.",
    )
