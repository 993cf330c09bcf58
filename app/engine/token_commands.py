"""Questions of text and tokens, answered by a model's tokenizer and template without its weights.

No MLX here, nor anything that imports it.
"""

from __future__ import annotations

from typing import Any

import msgspec

from app.engine.conversation import Message, Tool, check_messages, check_options, check_tools
from app.engine.request_checks import MAX_INT32, check_client, check_model
from app.engine.requests import ModelRef
from app.errors import GryphonError

# A text of so much is at most as many tokens, and a face spells each with its piece.
MAX_TEXT_BYTES = 1024 * 1024
MAX_TOKENS = 1024 * 1024


class Tokenize(msgspec.Struct, frozen=True, kw_only=True, tag="tokenize"):
    """Ask for the token ids of a text or of a conversation. Exactly one of `text` and `messages`
    is set. Ends in one `Tokenized` or `Failed`."""

    id: str
    model: ModelRef
    text: str | None = None
    messages: list[Message] | None = None
    """Rendered with the model's own chat template, as a prompt would be."""
    tools: list[Tool] = []
    template_options: dict[str, Any] = {}
    add_generation_prompt: bool = True
    """Whether the assistant's turn is open at the end; for messages."""
    add_special: bool = False
    """Whether what the tokenizer puts around a sequence is there; for text."""
    parse_special: bool = True
    """Whether the spelling of a special token is that token, or text like any other; for text."""
    with_pieces: bool = False
    client: str = ""
    """As in `GenerationRequest`."""


class Tokenized(msgspec.Struct, frozen=True, tag="tokenized"):
    """The answer to `Tokenize`."""

    id: str
    tokens: list[int]
    pieces: list[bytes] | None = None
    """Bytes that each token stands for, if asked: a part of a character is not valid UTF-8."""


class Detokenize(msgspec.Struct, frozen=True, kw_only=True, tag="detokenize"):
    """Ask for the text of token ids; ends in one `Detokenized` or `Failed`."""

    id: str
    model: ModelRef
    tokens: list[int]
    with_special: bool = False
    """Whether special tokens are spelled; else they leave no text."""
    client: str = ""
    """As in `GenerationRequest`."""


class Detokenized(msgspec.Struct, frozen=True, tag="detokenized"):
    """The answer to `Detokenize`."""

    id: str
    text: str


def check_tokenize(command: Tokenize) -> None:
    """Refuse what cannot be tokenized.

    Raises:
        GryphonError: "invalid_request", or "request_too_large".
    """
    if (command.text is None) == (command.messages is None):
        raise GryphonError("invalid_request", "Give exactly one of text and messages.")
    if command.messages is not None and not command.messages:
        raise GryphonError("invalid_request", "messages is empty: give at least one message.")
    if command.text is not None:
        if command.tools or command.template_options:
            raise GryphonError(
                "invalid_request",
                "tools and template_options are for the chat template: give messages, not a text.",
            )
        check_size(len(command.text.encode(errors="replace")))
    check_model(command.model)
    check_messages(command.messages or [])
    check_tools(command.tools, "auto")
    check_options(command.template_options)
    check_client(command.client)


def check_size(nbytes: int) -> None:
    """Refuse a text whose tokens would fill a frame.

    Raises:
        GryphonError: "request_too_large".
    """
    if nbytes > MAX_TEXT_BYTES:
        raise GryphonError(
            "request_too_large",
            f"A text to tokenize may take {MAX_TEXT_BYTES} bytes, this one takes {nbytes}. "
            "Divide it.",
        )


def check_detokenize(command: Detokenize) -> None:
    """Refuse what are no token ids.

    Raises:
        GryphonError: "invalid_request", or "request_too_large".
    """
    if len(command.tokens) > MAX_TOKENS:
        raise GryphonError(
            "request_too_large",
            f"There may be {MAX_TOKENS} tokens at once, got {len(command.tokens)}. Divide them.",
        )
    if command.tokens and not 0 <= min(command.tokens) <= max(command.tokens) <= MAX_INT32:
        raise GryphonError(
            "invalid_request",
            f"Token ids must be 0 to {MAX_INT32}, got {min(command.tokens)} to "
            f"{max(command.tokens)}.",
        )
    check_model(command.model)
    check_client(command.client)
