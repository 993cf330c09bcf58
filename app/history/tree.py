"""The messages of a conversation as a tree, in SQL. Every function works within a transaction.

Of siblings the one with the highest `shown` is on the path; `conversation.active` is the leaf that
this leads to from the root.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from app.engine.protocol import ToolCallPart
from app.history.records import AnswerStats, Attachment, Deleted, StoredMessage, Turn

MESSAGE_COLUMNS = (
    "id", "conversation", "parent", "depth", "shown", "role", "content", "reasoning",
    "tool_calls", "tool_call_id", "model", "state", "finish_reason", "error", "stats", "created",
)  # fmt: skip

_SELECT = f"SELECT {', '.join(f'message.{name}' for name in MESSAGE_COLUMNS)} FROM message"

_SUBTREE = """
    WITH RECURSIVE subtree(id) AS (
        VALUES (?)
        UNION ALL
        SELECT message.id FROM message JOIN subtree ON message.parent = subtree.id
    )
"""

_stats = msgspec.json.Decoder(AnswerStats)
_calls = msgspec.json.Decoder(tuple[ToolCallPart, ...])


def message(db: sqlite3.Connection, id: int) -> StoredMessage | None:
    """The message of this id."""
    found = _messages(db, db.execute(f"{_SELECT} WHERE id = ?", (id,)))
    return found[0] if found else None


def path_upward(
    db: sqlite3.Connection, leaf: int | None, limit: int | None = None
) -> list[StoredMessage]:
    """`leaf` and the `limit` - 1 messages above it (all: None), oldest first."""
    rows = db.execute(
        f"""
        WITH RECURSIVE path(id, parent, above) AS (
            SELECT id, parent, 0 FROM message WHERE id = ?
            UNION ALL
            SELECT message.id, message.parent, above + 1 FROM message
            JOIN path ON message.id = path.parent LIMIT ?
        )
        {_SELECT} JOIN path USING (id) ORDER BY above DESC
        """,
        (leaf, -1 if limit is None else limit),
    )
    return _messages(db, rows)


def all_messages(db: sqlite3.Connection, conversation: int) -> list[StoredMessage]:
    """The whole tree, a parent before its children."""
    return _messages(
        db, db.execute(f"{_SELECT} WHERE conversation = ? ORDER BY depth, id", (conversation,))
    )


def siblings(db: sqlite3.Connection, conversation: int, parent: int | None) -> list[int]:
    """The ids of the children of `parent` (the first messages: None), oldest first."""
    rows = db.execute(
        "SELECT id FROM message WHERE conversation = ? AND parent IS ? ORDER BY id",
        (conversation, parent),
    )
    return [id for (id,) in rows]


def as_turns(db: sqlite3.Connection, messages: Iterable[StoredMessage]) -> list[Turn]:
    """Each message with its place among its siblings."""
    turns = []
    for one in messages:
        ids = siblings(db, one.conversation, one.parent)
        index = ids.index(one.id)
        before = ids[index - 1] if index else None
        after = ids[index + 1] if index + 1 < len(ids) else None
        turns.append(Turn(one, index + 1, len(ids), before, after))
    return turns


def add(db: sqlite3.Connection, conversation: int, **values: Any) -> int:
    """Insert a message under its `parent` and show it; returns its id."""
    parent = values["parent"]
    depth = 1
    if parent is not None:
        row = db.execute(
            "SELECT depth + 1 FROM message WHERE id = ? AND conversation = ?",
            (parent, conversation),
        ).fetchone()
        if row is None:
            raise LookupError(parent)
        (depth,) = row
    shown = _next_shown(db, conversation, parent)
    columns = {**values, "conversation": conversation, "depth": depth, "shown": shown}
    row = db.execute(
        f"INSERT INTO message ({', '.join(columns)}) "
        f"VALUES ({', '.join('?' * len(columns))}) RETURNING id",
        list(columns.values()),
    ).fetchone()
    id: int = row[0]
    (active,) = db.execute(
        "SELECT active FROM conversation WHERE id = ?", (conversation,)
    ).fetchone()
    if parent is not None and parent != active:
        _show_above(db, conversation, parent)
    db.execute("UPDATE conversation SET active = ? WHERE id = ?", (id, conversation))
    return id


def show(db: sqlite3.Connection, conversation: int, id: int) -> None:
    """Make the path lead through the message, and on from there as it last did."""
    _show_above(db, conversation, id)
    set_active(db, conversation, id)


def _show_above(db: sqlite3.Connection, conversation: int, id: int) -> None:
    """Choose the message and everything above it among their siblings."""
    hidden = db.execute(
        """
        WITH RECURSIVE path(id, parent, shown) AS (
            SELECT id, parent, shown FROM message WHERE id = ?
            UNION ALL
            SELECT message.id, message.parent, message.shown FROM message
            JOIN path ON message.id = path.parent
        )
        SELECT id, parent FROM path WHERE id <> (
            SELECT id FROM message WHERE conversation = ? AND parent IS path.parent
            ORDER BY shown DESC, id DESC LIMIT 1
        )
        """,
        (id, conversation),
    ).fetchall()
    for one, parent in hidden:
        db.execute(
            "UPDATE message SET shown = ? WHERE id = ?",
            (_next_shown(db, conversation, parent), one),
        )


def _next_shown(db: sqlite3.Connection, conversation: int, parent: int | None) -> int:
    row = db.execute(
        "SELECT coalesce(max(shown), 0) + 1 FROM message WHERE conversation = ? AND parent IS ?",
        (conversation, parent),
    ).fetchone()
    return int(row[0])


def set_active(db: sqlite3.Connection, conversation: int, start: int | None) -> None:
    """Make the leaf that is shown below `start` (the whole tree: None) the active one."""
    leaf = start
    (below,) = db.execute(
        """
        WITH RECURSIVE path(id, below) AS (
            SELECT (SELECT id FROM message WHERE conversation = ?1 AND parent IS ?2
                    ORDER BY shown DESC, id DESC LIMIT 1), 1
            UNION ALL
            SELECT (SELECT id FROM message WHERE conversation = ?1 AND parent IS path.id
                    ORDER BY shown DESC, id DESC LIMIT 1), below + 1
            FROM path WHERE path.id IS NOT NULL
        )
        SELECT (SELECT id FROM path WHERE id IS NOT NULL ORDER BY below DESC LIMIT 1)
        """,
        (conversation, start),
    ).fetchone()
    db.execute("UPDATE conversation SET active = ? WHERE id = ?", (below or leaf, conversation))


def delete(db: sqlite3.Connection, root: StoredMessage) -> Deleted:
    """Take out the message and everything below it. Where that was shown, a sibling is, or the
    path ends above."""
    conversation = root.conversation
    (active,) = db.execute(
        "SELECT active FROM conversation WHERE id = ?", (conversation,)
    ).fetchone()
    subtree = f"{_SUBTREE} SELECT id FROM subtree"
    taken = _taken(db, f"IN ({subtree})", root.id)
    ids = [row[0] for row in taken["message"]]
    db.executemany("DELETE FROM message WHERE id = ?", [(id,) for id in ids])
    drop_unused_texts(db)
    if active in set(ids):
        set_active(db, conversation, root.parent)
    return Deleted(conversation, len(ids), taken, active)


def take_all(db: sqlite3.Connection, conversation: int) -> dict[str, list[tuple[Any, ...]]]:
    """What the tree of a conversation consists of, by table; nothing is removed."""
    return _taken(db, "IN (SELECT id FROM message WHERE conversation = ?)", conversation)


def _taken(db: sqlite3.Connection, which: str, key: int) -> dict[str, list[tuple[Any, ...]]]:
    return {
        "message": db.execute(
            f"SELECT * FROM message WHERE id {which} ORDER BY depth", (key,)
        ).fetchall(),
        "attachment_text": db.execute(
            "SELECT * FROM attachment_text WHERE digest IN "
            f"(SELECT digest FROM attachment WHERE message {which})",
            (key,),
        ).fetchall(),
        "attachment": db.execute(
            f"SELECT * FROM attachment WHERE message {which}", (key,)
        ).fetchall(),
        "message_words": db.execute(
            f"SELECT rowid, body FROM message_words WHERE rowid {which}", (key,)
        ).fetchall(),
    }


def first_question(db: sqlite3.Connection, conversation: int) -> str:
    """What was asked first, of all branches; empty when nothing was."""
    row = db.execute(
        "SELECT content FROM message WHERE conversation = ? AND role = 'user' ORDER BY id LIMIT 1",
        (conversation,),
    ).fetchone()
    return row[0] if row else ""


def put_back(db: sqlite3.Connection, rows: dict[str, list[tuple[Any, ...]]]) -> None:
    """Insert what was taken."""
    for table, values in rows.items():
        if not values:
            continue
        columns = "(rowid, body)" if table.endswith("_words") else ""
        # A text may be there again, attached to something else.
        verb = "INSERT OR IGNORE" if table == "attachment_text" else "INSERT"
        holes = ", ".join("?" * len(values[0]))
        db.executemany(f"{verb} INTO {table} {columns} VALUES ({holes})", values)


def attach(
    db: sqlite3.Connection,
    conversation: int,
    message: int | None,
    attachments: Sequence[Attachment],
) -> None:
    """Attach to a message, or to the draft (None)."""
    for one in attachments:
        db.execute("INSERT OR IGNORE INTO attachment_text VALUES (?, ?)", (one.digest, one.text))
        db.execute(
            "INSERT INTO attachment (conversation, message, name, digest) VALUES (?, ?, ?, ?)",
            (conversation, message, one.name, one.digest),
        )


def drop_unused_texts(db: sqlite3.Connection) -> None:
    """Remove texts that are attached to nothing any more."""
    db.execute(
        "DELETE FROM attachment_text WHERE NOT EXISTS "
        "(SELECT 1 FROM attachment WHERE attachment.digest = attachment_text.digest)"
    )


def index_words(db: sqlite3.Connection, id: int) -> None:
    """Put the words of a message into the index, or what they are now."""
    db.execute("DELETE FROM message_words WHERE rowid = ?", (id,))
    db.execute(
        "INSERT INTO message_words (rowid, body) "
        "SELECT id, prepared(content) FROM message WHERE id = ?",
        (id,),
    )


def _messages(db: sqlite3.Connection, cursor: sqlite3.Cursor) -> list[StoredMessage]:
    found = []
    rows = cursor.fetchall()
    attached_to = _with_attachments(db, {row[1] for row in rows})
    for row in rows:
        fields = dict(zip(MESSAGE_COLUMNS, row, strict=True))
        fields["stats"] = _stats.decode(fields["stats"]) if fields["stats"] else None
        calls = fields["tool_calls"]
        fields["tool_calls"] = () if calls == "[]" else _calls.decode(calls)
        id = fields["id"]
        fields["attachments"] = _attachments(db, id) if id in attached_to else ()
        found.append(StoredMessage(**fields))
    return found


def _with_attachments(db: sqlite3.Connection, conversations: Iterable[int]) -> set[int]:
    """The messages that have any: to ask for each takes most of the time of a long chat."""
    query = "SELECT message FROM attachment WHERE conversation = ? AND message IS NOT NULL"
    return {id for one in conversations for (id,) in db.execute(query, (one,))}


def _attachments(db: sqlite3.Connection, message: int) -> tuple[Attachment, ...]:
    rows = db.execute(
        "SELECT name, text FROM attachment JOIN attachment_text USING (digest) "
        "WHERE message = ? ORDER BY attachment.id",
        (message,),
    )
    return tuple(Attachment(name, text) for name, text in rows)
