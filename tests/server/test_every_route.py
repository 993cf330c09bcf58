"""No route without its guards, in whatever dialect: each test fails when a guard is taken away."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from app.server import security
from app.server.errors import ApiError, error_body

from .conftest import Reply, ScriptedEngine, Server, running
from .routes import POSTS, ROUTES, Route, application
from .wire import connect, head, raw

KEY = "a key that nobody has"
# A page of text that asks for the key, and no more than that.
OPEN = {"/docs", "/docs/page.css", "/docs/page.js"}
MARK = "swordfish"  # in prompts: must never come back in errors

PATHS = application().openapi()["paths"]

every_route = pytest.mark.parametrize("route", ROUTES, ids=str)
every_post = pytest.mark.parametrize("route", POSTS, ids=str)


@pytest.fixture(scope="module")
def guarded(home: object) -> Iterator[Server]:
    with running(api_key=KEY) as server:
        yield server


def ask(server: Server, route: Route, headers: dict[str, str], **more: Any) -> Reply:
    return server.call(route.method, route.url, route.body(**more), headers)


def assert_refused(route: Route, reply: Reply, status: int) -> None:
    """The status, and an error in the dialect's own shape that says something."""
    assert reply.status == status, reply
    if route.method == "HEAD":
        return
    assert shape(reply.json) == shape(error_body(route.url, ApiError(status, "code", "message")))
    assert MARK not in reply.body.decode()


def shape(value: Any) -> Any:
    """The keys of a JSON object, without what they hold."""
    if isinstance(value, dict):
        return {key: shape(one) for key, one in value.items()}
    return None


def test_there_are_routes(server: Server) -> None:
    assert len(ROUTES) >= 10 and len(POSTS) >= 2
    assert {"/health", "/metrics", "/docs", "/openapi.json"} <= {route.path for route in ROUTES}
    documented = {(method.upper(), path) for path, one in PATHS.items() for method in one}
    hidden = {"/openapi.json", *OPEN}
    there = {(one.method, one.documented): one for one in ROUTES if one.path not in hidden}
    assert documented <= set(there)
    # Of what else is answered, the document leaves out HEAD and refusals.
    for left_out in set(there) - documented:
        one = there[left_out]
        assert one.method == "HEAD" or server.call(one.method, one.url, {}).status == 403, one
    # Guards know http only.
    assert not [one for one in application().routes if "websocket" in type(one).__name__.lower()]


@every_route
def test_a_foreign_host_is_refused(server: Server, route: Route) -> None:
    assert_refused(route, ask(server, route, {"Host": "evil.example"}), 403)


@every_route
@pytest.mark.parametrize("origin", ["https://evil.example", "http://localhost:3000", "null"])
def test_a_web_page_is_refused(server: Server, route: Route, origin: str) -> None:
    reply = ask(server, route, {"Origin": origin})
    assert_refused(route, reply, 403)
    assert not [name for name in reply.headers if name.startswith("access-control")]


@every_route
@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_what_a_page_embeds_is_refused(server: Server, route: Route, site: str) -> None:
    """An image or script of another site comes without Origin."""
    headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "no-cors"}
    assert_refused(route, ask(server, route, headers), 403)


def test_a_link_is_followed(server: Server) -> None:
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert server.call("GET", "/docs", headers=headers).status == 200
    headers = {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "no-cors"}
    assert server.call("GET", "/docs/page.js", headers=headers).status == 200


@every_route
def test_without_the_key_nothing_is_answered(guarded: Server, route: Route) -> None:
    if route.path in OPEN:
        reply = guarded.call(route.method, route.url)
        assert reply.status == 200
        assert KEY.encode() not in reply.body
        return
    wrong: list[dict[str, str]] = [
        {},
        {"Authorization": f"Bearer {KEY}x"},
        {"X-Api-Key": KEY[:-1]},
        {"Authorization": f"Basic {KEY}"},
    ]
    for headers in wrong:
        assert_refused(route, ask(guarded, route, headers), 401)


@every_route
def test_the_key_opens_it(guarded: Server, route: Route) -> None:
    guarded.board.current = ScriptedEngine()
    for headers in ({"Authorization": f"Bearer {KEY}"}, {"X-Api-Key": KEY}):
        assert ask(guarded, route, headers).status != 401


