"""The client for metadata, with an end to what it reads.

Such answers are read whole; a proxy, a mirror or whoever HF_ENDPOINT names should not be able to
fill the memory, with what is sent or with what that unpacks to, or to trickle for ever.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx2

MAX_ANSWER_BYTES = 64_000_000
"""A repository of ten thousand files takes a few million."""
MAX_ANSWER_S = 120.0


class UnfitAnswer(ValueError):
    """An answer that is not read to its end; the message says why."""


def bounded(headers: dict[str, str], stall_s: float) -> httpx2.Client:
    """A client whose answers end; it follows redirects, and takes its token to no other host."""
    return httpx2.Client(
        headers=headers | {"Accept-Encoding": "identity"},
        event_hooks={"response": [_bound]},
        follow_redirects=True,
        timeout=stall_s,
    )


def _bound(response: httpx2.Response) -> None:
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise UnfitAnswer("it comes compressed")
    response.stream = _Bounded(response.stream)


class _Bounded(httpx2.SyncByteStream):
    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._ends_at = time.monotonic() + MAX_ANSWER_S

    def __iter__(self) -> Iterator[bytes]:
        count = 0
        for chunk in self._stream:
            count += len(chunk)
            if count > MAX_ANSWER_BYTES:
                raise UnfitAnswer(f"it has more than {MAX_ANSWER_BYTES:,} bytes")
            if time.monotonic() > self._ends_at:
                raise UnfitAnswer(f"it takes longer than {MAX_ANSWER_S:g} seconds")
            yield chunk

    def close(self) -> None:
        self._stream.close()
