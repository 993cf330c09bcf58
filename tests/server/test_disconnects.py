"""Clients that leave, or stay and do not read, with the real engine behind: rows end with them."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.server import generation

from ..rounds import SCALE, rounds
from ..tiny_models import RECURRENT_GEMMA, write_model
from .child import OneModel
from .children import Child, child
from .conftest import Server, chat, completion
from .routes import STREAMS, Route
from .wire import head

ROUNDS = len(rounds(20))
RUNNING = "gryphon_requests_running"
QUEUED = "gryphon_requests_queued"
TOKENS = "gryphon_generated_tokens_total"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers without end: it has no end-of-sequence token, and no limit to its context."""
    return write_model(tmp_path_factory.mktemp("model") / "tiny", RECURRENT_GEMMA)


@pytest.fixture(scope="module")
def real(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    """A server over a real engine that has answered."""
    with child(tmp_path_factory.mktemp("real"), model=str(model)) as server:
        body = json.dumps(completion(max_tokens=2))
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        assert connection.getresponse().read().endswith(b"}")
        connection.close()
        yield server


def metrics(server: Child) -> dict[str, float]:
    _, text = server.get("/metrics")
    lines = [line.split() for line in text.decode().splitlines() if line.startswith("gryphon_")]
    return {words[0]: float(words[1]) for words in lines if len(words) == 2}


def until_idle(server: Child) -> dict[str, float]:
    """Wait until the engine computes for nobody. It would for ever, were the requests not ended."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        now = metrics(server)
        if now[RUNNING] == now[QUEUED] == 0:
            return now
    pytest.fail("the engine still computes for a client that has left")


def asked(route: Route, **more: Any) -> bytes:
    body = route.encoded(**more)
    lines = "Content-Type: application/json", f"Content-Length: {len(body)}"
    return head("POST", route.url, *lines) + body


class HealthWatch:
    """Asks for `/health` all the time, and notes how long each answer took."""

    def __init__(self, server: Child) -> None:
        self.took_s: list[float] = []
        self._server = server
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._fault: BaseException | None = None

    def __enter__(self) -> HealthWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(120)

    def _run(self) -> None:
        try:
            while not self._over.is_set():
                started = time.monotonic()
                status, _ = self._server.get("/health")
                assert status == 200
                self.took_s.append(time.monotonic() - started)
                self._over.wait(0.01)
        except BaseException as error:
            self._fault = error

    def check(self) -> None:
        assert self._fault is None, self._fault
        assert not self._thread.is_alive() and self.took_s


@pytest.mark.timeout(150 * SCALE)
def test_a_client_that_leaves_frees_its_row(
    real: Child, record_property: Callable[[str, object], None]
) -> None:
    """At any byte of the answer, its head included, and at any moment before it."""
    draw = random.Random(ROUNDS)
    behind: list[float] = []
    with HealthWatch(real) as watch:
        for _ in range(ROUNDS):
            route = draw.choice(STREAMS)
            stream = draw.random() < 0.8
            with real.connect() as connection:
                connection.sendall(asked(route, stream=stream))
                # An answer in one piece never comes: its client leaves while it waits.
                wanted = draw.choice([0, draw.randrange(400), draw.randrange(5000)])
                got = 0
                connection.settimeout(60 if wanted and stream else 0.02)
                with contextlib.suppress(TimeoutError):
                    while got < wanted and (data := connection.recv(wanted - got)):
                        got += len(data)
                if draw.random() < 0.5:  # a reset instead of a polite end
                    linger = b"\1\0\0\0\0\0\0\0"
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            left = metrics(real)[TOKENS]
            behind.append(until_idle(real)[TOKENS] - left)
    watch.check()
    took_ms = sorted(1000 * one for one in watch.took_s)
    p99 = took_ms[min(len(took_ms) - 1, int(len(took_ms) * 0.99))]
    print(f"{ROUNDS} disconnects, at most {max(behind):.0f} tokens computed after one;")
    print(f"/health {len(took_ms)} times: ", end="")
    print(f"median {took_ms[len(took_ms) // 2]:.1f} ms, p99 {p99:.1f} ms, max {took_ms[-1]:.1f} ms")
    record_property("disconnects", ROUNDS)
    record_property("health_answers", len(took_ms))
    record_property("health_p99_ms", round(p99))
    status, body = real.get("/health")
    assert status == 200 and json.loads(body)["engine"] == "ready"
    assert "Traceback" not in real.log and "failed" not in real.log, real.log


def test_a_client_that_does_not_read_is_let_go(
    model: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits for it is bounded, the others go on, and its row ends. Over a UNIX socket, whose
    buffers are small and stay so."""
    from app.engine.client import EngineClient
    from app.server.serving import ServerOptions, ServerThread

    from .test_doors import SocketConnection

    monkeypatch.setattr(generation, "MAX_UNREAD_BYTES", 256 * 1024)
    path = tmp_path_factory.mktemp("s") / "g.sock"
    thread = ServerThread(EngineClient, ServerOptions(socket=path), models=OneModel(model))
    thread.start()
    try:
        json_ = {"Content-Type": "application/json"}
        slow = SocketConnection(path)
        slow.connect()
        slow.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.request("POST", "/v1/completions", json.dumps(completion(stream=True)), json_)
        response = slow.getresponse()
        assert response.status == 200 and response.readline()
        other = SocketConnection(path)
        other.request("POST", "/v1/completions", json.dumps(completion(max_tokens=50)), json_)
        assert other.getresponse().read().endswith(b"}")
        while True:
            other.request("GET", "/metrics")
            text = other.getresponse().read().decode()
            if f"{RUNNING} 0.0" in text and f"{QUEUED} 0.0" in text:
                break
        other.close()
        rest = response.read()
        assert b"behind its answer" in rest
        # 256 bytes are counted for what takes about as many as a frame.
        assert len(rest) < 4 * 2**20
        slow.close()
    finally:
        thread.stop()


def test_a_client_that_reads_late_gets_everything(server: Server) -> None:
    """Waiting within the limit loses nothing."""
    pieces = ["x" * 1000] * 1500
    server.board.current.answers = [pieces]
    with server.streaming("/v1/chat/completions", chat(stream=True)) as response:
        for _ in range(50):
            assert server.call("GET", "/health").status == 200
        body = response.read()
    assert body.count(b"x" * 1000) == 1500 and body.endswith(b"[DONE]\n\n")


@pytest.mark.parametrize("route", STREAMS, ids=str)
def test_a_long_prefill_is_not_silent(impatient_server: Server, route: Route) -> None:
    """Whatever the dialect: clients and what lies between give up on a silent connection."""
    import asyncio

    engine = impatient_server.board.current
    gate = asyncio.Event()
    engine.answers = [[gate, "late"]]
    with impatient_server.streaming(route.url, route.body(stream=True)) as response:
        assert response.status == 200
        heard = [response.readline() for _ in range(8)]
        assert all(heard)
        engine.release(gate)
        assert b"late" in response.read()
    assert engine.cancelled == []
