"""The client through which huggingface_hub asks for metadata, with an end to what it reads.

huggingface_hub reads an answer whole, unpacks it and has no limit for either; a proxy, a mirror or
whoever HF_ENDPOINT names should not be able to fill the memory or to trickle for ever.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx2
from huggingface_hub import set_client_factory

MAX_ANSWER_BYTES = 64_000_000
"""A repository of ten thousand files takes a few million."""
MAX_ANSWER_S = 120.0


class UnfitAnswer(ValueError):
    """An answer that is not read to its end; the message says why."""


def install() -> None:
    """Have huggingface_hub use this client in this process."""
    set_client_factory(_client)


def _client() -> httpx2.Client:
    return httpx2.Client(
        event_hooks={"request": [_ask_plain], "response": [_bound]},
        follow_redirects=True,
    )


def _ask_plain(request: httpx2.Request) -> None:
    request.headers["Accept-Encoding"] = "identity"


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
