"""HTTP connections: how many there may be, how long one may say nothing, and what is no HTTP.

uvicorn with h11, which is strict about what it reads and keeps a request's head under 16 KiB. What
it lacks is here: a limit on how long a head may take to come, room for new connections when
others hold theirs for nothing, and an answer to malformed requests whatever state they come in.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
from typing import Any

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from app.server.errors import ApiError, openai_body

MAX_CONNECTIONS = 512
HEAD_TIMEOUT_S = 20.0
REST_S = 60
"""How long a connection may rest between two requests. Common clients drop theirs after 5 s, and
closing at the same moment as they ask again would fail that request."""

_SPARE_FILES = 256


def allow_open_files(connections: int) -> None:
    """Let this process have so many connections open; macOS begins with 256 files in all."""
    wanted = connections + _SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    # What the system does not grant is not needed to begin with.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Connection(H11Protocol):
    """One HTTP connection.

    Args:
        most: Connections at a time. One more makes the one go that has rested longest; where all
            are busy it gets its 503 from `security.ConnectionLimit`.
        head_timeout_s: From the first byte of a request, or the beginning of the connection, to
            the end of the request's head.
    """

    def __init__(self, *args: Any, most: int, head_timeout_s: float, **more: Any) -> None:
        super().__init__(*args, **more)
        self.most = most
        self.head_timeout_s = head_timeout_s
        self.resting_since = self.loop.time()
        self._head_timer: asyncio.TimerHandle | None = None

    @property
    def is_resting(self) -> bool:
        """Whether no request is being read or answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()
        if len(self.connections) > self.most:
            resting = [
                one
                for one in self.connections
                if isinstance(one, Connection) and one is not self and one.is_resting
                if not one.transport.is_closing()
            ]
            if resting:
                min(resting, key=lambda one: one.resting_since).transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_expecting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.is_resting:
            # Also what still comes of a body that was answered before its end.
            self._expect_head()
        super().data_received(data)
        if not self.is_resting:
            self._stop_expecting()

    def on_response_complete(self) -> None:
        self.resting_since = self.loop.time()
        self._stop_expecting()
        super().on_response_complete()
        if self.is_resting and self.conn.trailing_data[0]:
            self._expect_head()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, or cut the connection where an answer has begun already."""
        cycle = None if self.is_resting else self.cycle
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        if cycle is not None:
            # The body broke off in a malformed chunk: its reader hears that nobody is there.
            cycle.disconnected = True
            cycle.message_event.set()
        body = msgspec.json.encode(openai_body(ApiError(400, "invalid_http", f"{msg}")))
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_timeout_s, self._give_up)

    def _stop_expecting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        self.transport.abort()
