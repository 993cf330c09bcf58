"""Answers as Ollama spells them: one JSON object a line, the last one with counts and times.

NDJSON has no comments, and clients decode every line (the ollama package and Zed fail at an empty
one); so a silence is filled with a piece that is empty, as Ollama itself sends now and then.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from app.engine.conversation import Message
from app.engine.protocol import Accepted, Finished, Token, TokenLogprob, ToolCall
from app.server.errors import ApiError, ollama_body
from app.server.generation import Choice
from app.server.ollama_requests import MAX_CONTEXT
from app.server.timestamp import timestamp

# Go's encoder escapes the first five in strings, and thus does Ollama; the sixth is a line's end to
# Python clients.
_ESCAPED = {
    "<": b"\\u003c",
    ">": b"\\u003e",
    "&": b"\\u0026",
    "\u2028": b"\\u2028",
    "\u2029": b"\\u2029",
    "\u0085": b"\\u0085",
}
_LEAST_LOGPROB = -9999.0


def encoded(data: Any) -> bytes:
    """`data` as Ollama writes JSON, in one line without its end."""
    text = msgspec.json.encode(data)
    for character, escaped in _ESCAPED.items():
        text = text.replace(character.encode(), escaped)
    return text


def _done(end: Finished | None) -> dict[str, Any]:
    if end is None:
        return {"done": False}
    return {"done": True, "done_reason": "length" if end.reason == "length" else "stop"}


def _nanoseconds(seconds: float) -> int:
    # At least one: Ollama leaves a zero out, and clients divide by it.
    return max(1, round(seconds * 1e9))


class _OllamaAnswer:
    """What the two routes' answers share. Subclasses place what was said in the object."""

    stream_media_type = "application/x-ndjson"

    def __init__(self, model: str) -> None:
        self.model = model
        """As the client named it."""
        self.calls = 0
        self._begun_s = time.monotonic()

    def _said(self, text: str, reasoning: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
        """The part of the object that says something."""
        raise NotImplementedError

    def _ordered(
        self,
        said: dict[str, Any],
        end: Finished | None,
        counts: dict[str, Any],
        logprobs: dict[str, Any],
    ) -> dict[str, Any]:
        """The parts of an object in Ollama's order."""
        raise NotImplementedError

    def _object(
        self,
        text: str = "",
        reasoning: str = "",
        calls: Sequence[ToolCall] = (),
        tokens: Sequence[Token] = (),
        end: Finished | None = None,
    ) -> dict[str, Any]:
        head = {"model": self.model, "created_at": timestamp(time.time())}
        said = self._said(text, reasoning, calls)
        self.calls += len(calls)
        spelled = [_spelled_token(token) for token in tokens if token.logprob is not None]
        logprobs = {"logprobs": spelled} if spelled else {}
        counts = self._counts(end) if end is not None else {}
        return head | self._ordered(said, end, counts, logprobs)

    def _counts(self, end: Finished) -> dict[str, Any]:
        return {
            "total_duration": _nanoseconds(time.monotonic() - self._begun_s),
            # Waiting for a place among the running requests is part of it.
            "load_duration": _nanoseconds(end.timings.queue_s),
            "prompt_eval_count": end.usage.prompt_tokens,
            "prompt_eval_duration": _nanoseconds(end.timings.prefill_s),
            "eval_count": end.usage.completion_tokens,
            "eval_duration": _nanoseconds(end.timings.decode_s),
        }

    @property
    def keep_alive(self) -> bytes:
        return encoded(self._object()) + b"\n"

    def opening(self, accepted: Accepted | None) -> bytes:
        return b""

    def piece(self, event: Token | ToolCall, choice: int) -> bytes:
        if isinstance(event, ToolCall):
            return encoded(self._object(calls=[event])) + b"\n"
        if not event.text and not event.reasoning and event.logprob is None:
            return b""
        return encoded(self._object(event.text, event.reasoning, tokens=[event])) + b"\n"

    def ended(self, finished: Finished, choice: int) -> bytes:
        last = b""
        if finished.text or finished.reasoning:
            last = encoded(self._object(finished.text, finished.reasoning)) + b"\n"
        return last + encoded(self._object(end=finished)) + b"\n"

    def closing(self, ends: Sequence[Finished]) -> bytes:
        return b""

    def broken(self, error: ApiError) -> bytes:
        return encoded(ollama_body(error)) + b"\n"

    def without_words(self, reason: str) -> bytes:
        """The whole answer where a model was only loaded or unloaded."""
        return encoded(self._object() | {"done": True, "done_reason": reason})

    def whole(self, choices: Sequence[Choice]) -> bytes:
        (one,) = choices
        said = one.text, one.reasoning, one.tool_calls
        return encoded(self._object(*said, tokens=one.tokens, end=one.end))


class ChatAnswer(_OllamaAnswer):
    """Answers of `/api/chat`."""

    def _said(self, text: str, reasoning: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if reasoning:
            message["thinking"] = reasoning
        if calls:
            spelled = [_spelled_call(call, self.calls + i) for i, call in enumerate(calls)]
            message["tool_calls"] = spelled
        return {"message": message}

    def _ordered(
        self,
        said: dict[str, Any],
        end: Finished | None,
        counts: dict[str, Any],
        logprobs: dict[str, Any],
    ) -> dict[str, Any]:
        return said | _done(end) | logprobs | counts


class GenerateAnswer(_OllamaAnswer):
    """Answers of `/api/generate`.

    Args:
        conversation: What the answer continues, for the `context` that goes out with its end; None
            for a prompt that went through no template.
    """

    def __init__(self, model: str, conversation: Sequence[Message] | None = None) -> None:
        super().__init__(model)
        self.conversation = conversation
        self._text = ""

    def _said(self, text: str, reasoning: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
        self._text += text
        return {"response": text} | ({"thinking": reasoning} if reasoning else {})

    def _ordered(
        self,
        said: dict[str, Any],
        end: Finished | None,
        counts: dict[str, Any],
        logprobs: dict[str, Any],
    ) -> dict[str, Any]:
        context: dict[str, Any] = {}
        if end is not None and self.conversation is not None:
            numbers = context_of([*self.conversation, Message("assistant", self._text)])
            if len(numbers) <= MAX_CONTEXT:
                context["context"] = numbers
        return said | _done(end) | context | counts | logprobs


class _Turn(msgspec.Struct, array_like=True):
    role: str
    content: str


def context_of(conversation: Sequence[Message]) -> list[int]:
    """A conversation as the numbers of a `context`.

    Ollama's are token ids. Ours are the bytes of the words: they go through the chat template once
    more with the next prompt, as a conversation does, where token ids could only be put before it.
    """
    turns = [_Turn(message.role, message.content) for message in conversation]
    return list(msgspec.json.encode(turns))


def conversation_of(context: Sequence[int]) -> list[Message]:
    """The conversation that a `context` stands for.

    Raises:
        ApiError: 400, the context is not of this endpoint.
    """
    try:
        turns = msgspec.json.decode(bytes(context), type=list[_Turn])
    except (ValueError, msgspec.MsgspecError):
        raise ApiError(
            400,
            "invalid_value",
            "`context` should be what an earlier answer of this endpoint held. Leave it out, or "
            "use /api/chat, which takes the messages themselves.",
            param="context",
        ) from None
    return [Message(turn.role, turn.content) for turn in turns]


def _spelled_call(call: ToolCall, index: int) -> dict[str, Any]:
    # As Go writes it: no white space between the parts.
    arguments = json.dumps(
        json.loads(call.arguments), ensure_ascii=False, separators=(",", ":")
    ).encode()
    function = {"index": index, "name": call.name, "arguments": msgspec.Raw(arguments)}
    return {"id": call.call_id, "function": function}


def _spelled_token(token: Token) -> dict[str, Any]:
    assert token.logprob is not None
    spelled = _spelled(token.logprob)
    if token.top:
        spelled["top_logprobs"] = [_spelled(one) for one in token.top]
    return spelled


def _spelled(one: TokenLogprob) -> dict[str, Any]:
    # JSON has no word for minus infinity.
    spelled = {"token": one.text, "logprob": max(one.logprob, _LEAST_LOGPROB)}
    return spelled | ({"bytes": list(one.raw)} if one.raw else {})
