"""No stranger gets in. Each test fails when its guard is taken away."""

from __future__ import annotations

import hmac
import socket
from collections.abc import Iterator

import pytest

from app.errors import GryphonError
from app.server import security
from app.server.application import create_app

from .conftest import Reply, ScriptedEngine, Server, Switchboard, chat, running
from .wire import raw

CHAT = "/v1/chat/completions"
KEY = "sésame"


@pytest.fixture(scope="module")
def _guarded(home: object) -> Iterator[Server]:
    with running(api_key=KEY, allow_origins=["http://Localhost:3000/"]) as server:
        yield server


@pytest.fixture
def guarded(_guarded: Server) -> Server:
    """With an API key and one origin let in."""
    _guarded.board.current = ScriptedEngine()
    return _guarded


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:1", "LOCALHOST", "127.0.0.1", "127.0.0.1:11500", "[::1]:9"]
)
def test_own_host_names(server: Server, host: str) -> None:
    assert server.call("GET", "/health", headers={"Host": host}).status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:11500",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "localhost:11500.evil.example",
        "localhost:",
        "evil.example@localhost",
        "0.0.0.0",
        "192.168.1.2",
        "[::]",
        "::1",
        "localhost localhost",
        "",
    ],
)
@pytest.mark.parametrize("path", ["/health", "/v1/models", "/openapi.json"])
def test_foreign_host_is_refused(server: Server, host: str, path: str) -> None:
    reply = server.call("GET", path, headers={"Host": host})
    assert reply.status == 403
    assert reply.error["code"] == "host_not_allowed"


def test_foreign_host_is_refused_before_the_handler(server: Server, engine: ScriptedEngine) -> None:
    assert server.post(CHAT, chat(), {"Host": "evil.example"}).status == 403
    assert engine.requests == []


def test_request_without_host_is_refused(server: Server) -> None:
    assert raw(server, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 403 ")


def test_two_hosts_are_refused(server: Server) -> None:
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n"
    assert raw(server, request).startswith(b"HTTP/1.1 400 ")


def test_program_without_origin_gets_no_cors(server: Server) -> None:
    reply = server.call("GET", "/health")
    assert not [name for name in reply.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "origin",
    [
        "vscode-webview://0a1b2c",
        "vscode-file://vscode-app",
        "app://obsidian.md",
        "tauri://localhost",
    ],
)
def test_editors_are_let_in(server: Server, origin: str) -> None:
    reply = server.post(CHAT, chat(), {"Origin": origin})
    assert reply.status == 200
    assert reply.headers["access-control-allow-origin"] == origin
    assert reply.headers["vary"] == "Origin"
    assert "access-control-allow-credentials" not in reply.headers


def test_own_origin_is_let_in(server: Server) -> None:
    reply = server.call("GET", "/health", headers={"Origin": server.thread.url})
    assert reply.status == 200


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "http://localhost:3000",
        "http://localhost",
        "http://127.0.0.1:3000",
        "https://127.0.0.1",
        "null",
        "file://",
        "chrome-extension://abc",
        "app",
        "app.evil.example://x",
        "http://evil.example/app://",
        "",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_web_page_is_refused(
    server: Server, engine: ScriptedEngine, origin: str, method: str
) -> None:
    if method == "GET":
        reply = server.call("GET", "/v1/models", headers={"Origin": origin})
    else:
        reply = server.post(CHAT, chat(), {"Origin": origin})
    assert reply.status == 403
    assert reply.error["code"] == "origin_not_allowed"
    assert not [name for name in reply.headers if name.startswith("access-control")]
    assert engine.requests == []


def test_rebound_page_is_not_its_own_origin(server: Server) -> None:
    headers = {"Host": "evil.example:80", "Origin": "http://evil.example:80"}
    assert server.call("GET", "/v1/models", headers=headers).status == 403


def test_two_origins_are_refused(server: Server) -> None:
    request = (
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Origin: app://x\r\nOrigin: https://evil.example\r\n\r\n"
    )
    assert raw(server, request).startswith(b"HTTP/1.1 403 ")


def preflight(server: Server, origin: str) -> Reply:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type,x-stainless-os",
        "Access-Control-Request-Private-Network": "true",
    }
    return server.call("OPTIONS", CHAT, headers=headers)


def test_preflight_of_an_editor(server: Server) -> None:
    reply = preflight(server, "vscode-webview://x")
    assert reply.status == 204
    assert reply.headers["access-control-allow-origin"] == "vscode-webview://x"
    assert reply.headers["access-control-allow-headers"] == "content-type,x-stainless-os"
    assert "POST" in reply.headers["access-control-allow-methods"]
    assert reply.headers["access-control-allow-private-network"] == "true"


def test_preflight_of_a_web_page(server: Server) -> None:
    reply = preflight(server, "https://evil.example")
    assert reply.status == 403
    assert not [name for name in reply.headers if name.startswith("access-control")]


def test_origin_let_in_by_name(guarded: Server) -> None:
    headers = {"Origin": "http://localhost:3000", "Authorization": f"Bearer {KEY}"}
    reply = guarded.post(CHAT, chat(), latin(headers))
    assert reply.status == 200
    assert reply.headers["access-control-allow-origin"] == "http://localhost:3000"
    assert preflight(guarded, "http://localhost:3000").status == 204
    headers["Origin"] = "http://localhost:3001"
    assert guarded.post(CHAT, chat(), latin(headers)).status == 403


def test_page_let_in_can_read_errors(guarded: Server) -> None:
    reply = guarded.post(CHAT, chat(), {"Origin": "http://localhost:3000"})
    assert reply.status == 401
    assert reply.headers["access-control-allow-origin"] == "http://localhost:3000"


