"""What the history holds, as plain immutable values."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from app.engine.protocol import Sampling, ToolCallPart

Role = Literal["system", "user", "assistant", "tool"]

MessageState = Literal["streaming", "complete", "cancelled", "failed", "interrupted"]
"""`streaming` rows whose writer died become `interrupted` when the conversation is next claimed."""

TitledBy = Literal["nobody", "first_words", "model", "person"]
"""Who a title is from; a later one of these replaces an earlier one, never the other way round."""


class Parameters(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the answers of one chat are generated; names and ranges as in `GenerationRequest`."""

    sampling: Sampling = Sampling()
    max_tokens: int | None = None
    stop: list[str] = []
    template_options: dict[str, Any] = {}


@dataclass(frozen=True)
class Conversation:
    """One chat: a tree of messages, of which the path to `active` is shown."""

    id: int
    uid: str
    """The same in exports, wherever they are imported."""
    title: str
    """Empty before there is one; one line."""
    titled_by: TitledBy
    folder: str
    """The folder it is in; empty is none. A slash nests: "work/reports"."""
    pinned: bool
    draft: str
    """Typed and not sent; what is attached to it: `History.draft_attachments`."""
    active: int | None
    """The leaf whose path from the root is the chat as people see it."""
    model: str
    """Name of the model the chat is with; empty: the default one."""
    adapter: str
    """Name of the LoRA adapter on it; empty is none."""
    system_prompt: str
    parameters: Parameters
    created: float
    updated: float
    """When it was last written to by a person or a model; seconds since 1970."""
    messages: int
    """In the whole tree."""
    turns: int
    """On the path shown."""

    @property
    def engine_chat(self) -> str:
        """The name under which the engine keeps what it has read of it: the `chat` of requests."""
        return engine_chat(self.uid)


def engine_chat(uid: str) -> str:
    """As `Conversation.engine_chat`, from its uid."""
    return f"history-{uid}"


@dataclass(frozen=True)
class AnswerStats:
    """What an answer took, as the engine reported it. Times are in seconds."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Those of them that the engine had read before."""
    completion_tokens: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    context_length: int | None = None
    """The model's limit; None: it has none, or it is not known."""

    @property
    def decode_tps(self) -> float:
        """Decoded tokens per second; the first token comes out of prefill."""
        tokens = max(0, self.completion_tokens - 1)
        return tokens / self.decode_s if self.decode_s > 0 else 0.0

    @property
    def prefill_tps(self) -> float:
        """Prompt tokens read per second."""
        computed = self.prompt_tokens - self.cached_tokens
        return computed / self.prefill_s if self.prefill_s > 0 else 0.0

    def continued(self, later: AnswerStats) -> AnswerStats:
        """This answer's, with those of the request that went on with it. The later prompt holds
        the answer so far, so the first one's size stays and the rest adds up."""
        return AnswerStats(
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            completion_tokens=self.completion_tokens + later.completion_tokens,
            queue_s=self.queue_s + later.queue_s,
            prefill_s=self.prefill_s + later.prefill_s,
            decode_s=self.decode_s + later.decode_s,
            context_length=later.context_length,
        )


@dataclass(frozen=True)
class Attachment:
    """A text that goes with a message, under a name; stored once however often it is attached."""

    name: str
    text: str

    @property
    def digest(self) -> str:
        """SHA-256 of the text in UTF-8, in hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class StoredMessage:
    """One turn; its siblings (same `parent`) are retries and branches."""

    id: int
    conversation: int
    parent: int | None
    depth: int
    """1 for a message without a parent; its place in the chat as shown."""
    shown: int
    """Of siblings the one with the highest is on the path."""
    role: Role
    content: str
    reasoning: str
    """What the model thought before it answered; never shown to it as its answer."""
    tool_calls: tuple[ToolCallPart, ...]
    """What the model called after `content`."""
    tool_call_id: str
    """Which call this is the result of, in the role "tool"."""
    model: str | None
    """Name of the model that wrote it, for answers."""
    state: MessageState
    finish_reason: str | None
    """Why an answer ended, as the engine says it: "length" was cut and can be continued."""
    error: str | None
    """One sentence for a person, when `state` is "failed"."""
    stats: AnswerStats | None
    created: float
    attachments: tuple[Attachment, ...] = ()

    @property
    def is_cut(self) -> bool:
        """An answer that ended before its end, and has words to go on from."""
        ended_early = self.state in ("cancelled", "failed", "interrupted")
        return (
            self.role == "assistant"
            and bool(self.content or self.reasoning)
            and (ended_early or self.finish_reason == "length")
        )


@dataclass(frozen=True)
class Turn:
    """A message on the path shown, and where it stands among its siblings: ◀ number/of ▶."""

    message: StoredMessage
    number: int
    """1 is the oldest sibling."""
    of: int
    before: int | None
    """The sibling ◀ leads to, for `History.choose`; None at the first."""
    after: int | None
    """The sibling ▶ leads to; None at the last."""


@dataclass(frozen=True)
class Page:
    """Some consecutive turns of the path shown, oldest first."""

    turns: list[Turn]
    earlier: int
    """How many turns of the path come before them."""


@dataclass(frozen=True)
class Folder:
    """A folder is there as long as a chat is in it."""

    name: str
    conversations: int


@dataclass(frozen=True)
class Snippet:
    """The words around what was searched for, on one line."""

    text: str
    marks: tuple[tuple[int, int], ...]
    """Where in `text` the hits begin and end."""


@dataclass(frozen=True)
class SearchHit:
    """A title or a message in which all words of a query are."""

    conversation: int
    title: str
    message: int | None
    """None: the title is the hit."""
    role: Role | None
    created: float
    """Of the message; of a title, when the chat was last used."""
    snippet: Snippet


@dataclass(frozen=True)
class Deleted:
    """What a deletion took out of the file, held in memory for `History.restore`."""

    conversation: int
    messages: int
    """How many went."""
    rows: dict[str, list[tuple[Any, ...]]] = field(repr=False)
    """By table, in the order in which they can be put back."""
    active: int | None = None
    """What was shown before."""
    is_whole: bool = False
    """The conversation itself went too."""
