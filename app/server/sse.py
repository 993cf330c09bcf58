"""Server-sent events."""

from __future__ import annotations

from typing import Any

import msgspec

EVENT_STREAM = "text/event-stream"
KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which clients skip."""

# Legal inside JSON and SSE, but Python clients that split with str.splitlines break at them.
_LINE_ENDS = {
    "\u0085".encode(): b"\\u0085",
    "\u2028".encode(): b"\\u2028",
    "\u2029".encode(): b"\\u2029",
}


def frame(data: Any, event: str = "") -> bytes:
    """`data` as one server-sent event; `event` is its name, for dialects that name theirs."""
    encoded = msgspec.json.encode(data)
    for character, escaped in _LINE_ENDS.items():
        encoded = encoded.replace(character, escaped)
    name = f"event: {event}\n".encode() if event else b""
    return name + b"data: " + encoded + b"\n\n"
