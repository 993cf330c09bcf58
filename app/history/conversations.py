"""Chats and what belongs to each besides its messages."""

from __future__ import annotations

import json
import sqlite3
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from app.engine.protocol import check_sampling
from app.errors import GryphonError
from app.history import tree
from app.history.database import Database
from app.history.records import Attachment, Conversation, Folder, Parameters, TitledBy
from app.history.text import one_line, sound

TITLE_LENGTH = 60
MAX_TITLE_CHARACTERS = 200
MAX_FOLDER_CHARACTERS = 200
MAX_ATTACHMENT_CHARACTERS = 16 * 1024 * 1024
PROMPTS_KEPT = 500
"""Of what was typed in one chat."""

CONVERSATION_COLUMNS = (
    "id", "uid", "title", "titled_by", "folder", "pinned", "draft", "active", "model", "adapter",
    "system_prompt", "parameters", "created", "updated",
)  # fmt: skip
_SELECT = f"""
    SELECT {", ".join(f"conversation.{name}" for name in CONVERSATION_COLUMNS)},
        (SELECT count(*) FROM message WHERE message.conversation = conversation.id),
        coalesce((SELECT depth FROM message WHERE message.id = conversation.active), 0)
    FROM conversation
"""

_parameters = msgspec.json.Decoder(Parameters)
_TITLE_RANK: dict[TitledBy, int] = {"nobody": 0, "first_words": 1, "model": 2, "person": 3}


