"""What the history holds, as plain immutable values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]

MessageState = Literal["streaming", "complete", "cancelled", "failed", "interrupted"]
"""`streaming` rows whose writer died become `interrupted` when the conversation is next claimed."""


@dataclass(frozen=True)
class Conversation:
    """One chat: a tree of messages, of which the path to `active` is shown."""

    id: int
    title: str
    """First line of the first user message; empty before there is one."""
    draft: str
    """Typed and not sent."""
    active: int | None
    """The leaf whose path from the root is the chat as people see it."""
    created: float
    updated: float


@dataclass(frozen=True)
class StoredMessage:
    """One turn; its siblings (same `parent`) are retries and branches."""

    id: int
    conversation: int
    parent: int | None
    role: Role
    content: str
    model: str | None
    """Name of the model that wrote it, for answers."""
    state: MessageState
    error: str | None
    """One sentence for a person, when `state` is "failed"."""
    stats: dict[str, Any] | None
    """Usage and timings of an answer, as the engine reported them."""
    created: float
    reasoning: str
    """What the model thought before it answered; never shown to it as its answer."""
