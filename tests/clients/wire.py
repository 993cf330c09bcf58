"""What goes over the wire between a client and the server: recorded, and held to the rules that
every client relies on."""

from __future__ import annotations

import http.client
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "te", "upgrade"}


@dataclass
class Exchange:
    """A request and its answer, as bytes."""

    method: str
    path: str
    request: bytes
    status: int
    content_type: str
    answer: bytes

    def check(self) -> None:
        """No refusal, frames that parse, and one end: raises AssertionError."""
        assert self.status < 400, f"{self}\n{self.answer.decode()}"
        if self.method == "HEAD" or self.status == 204:
            return
        kind = self.content_type.partition(";")[0]
        if kind == "text/event-stream":
            check_events(self.path, self.answer)
        elif kind == "application/x-ndjson":
            lines = [json.loads(line) for line in self.answer.splitlines()]
            assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True], lines
        elif kind == "application/json":
            json.loads(self.answer)

    def __str__(self) -> str:
        return f"{self.method} {self.path} {self.request.decode()[:2000]} -> {self.status}"


def check_events(path: str, answer: bytes) -> None:
    """A stream of server-sent events, by the rules of the dialect that `path` belongs to."""
    assert answer.endswith(b"\n\n"), answer[-200:]
    events: list[tuple[str, Any]] = []
    for frame in answer.decode().removesuffix("\n\n").split("\n\n"):
        lines = [line for line in frame.split("\n") if not line.startswith(":")]
        if not lines:
            continue  # a keep-alive
        fields = [line.split(": ", 1) for line in lines]
        names = [name for name, _ in fields]
        assert names in (["data"], ["event", "data"]), frame
        values = dict(fields)
        data = values["data"]
        body = data if data == "[DONE]" else json.loads(data)
        name = values.get("event", "")
        if name:
            assert body["type"] == name, frame
        events.append((name, body))
    route = path.partition("?")[0]
    if route.endswith("/messages"):
        _anthropic(events)
    elif route.endswith("/responses"):
        _responses(events)
    elif route.endswith("/completions"):
        _openai(events)
    else:
        ends = [body for _, body in events if body.get("stop") is True]
        assert len(ends) == 1 and events[-1][1] is ends[0], events


def _openai(events: list[tuple[str, Any]]) -> None:
    bodies = [body for _, body in events]
    assert bodies.count("[DONE]") == 1 and bodies[-1] == "[DONE]", bodies
    ends: Counter[int] = Counter()
    for body in bodies[:-1]:
        for choice in body["choices"]:
            assert choice["index"] not in ends, "a choice goes on after its end"
            ends[choice["index"]] += choice["finish_reason"] is not None
            if not ends[choice["index"]]:
                del ends[choice["index"]]
    assert ends and set(ends.values()) == {1}, bodies


def _responses(events: list[tuple[str, Any]]) -> None:
    names = [name for name, _ in events]
    ends = {"response.completed", "response.incomplete", "response.failed"}
    assert names[0] == "response.created" and names.count("response.created") == 1, names
    assert names[-1] in ends and len([name for name in names if name in ends]) == 1, names
    numbers = [body["sequence_number"] for _, body in events]
    assert numbers == sorted(set(numbers)), numbers


def _anthropic(events: list[tuple[str, Any]]) -> None:
    names = [name for name, _ in events if name != "ping"]
    assert names[0] == "message_start" and names[-2:] == ["message_delta", "message_stop"], names
    assert names.count("message_start") == names.count("message_stop") == 1, names
    opened = [body["index"] for name, body in events if name == "content_block_start"]
    closed = [body["index"] for name, body in events if name == "content_block_stop"]
    assert opened == closed == list(range(len(opened))), names


class Tape:
    """A recorder between a client and the server on `port`; answers pass as they come."""

    def __init__(self, port: int) -> None:
        self.exchanges: list[Exchange] = []
        tape = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def _pass_on(self) -> None:
                body = self._body()
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                given = {
                    name: value
                    for name, value in self.headers.items()
                    if name.lower() not in _HOP_BY_HOP
                }
                connection.request(self.command, self.path, body or None, given)
                response = connection.getresponse()
                self.send_response_only(response.status)
                for name, value in response.getheaders():
                    if name.lower() not in _HOP_BY_HOP:
                        self.send_header(name, value)
                length = response.getheader("content-length")
                has_body = self.command != "HEAD" and response.status not in (204, 304)
                if length is not None or not has_body:
                    self.send_header("Content-Length", length or "0")
                else:
                    self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                answer = b""
                while has_body and (piece := response.read1(65536)):
                    answer += piece
                    chunk = b"%x\r\n%s\r\n" % (len(piece), piece)
                    self.wfile.write(piece if length is not None else chunk)
                    self.wfile.flush()
                if has_body and length is None:
                    self.wfile.write(b"0\r\n\r\n")
                connection.close()
                kind = response.getheader("content-type") or ""
                tape.exchanges.append(
                    Exchange(self.command, self.path, body, response.status, kind, answer)
                )

            do_GET = do_POST = do_HEAD = do_DELETE = do_OPTIONS = _pass_on

            def _body(self) -> bytes:
                if "chunked" not in self.headers.get("transfer-encoding", ""):
                    return self.rfile.read(int(self.headers.get("content-length") or 0))
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    @contextmanager
    def running(self) -> Iterator[Tape]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()

    def check(self) -> list[str]:
        """Check every exchange; returns their methods and paths."""
        for exchange in self.exchanges:
            exchange.check()
        return [f"{one.method} {one.path.partition('?')[0]}" for one in self.exchanges]
