"""What the preparation process is given to do, and what it answers.

No MLX here, nor anything that imports it.
"""

from __future__ import annotations

import array
import itertools
from typing import Any, Literal, NamedTuple

import msgspec

from app.engine.answer_parts import PLAIN, AnswerFormat
from app.engine.constraint import Constraint
from app.engine.conversation import Message, Tool
from app.engine.requests import Infill
from app.errors import GryphonError


class Prompt(msgspec.Struct, frozen=True, tag="prompt"):
    """What to prepare: exactly one of `messages` and `text`."""

    model_path: str
    messages: list[Message] | None = None
    text: str | None = None
    tools: list[Tool] = []
    template_options: dict[str, Any] = {}
    tool_choice: str = "auto"
    suffix: str = ""
    infill: Infill | None = None
    """What follows a gap after `text`, and more on it, as in `GenerationRequest`."""
    opens_turn: bool = True
    """Whether the assistant's turn is open at the end of messages."""
    is_prefix: bool = True
    """Whether other prompts may begin like it: false is quicker."""


class Texts(msgspec.Struct, frozen=True, tag="texts"):
    """Texts to tokenize one by one."""

    model_path: str
    texts: list[str]
    add_special: bool = True
    parse_special: bool = True


class Ids(msgspec.Struct, frozen=True, tag="ids"):
    """Token ids to say something of."""

    model_path: str
    tokens: list[int]
    wanted: Literal["text", "spelled", "pieces"] = "text"
    """Their text, without or with the spelling of special tokens, or the bytes of each."""


Work = Prompt | Texts | Ids


class TokenizedPrompt(NamedTuple):
    """Token ids, and lengths of prefixes of them that other prompts are likely to begin with; how
    the answer will be marked, what a person should know of the prompt, what holds the answer to
    its tool_choice, and the tokens that end it besides the model's own ends."""

    tokens: list[int]
    boundaries: list[int]
    format: AnswerFormat = PLAIN
    notice: str = ""
    call: Constraint | None = None
    ends: list[int] = []


class Prepared(msgspec.Struct, frozen=True):
    """The answer: token ids as little-endian int32 bytes, or an error's code and message.

    `lengths` are those of each of `Texts`, whose ids follow each other; `text` and `pieces` are for
    `Ids`.
    """

    tokens: bytes = b""
    boundaries: list[int] = []
    format: AnswerFormat = PLAIN
    notice: str = ""
    call: Constraint | None = None
    ends: list[int] = []
    lengths: list[int] = []
    text: str = ""
    pieces: list[bytes] = []
    error: tuple[str, str] | None = None

    @property
    def token_ids(self) -> list[int]:
        return array.array("i", self.tokens).tolist()

    @property
    def prompt(self) -> TokenizedPrompt:
        """What became of a `Prompt`, at least one token.

        Raises:
            GryphonError: "invalid_request", no token came out.
        """
        tokens = self.token_ids
        if not tokens:
            raise GryphonError("invalid_request", "The prompt is empty: it holds no token.")
        return TokenizedPrompt(
            tokens, self.boundaries, self.format, self.notice, self.call, self.ends
        )

    @property
    def each(self) -> list[list[int]]:
        """Token ids of each of `Texts`."""
        tokens, ends = self.token_ids, list(itertools.accumulate(self.lengths))
        return [tokens[end - n : end] for n, end in zip(self.lengths, ends, strict=True)]