@every_post
@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
def test_only_json_is_taken(
    server: Server, engine: ScriptedEngine, route: Route, content_type: str
) -> None:
    """What a page may send to anybody without being asked."""
    reply = server.call("POST", route.url, route.encoded() or b"{}", {"Content-Type": content_type})
    assert_refused(route, reply, 415)
    assert engine.requests == []


@every_post
def test_a_body_over_the_limit_is_refused_unread(server: Server, route: Route) -> None:
    lines = "Content-Type: application/json", f"Content-Length: {security.MAX_BODY_BYTES + 1}"
    with connect(server) as connection:
        connection.sendall(head("POST", route.url, *lines))
        with connection.makefile("rb") as answer:
            assert answer.readline().startswith(b"HTTP/1.1 413 ")


@every_post
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b"[" * 100_000, b'{"model":' * 50_000],
    ids=repr,
)
def test_a_body_that_is_no_object_is_refused(
    server: Server, engine: ScriptedEngine, route: Route, body: bytes
) -> None:
    """Also one nested so deeply that a parser which recurses would not come back."""
    reply = server.call("POST", route.url, body)
    assert reply.status in (400, 403)  # 403: the command line does this, whatever the body
    assert_refused(route, reply, reply.status)
    assert len(reply.body) < 2000
    assert engine.requests == []


@every_post
def test_deep_values_in_fields_are_refused_or_ignored(server: Server, route: Route) -> None:
    for name in [*(route.schema or {}).get("properties", {}), "metadata"]:
        for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
            deep = opening * 50_000 + b"1" + closing * 50_000
            reply = server.call("POST", route.url, b'{"%s":%s}' % (name.encode(), deep))
            assert 400 <= reply.status < 500, (name, reply)
            assert len(reply.body) < 2000


@every_route
@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "TRACE", "OPTIONS", "BREW", "POST"])
def test_other_methods_are_refused(server: Server, route: Route, method: str) -> None:
    allowed = {one.method for one in ROUTES if one.path == route.path}
    if method in allowed:
        return
    reply = server.call(method, route.url)
    assert_refused(route, reply, 405)
    assert set(reply.headers["allow"].replace(" ", "").split(",")) <= allowed


@every_route
def test_two_lengths_are_refused(server: Server, route: Route) -> None:
    """Where one server sees one request and a proxy in front of it two."""
    body = b"0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
    length = f"Content-Length: {len(body)}"
    for lines in (
        [length, "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: chunked", length],
        ["Transfer-Encoding: chunked, identity"],
        ["Transfer-Encoding: identity", length],
        ["Transfer-Encoding : chunked"],
        [length, "Content-Length: 3"],
        ["Content-Length: +5"],
        ["Content-Length: 5, 6"],
    ):
        asked = head(route.method, route.url, "Content-Type: application/json", *lines) + body
        answer = raw(server, asked)
        status = answer.partition(b" ")[2][:3]
        assert status in (b"400", b"501"), (lines, answer)
        assert answer.count(b"HTTP/1.1 ") == 1, (lines, answer)


@every_route
def test_no_upgrade_is_made(server: Server, engine: ScriptedEngine, route: Route) -> None:
    body = route.encoded()
    for upgrade in ("websocket", "h2c", "TLS/1.2"):
        lines = [
            f"Upgrade: {upgrade}",
            "Connection: Upgrade",
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
            "Sec-WebSocket-Version: 13",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
        ]
        answer = raw(server, head(route.method, route.url, *lines) + body)
        assert answer.startswith(b"HTTP/1.1 ") and not answer.startswith(b"HTTP/1.1 101")


@every_post
def test_prompts_do_not_come_back_in_errors(
    server: Server, engine: ScriptedEngine, route: Route
) -> None:
    """An error ends up in logs of clients that were trusted with less."""
    for more in ({"no_such_field": True}, {"model": "no such model"}):
        body = json.loads(json.dumps(route.body(**more)).replace("Hello", MARK))
        reply = server.call("POST", route.url, body)
        if reply.status >= 400:
            assert_refused(route, reply, reply.status)
