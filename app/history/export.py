"""Chats as files: Markdown of the path shown, for reading; JSON of everything, to be imported."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from app.history.conversations import encode_parameters
from app.history.records import Conversation, StoredMessage
from app.history.store import History

FORMAT = "gryphon-chats"
VERSION = 1


def as_markdown(history: History, conversation: int) -> str:
    """The path shown of one chat, with what was thought and attached.

    Raises:
        GryphonError: "no_such_chat", or the file cannot be read.
    """
    chat = history.conversation(conversation)
    parts = [f"# {chat.title or 'Untitled chat'}", f"*{_date(chat.created)}*"]
    if chat.system_prompt:
        parts += ["## System", chat.system_prompt]
    for message in history.path_to_leaf(conversation):
        parts += _markdown(message)
    return "\n\n".join(parts) + "\n"


def _markdown(message: StoredMessage) -> Iterator[str]:
    names = {"user": "You", "assistant": message.model or "Assistant", "tool": "Tool"}
    yield f"## {names.get(message.role, message.role.capitalize())}"
    if message.reasoning:
        yield f"<details><summary>Thinking</summary>\n\n{message.reasoning}\n\n</details>"
    if message.content:
        yield message.content
    for call in message.tool_calls:
        yield f"Called `{call.name}`:\n\n{_fenced(call.arguments, 'json')}"
    for attachment in message.attachments:
        yield f"Attached `{attachment.name}`:\n\n{_fenced(attachment.text)}"
    endings = {
        "cancelled": "stopped",
        "interrupted": "interrupted",
        "streaming": "not finished",
        "failed": f"failed: {message.error}",
    }
    if ending := endings.get(message.state):
        yield f"*({ending})*"


def _fenced(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any in the text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip(chr(10))}\n{fence}"


def as_json(history: History, conversations: Iterable[int]) -> Iterator[str]:
    """Pieces of one JSON document with everything of these chats, whole trees; `import_chats` reads
    it. One chat is in memory at a time.

    Raises:
        GryphonError: as `as_markdown`.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    yield f'{{"format": "{FORMAT}", "version": {VERSION}, "exported": "{now}", "chats": ['
    separator = "\n"
    for conversation in conversations:
        yield separator + json.dumps(_chat(history, conversation), ensure_ascii=False)
        separator = ",\n"
    yield "\n]}\n"


def _chat(history: History, conversation: int) -> dict[str, Any]:
    chat: Conversation = history.conversation(conversation)
    messages = history.tree(conversation)
    draft = history.draft_attachments(conversation)
    texts = {one.digest: one.text for message in messages for one in message.attachments}
    texts |= {one.digest: one.text for one in draft}
    return {
        "uid": chat.uid,
        "title": chat.title,
        "titled_by": chat.titled_by,
        "folder": chat.folder,
        "pinned": chat.pinned,
        "created": chat.created,
        "updated": chat.updated,
        "model": chat.model,
        "adapter": chat.adapter,
        "system_prompt": chat.system_prompt,
        "parameters": json.loads(encode_parameters(chat.parameters)),
        "draft": chat.draft,
        "draft_attachments": [{"name": one.name, "digest": one.digest} for one in draft],
        "commands": [
            {"text": text, "created": created} for text, created in history.commands(conversation)
        ],
        "active": chat.active,
        "messages": [_message(message) for message in messages],
        "attachments": texts,
    }


def _message(message: StoredMessage) -> dict[str, Any]:
    fields = {
        "id": message.id,
        "parent": message.parent,
        "shown": message.shown,
        "role": message.role,
        "content": message.content,
        "reasoning": message.reasoning,
        "tool_calls": [
            {"id": call.id, "name": call.name, "arguments": call.arguments}
            for call in message.tool_calls
        ],
        "tool_call_id": message.tool_call_id,
        "model": message.model,
        "state": message.state,
        "finish_reason": message.finish_reason,
        "error": message.error,
        "stats": asdict(message.stats) if message.stats else None,
        "created": message.created,
        "attachments": [{"name": one.name, "digest": one.digest} for one in message.attachments],
    }
    always = ("id", "parent", "shown", "role", "content", "created")
    return {name: value for name, value in fields.items() if name in always or value}


def _date(moment: float) -> str:
    return datetime.datetime.fromtimestamp(moment).strftime("%Y-%m-%d %H:%M")
