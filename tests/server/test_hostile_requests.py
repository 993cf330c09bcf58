"""Requests that mean harm, through the whole endpoint: paths, bombs, injections, secrets."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.engine.client import EngineClient
from app.library import installed
from app.server.serving import ServerOptions, ServerThread

from ..tiny_models import OPEN_LLAMA, RECURRENT_GEMMA, write_model
from .child import OneModel
from .children import child
from .conftest import SMOL, ScriptedEngine, Server, chat
from .routes import POSTS, ROUTES, STREAMS, Route
from .wire import head, raw

every_stream = pytest.mark.parametrize("route", STREAMS, ids=str)

PATHS = [
    "{path}",
    "{path}/",
    "file://{path}",
    "../models/tiny",
    "./tiny",
    "tiny/../tiny",
    "~/tiny",
    "/etc/passwd",
    "..",
    ".",
    "/",
    "tiny\x00",
    "tiny\n",
    "C:\\models\\tiny",
    "tiny+../../x",
    "https://huggingface.co/org/name",
    "org/name@main",
    "x" * 256,
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """A server over the real library, with one model installed and another one beside it."""
    from .conftest import Switchboard

    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setenv("GRYPHON_HOME", str(home))
        patch.setenv("HF_HUB_CACHE", str(home / "hub"))
        write_model(home / "data" / "models" / "tiny", OPEN_LLAMA)
        elsewhere = write_model(home / "elsewhere" / "secret-model", OPEN_LLAMA)
        board = Switchboard()
        thread = ServerThread(lambda: board, ServerOptions(port=0), models=installed)
        thread.start()
        yield Server(thread, board), elsewhere
        thread.stop()


@pytest.mark.parametrize("name", PATHS)
def test_no_path_is_looked_at(library: tuple[Server, Path], name: str) -> None:
    """A model is what is installed under its name: never a path, an address or a download."""
    server, elsewhere = library
    server.board.current = ScriptedEngine()
    model = name.format(path=elsewhere)
    for route in POSTS:
        if "model" in (route.schema or {}).get("properties", {}):
            reply = server.post(route.url, route.body(model=model))
            assert reply.status in (400, 403, 404), (route, reply)
            assert b"weights" not in reply.body and b"config.json" not in reply.body
    for route in ROUTES:
        if "{" in route.path and "\x00" not in model and "\n" not in model and " " not in model:
            quoted = model.replace("%", "%25").replace("\\", "%5C")
            path = re.sub(r"\{[^}]*\}", lambda _, name=quoted: name, route.path)  # type: ignore[misc]
            reply = server.call(route.method, path, {} if route.method == "POST" else None)
            assert reply.status in (403, 404), (route, reply)
    assert server.board.current.requests == []


def test_the_installed_one_is_found(library: tuple[Server, Path]) -> None:
    server, _ = library
    assert server.post("/v1/chat/completions", chat() | {"model": "tiny"}).status == 200


LINES = ["a\r\nX-Evil: 1", "a\nX-Evil: 1", "a\rX-Evil: 1", "a\r\n\r\nHTTP/1.1 200 OK\r\n\r\n"]


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_line_ends_never_reach_the_headers(server: Server, route: Route) -> None:
    """In a name, a path or a header that is echoed."""
    for text in LINES:
        quoted = "".join(f"%{byte:02x}" for byte in text.encode())
        body = route.encoded(model=text)
        lines = ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        asked = [
            head(route.method, route.url.replace(SMOL.name, quoted) + f"?a={quoted}", *lines)
            + body,
            head(route.method, route.url, *lines, f"Origin: app://{quoted}") + body,
        ]
        for one in asked:
            answer = raw(server, one)
            assert len(re.findall(rb"(?m)^HTTP/1\.1 ", answer)) == 1, answer
            head_lines = answer.partition(b"\r\n\r\n")[0].lower().splitlines()
            assert not [line for line in head_lines if line.strip().startswith(b"x-evil")]


@every_stream
def test_request_ids_are_ours(server: Server, engine: ScriptedEngine, route: Route) -> None:
    """What a client says of itself reaches neither ids nor, unchecked, `gryphon ps`."""
    for stream in (False, True):
        engine.answers = []
        headers = {"User-Agent": "evil\x1b[31m" + "x" * 5000, "X-Request-Id": "mine"}
        reply = server.post(route.url, route.body(stream=stream), headers)
        assert reply.status == 200
        asked = engine.requests.pop()
        assert asked.id != "mine" and len(asked.client) <= 200 and asked.client.isprintable()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server over a real engine."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("real")
        patch.setenv("GRYPHON_HOME", str(home))
        model = OneModel(write_model(home / "tiny", RECURRENT_GEMMA))
        thread = ServerThread(EngineClient, ServerOptions(port=0), models=model)
        thread.start()
        yield Server(thread)
        thread.stop()


INJECTIONS = [
    "{{ 7 * 7 }}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.environ }}",
    "{# comment #}",
    "{{ raise_exception('x') }}",
]


@pytest.mark.parametrize("text", INJECTIONS)
def test_messages_are_never_run_as_templates(real: Server, text: str) -> None:
    """The tokens of a message are those of its text, whatever the text looks like: the tiny
    tokenizer has one per byte, so a template that was run shows in the count."""

    def tokens(content: str) -> int:
        reply = real.post("/v1/chat/completions", chat(content, max_tokens=1, temperature=0))
        assert reply.status == 200, reply
        counted: int = reply.json["usage"]["prompt_tokens"]
        return counted

    plain = text.replace("{", "(").replace("}", ")")
    assert tokens(text) == tokens(plain)


def deep(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


BOMBS: dict[str, dict[str, Any]] = {
    "deep": deep(150),
    "wide": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(50_000)}},
    "repeated": {"type": "string", "pattern": "^((((a{1,99}){1,99}){1,99}){1,99})$"},
    "backtracking": {"type": "string", "pattern": "^(a+)+$"},
    "counted": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9},
    "loop": {"$ref": "#"},
    "loops": {"anyOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"anyOf": [{"$ref": "#"}]}}},
    "doubling": {
        "$ref": "#/$defs/p0",
        "$defs": {f"p{i}": {"allOf": [{"$ref": f"#/$defs/p{i + 1}"}] * 2} for i in range(40)}
        | {"p40": {"type": "string"}},
    },
    "far away": {"$ref": "http://evil.example/schema.json"},
    "a file": {"$ref": "file:///etc/passwd"},
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_schema_that_explodes_harms_nobody_else(real: Server, name: str) -> None:
    """It is refused or ends in time; whoever comes next is answered. The engine's own limits are
    tested where they are: tests/engine/test_hostile_constraints.py."""
    schema = BOMBS[name]
    asked: list[tuple[str, dict[str, Any]]] = [
        (
            "/v1/chat/completions",
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": schema},
                }
            },
        )
    ]
    if any(route.path == "/api/chat" for route in ROUTES):
        asked.append(("/api/chat", {"format": schema, "stream": False}))
    for path, more in asked:
        body = chat(**more)
        body |= {"options": {"num_predict": 3}} if path == "/api/chat" else {"max_tokens": 3}
        reply = real.post(path, body)
        assert reply.status in (200, 400), reply
        assert len(reply.body) < 10_000
        assert real.call("GET", "/health").json["engine"] in ("ready", "stopped")
    assert real.post("/v1/chat/completions", chat(max_tokens=1)).status == 200


KEY, TOKEN, WORD = "api-key-of-the-test", "hf_tokenofthetest", "swordfish"


def test_secrets_and_prompts_stay_out_of_logs_and_errors(home: Path, tmp_path: Path) -> None:
    """With every log switched on, and requests that fail in many ways."""
    model = write_model(tmp_path / "tiny", OPEN_LLAMA)
    said = b""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("GRYPHON_LOG", "debug")
        with child(home / "secrets", model=str(model), api_key=KEY) as server:
            said = _provoke(server.port)
            server.process.terminate()
            server.process.wait(60)
            files = [one for one in (home / "secrets").rglob("*") if one.is_file()]
            logs = [one for one in files if ".log" in one.name]
            assert [one.name for one in logs if one.name == "engine.log"], files
    for place, text in [("answers", said), *((str(one), one.read_bytes()) for one in logs)]:
        for secret in (KEY, TOKEN, WORD):
            assert secret.encode() not in text, (place, secret)
    for one in logs:
        assert one.stat().st_mode & 0o077 == 0


def _provoke(port: int) -> bytes:
    """Everything that was said about requests that were right and wrong."""
    import http.client

    key = {"X-Api-Key": KEY}
    asked: list[tuple[str, str, Any, dict[str, str]]] = [
        ("GET", f"/health?key={KEY}", None, {}),
        ("GET", "/v1/models", None, {"Authorization": f"Basic {KEY}"}),
        ("GET", f"/{WORD}", None, key),
    ]
    for route in POSTS:
        for more in ({}, {"model": "nope"}, {"no_such": WORD}, {"stream": True}):
            # A prompt that leaves little of the context to answer in.
            text = json.dumps(route.body(**more)).replace("Hello", WORD * 50)
            asked.append(("POST", route.url, text, key))
        asked.append(("POST", route.url, text[:-1], key))
        too_long = json.dumps(route.body()).replace("Hello", WORD * 500)
        asked.append(("POST", route.url, too_long, key))
    said = b""
    for method, path, body, headers in asked:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        connection.request(method, path, body, {"Content-Type": "application/json"} | headers)
        response = connection.getresponse()
        answer = response.read()
        if response.status >= 400:
            said += str(response.getheaders()).encode() + answer
        connection.close()
    return said


def test_the_access_log_leaves_queries_out(home: Path) -> None:
    import subprocess
    import sys
    import urllib.error
    import urllib.request

    from .children import ROOT

    process = subprocess.Popen(
        [sys.executable, "-m", "tests.server.child", json.dumps({"access_log": True})],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "GRYPHON_HOME": str(home / "log"), "PYTHONPATH": str(ROOT)},
    )
    with process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        with urllib.request.urlopen(f"{url}/health?key={KEY}", timeout=60) as reply:
            assert reply.status == 200
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert '"GET /health HTTP/1.1" 200' in err and KEY not in err
