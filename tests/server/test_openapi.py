"""`/openapi.json` is complete, and `/docs` shows it with nothing from elsewhere."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import jsonschema
import pytest

from app.server import docs
from app.server.errors import ApiError, error_body

from .conftest import SMOL, ScriptedEngine, Server, running
from .routes import POSTS, ROUTES, STREAMS, Route, application

PAGE = Path(docs.__file__).with_name("docs_page")
DOCUMENTED = [route for route in ROUTES if route.operation]


@pytest.mark.parametrize("route", DOCUMENTED, ids=str)
def test_every_answer_is_described(route: Route) -> None:
    operation = route.operation
    assert operation["summary"] and operation["tags"]
    responses = operation["responses"]
    assert [status for status in responses if status.startswith("2") or status == "403"]
    for status in ("401", "403", "500", "503", *(("408", "413", "415") if route.schema else ())):
        answer = responses[status]
        assert answer["description"]
        if route.method == "HEAD":
            continue
        schema = answer["content"]["application/json"]["schema"]
        for param in (None, "model"):
            error = ApiError(int(status), "code", "message", param=param)
            jsonschema.validate(error_body(route.url, error), schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"detail": "what FastAPI says"}, schema)
    assert "422" not in responses


@pytest.mark.parametrize("route", POSTS, ids=str)
def test_every_body_is_described(server: Server, route: Route) -> None:
    if not route.operation:  # only where it does not matter: the command line does this
        assert server.post(route.url, {}).status == 403
        return
    assert route.schema is not None and route.schema["type"] == "object"
    jsonschema.Draft202012Validator.check_schema(route.schema)
    jsonschema.validate(route.body(), route.schema)


@pytest.mark.parametrize("route", STREAMS, ids=str)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_sent_is_what_is_described(
    server: Server, engine: ScriptedEngine, route: Route, stream: bool
) -> None:
    reply = server.post(route.url, route.body(stream=stream))
    assert reply.status == 200
    kind = reply.headers["content-type"].partition(";")[0]
    assert kind in route.operation["responses"]["200"]["content"]
    assert (kind != "application/json") == stream


def test_the_key_is_asked_for_where_there_is_one(server: Server) -> None:
    assert "security" not in server.call("GET", "/openapi.json").json
    with running(api_key="k") as guarded:
        document = guarded.call("GET", "/openapi.json", headers={"X-Api-Key": "k"}).json
    schemes = document["components"]["securitySchemes"]
    assert [name for one in document["security"] for name in one] == list(schemes)


def test_the_document_is_the_same_each_time(server: Server) -> None:
    first = server.call("GET", "/openapi.json")
    assert first.body == server.call("GET", "/openapi.json").body
    assert first.json["paths"] == json.loads(json.dumps(application().openapi()["paths"]))


@pytest.mark.parametrize("path", sorted(docs.PATHS))
def test_the_page_comes_from_here_and_allows_nothing_else(server: Server, path: str) -> None:
    reply = server.call("GET", path)
    assert reply.status == 200
    policy = dict(
        part.strip().partition(" ")[::2]
        for part in reply.headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'" and policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert reply.headers["x-content-type-options"] == "nosniff"
    text = reply.body.decode()
    # No address of anybody else's, nothing inline that the policy would have to allow.
    assert not re.search(r"""https?://|(src|href)=["']?//|\bstyle=|\bon\w+=["']""", text)
    assert "<script>" not in text and "<style" not in text and "innerHTML" not in text


def test_what_the_page_refers_to_is_there(server: Server) -> None:
    page = server.call("GET", "/docs").body.decode()
    refers = re.findall(r'(?:src|href)="(/[^"]*)"', page)
    assert len(refers) == 3
    for path in refers:
        assert server.call("GET", path).status == 200
    kinds = {"/docs": "text/html", "/docs/page.css": "text/css", "/docs/page.js": "text/javascript"}
    for path, kind in kinds.items():
        assert server.call("GET", path).headers["content-type"].startswith(kind)


NODE = """
const {{ readFileSync }} = require("fs");
// As much of a browser as the page uses.
function element(name) {{
  return {{ name, children: [], dataset: {{}}, value: "",
    append(...more) {{ this.children.push(...more); }},
    replaceChildren(...more) {{ this.children = more; }},
    addEventListener() {{}} }};
}}
const byId = {{ key: element("input"), status: element("p"), routes: element("main") }};
globalThis.document = {{ createElement: element, getElementById: (id) => byId[id] }};
const text = (one) => typeof one === "string" ? one
  : [one.textContent || "", one.value || "", ...one.children.map(text)].join(" ");
const fetched = globalThis.fetch;
globalThis.fetch = (path, options) => fetched("{url}" + path, options);
(0, eval)(readFileSync("{script}", "utf8"));
const wait = () => byId.status.textContent ? console.log(JSON.stringify(
  {{ status: byId.status.textContent, shown: byId.routes.children.map(text).join("\\n") }}))
  : setTimeout(wait, 10);
wait();
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed")
def test_the_page_draws_every_route(server: Server) -> None:
    """Its script, run by Node over the few functions of a browser that it calls."""
    code = NODE.format(url=server.thread.url, script=PAGE / "page.js")
    done = subprocess.run(["node", "-e", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    drawn = json.loads(done.stdout)
    assert drawn["status"].startswith("Version"), drawn
    for route in DOCUMENTED:
        assert route.documented in drawn["shown"]
    assert SMOL.name in drawn["shown"] or "recurrentgemma" in drawn["shown"]
