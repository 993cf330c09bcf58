"""The schema, as numbered steps. A step, once released, is never edited: add the next one."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.history.words import SHORTEST_PREFIX, TOKENIZER

Migration = Callable[[sqlite3.Connection], None]

MIGRATIONS: list[Migration] = []
"""`PRAGMA user_version` counts how many of these a file has been through."""

BACKUPS_KEPT_S = 14 * 24 * 3600.0
"""How long the copies made before migrations stay: they hold what is deleted meanwhile."""


def migration(step: Migration) -> Migration:
    """Append `step` to the list; its position is its number."""
    MIGRATIONS.append(step)
    return step


class NewerSchema(Exception):
    """The file was written by a later Gryphon."""


class ForeignDatabase(Exception):
    """The file is a database of another program."""


def migrate(db: sqlite3.Connection, path: Path) -> None:
    """Bring the file up to date, all steps or none; before that, copy it beside itself.

    Args:
        db: Without a transaction and with foreign keys off, for steps rebuild tables.
        path: The file that `db` has open.

    Raises:
        NewerSchema: the file has been through steps this Gryphon does not know.
        ForeignDatabase: it has tables, but none of ours.
        OSError, sqlite3.Error: also when the copy cannot be made; the file is as it was.
    """
    if _version(db) == len(MIGRATIONS):
        return
    # The write lock is taken before the version is read again: two gryphons may start at once.
    db.execute("BEGIN IMMEDIATE")
    try:
        version = _version(db)
        if version > len(MIGRATIONS):
            raise NewerSchema(version)
        if version == 0 and db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
            raise ForeignDatabase
        if 0 < version < len(MIGRATIONS):
            _copy(path, backup_path(path, version))
        for step in MIGRATIONS[version:]:
            step(db)
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def backup_path(path: Path, version: int) -> Path:
    """Where the copy of a file of this version is put."""
    return path.with_name(f"{path.name}-version-{version}")


def remove_old_backups(path: Path) -> None:
    """Remove the copies that have been there for `BACKUPS_KEPT_S`."""
    for backup in path.parent.glob(f"{path.name}-version-*"):
        if time.time() - backup.stat().st_mtime > BACKUPS_KEPT_S:
            backup.unlink(missing_ok=True)


def _copy(path: Path, target: Path) -> None:
    """Copy the database as last committed; `target` is whole or not there."""
    unfinished = target.with_name(f"{target.name}.part")
    unfinished.unlink(missing_ok=True)
    os.close(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    try:
        source, copy = sqlite3.connect(path), sqlite3.connect(unfinished)
        try:
            source.backup(copy)
        finally:
            copy.close()
            source.close()
        unfinished.replace(target)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _version(db: sqlite3.Connection) -> int:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    return int(version)


@migration
def conversations_as_trees(db: sqlite3.Connection) -> None:
    """Conversations, and messages that know their parent."""
    db.execute(
        """
        CREATE TABLE conversation (
            id INTEGER PRIMARY KEY,
            title TEXT NOT NULL DEFAULT '',
            draft TEXT NOT NULL DEFAULT '',
            active INTEGER REFERENCES message(id) ON DELETE SET NULL,
            created REAL NOT NULL,
            updated REAL NOT NULL
        )
        """
    )
    db.execute(
        """
        CREATE TABLE message (
            id INTEGER PRIMARY KEY,
            conversation INTEGER NOT NULL REFERENCES conversation(id) ON DELETE CASCADE,
            parent INTEGER REFERENCES message(id) ON DELETE CASCADE,
            role TEXT NOT NULL CHECK (role IN ('system', 'user', 'assistant')),
            content TEXT NOT NULL,
            model TEXT,
            state TEXT NOT NULL CHECK (
                state IN ('streaming', 'complete', 'cancelled', 'failed', 'interrupted')
            ),
            error TEXT,
            stats TEXT,
            created REAL NOT NULL
        )
        """
    )
    db.execute("CREATE INDEX message_parent ON message(parent)")
    db.execute("CREATE INDEX message_conversation ON message(conversation)")
    db.execute("CREATE INDEX conversation_updated ON conversation(updated)")


@migration
def reasoning_of_answers(db: sqlite3.Connection) -> None:
    """What a model thought before an answer, apart from the answer."""
    db.execute("ALTER TABLE message ADD COLUMN reasoning TEXT NOT NULL DEFAULT ''")


@migration
def chats_that_remember(db: sqlite3.Connection) -> None:
    """What belongs to a chat besides its messages; the child shown of each message; attachments;
    commands that were typed; an index of the words.

    Ids are never used again, so that a deleted message can be put back. Parents are looked at when
    a transaction ends: a cascade along them would go as deep as a chat is long, and SQLite stops at
    1000.
    """
    db.execute(
        """
        CREATE TABLE new_conversation (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            uid TEXT NOT NULL UNIQUE,
            title TEXT NOT NULL DEFAULT '',
            titled_by TEXT NOT NULL DEFAULT 'nobody' CHECK (
                titled_by IN ('nobody', 'first_words', 'model', 'person')
            ),
            folder TEXT NOT NULL DEFAULT '',
            pinned INTEGER NOT NULL DEFAULT 0,
            draft TEXT NOT NULL DEFAULT '',
            active INTEGER REFERENCES message(id) ON DELETE SET NULL,
            model TEXT NOT NULL DEFAULT '',
            adapter TEXT NOT NULL DEFAULT '',
            system_prompt TEXT NOT NULL DEFAULT '',
            parameters TEXT NOT NULL DEFAULT '{}',
            created REAL NOT NULL,
            updated REAL NOT NULL
        )
        """
    )
    db.execute(
        """
        CREATE TABLE new_message (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            conversation INTEGER NOT NULL REFERENCES conversation(id) ON DELETE CASCADE,
            parent INTEGER REFERENCES message(id) DEFERRABLE INITIALLY DEFERRED,
            depth INTEGER NOT NULL,
            shown INTEGER NOT NULL,
            role TEXT NOT NULL CHECK (role IN ('system', 'user', 'assistant', 'tool')),
            content TEXT NOT NULL,
            reasoning TEXT NOT NULL DEFAULT '',
            tool_calls TEXT NOT NULL DEFAULT '[]',
            tool_call_id TEXT NOT NULL DEFAULT '',
            model TEXT,
            state TEXT NOT NULL CHECK (
                state IN ('streaming', 'complete', 'cancelled', 'failed', 'interrupted')
            ),
            finish_reason TEXT,
            error TEXT,
            stats TEXT,
            created REAL NOT NULL
        )
        """
    )
    db.execute(
        """
        INSERT INTO new_conversation (id, uid, title, titled_by, draft, active, created, updated)
        SELECT id, lower(hex(randomblob(16))), title,
            CASE title WHEN '' THEN 'nobody' ELSE 'first_words' END,
            draft, active, created, updated
        FROM conversation
        """
    )
    # The sibling with the highest `shown` is the one on the path: the newest, but for the path that
    # was active.
    db.execute(
        """
        WITH RECURSIVE
            tree(id, depth) AS (
                SELECT id, 1 FROM message WHERE parent IS NULL
                UNION ALL
                SELECT message.id, depth + 1 FROM message JOIN tree ON message.parent = tree.id
            ),
            path(id) AS (
                SELECT active FROM conversation WHERE active IS NOT NULL
                UNION ALL
                SELECT parent FROM message JOIN path USING (id) WHERE parent IS NOT NULL
            )
        INSERT INTO new_message (id, conversation, parent, depth, shown, role, content, reasoning,
            model, state, finish_reason, error, stats, created)
        SELECT id, conversation, parent, depth,
            CASE WHEN id IN path THEN (SELECT max(id) + 1 FROM message) ELSE id END,
            role, content, reasoning, model, state, NULL, error, stats, created
        FROM message JOIN tree USING (id) ORDER BY id
        """
    )
    for name, stats in db.execute("SELECT id, stats FROM message WHERE stats IS NOT NULL"):
        reason, flat = _flat_stats(stats)
        db.execute(
            "UPDATE new_message SET finish_reason = ?, stats = ? WHERE id = ?", (reason, flat, name)
        )
    db.execute("CREATE TABLE forgetting (engine_chat TEXT PRIMARY KEY)")
    # The engine kept these under the names that they had before they had a uid.
    db.execute("INSERT INTO forgetting SELECT 'history-' || id FROM conversation")
    db.execute("DROP TABLE message")
    db.execute("DROP TABLE conversation")
    db.execute("ALTER TABLE new_conversation RENAME TO conversation")
    db.execute("ALTER TABLE new_message RENAME TO message")
    db.execute("CREATE INDEX message_siblings ON message(conversation, parent, shown)")
    db.execute("CREATE INDEX message_parent ON message(parent)")
    db.execute("CREATE INDEX conversation_updated ON conversation(updated)")
    db.execute(
        """
        CREATE TABLE prompt (
            id INTEGER PRIMARY KEY,
            conversation INTEGER NOT NULL REFERENCES conversation(id) ON DELETE CASCADE,
            text TEXT NOT NULL,
            created REAL NOT NULL
        )
        """
    )
    db.execute("CREATE INDEX prompt_conversation ON prompt(conversation)")
    db.execute("CREATE TABLE attachment_text (digest TEXT PRIMARY KEY, text TEXT NOT NULL)")
    db.execute(
        """
        CREATE TABLE attachment (
            id INTEGER PRIMARY KEY,
            conversation INTEGER NOT NULL REFERENCES conversation(id) ON DELETE CASCADE,
            message INTEGER REFERENCES message(id) ON DELETE CASCADE,
            name TEXT NOT NULL,
            digest TEXT NOT NULL REFERENCES attachment_text(digest)
        )
        """
    )
    db.execute("CREATE INDEX attachment_message ON attachment(message)")
    db.execute("CREATE INDEX attachment_conversation ON attachment(conversation)")
    db.execute("CREATE INDEX attachment_digest ON attachment(digest)")
    for kind in ("message", "conversation"):
        db.execute(
            f"CREATE VIRTUAL TABLE {kind}_words "
            f'USING fts5(body, tokenize="{TOKENIZER}", prefix={SHORTEST_PREFIX})'
        )
        db.execute(
            f"CREATE TRIGGER {kind}_unindexed AFTER DELETE ON {kind} "
            f"BEGIN DELETE FROM {kind}_words WHERE rowid = old.id; END"
        )
    db.execute(
        "INSERT INTO message_words (rowid, body) "
        "SELECT id, prepared(content) FROM message WHERE state <> 'streaming'"
    )
    db.execute(
        "INSERT INTO conversation_words (rowid, body) SELECT id, prepared(title) FROM conversation"
    )


def _flat_stats(text: str) -> tuple[str | None, str | None]:
    """The finish reason, and the counts and times by themselves, of what version 2 kept as one."""
    try:
        old: dict[str, Any] = json.loads(text)
        flat = {
            **{name: old["usage"][name] for name in _COUNTS},
            **{name: old["timings"][name] for name in _TIMES},
            "context_length": old.get("context_length"),
        }
        return old.get("reason"), json.dumps(flat)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None, None


_COUNTS = ("prompt_tokens", "cached_tokens", "completion_tokens")
_TIMES = ("queue_s", "prefill_s", "decode_s")
