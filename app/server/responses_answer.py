"""Answers of `POST /v1/responses`.

A stream is `response.created`, `response.in_progress`, the events of the output's items, and one of
`response.completed`, `response.incomplete` (the token limit cut it short) and `response.failed`;
`sequence_number` counts them from 0. There is no `[DONE]`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from app.engine.protocol import Accepted, Finished, Token, ToolCall, Usage
from app.server.errors import ApiError
from app.server.generation import Choice
from app.server.responses_output import Event, ResponseOutput
from app.server.sse import EVENT_STREAM, KEEP_ALIVE, frame


class ResponsesAnswer:
    """One response.

    Args:
        echo: What it says of its request.
        output: Its items.
    """

    stream_media_type = EVENT_STREAM
    keep_alive = KEEP_ALIVE

    def __init__(self, id: str, model: str, echo: dict[str, Any], output: ResponseOutput) -> None:
        self.output = output
        self.sequence = 0
        self.response: dict[str, Any] = {
            "id": id,
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "model": model,
            "output": [],
            "previous_response_id": None,
            "service_tier": "default",
            "store": False,
            "truncation": "disabled",
            "usage": None,
            **echo,
        }

    def opening(self, accepted: Accepted | None) -> bytes:
        return self._frames(
            {"type": type, "response": self.response}
            for type in ("response.created", "response.in_progress")
        )

    def piece(self, event: Token | ToolCall, choice: int) -> bytes:
        if isinstance(event, ToolCall):
            return self._frames(self.output.call(event))
        return self._frames(self.output.token(event))

    def ended(self, finished: Finished, choice: int) -> bytes:
        return self._frames(self.output.end(finished))

    def closing(self, ends: Sequence[Finished]) -> bytes:
        response = self._ended_response(ends[0])
        return self._frames([{"type": f"response.{response['status']}", "response": response}])

    def broken(self, error: ApiError) -> bytes:
        # OpenAI's own word for what is no fault of the client's, which its clients try again after.
        code = "server_error" if error.status >= 500 else error.code
        failed = {
            "status": "failed",
            "error": {"code": code, "message": error.message},
            "output": self.output.items,
        }
        return self._frames([{"type": "response.failed", "response": self.response | failed}])

    def whole(self, choices: Sequence[Choice]) -> bytes:
        (choice,) = choices
        for token in choice.tokens:
            list(self.output.token(token))
        if (last := choice.end).text or last.reasoning:
            # Released by the last token: before any call.
            released = Token(last.id, last.text, -1, None, [], last.reasoning)
            list(self.output.token(released))
            last = msgspec.structs.replace(last, text="", reasoning="")
        for call in choice.tool_calls:
            list(self.output.call(call))
        list(self.output.end(last))
        return msgspec.json.encode(self._ended_response(last))

    def _ended_response(self, end: Finished) -> dict[str, Any]:
        cut = end.reason == "length"
        return self.response | {
            "status": "incomplete" if cut else "completed",
            "completed_at": None if cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self.output.items,
            "usage": self._usage(end.usage),
        }

    def _usage(self, usage: Usage) -> dict[str, Any]:
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": usage.cached_tokens,
                "cache_write_tokens": 0,
            },
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {
                "reasoning_tokens": min(self.output.reasoning_tokens, usage.completion_tokens)
            },
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }

    def _frames(self, events: Iterable[Event]) -> bytes:
        frames = b""
        for event in events:
            type = event.pop("type")
            numbered = {"type": type, "sequence_number": self.sequence, **event}
            frames += frame(numbered, type)
            self.sequence += 1
        return frames
