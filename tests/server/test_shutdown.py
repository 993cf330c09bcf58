"""The server stops while answers are under way: each ends as its dialect ends, and none is cut."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from app.library.installed import InstalledModel

from .children import child
from .conftest import Server, chat, completion, running
from .routes import POSTS, STREAMS, Route

SAYS = b"Gryphon is closing"
# What a whole answer ends with, in any of the dialects.
WHOLE = (b"[DONE]", b"message_stop", b'"done":true', b"response.completed", b'"stop":true')


def begin(port: int, route: Route, **more: Any) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps(route.body(**more)).replace("Hello", "endless")
    connection.request("POST", route.url, body, {"Content-Type": "application/json"})
    return connection


def assert_ended(rest: bytes) -> None:
    """An error in place of the end."""
    assert rest.count(SAYS) == 1, rest
    assert not any(end in rest for end in WHOLE), rest
    last = [line for line in rest.splitlines() if line.strip()][-1]
    json.loads(last.removeprefix(b"data:"))


@pytest.mark.parametrize("route", STREAMS, ids=str)
def test_a_stream_ends_with_its_error(route: Route) -> None:
    with running(drain_s=0.05) as server:
        engine = server.board.current
        engine.answers = [["a", asyncio.Event()]]
        connection = begin(server.port, route, stream=True)
        response = connection.getresponse()
        assert response.status == 200
        first = response.readline()
        assert first
        server.thread.stop()
        # `read` raises IncompleteRead where the last chunk is missing.
        assert_ended(first + response.read())
        connection.close()
        assert engine.cancelled == [engine.requests[0].id]


@pytest.mark.parametrize("route", STREAMS, ids=str)
def test_a_whole_answer_that_is_not_ready_is_an_error(route: Route) -> None:
    with running(drain_s=0.05) as server:
        engine = server.board.current
        engine.answers = [["a", asyncio.Event()]]
        connection = begin(server.port, route, stream=False)
        assert engine.begun.wait(60)
        server.thread.stop()
        response = connection.getresponse()
        assert response.status == 503
        assert SAYS in response.read()
        assert response.getheader("retry-after")
        connection.close()


def test_what_cannot_be_told_is_answered_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler that hangs elsewhere than in the engine."""
    entered, go_on = threading.Event(), threading.Event()

    def hang() -> list[InstalledModel]:
        entered.set()
        go_on.wait(60)
        return []

    with running(drain_s=0.05) as server:
        monkeypatch.setattr(server.thread.models, "installed_models", hang)
        connection = server.connect()
        connection.request("GET", "/v1/models")
        assert entered.wait(60)
        stopping = threading.Thread(target=server.thread.stop)
        stopping.start()
        response = connection.getresponse()
        assert response.status == 503 and SAYS in response.read()
        go_on.set()
        stopping.join(60)
        connection.close()


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_ends_soon_is_whole(stream: bool) -> None:
    with running(drain_s=60) as server:
        engine = server.board.current
        gate = asyncio.Event()
        engine.answers = [["a", gate, "b"]]
        connection = server.connect()
        connection.request(
            "POST",
            "/v1/completions",
            json.dumps(completion(stream=stream)),
            {"Content-Type": "application/json"},
        )
        assert engine.begun.wait(60)
        stopping = threading.Thread(target=server.thread.stop)
        stopping.start()
        refused_by(server)
        engine.release(gate)
        body = connection.getresponse().read()
        stopping.join(60)
        connection.close()
        assert b'"b"' in body if stream else b'"ab"' in body
        assert body.endswith(b"[DONE]\n\n" if stream else b"}")


def refused_by(server: Server) -> None:
    """Return when the server takes no more connections: it has begun to stop."""
    while True:
        with contextlib.suppress(ConnectionResetError, http.client.RemoteDisconnected):
            try:
                server.call("GET", "/health")
            except ConnectionRefusedError:
                return


def test_a_stream_that_begins_meanwhile_ends_too() -> None:
    """On a connection that was there before: the answer that kept it is still being read."""
    with running(drain_s=0.05) as server:
        engine = server.board.current
        engine.answers = [["a", asyncio.Event()], ["b", asyncio.Event()]]
        with server.streaming("/v1/chat/completions", chat(stream=True)) as response:
            response.readline()
            server.thread.stop()
            assert SAYS in response.read()


def test_sigterm_ends_streams_of_every_dialect(home: Path) -> None:
    with child(home / "term", drain_s=0.05) as server:
        connections = [begin(server.port, route, stream=True) for route in STREAMS]
        responses = [connection.getresponse() for connection in connections]
        firsts = [response.readline() for response in responses]
        assert all(response.status == 200 for response in responses) and all(firsts)
        server.process.send_signal(signal.SIGTERM)
        for first, response in zip(firsts, responses, strict=True):
            assert_ended(first + response.read())
        for connection in connections:
            connection.close()
        assert server.process.wait(60) == 0
        assert "Traceback" not in server.log


def test_there_are_streams_to_end() -> None:
    assert len(STREAMS) >= 2 and set(STREAMS) <= set(POSTS)