@pytest.mark.parametrize("origin", ["*", "localhost:3000", "http://", "http://a/b", "null", ""])
def test_only_origins_can_be_let_in(origin: str) -> None:
    with pytest.raises(GryphonError, match="is not an origin"):
        create_app(Switchboard(), allow_origins=[origin])


def latin(headers: dict[str, str]) -> dict[str, str]:
    """http.client writes latin-1; the server compares UTF-8."""
    return {name: value.encode().decode("latin-1") for name, value in headers.items()}


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {KEY}"},
        {"Authorization": f"bearer  {KEY} "},
        {"X-Api-Key": KEY},
        {"Authorization": "Basic abc", "X-API-KEY": KEY},
    ],
)
def test_right_key(guarded: Server, headers: dict[str, str]) -> None:
    assert guarded.post(CHAT, chat(), latin(headers)).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": f"Bearer {KEY[:-1]}"},
        {"Authorization": "Bearer "},
        {"Authorization": KEY},
        {"Authorization": f"Basic {KEY}"},
        {"X-Api-Key": ""},
    ],
)
@pytest.mark.parametrize("path", ["/health", "/v1/models", CHAT])
def test_missing_or_wrong_key(guarded: Server, headers: dict[str, str], path: str) -> None:
    if path == CHAT:
        reply = guarded.post(path, chat(), latin(headers))
    else:
        reply = guarded.call("GET", path, headers=latin(headers))
    assert reply.status == 401
    assert reply.error["code"] == "invalid_api_key"
    assert reply.headers["www-authenticate"] == "Bearer"
    assert guarded.board.current.requests == []
    assert KEY.encode() not in reply.body


def test_key_is_compared_in_constant_time(guarded: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def spy(given: bytes, key: bytes) -> bool:
        compared.append((given, key))
        return False

    monkeypatch.setattr(hmac, "compare_digest", spy)
    guarded.call("GET", "/health", headers={"X-Api-Key": "guess"})
    assert compared == [(b"guess", KEY.encode())]


def test_empty_key_is_refused() -> None:
    with pytest.raises(GryphonError, match="must not be empty"):
        create_app(Switchboard(), api_key=" ")


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "text/plain; application/json",
        "application/jsonx",
        "",
    ],
)
def test_post_must_be_json(server: Server, engine: ScriptedEngine, content_type: str) -> None:
    reply = server.post(CHAT, chat(), {"Content-Type": content_type})
    assert reply.status == 415
    assert reply.error["code"] == "unsupported_media_type"
    assert engine.requests == []


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (b"", 400),  # a program: its body is read, and lacks everything
        (b"Sec-Fetch-Site: none\r\n", 415),
        (b"Origin: vscode-webview://editor\r\n", 415),
    ],
)
def test_a_body_of_no_type_is_a_programs_alone(server: Server, header: bytes, status: int) -> None:
    request = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Content-Length: 2\r\n%b\r\n{}" % header
    )
    assert raw(server, request).startswith(b"HTTP/1.1 %d " % status)


def test_json_with_parameters(server: Server) -> None:
    reply = server.post(CHAT, chat(), {"Content-Type": "Application/JSON; charset=utf-8"})
    assert reply.status == 200


LIMIT = security.MAX_BODY_BYTES


def head(*lines: bytes) -> bytes:
    start = b"POST /v1/completions HTTP/1.1", b"Host: localhost", b"Content-Type: application/json"
    return b"\r\n".join((*start, *lines)) + b"\r\n\r\n"


def first_line(connection: socket.socket) -> bytes:
    with connection.makefile("rb") as answer:
        return answer.readline()


def test_announced_body_over_the_limit_is_refused_unread(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(head(b"Content-Length: %d" % (LIMIT + 1)))
        assert first_line(connection).startswith(b"HTTP/1.1 413 ")


def test_unannounced_body_over_the_limit_is_refused_while_it_comes(server: Server) -> None:
    chunk = b"%x\r\n" % 2**16 + b" " * 2**16 + b"\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(head(b"Transfer-Encoding: chunked"))
        for _ in range(LIMIT // 2**16 + 1):
            connection.sendall(chunk)
        # The body has not ended, and the answer is there.
        assert first_line(connection).startswith(b"HTTP/1.1 413 ")


def test_body_at_the_limit_is_read(server: Server, engine: ScriptedEngine) -> None:
    body = b'{"model":"smollm2-135m","prompt":"' + b"x" * LIMIT
    body = body[: LIMIT - 2] + b'"}'
    assert len(body) == LIMIT
    assert server.post("/v1/completions", body).status == 200
    assert server.post("/v1/completions", body + b" ").status == 413
    assert len(engine.requests) == 1


@pytest.mark.parametrize(
    "line",
    [b"Content-Length: -1", b"Content-Length: x", b"Content-Length: 1\r\nContent-Length: 2"],
)
def test_odd_content_length(server: Server, line: bytes) -> None:
    assert raw(server, head(line)).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    "line",
    [
        b"X-A: b\rX-C: d",
        b"X-A: \x00",
        b"X-A : b",
        b"X-\xff: b",
        b"Origin: app://x\x0bhttp://evil.example",
    ],
)
def test_odd_header_is_refused(server: Server, line: bytes) -> None:
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + line + b"\r\n\r\n"
    answer = raw(server, request)
    assert answer.startswith(b"HTTP/1.1 400 ")


def test_line_ends_in_a_name_do_not_reach_the_headers(server: Server) -> None:
    reply = server.call("GET", "/v1/models/a%0d%0aX-Evil:%201")
    assert reply.status == 404
    assert "x-evil" not in reply.headers


def test_server_does_not_name_its_software(server: Server) -> None:
    assert "server" not in server.call("GET", "/health").headers
