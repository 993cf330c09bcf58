"""Connections that say nothing, too little, too slowly, or what is no HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.server import connections

from .conftest import ScriptedEngine, Server, chat, completion, running
from .wire import connect, head, raw, rest

ROOT = Path(__file__).parents[2]
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def hasty(home: object) -> Iterator[Server]:
    """Gives a head and a body 0.2 s each."""
    with running(head_timeout_s=0.2, body_timeout_s=0.2) as server:
        yield server


def one_answer(connection: socket.socket) -> bytes:
    """An answer of the server that keeps the connection."""
    response = http.client.HTTPResponse(connection)
    response.begin()
    return b"HTTP/1.1 %d " % response.status + response.read()


@pytest.mark.parametrize("sent", [b"", b"G", GET[:-2], b"GET /health HTTP/1.1\r\nX-A: "])
def test_a_connection_that_does_not_finish_its_head_is_closed(hasty: Server, sent: bytes) -> None:
    with connect(hasty) as connection:
        connection.sendall(sent)
        assert rest(connection) == b""


@pytest.mark.parametrize("first", [b"", GET])
def test_a_head_that_trickles_in_is_closed_all_the_same(hasty: Server, first: bytes) -> None:
    """Each byte comes soon after the last: only the whole can be too late."""
    with connect(hasty) as connection:
        connection.sendall(first)
        if first:
            assert one_answer(connection).startswith(b"HTTP/1.1 200 ")
        connection.settimeout(0.01)
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: ")
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            while True:
                try:
                    answer = connection.recv(1)
                except TimeoutError:
                    connection.sendall(b"a")
                else:
                    assert answer == b""
                    break


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("length", ["Content-Length: 100", "Transfer-Encoding: chunked"])
def test_a_body_that_does_not_come_is_not_waited_for(hasty: Server, path: str, length: str) -> None:
    with connect(hasty) as connection:
        connection.sendall(head("POST", path, "Content-Type: application/json", length))
        assert rest(connection).startswith(b"HTTP/1.1 408 ")


def test_a_body_that_trickles_in_after_its_answer_ends(hasty: Server) -> None:
    """The answer did not wait for the body; neither does the server, for ever."""
    with connect(hasty) as connection:
        lines = "Host: localhost", "Content-Type: text/plain", "Content-Length: 1000000"
        connection.sendall("\r\n".join(("POST /v1/completions HTTP/1.1", *lines, "", "")).encode())
        assert one_answer(connection).startswith(b"HTTP/1.1 415 ")
        connection.settimeout(0.01)
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            while True:
                try:
                    if connection.recv(65536) == b"":
                        break
                except TimeoutError:
                    connection.sendall(b" ")


def test_a_slow_answer_is_waited_for(hasty: Server) -> None:
    """The limits are for what the client says, not for what it is told."""
    engine = hasty.board.current = ScriptedEngine()
    gate = asyncio.Event()
    engine.answers = [[gate, "late"]]
    with connect(hasty) as connection:
        body = json.dumps(completion()).encode()
        lines = "Content-Type: application/json", f"Content-Length: {len(body)}"
        connection.sendall(head("POST", "/v1/completions", *lines) + body)
        # Another connection lives through its whole patience meanwhile.
        with connect(hasty) as silent:
            assert rest(silent) == b""
        engine.release(gate)
        assert rest(connection).endswith(b"}")


def test_a_connection_may_rest_between_requests(hasty: Server) -> None:
    with connect(hasty) as connection, connect(hasty) as silent:
        connection.sendall(GET)
        assert one_answer(connection).startswith(b"HTTP/1.1 200 ")
        assert rest(silent) == b""
        connection.sendall(GET)
        assert one_answer(connection).startswith(b"HTTP/1.1 200 ")


def test_idle_connections_do_no_harm(server: Server) -> None:
    with contextlib.ExitStack() as open_:
        idle = [open_.enter_context(connect(server)) for _ in range(256)]
        for one in idle[::2]:
            one.sendall(b"GET /health HTTP/1.1\r\n")
        assert server.call("GET", "/health").status == 200
        assert server.post("/v1/chat/completions", chat()).status == 200
        with server.streaming("/v1/chat/completions", chat(stream=True)) as response:
            assert response.read().endswith(b"[DONE]\n\n")
        for one in idle[::2]:
            one.sendall(b"Host: localhost\r\nConnection: close\r\n\r\n")
            assert rest(one).startswith(b"HTTP/1.1 200 ")


def test_those_that_rest_make_room() -> None:
    with running(max_connections=4) as server, contextlib.ExitStack() as open_:
        idle = [open_.enter_context(connect(server)) for _ in range(4)]
        for one in idle:  # in this order
            one.sendall(GET)
            assert one_answer(one).startswith(b"HTTP/1.1 200 ")
        for _ in range(3):
            assert server.call("GET", "/health").status == 200
        assert rest(idle[0]) == b""
        idle[3].sendall(GET)
        assert one_answer(idle[3]).startswith(b"HTTP/1.1 200 ")


def test_where_all_are_busy_there_is_a_clear_503() -> None:
    with running(max_connections=2) as server, contextlib.ExitStack() as open_:
        engine = server.board.current
        gate = asyncio.Event()
        engine.answers = [["a", gate], ["b", gate]]
        busy = [
            open_.enter_context(server.streaming("/v1/completions", completion(stream=True)))
            for _ in range(2)
        ]
        for one in busy:
            one.readline()
        for reply in (
            server.call("GET", "/health"),
            server.post("/v1/completions", completion()),
        ):
            assert reply.status == 503
            assert reply.error["code"] == "too_many_connections"
            assert reply.headers["retry-after"] == "1"
            assert reply.headers["connection"] == "close"
        assert len(engine.requests) == 2
        engine.release(gate)
        for one in busy:
            assert one.read().endswith(b"[DONE]\n\n")
        assert server.call("GET", "/health").status == 200


def test_there_are_files_enough_for_them() -> None:
    """A shell on macOS allows 256 open files."""
    code = (
        "import resource; from app.server import connections\n"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))\n"
        "connections.allow_open_files(512)\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 300))\n"
        "connections.allow_open_files(512)\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.split() == ["768", "300"]
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    connections.allow_open_files(1)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == soft


CHUNKED = head(
    "POST", "/v1/completions", "Content-Type: application/json", "Transfer-Encoding: chunked"
)
MALFORMED = {
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00",
    "no version": b"GET /health\r\n\r\n",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "space in the target": b"GET /a b HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "long head": b"GET / HTTP/1.1\r\nX-A: " + b"a" * 100_000,
    "many headers": b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 20_000,
    "bad chunk": CHUNKED + b"zz\r\n",
    "long chunk size": CHUNKED + b"f" * 30 + b"\r\n",
    "chunk longer than it says": CHUNKED + b"2\r\n{}}\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_no_http_is_answered_so(server: Server, home: Path, name: str) -> None:
    log = home / "state" / "server.log"
    before = log.stat().st_size if log.exists() else 0
    answer = raw(server, MALFORMED[name])
    # Sending on while the answer comes may cost the answer.
    assert b"HTTP/1.1 400 " in answer or (not answer and name in ("long head", "many headers"))
    if answer:
        body = json.loads(answer.rpartition(b"\r\n\r\n")[2])
        assert body["error"]["code"] == "invalid_http"
    assert server.call("GET", "/health").status == 200
    logged = log.read_text()[before:] if log.exists() else ""
    assert "Traceback" not in logged and "request failed" not in logged


def test_a_bad_chunk_behind_an_answer_cuts_the_connection(server: Server, home: Path) -> None:
    log = home / "state" / "server.log"
    before = log.stat().st_size if log.exists() else 0
    with connect(server) as connection:
        lines = "Host: localhost", "Content-Type: text/plain", "Transfer-Encoding: chunked"
        connection.sendall("\r\n".join(("POST /v1/completions HTTP/1.1", *lines, "", "")).encode())
        assert one_answer(connection).startswith(b"HTTP/1.1 415 ")
        connection.sendall(b"zz\r\n")
        assert rest(connection) == b""
    assert not log.exists() or "rror" not in log.read_text()[before:].replace("uvicorn.error", "")


def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    asked = GET + b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n" + head("GET", "/health")
    answer = raw(server, asked)
    assert [answer[i + 9 : i + 12] for i in _starts(answer)] == [b"200", b"404", b"200"]


def _starts(answer: bytes) -> list[int]:
    return [i for i in range(len(answer)) if answer.startswith(b"HTTP/1.1 ", i)]
