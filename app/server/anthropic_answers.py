"""Answers as Anthropic spells them: content blocks, streamed as events with names.

message_start, then of each block content_block_start, content_block_delta … and content_block_stop,
then message_delta with the reason and the counts, and message_stop. The tokens of a prompt that
came from the prefix cache are counted apart, as Anthropic counts those of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from app.engine.protocol import Accepted, Finished, Token, ToolCall, Usage
from app.server.errors import ApiError, anthropic_body
from app.server.generation import Choice
from app.server.sse import EVENT_STREAM, frame

# Anthropic signs thoughts, and clients send back only those that are signed. Nobody reads it here.
_SIGNATURE = "Z3J5cGhvbg=="

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}

Kind = Literal["text", "thinking"]


def sse(kind: str, **fields: Any) -> bytes:
    """One server-sent event."""
    return frame({"type": kind, **fields}, kind)


_PING = sse("ping")


def _stopping(end: Finished) -> dict[str, Any]:
    by_sequence = end.reason == "stop" and bool(end.stop_string)
    return {
        "stop_reason": "stop_sequence" if by_sequence else _REASONS.get(end.reason, "end_turn"),
        "stop_sequence": end.stop_string if by_sequence else None,
    }


def _usage(prompt_tokens: int, cached_tokens: int, output_tokens: int) -> dict[str, int]:
    return {
        "input_tokens": prompt_tokens - cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached_tokens,
        "output_tokens": output_tokens,
    }


def _used(usage: Usage) -> dict[str, int]:
    return _usage(usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)


class MessagesAnswer:
    """Answers of `/v1/messages`.

    Args:
        model: As the client named it.
        one_call_only: Whether further tool calls of an answer are left out.
        shows_thinking: Whether thoughts are sent, or only that there were some.
    """

    stream_media_type = EVENT_STREAM
    keep_alive = _PING

    def __init__(
        self,
        message_id: str,
        model: str,
        *,
        one_call_only: bool = False,
        shows_thinking: bool = True,
    ) -> None:
        self.one_call_only = one_call_only
        self.shows_thinking = shows_thinking
        self._head = {"id": message_id, "type": "message", "role": "assistant", "model": model}
        self._index = 0
        """Of the block that is open, or of the next one."""
        self._open: Kind | None = None
        self._calls = 0

    def opening(self, accepted: Accepted | None) -> bytes:
        known = (accepted.prompt_tokens, accepted.cached_tokens) if accepted else (0, 0)
        rest = {"stop_reason": None, "stop_sequence": None, "usage": _usage(*known, 0)}
        message: dict[str, Any] = self._head | {"content": []} | rest
        return sse("message_start", message=message) + _PING

    def piece(self, event: Token | ToolCall, choice: int) -> bytes:
        if isinstance(event, ToolCall):
            return self._call(event)
        return self._said(event.reasoning, event.text)

    def ended(self, finished: Finished, choice: int) -> bytes:
        return (
            self._said(finished.reasoning, finished.text)
            + self._closed()
            + sse("message_delta", delta=_stopping(finished), usage=_used(finished.usage))
        )

    def closing(self, ends: Sequence[Finished]) -> bytes:
        return sse("message_stop")

    def broken(self, error: ApiError) -> bytes:
        return sse("error", error=anthropic_body(error)["error"])

    def whole(self, choices: Sequence[Choice]) -> bytes:
        (one,) = choices
        content: list[dict[str, Any]] = []
        if one.reasoning:
            thought = one.reasoning if self.shows_thinking else ""
            content.append({"type": "thinking", "thinking": thought, "signature": _SIGNATURE})
        if one.text:
            content.append({"type": "text", "text": one.text})
        calls = one.tool_calls[:1] if self.one_call_only else one.tool_calls
        for call in calls:
            content.append(_call_block(call) | {"input": json.loads(call.arguments)})
        rest = {"content": content} | _stopping(one.end) | {"usage": _used(one.end.usage)}
        return msgspec.json.encode(self._head | rest)

    def _said(self, reasoning: str, text: str) -> bytes:
        sent = b""
        if reasoning:
            sent += self._opened("thinking", {"thinking": "", "signature": ""})
            if self.shows_thinking:
                sent += self._delta("thinking_delta", thinking=reasoning)
        if text:
            sent += self._opened("text", {"text": ""}) + self._delta("text_delta", text=text)
        return sent

    def _call(self, call: ToolCall) -> bytes:
        self._calls += 1
        if self.one_call_only and self._calls > 1:
            return b""
        block = _call_block(call) | {"input": {}}
        sent = self._closed() + sse("content_block_start", index=self._index, content_block=block)
        sent += self._delta("input_json_delta", partial_json=call.arguments)
        return sent + self._stopped()

    def _opened(self, kind: Kind, empty: dict[str, str]) -> bytes:
        """What opens a block of a kind where none is open."""
        if self._open == kind:
            return b""
        closed = self._closed()
        self._open = kind
        block = {"type": kind, **empty}
        return closed + sse("content_block_start", index=self._index, content_block=block)

    def _closed(self) -> bytes:
        """What closes the block that is open."""
        if self._open is None:
            return b""
        signed = b""
        if self._open == "thinking":
            signed = self._delta("signature_delta", signature=_SIGNATURE)
        self._open = None
        return signed + self._stopped()

    def _delta(self, kind: str, **fields: str) -> bytes:
        return sse("content_block_delta", index=self._index, delta={"type": kind, **fields})

    def _stopped(self) -> bytes:
        self._index += 1
        return sse("content_block_stop", index=self._index - 1)


def _call_block(call: ToolCall) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.call_id, "name": call.name}
