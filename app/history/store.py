"""The history file: small synchronous calls, each one transaction."""

from __future__ import annotations

import json
import os
import sqlite3
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from app.errors import GryphonError
from app.history.claims import Claims
from app.history.migrations import NewerSchema, migrate
from app.history.records import Conversation, MessageState, Role, StoredMessage

_BUSY_TIMEOUT_S = 2.0
_TITLE_LENGTH = 60

_CONVERSATION = "id, title, draft, active, created, updated"
_MESSAGE = "id, conversation, parent, role, content, model, state, error, stats, created, reasoning"


class History:
    """An open history file. Several gryphons may have the same one open.

    Every call is one short transaction in WAL mode, so a process killed at any moment loses
    nothing that a call had returned from. Faults of the file arrive as `GryphonError`; the file
    itself is never deleted or replaced.
    """

    def __init__(self, path: Path) -> None:
        """Open `path`, creating it (0600) and bringing its schema up to date.

        Raises:
            GryphonError: "history_unreadable" (not a database, or damaged), "history_too_new",
                "history_not_writable" or "history_busy".
        """
        self.path = path
        with self._faults():
            # Created before SQLite sees it: the -wal and -shm files copy the mode of this one.
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if stat.S_IMODE(os.fstat(file).st_mode) & 0o077:
                    os.fchmod(file, 0o600)
            finally:
                os.close(file)
            self._db = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA synchronous = NORMAL")
                self._db.execute("PRAGMA foreign_keys = ON")
                migrate(self._db)
                self._claims = Claims(path.with_name(f"{path.name}-open"))
            except BaseException:
                self._db.close()
                raise

    def close(self) -> None:
        self._claims.close()
        self._db.close()

    def create_conversation(self) -> Conversation:
        """A new conversation, claimed by this process."""
        now = time.time()
        with self._transaction() as db:
            row = db.execute(
                "INSERT INTO conversation (created, updated) VALUES (?, ?) "
                f"RETURNING {_CONVERSATION}",
                (now, now),
            ).fetchone()
        conversation = Conversation(*row)
        self._claims.take(conversation.id)
        return conversation

    def conversations(self) -> list[Conversation]:
        """All of them, the one used last first."""
        with self._faults():
            rows = self._db.execute(
                f"SELECT {_CONVERSATION} FROM conversation ORDER BY updated DESC, id DESC"
            ).fetchall()
        return [Conversation(*row) for row in rows]

    def latest(self) -> Conversation | None:
        """The one used last."""
        with self._faults():
            row = self._db.execute(
                f"SELECT {_CONVERSATION} FROM conversation ORDER BY updated DESC, id DESC LIMIT 1"
            ).fetchone()
        return Conversation(*row) if row else None

    def claim(self, conversation: int) -> bool:
        """Take a conversation for this process; False while another running gryphon has it.

        Whoever holds the claim is the only writer, so an answer that is still marked as streaming
        was left by a process that died: it is marked as interrupted.
        """
        if not self._claims.take(conversation):
            return False
        with self._transaction() as db:
            db.execute(
                "UPDATE message SET state = 'interrupted' "
                "WHERE conversation = ? AND state = 'streaming'",
                (conversation,),
            )
        return True

    def release(self, conversation: int) -> None:
        """Let another gryphon have the conversation."""
        self._claims.release(conversation)

    def append(
        self,
        conversation: int,
        parent: int | None,
        role: Role,
        content: str,
        *,
        model: str | None = None,
        state: MessageState = "complete",
    ) -> StoredMessage:
        """Add a message under `parent` and make it the active leaf. The draft is emptied when it
        is a user's, for it is what the draft became."""
        now = time.time()
        with self._transaction() as db:
            row = db.execute(
                "INSERT INTO message (conversation, parent, role, content, model, state, created) "
                f"VALUES (?, ?, ?, ?, ?, ?, ?) RETURNING {_MESSAGE}",
                (conversation, parent, role, content, model, state, now),
            ).fetchone()
            db.execute(
                "UPDATE conversation SET active = ?, updated = ? WHERE id = ?",
                (row[0], now, conversation),
            )
            if role == "user":
                db.execute(
                    "UPDATE conversation SET draft = '', "
                    "title = CASE title WHEN '' THEN ? ELSE title END WHERE id = ?",
                    (_title(content), conversation),
                )
        return _message(row)

    def update_text(self, message: int, content: str, reasoning: str = "") -> None:
        """Save what has come so far of a streaming answer."""
        with self._transaction() as db:
            db.execute(
                "UPDATE message SET content = ?, reasoning = ? "
                "WHERE id = ? AND state = 'streaming'",
                (content, reasoning, message),
            )

    def finish(
        self,
        message: int,
        content: str,
        state: MessageState,
        *,
        error: str | None = None,
        stats: dict[str, Any] | None = None,
        reasoning: str = "",
    ) -> StoredMessage:
        """Save the whole of an answer and how it ended."""
        with self._transaction() as db:
            row = db.execute(
                "UPDATE message SET content = ?, state = ?, error = ?, stats = ?, reasoning = ? "
                f"WHERE id = ? RETURNING {_MESSAGE}",
                (content, state, error, json.dumps(stats) if stats else None, reasoning, message),
            ).fetchone()
            db.execute("UPDATE conversation SET updated = ? WHERE id = ?", (time.time(), row[1]))
        return _message(row)

    def path_to_leaf(self, conversation: int) -> list[StoredMessage]:
        """The chat as people see it: the messages from the root to the active leaf."""
        with self._faults():
            rows = self._db.execute(
                f"""
                WITH RECURSIVE path(id, parent, depth) AS (
                    SELECT message.id, message.parent, 0 FROM message
                    JOIN conversation ON conversation.active = message.id
                    WHERE conversation.id = ?
                    UNION ALL
                    SELECT message.id, message.parent, depth + 1 FROM message
                    JOIN path ON message.id = path.parent
                )
                SELECT {", ".join(f"message.{column}" for column in _MESSAGE.split(", "))}
                FROM path JOIN message ON message.id = path.id ORDER BY depth DESC
                """,
                (conversation,),
            ).fetchall()
        return [_message(row) for row in rows]

    def save_draft(self, conversation: int, text: str) -> None:
        """Keep what is typed and not sent."""
        with self._transaction() as db:
            db.execute("UPDATE conversation SET draft = ? WHERE id = ?", (text, conversation))

    def delete_conversation(self, conversation: int) -> None:
        """Remove a conversation with all its messages, and let go of its claim."""
        with self._transaction() as db:
            db.execute("DELETE FROM conversation WHERE id = ?", (conversation,))
        self._claims.release(conversation)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._faults():
            # IMMEDIATE waits for the other gryphon here; a lock upgraded later would fail at once.
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """Turn faults of the file into one sentence that says where it is and what to do."""
        try:
            yield
        except NewerSchema as error:
            raise GryphonError(
                "history_too_new",
                f"The chat history {self.path} was written by a newer Gryphon. Update Gryphon, or "
                "set GRYPHON_HOME to another directory to start a separate history.",
            ) from error
        except (OSError, sqlite3.Error) as error:
            raise _explain(error, self.path) from error


def _explain(error: OSError | sqlite3.Error, path: Path) -> GryphonError:
    # Extended result codes carry the primary one in their low byte.
    code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
    if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return GryphonError(
            "history_unreadable",
            f"The chat history {path} is damaged or is not a Gryphon history ({error}). It was "
            "left as it is: move it aside to start a new one, or put a backup in its place.",
        )
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return GryphonError(
            "history_busy",
            f"The chat history {path} is locked by another program. Close it and try again.",
        )
    if code == sqlite3.SQLITE_FULL:
        return GryphonError(
            "history_disk_full", f"The disk is full: {path} cannot be saved. Free some space."
        )
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return GryphonError(
        "history_not_writable",
        f"The chat history {path} cannot be written: {reason}. Make it and its directory "
        "writable, or set GRYPHON_HOME to a directory you own.",
    )


def _title(text: str) -> str:
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line if len(line) <= _TITLE_LENGTH else line[: _TITLE_LENGTH - 1] + "…"


def _message(row: tuple[Any, ...]) -> StoredMessage:
    fields = dict(zip(_MESSAGE.split(", "), row, strict=True))
    if fields["stats"]:
        fields["stats"] = json.loads(fields["stats"])
    return StoredMessage(**fields)