class Conversations:
    """The half of `History` that needs no messages."""

    def __init__(self, path: Path) -> None:
        """Open `path`, creating it (0600) and bringing its schema up to date.

        Raises:
            GryphonError: as `Database` says.
        """
        self.path = path
        self.database = Database(path)
        self.has_deleted = bool(self.to_forget())
        """Whether something was deleted that the file may still hold in its unused parts."""

    @property
    def notice(self) -> str:
        """What a person should be told about how it was opened; empty as a rule."""
        return self.database.notice

    def close(self) -> None:
        """Let go of everything that is claimed. What was deleted can no longer be restored."""
        try:
            if self.has_deleted:
                with suppress(GryphonError):
                    self.database.scrub()
        finally:
            self.database.close()

    def create_conversation(
        self, *, folder: str = "", model: str = "", adapter: str = ""
    ) -> Conversation:
        """A new conversation, claimed by this process."""
        now = time.time()
        with self.database.transaction() as db:
            row = db.execute(
                "INSERT INTO conversation (uid, folder, model, adapter, created, updated) "
                "VALUES (?, ?, ?, ?, ?, ?) RETURNING id",
                (uuid.uuid4().hex, _folder(folder), model, adapter, now, now),
            ).fetchone()
        self.database.claims.take(row[0])
        return self.conversation(row[0])

    def conversation(self, id: int) -> Conversation:
        """The conversation as it is now."""
        with self.database.reading() as db:
            return conversation_row(db, id)

    def conversations(
        self,
        *,
        folder: str | None = None,
        pinned_first: bool = False,
        limit: int | None = None,
        offset: int = 0,
    ) -> list[Conversation]:
        """The one used last first.

        Args:
            folder: Those in this folder alone; "" are those in none, None is all.
            pinned_first: Put the pinned ones before the others, as a list for people does.
            limit: How many at most; None is all. `offset` are left out before.
        """
        with self.database.reading() as db:
            rows = db.execute(
                f"{_SELECT} WHERE ?1 IS NULL OR folder = ?1 "
                f"ORDER BY {'pinned DESC,' if pinned_first else ''} updated DESC, id DESC "
                "LIMIT ?2 OFFSET ?3",
                (folder, -1 if limit is None else limit, offset),
            ).fetchall()
        return [_as_conversation(row) for row in rows]

    def latest(self) -> Conversation | None:
        """The one used last."""
        found = self.conversations(limit=1)
        return found[0] if found else None

    def claim(self, conversation: int) -> bool:
        """Take a conversation for this process; False while another running gryphon has it.

        Whoever holds the claim is the only writer, so an answer that is still marked as streaming
        was left by a process that died: it is marked as interrupted.
        """
        if not self.database.claims.take(conversation):
            return False
        with self.database.transaction() as db:
            cut = db.execute(
                "UPDATE message SET state = 'interrupted' "
                "WHERE conversation = ? AND state = 'streaming' RETURNING id",
                (conversation,),
            ).fetchall()
            for (id,) in cut:
                tree.index_words(db, id)
        return True

    def release(self, conversation: int) -> None:
        """Let another gryphon have the conversation."""
        self.database.claims.release(conversation)

    def rename(self, conversation: int, title: str, *, by: TitledBy = "person") -> bool:
        """Give it a title. One by a model does not replace a person's: False then. An empty title
        by a person leaves it to the model again."""
        line = one_line(title, MAX_TITLE_CHARACTERS)
        if not line:
            by = "nobody"
        with self.database.transaction() as db:
            before = conversation_row(db, conversation)
            if line and _TITLE_RANK[by] < _TITLE_RANK[before.titled_by]:
                return False
            set_title(db, conversation, line, by)
        return True

    def pin(self, conversation: int, *, pinned: bool = True) -> None:
        """Keep it at the top of the list, or no longer."""
        self._set(conversation, pinned=int(pinned))

    def move(self, conversation: int, folder: str) -> None:
        """Put it into a folder, which is there from then on; "" takes it out."""
        self._set(conversation, folder=_folder(folder))

    def folders(self) -> list[Folder]:
        """The folders that chats are in, by name."""
        with self.database.reading() as db:
            rows = db.execute(
                "SELECT folder, count(*) FROM conversation WHERE folder <> '' "
                "GROUP BY folder ORDER BY folder"
            ).fetchall()
        return [Folder(*row) for row in rows]

    def rename_folder(self, name: str, to: str) -> None:
        """Rename a folder and those within it; into one that exists, the two become one; "" takes
        the chats out of any."""
        target = _folder(to)
        with self.database.transaction() as db:
            db.execute("UPDATE conversation SET folder = ? WHERE folder = ?", (target, name))
            db.execute(
                "UPDATE conversation SET folder = ?1 || substr(folder, ?2 + 1) "
                "WHERE substr(folder, 1, ?2) = ?3 || '/'",
                (f"{target}/" if target else "", len(name) + 1, name),
            )

    def set_model(self, conversation: int, model: str, adapter: str = "") -> None:
        """The model, and the adapter on it, that the chat goes on with."""
        self._set(conversation, model=sound(model), adapter=sound(adapter))

    def set_system_prompt(self, conversation: int, text: str) -> None:
        """What the model is told before the first message."""
        self._set(conversation, system_prompt=sound(text))

    def set_parameters(self, conversation: int, parameters: Parameters) -> None:
        """How answers are generated from now on.

        Raises:
            GryphonError: "invalid_sampling".
        """
        check_sampling(parameters.sampling)
        self._set(conversation, parameters=encode_parameters(parameters))

    def save_draft(
        self, conversation: int, text: str, attachments: Sequence[Attachment] | None = None
    ) -> None:
        """Keep what is typed and not sent. `attachments` replace those of the draft; None leaves
        them."""
        with self.database.transaction() as db:
            update_conversation(db, conversation, draft=sound(text))
            if attachments is not None:
                clear_draft_attachments(db, conversation)
                tree.attach(db, conversation, None, checked(attachments))

    def draft_attachments(self, conversation: int) -> list[Attachment]:
        """What is attached to the draft."""
        with self.database.reading() as db:
            rows = db.execute(
                "SELECT name, text FROM attachment JOIN attachment_text USING (digest) "
                "WHERE conversation = ? AND message IS NULL ORDER BY attachment.id",
                (conversation,),
            ).fetchall()
        return [Attachment(*row) for row in rows]

    def prompts(self, conversation: int, limit: int = PROMPTS_KEPT) -> list[str]:
        """What was typed in the chat, the last first and nothing twice: the questions of all its
        branches and what `remember_prompt` added."""
        with self.database.reading() as db:
            rows = db.execute(
                "SELECT content, created, id FROM message "
                "WHERE conversation = ?1 AND role = 'user' AND trim(content) <> '' "
                "UNION ALL SELECT text, created, 0 FROM prompt WHERE conversation = ?1 "
                "ORDER BY created DESC, id DESC LIMIT ?2",
                (conversation, limit),
            ).fetchall()
        return list(dict.fromkeys(text for text, *_ in rows))

    def commands(self, conversation: int) -> list[tuple[str, float]]:
        """What `remember_prompt` added, the first first, and when."""
        with self.database.reading() as db:
            return db.execute(
                "SELECT text, created FROM prompt WHERE conversation = ? ORDER BY id",
                (conversation,),
            ).fetchall()

    def remember_prompt(self, conversation: int, text: str) -> None:
        """Add what was typed and is no question, such as a command."""
        with self.database.transaction() as db:
            conversation_row(db, conversation)
            db.execute(
                "INSERT INTO prompt (conversation, text, created) VALUES (?, ?, ?)",
                (conversation, sound(text), time.time()),
            )
            db.execute(
                "DELETE FROM prompt WHERE conversation = ?1 AND id <= ("
                "SELECT id FROM prompt WHERE conversation = ?1 ORDER BY id DESC LIMIT 1 OFFSET ?2)",
                (conversation, PROMPTS_KEPT),
            )

    def to_forget(self) -> list[str]:
        """The engine's names of chats whose words it may still keep though they were deleted here.
        They stay in this list, also over a kill, until `forgot`: see `forget_deleted`."""
        with self.database.reading() as db:
            rows = db.execute("SELECT engine_chat FROM forgetting ORDER BY rowid").fetchall()
        return [name for (name,) in rows]

    def forgot(self, name: str) -> None:
        """The engine keeps nothing of this chat any more."""
        with self.database.transaction() as db:
            db.execute("DELETE FROM forgetting WHERE engine_chat = ?", (name,))

    def _set(self, conversation: int, **values: Any) -> None:
        with self.database.transaction() as db:
            update_conversation(db, conversation, **values)


