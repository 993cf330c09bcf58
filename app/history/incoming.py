"""Chats on their way into the history: all of them are stored, or none."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass, field

from app.engine.protocol import ToolCallPart
from app.history import tree
from app.history.conversations import PROMPTS_KEPT, encode_parameters, first_words, index_title
from app.history.records import (
    AnswerStats,
    Attachment,
    MessageState,
    Parameters,
    Role,
    TitledBy,
)
from app.history.store import History, encode_calls
from app.history.text import one_line


@dataclass
class IncomingMessage:
    """As `StoredMessage`, but for where it is."""

    role: Role
    content: str
    parent: int | None = None
    """Its place in the chat's list, before this one."""
    shown: int = 0
    reasoning: str = ""
    tool_calls: tuple[ToolCallPart, ...] = ()
    tool_call_id: str = ""
    model: str | None = None
    state: MessageState = "complete"
    finish_reason: str | None = None
    error: str | None = None
    stats: AnswerStats | None = None
    created: float | None = None
    attachments: tuple[Attachment, ...] = ()


@dataclass
class IncomingChat:
    """As `Conversation`, with all that belongs to it."""

    uid: str
    """A chat whose uid is there already is not imported again."""
    messages: list[IncomingMessage] = field(default_factory=list)
    active: int | None = None
    """The place of a message that the path leads through."""
    title: str = ""
    titled_by: TitledBy = "model"
    folder: str = ""
    pinned: bool = False
    created: float | None = None
    updated: float | None = None
    model: str = ""
    adapter: str = ""
    system_prompt: str = ""
    parameters: Parameters = field(default_factory=Parameters)
    draft: str = ""
    draft_attachments: tuple[Attachment, ...] = ()
    commands: list[tuple[str, float]] = field(default_factory=list)
    """What was typed and is no question, and when."""
    left_out: int = 0
    """Parts, such as images, that the history has no place for."""


@dataclass(frozen=True)
class ImportResult:
    """What came of an import."""

    conversations: list[int]
    """The new chats, in the order of the file."""
    already_here: int
    left_out: int
    """Parts, such as images, that the history has no place for."""


def digest_uid(value: object) -> str:
    """A uid for what has none: the same for the same content."""
    text = json.dumps(value, sort_keys=True)
    return f"sha256-{hashlib.sha256(text.encode()).hexdigest()}"


def store(history: History, chats: list[IncomingChat]) -> ImportResult:
    """Put the chats into the history in one transaction.

    Raises:
        GryphonError: the file cannot be written; nothing was stored then.
    """
    new: list[int] = []
    already = left_out = 0
    now = time.time()
    with history.database.transaction() as db:
        for chat in chats:
            if db.execute("SELECT 1 FROM conversation WHERE uid = ?", (chat.uid,)).fetchone():
                already += 1
                continue
            moments = [one.created for one in chat.messages if one.created is not None]
            created = chat.created or min(moments, default=now)
            updated = chat.updated or max(moments, default=created)
            asked = [one.content for one in chat.messages if one.role == "user"]
            title = one_line(chat.title, 200)
            titled_by = chat.titled_by if title else "nobody"
            if not title and asked and (title := first_words(asked[0])):
                titled_by = "first_words"
            row = db.execute(
                "INSERT INTO conversation (uid, title, titled_by, folder, pinned, draft, model, "
                "adapter, system_prompt, parameters, created, updated) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING id",
                (
                    chat.uid, title, titled_by, one_line(chat.folder, 200), int(chat.pinned),
                    chat.draft, chat.model, chat.adapter, chat.system_prompt,
                    encode_parameters(chat.parameters), created, updated,
                ),
            ).fetchone()  # fmt: skip
            conversation: int = row[0]
            new.append(conversation)
            left_out += chat.left_out
            index_title(db, conversation, title)
            ids: list[tuple[int, int]] = []
            for one in chat.messages:
                parent, depth = (None, 0) if one.parent is None else ids[one.parent]
                id = db.execute(
                    "INSERT INTO message (conversation, parent, depth, shown, role, content, "
                    "reasoning, tool_calls, tool_call_id, model, state, finish_reason, error, "
                    "stats, created) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
                    "RETURNING id",
                    (
                        conversation, parent, depth + 1, one.shown, one.role, one.content,
                        one.reasoning, encode_calls(one.tool_calls), one.tool_call_id, one.model,
                        "interrupted" if one.state == "streaming" else one.state,
                        one.finish_reason, one.error,
                        json.dumps(asdict(one.stats)) if one.stats else None,
                        created if one.created is None else one.created,
                    ),
                ).fetchone()[0]  # fmt: skip
                ids.append((id, depth + 1))
                tree.attach(db, conversation, id, one.attachments)
            db.execute(
                "INSERT INTO message_words (rowid, body) "
                "SELECT id, prepared(content) FROM message WHERE conversation = ?",
                (conversation,),
            )
            tree.attach(db, conversation, None, chat.draft_attachments)
            if chat.active is None:
                tree.set_active(db, conversation, None)
            else:
                tree.show(db, conversation, ids[chat.active][0])
            db.executemany(
                "INSERT INTO prompt (conversation, text, created) VALUES (?, ?, ?)",
                [(conversation, *command) for command in chat.commands[-PROMPTS_KEPT:]],
            )
    return ImportResult(new, already, left_out)
