"""Filled gaps as llama.cpp answers them, and where they end early.

`timings` and the counts are the engine's. `stop_type` is left out where it is not known whether a
stop string or the model itself ended the answer; `prompt` and `stopping_word` are left out always.
A stream ends with the object that has `stop: true`; there is no `[DONE]`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, cast

import msgspec

from app.engine.protocol import (
    Accepted,
    Event,
    Finished,
    GenerationRequest,
    Timings,
    Token,
    ToolCall,
    Usage,
)
from app.server.errors import ApiError, llama_cpp_body
from app.server.generation import Choice, Engine
from app.server.sse import frame


class EarlyEnd:
    """An engine whose answers end before a line that is indented too little, or when time is up.

    As llama.cpp does: the line is cut where its text begins, a line without any too; the time
    counts from the first token and ends an answer that has a line end.

    Args:
        indent: Spaces and tabs that every line but the first begins with.
        seconds: 0 for no limit.
        has_text: False answers nothing once the prompt is read.
    """

    def __init__(
        self, engine: Engine, *, indent: int = 0, seconds: float = 0.0, has_text: bool = True
    ) -> None:
        self._engine = engine
        self._indent = indent
        self._seconds = seconds
        self._has_text = has_text

    async def start(self) -> None:
        await self._engine.start()

    async def stream(self, request: GenerationRequest) -> AsyncIterator[Event]:
        """As `Engine.stream`; closing it cancels the request."""
        line = _Line(self._indent)
        prompt_tokens = cached = count = 0
        began = time.monotonic()
        first = 0.0
        stream = cast("AsyncGenerator[Event, None]", self._engine.stream(request))
        async with aclosing(stream) as events:
            async for event in events:
                if isinstance(event, Accepted):
                    prompt_tokens, cached = event.prompt_tokens, event.cached_tokens
                    began = time.monotonic()
                if isinstance(event, Token):
                    if not self._has_text:
                        continue
                    now = time.monotonic()
                    first, count = first or now, count + 1
                    kept = line.add(event.text)
                    late = self._seconds and line.is_later_line and now - first > self._seconds
                    if kept < len(event.text) or late:
                        yield msgspec.structs.replace(event, text=event.text[:kept])
                        usage = Usage(prompt_tokens, count, cached)
                        yield Finished(
                            request.id, "length", usage, Timings(0.0, first - began, now - first)
                        )
                        return
                if isinstance(event, Finished):
                    if self._has_text:
                        rest = event.text[: line.add(event.text)]
                        event = msgspec.structs.replace(event, text=rest)
                    else:
                        usage = msgspec.structs.replace(event.usage, completion_tokens=0)
                        event = msgspec.structs.replace(event, text="", usage=usage)
                yield event


class _Line:
    """Where a growing text's last line is, and how far it is indented."""

    def __init__(self, indent: int) -> None:
        self._indent = indent
        self._seen = 0
        self._has_text = True
        self.is_later_line = False

    def add(self, text: str) -> int:
        """How many characters of some more text are before the end of what is wanted."""
        for index, character in enumerate(text):
            if not self._has_text and character in " \t":
                self._seen += 1
            elif not self._has_text:
                if self._seen < self._indent:
                    return index
                self._has_text = True
            if character == "\n":
                self.is_later_line = True
                self._has_text, self._seen = False, 0
        return len(text)


class InfillAnswer:
    """Answers of `/infill`."""

    stream_media_type = "text/event-stream"
    keep_alive = b": keep-alive\n\n"

    def __init__(
        self,
        model: str,
        *,
        settings: dict[str, Any],
        fields: Sequence[str] | None,
        with_tokens: bool,
        has_stop: bool,
        choices: int,
    ) -> None:
        self._model = model
        self._settings = settings
        self._fields = fields
        self._with_tokens = with_tokens
        self._has_stop = has_stop
        self._prompt_tokens = 0
        self._counts = [0] * choices
        self._has_lines = [False] * choices

    def opening(self, accepted: Accepted | None) -> bytes:
        self._prompt_tokens = accepted.prompt_tokens if accepted is not None else 0
        return b""

    def piece(self, event: Token | ToolCall, choice: int) -> bytes:
        if isinstance(event, ToolCall):  # nobody was given tools
            return b""
        self._counts[choice] += 1
        return self._part(choice, event.text, [event.token_id])

    def _part(self, choice: int, text: str, tokens: list[int]) -> bytes:
        self._has_lines[choice] |= "\n" in text
        part = {
            "index": choice,
            "content": text,
            "tokens": tokens,
            "stop": False,
            "id_slot": -1,
            "tokens_predicted": self._counts[choice],
            "tokens_evaluated": self._prompt_tokens,
        }
        return frame(part)

    def ended(self, finished: Finished, choice: int) -> bytes:
        rest = self._part(choice, finished.text, []) if finished.text else b""
        return rest + frame(self._final(finished, choice, "", [], self._has_lines[choice]))

    def closing(self, ends: Sequence[Finished]) -> bytes:
        return b""

    def broken(self, error: ApiError) -> bytes:
        return frame(llama_cpp_body(error))

    def whole(self, choices: Sequence[Choice]) -> bytes:
        answers = [
            self._final(one.end, index, one.text, self._ids(one), "\n" in one.text)
            for index, one in enumerate(choices)
        ]
        return msgspec.json.encode(answers[0] if len(answers) == 1 else answers)

    def _ids(self, choice: Choice) -> list[int]:
        return [token.token_id for token in choice.tokens] if self._with_tokens else []

    def _final(
        self, end: Finished, index: int, text: str, tokens: list[int], has_line: bool
    ) -> dict[str, Any]:
        usage = end.usage
        answer: dict[str, Any] = {
            "index": index,
            "content": text,
            "tokens": tokens,
            "id_slot": -1,
            "stop": True,
            "model": self._model,
            "tokens_predicted": usage.completion_tokens,
            "tokens_evaluated": usage.prompt_tokens,
            "tokens_cached": usage.cached_tokens,
            "generation_settings": self._settings,
            "has_new_line": has_line,
            "truncated": False,
            "timings": _timings(end),
        }
        if end.reason == "length":
            answer["stop_type"] = "limit"
        elif not self._has_stop:
            answer["stop_type"] = "eos"
        return answer if self._fields is None else _selected(answer, self._fields)


def _timings(end: Finished) -> dict[str, float]:
    usage, timings = end.usage, end.timings
    read = usage.prompt_tokens - usage.cached_tokens
    made = usage.completion_tokens
    prompt_ms, predicted_ms = 1000 * timings.prefill_s, 1000 * timings.decode_s
    return {
        "cache_n": usage.cached_tokens,
        "prompt_n": read,
        "prompt_ms": prompt_ms,
        "prompt_per_token_ms": prompt_ms / read if read else 0.0,
        "prompt_per_second": timings.prefill_tps(usage),
        "predicted_n": made,
        "predicted_ms": predicted_ms,
        "predicted_per_token_ms": predicted_ms / made if made else 0.0,
        "predicted_per_second": timings.decode_tps(usage),
    }


def _selected(answer: dict[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """The fields of these names; `a/b` is `b` of `a`, under that name. Others are not there."""
    chosen: dict[str, Any] = {}
    for name in fields:
        value: Any = answer
        for part in name.split("/"):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            chosen[name] = value
    return chosen
