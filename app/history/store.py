"""The history: small synchronous calls, each one transaction."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import msgspec

from app.engine.protocol import ToolCallPart
from app.errors import GryphonError
from app.history import tree
from app.history.conversations import (
    CONVERSATION_COLUMNS,
    Conversations,
    checked,
    clear_draft_attachments,
    conversation_row,
    first_words,
    set_title,
    update_conversation,
)
from app.history.records import (
    AnswerStats,
    Attachment,
    Deleted,
    MessageState,
    Page,
    Role,
    StoredMessage,
    Turn,
    engine_chat,
)
from app.history.text import sound


class History(Conversations):
    """An open history file. Several gryphons may have the same one open.

    Every call is one short transaction in WAL mode, so a process killed at any moment loses
    nothing that a call had returned from. Faults of the file arrive as `GryphonError`, as does an
    id that is not there ("no_such_chat", "no_such_message").
    """

    def append(
        self,
        conversation: int,
        parent: int | None,
        role: Role,
        content: str,
        *,
        attachments: Sequence[Attachment] = (),
        model: str | None = None,
        state: MessageState = "complete",
        tool_call_id: str = "",
    ) -> StoredMessage:
        """Add a message under `parent` and make it the active leaf; when `parent` has children
        already, it is a branch beside them. A user's message empties the draft, for it is what the
        draft became."""
        now = time.time()
        content = sound(content)
        with self.database.transaction() as db:
            chat = conversation_row(db, conversation)
            try:
                id = tree.add(
                    db,
                    conversation,
                    parent=parent,
                    role=role,
                    content=content,
                    model=model,
                    state=state,
                    tool_call_id=tool_call_id,
                    created=now,
                )
            except LookupError:
                raise _no_message(parent, conversation) from None
            tree.attach(db, conversation, id, checked(attachments))
            update_conversation(db, conversation, updated=now)
            if state != "streaming":
                tree.index_words(db, id)
            if role == "user":
                update_conversation(db, conversation, draft="")
                clear_draft_attachments(db, conversation)
                if chat.titled_by == "nobody":
                    _title_by_first_words(db, conversation)
            return _message(db, id)

    def edit(
        self, message: int, content: str, attachments: Sequence[Attachment] | None = None
    ) -> StoredMessage:
        """Say something else instead of a message: a branch beside it. `attachments` are its own
        unless given."""
        old = self.message(message)
        return self.append(
            old.conversation,
            old.parent,
            old.role,
            content,
            attachments=old.attachments if attachments is None else attachments,
            model=old.model,
        )

    def update_text(self, message: int, content: str, reasoning: str = "") -> None:
        """Save what has come so far of a streaming answer."""
        with self.database.transaction() as db:
            db.execute(
                "UPDATE message SET content = ?, reasoning = ? "
                "WHERE id = ? AND state = 'streaming'",
                (sound(content), sound(reasoning), message),
            )

    def finish(
        self,
        message: int,
        content: str,
        state: MessageState,
        *,
        reasoning: str = "",
        tool_calls: Sequence[ToolCallPart] = (),
        finish_reason: str | None = None,
        error: str | None = None,
        stats: AnswerStats | None = None,
    ) -> StoredMessage:
        """Save the whole of an answer and how it ended."""
        with self.database.transaction() as db:
            conversation = _message(db, message).conversation
            db.execute(
                "UPDATE message SET content = ?, state = ?, reasoning = ?, tool_calls = ?, "
                "finish_reason = ?, error = ?, stats = ? WHERE id = ?",
                (
                    sound(content),
                    state,
                    sound(reasoning),
                    encode_calls(tool_calls),
                    finish_reason,
                    error,
                    json.dumps(asdict(stats)) if stats else None,
                    message,
                ),
            )
            tree.index_words(db, message)
            update_conversation(db, conversation, updated=time.time())
            return _message(db, message)

    def continue_answer(self, message: int) -> StoredMessage:
        """Go on with an answer that was cut: it streams again, from the words it has. It is saved
        as any other; the stats of the whole are `AnswerStats.continued`.

        Raises:
            GryphonError: "not_continuable": it is no answer that was cut.
        """
        with self.database.transaction() as db:
            before = _message(db, message)
            if not before.is_cut:
                raise GryphonError(
                    "not_continuable", "Only an answer that was cut off can be continued."
                )
            db.execute(
                "UPDATE message SET state = 'streaming', error = NULL, finish_reason = NULL "
                "WHERE id = ?",
                (message,),
            )
            tree.show(db, before.conversation, message)
            return _message(db, message)

    def message(self, id: int) -> StoredMessage:
        """The message as it is now."""
        with self.database.reading() as db:
            return _message(db, id)

    def siblings(self, message: int) -> list[int]:
        """The message and its branches and retries, oldest first."""
        with self.database.reading() as db:
            one = _message(db, message)
            return tree.siblings(db, one.conversation, one.parent)

    def choose(self, message: int) -> StoredMessage:
        """Show the path that leads through a message, and on as it last did; returns its leaf.
        The chat remembers it."""
        with self.database.transaction() as db:
            one = _message(db, message)
            tree.show(db, one.conversation, message)
            leaf = conversation_row(db, one.conversation).active
            assert leaf is not None
            return _message(db, leaf)

    def path_to_leaf(self, conversation: int) -> list[StoredMessage]:
        """The chat as people see it: the messages from the root to the active leaf."""
        with self.database.reading() as db:
            return tree.path_upward(db, conversation_row(db, conversation).active)

    def page(self, conversation: int, limit: int, *, above: int | None = None) -> Page:
        """The last `limit` turns of the path shown, or those above the message `above`."""
        with self.database.reading() as db:
            leaf = conversation_row(db, conversation).active
            if above is not None:
                leaf = _message(db, above).parent
            messages = tree.path_upward(db, leaf, limit)
            earlier = messages[0].depth - 1 if messages else 0
            return Page(tree.as_turns(db, messages), earlier)

    def turn(self, message: int) -> Turn:
        """A message and its place among its siblings."""
        with self.database.reading() as db:
            return tree.as_turns(db, [_message(db, message)])[0]

    def tree(self, conversation: int) -> list[StoredMessage]:
        """All messages of a chat, a parent before its children."""
        with self.database.reading() as db:
            conversation_row(db, conversation)
            return tree.all_messages(db, conversation)

    def delete_message(self, message: int) -> Deleted:
        """Remove a message and everything below it. If it was shown, a sibling is from then on, or
        the path ends above. What the engine keeps of the chat is named by `to_forget`, for it holds
        these words too."""
        with self.database.transaction() as db:
            root = _message(db, message)
            deleted = tree.delete(db, root)
            _title_by_first_words(db, root.conversation)
            _will_forget(db, conversation_row(db, root.conversation).engine_chat)
            update_conversation(db, root.conversation, updated=time.time())
        self.has_deleted = True
        return deleted

    def restore(self, deleted: Deleted) -> None:
        """Undo a deletion of this session, the last one first. A conversation is claimed again.

        Raises:
            GryphonError: "cannot_undo": what it hung on is gone, or it is there again.
        """
        rows = dict(deleted.rows)
        with self.database.transaction() as db:
            try:
                if deleted.is_whole:
                    (row,) = rows.pop("conversation")
                    values = dict(zip(CONVERSATION_COLUMNS, row, strict=True)) | {"active": None}
                    db.execute(
                        f"INSERT INTO conversation ({', '.join(CONVERSATION_COLUMNS)}) "
                        f"VALUES ({', '.join('?' * len(CONVERSATION_COLUMNS))})",
                        list(values.values()),
                    )
                    db.execute(
                        "DELETE FROM forgetting WHERE engine_chat = ?",
                        (engine_chat(values["uid"]),),
                    )
                elif not _has_parent_of(db, rows["message"]):
                    raise sqlite3.IntegrityError("its parent is gone")
                tree.put_back(db, rows)
                db.execute(
                    "UPDATE conversation SET active = ? WHERE id = ?",
                    (deleted.active, deleted.conversation),
                )
                _title_by_first_words(db, deleted.conversation)
            except sqlite3.IntegrityError as error:
                raise GryphonError(
                    "cannot_undo",
                    f"The deletion cannot be undone ({error}): what it belonged to is gone or has "
                    "changed. Undo the later deletion first.",
                ) from error
        if deleted.is_whole:
            self.database.claims.take(deleted.conversation)

    def delete_conversation(self, conversation: int) -> Deleted:
        """Remove a conversation with all its messages, and let go of its claim. What the engine
        keeps of it is named by `to_forget` from then on.

        Raises:
            GryphonError: "chat_in_use": another running gryphon has it open.
        """
        if not self.database.claims.take(conversation):
            raise GryphonError(
                "chat_in_use",
                f"Chat {conversation} is open in another Gryphon. Close it there first.",
            )
        with self.database.transaction() as db:
            chat = conversation_row(db, conversation)
            rows = {
                "conversation": db.execute(
                    f"SELECT {', '.join(CONVERSATION_COLUMNS)} FROM conversation WHERE id = ?",
                    (conversation,),
                ).fetchall(),
                **tree.take_all(db, conversation),
                "prompt": db.execute(
                    "SELECT * FROM prompt WHERE conversation = ?", (conversation,)
                ).fetchall(),
                "conversation_words": db.execute(
                    "SELECT rowid, body FROM conversation_words WHERE rowid = ?", (conversation,)
                ).fetchall(),
            }
            rows["attachment_text"] = db.execute(
                "SELECT * FROM attachment_text WHERE digest IN "
                "(SELECT digest FROM attachment WHERE conversation = ?)",
                (conversation,),
            ).fetchall()
            rows["attachment"] = db.execute(
                "SELECT * FROM attachment WHERE conversation = ?", (conversation,)
            ).fetchall()
            if rows["message"]:
                _will_forget(db, chat.engine_chat)
            db.execute("DELETE FROM conversation WHERE id = ?", (conversation,))
            tree.drop_unused_texts(db)
        self.has_deleted = self.has_deleted or bool(rows["message"])
        self.database.claims.release(conversation)
        return Deleted(conversation, len(rows["message"]), rows, chat.active, is_whole=True)


def encode_calls(calls: Sequence[ToolCallPart]) -> str:
    """As the column holds them."""
    return msgspec.json.encode(list(calls)).decode()


def _message(db: sqlite3.Connection, id: int) -> StoredMessage:
    found = tree.message(db, id)
    if found is None:
        raise GryphonError("no_such_message", f"There is no message {id}; it may be deleted.")
    return found


def _no_message(parent: int | None, conversation: int) -> GryphonError:
    return GryphonError(
        "no_such_message",
        f"Chat {conversation} has no message {parent} to answer; it may be deleted.",
    )


def _title_by_first_words(db: sqlite3.Connection, conversation: int) -> None:
    """Give it the title that its first question makes, unless somebody gave it a better one."""
    chat = conversation_row(db, conversation)
    if chat.titled_by in ("nobody", "first_words"):
        title = first_words(tree.first_question(db, conversation))
        if title != chat.title:
            set_title(db, conversation, title, "first_words" if title else "nobody")


def _will_forget(db: sqlite3.Connection, name: str) -> None:
    db.execute("INSERT OR IGNORE INTO forgetting VALUES (?)", (name,))


def _has_parent_of(db: sqlite3.Connection, rows: Sequence[tuple[Any, ...]]) -> bool:
    _, conversation, parent, *_ = rows[0]
    if parent is None:
        return (
            db.execute("SELECT 1 FROM conversation WHERE id = ?", (conversation,)).fetchone()
            is not None
        )
    return db.execute("SELECT 1 FROM message WHERE id = ?", (parent,)).fetchone() is not None