def first_words(text: str) -> str:
    """The title that a chat has until it gets a better one: its first line."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    line = one_line(line, MAX_TITLE_CHARACTERS)
    return line if len(line) <= TITLE_LENGTH else line[: TITLE_LENGTH - 1] + "…"


def encode_parameters(parameters: Parameters) -> str:
    """As the column holds them: what is set, and nothing else."""
    fields = msgspec.to_builtins(parameters, str_keys=True)
    if "sampling" in fields:
        fields["sampling"] = {k: v for k, v in fields["sampling"].items() if v is not None}
    return json.dumps(fields)


def decode_parameters(text: str) -> Parameters:
    """What `encode_parameters` made.

    Raises:
        msgspec.ValidationError: it is something else.
    """
    return _parameters.decode(text)


def conversation_row(db: sqlite3.Connection, id: int) -> Conversation:
    """The conversation of this id.

    Raises:
        GryphonError: "no_such_chat".
    """
    row = db.execute(f"{_SELECT} WHERE conversation.id = ?", (id,)).fetchone()
    if row is None:
        raise GryphonError("no_such_chat", f"There is no chat {id}. `gryphon chats` lists them.")
    return _as_conversation(row)


def _as_conversation(row: tuple[Any, ...]) -> Conversation:
    fields = dict(zip((*CONVERSATION_COLUMNS, "messages", "turns"), row, strict=True))
    fields["pinned"] = bool(fields["pinned"])
    fields["parameters"] = decode_parameters(fields["parameters"])
    return Conversation(**fields)


def update_conversation(db: sqlite3.Connection, conversation: int, **values: Any) -> None:
    """Set columns; "no_such_chat" where there is none."""
    changed = db.execute(
        f"UPDATE conversation SET {', '.join(f'{name} = ?' for name in values)} WHERE id = ?",
        [*values.values(), conversation],
    )
    if not changed.rowcount:
        conversation_row(db, conversation)


def set_title(db: sqlite3.Connection, conversation: int, title: str, by: TitledBy) -> None:
    """Give it a title, which can be searched for from then on."""
    update_conversation(db, conversation, title=title, titled_by=by)
    index_title(db, conversation, title)


def index_title(db: sqlite3.Connection, conversation: int, title: str) -> None:
    """Put the title's words into the index, in place of those before."""
    db.execute("DELETE FROM conversation_words WHERE rowid = ?", (conversation,))
    db.execute(
        "INSERT INTO conversation_words (rowid, body) VALUES (?, prepared(?))",
        (conversation, title),
    )


def clear_draft_attachments(db: sqlite3.Connection, conversation: int) -> None:
    """The draft has no attachments any more."""
    gone = db.execute(
        "DELETE FROM attachment WHERE conversation = ? AND message IS NULL", (conversation,)
    )
    if gone.rowcount:
        tree.drop_unused_texts(db)


def checked(attachments: Sequence[Attachment]) -> list[Attachment]:
    """The attachments as they can be stored.

    Raises:
        GryphonError: "attachment_too_large".
    """
    for one in attachments:
        if len(one.text) > MAX_ATTACHMENT_CHARACTERS:
            raise GryphonError(
                "attachment_too_large",
                f"{one.name} has {len(one.text)} characters; an attachment may have "
                f"{MAX_ATTACHMENT_CHARACTERS}.",
            )
    return [replace(one, name=one_line(one.name, 255), text=sound(one.text)) for one in attachments]


def _folder(name: str) -> str:
    parts = (part.strip() for part in one_line(name, MAX_FOLDER_CHARACTERS).split("/"))
    return "/".join(filter(None, parts))
