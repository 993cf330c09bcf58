"""The schema, as numbered steps. A step, once released, is never edited: add the next one."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

Migration = Callable[[sqlite3.Connection], None]

MIGRATIONS: list[Migration] = []
"""`PRAGMA user_version` counts how many of these a file has been through."""


def migration(step: Migration) -> Migration:
    """Append `step` to the list; its position is its number."""
    MIGRATIONS.append(step)
    return step


class NewerSchema(Exception):
    """The file was written by a later Gryphon."""


def migrate(db: sqlite3.Connection) -> None:
    """Bring the file up to date, all steps or none.

    Raises:
        NewerSchema: the file has been through steps this Gryphon does not know.
    """
    if _version(db) == len(MIGRATIONS):
        return
    # The write lock is taken before the version is read again: two gryphons may start at once.
    db.execute("BEGIN IMMEDIATE")
    try:
        version = _version(db)
        if version > len(MIGRATIONS):
            raise NewerSchema(version)
        for step in MIGRATIONS[version:]:
            step(db)
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
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
