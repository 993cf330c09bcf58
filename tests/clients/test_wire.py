"""The rules that every answer is held to find the faults they are about."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .wire import Exchange


def sse(*bodies: Any, named: bool = False) -> bytes:
    frames = []
    for body in bodies:
        data = body if isinstance(body, str) else json.dumps(body)
        frames.append(f"event: {body['type']}\ndata: {data}\n\n" if named else f"data: {data}\n\n")
    return "".join(frames).encode()


def chunk(finish: str | None, index: int = 0) -> dict[str, Any]:
    return {"choices": [{"index": index, "delta": {}, "finish_reason": finish}]}


def typed(*names: str, **more: Any) -> list[dict[str, Any]]:
    return [{"type": name, "sequence_number": i} | more for i, name in enumerate(names)]


MESSAGE = typed(
    "message_start", "ping", "content_block_start", "content_block_stop", "message_delta",
    "message_stop", index=0,
)  # fmt: skip
CHAT, LINES = "/v1/chat/completions", "application/x-ndjson"
EVENTS = "text/event-stream"

GOOD = [
    (CHAT, EVENTS, sse(chunk(None), chunk("stop"), {"choices": []}, "[DONE]")),
    (CHAT, EVENTS, b": keep-alive\n\n" + sse(chunk("stop"), chunk("stop", 1), "[DONE]")),
    ("/v1/responses", EVENTS, sse(*typed("response.created", "response.completed"), named=True)),
    ("/v1/messages?beta=true", EVENTS, sse(*MESSAGE, named=True)),
    ("/infill", EVENTS, sse({"content": "a", "stop": False}, {"content": "", "stop": True})),
    ("/api/chat", LINES, b'{"done": false}\n{"done": true}\n'),
    ("/v1/models", "application/json", b"{}"),
]
BAD = [
    (CHAT, EVENTS, sse(chunk("stop"), "[DONE]", "[DONE]")),
    (CHAT, EVENTS, sse(chunk("stop"))),
    (CHAT, EVENTS, sse(chunk(None), "[DONE]")),
    (CHAT, EVENTS, sse(chunk("stop"), chunk("stop"), "[DONE]")),
    (CHAT, EVENTS, sse(chunk("stop"), "[DONE]")[:-1]),
    (CHAT, EVENTS, sse("{", "[DONE]")),
    (CHAT, EVENTS, b"dat: 1\n\n" + sse(chunk("stop"), "[DONE]")),
    ("/v1/responses", EVENTS, sse(*typed("response.created", "response.in_progress"), named=True)),
    ("/v1/responses", EVENTS, sse(*MESSAGE, named=True)),
    ("/v1/messages", EVENTS, sse(*MESSAGE[:-1], named=True)),
    ("/v1/messages", EVENTS, sse(*MESSAGE, MESSAGE[-1], named=True)),
    ("/v1/messages", EVENTS, sse(*MESSAGE[:3], *MESSAGE[4:], named=True)),
    ("/v1/messages", EVENTS, sse(*MESSAGE, named=True).replace(b"event: ping", b"event: pong")),
    ("/infill", EVENTS, sse({"content": "a", "stop": False})),
    ("/api/chat", LINES, b'{"done": false}\n'),
    ("/api/chat", LINES, b'{"done": true}\n{"done": true}\n'),
    ("/v1/models", "application/json", b"{"),
]


@pytest.mark.parametrize(("path", "kind", "answer"), GOOD)
def test_a_good_answer_passes(path: str, kind: str, answer: bytes) -> None:
    Exchange("POST", path, b"", 200, f"{kind}; charset=utf-8", answer).check()


@pytest.mark.parametrize(("path", "kind", "answer"), BAD)
def test_a_bad_answer_is_found(path: str, kind: str, answer: bytes) -> None:
    with pytest.raises((AssertionError, ValueError, KeyError)):
        Exchange("POST", path, b"", 200, kind, answer).check()


def test_a_refusal_is_found() -> None:
    with pytest.raises(AssertionError, match="no such field"):
        Exchange("POST", CHAT, b"", 400, "application/json", b'"no such field"').check()
