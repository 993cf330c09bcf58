"""docs/rest/openai.md says what becomes of every field, and the `openai` package knows no other."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params

from app.server.chat_requests import ChatFields
from app.server.completion_requests import CompletionFields
from app.server.responses_requests import ResponseFields
from app.server.validation import Fields

from .conftest import ScriptedEngine, Server, chat, completion

PAGE = Path(__file__).parents[2] / "docs" / "rest" / "openai.md"
ROUTES: dict[str, tuple[type[Fields], tuple[type, ...]]] = {
    "/v1/chat/completions": (
        ChatFields,
        (
            chat_params.CompletionCreateParamsNonStreaming,
            chat_params.CompletionCreateParamsStreaming,
        ),
    ),
    "/v1/completions": (
        CompletionFields,
        (
            completion_create_params.CompletionCreateParamsNonStreaming,
            completion_create_params.CompletionCreateParamsStreaming,
        ),
    ),
    "/v1/responses": (
        ResponseFields,
        (
            response_create_params.ResponseCreateParamsNonStreaming,
            response_create_params.ResponseCreateParamsStreaming,
        ),
    ),
}
BODIES = {
    "/v1/chat/completions": chat(),
    "/v1/completions": completion(),
    "/v1/responses": {"model": chat()["model"], "input": "Hi"},
}


def documented(route: str) -> dict[str, str]:
    """Class by field, as the page says."""
    _, _, section = PAGE.read_text().partition(f"## POST {route}\n")
    rows = re.findall(r"^\| `(\w+)` \| ([a-z ]+) \|", section.partition("\n## ")[0], re.MULTILINE)
    assert len(rows) == len(dict(rows)), "a field is documented twice"
    return dict(rows)


@pytest.mark.parametrize("route", ROUTES)
def test_the_page_is_the_code(route: str) -> None:
    fields, _ = ROUTES[route]
    in_code = {
        **dict.fromkeys(fields.model_fields, "honoured"),
        **dict.fromkeys(fields.without_effect, "no effect"),
        **dict.fromkeys(fields.only_neutral, "refused"),
    }
    assert documented(route) == in_code


@pytest.mark.parametrize("route", ROUTES)
def test_every_field_of_the_openai_package_is_on_the_page(route: str) -> None:
    _, params = ROUTES[route]
    names = {name for one in params for name in one.__annotations__}
    assert names - documented(route).keys() == set()


@pytest.mark.parametrize("route", ROUTES)
def test_fields_without_effect_have_none(
    server: Server, engine: ScriptedEngine, route: str
) -> None:
    fields, _ = ROUTES[route]
    extra = {name: {"a": "b"} for name in fields.without_effect}
    for body in (BODIES[route], BODIES[route] | extra):
        assert server.post(route, body).status == 200
    plain, with_them = engine.requests
    assert msgspec.structs.replace(with_them, id=plain.id) == plain


@pytest.mark.parametrize(
    ("route", "field"),
    [(route, field) for route in ROUTES for field in ROUTES[route][0].only_neutral],
)
def test_refused_fields_are_refused_unless_neutral(server: Server, route: str, field: str) -> None:
    neutral = ROUTES[route][0].only_neutral[field]
    for value in (None, *neutral):
        assert server.post(route, BODIES[route] | {field: value}).status == 200
    for value in ({"type": "other"}, "other", 2, True):
        reply = server.post(route, BODIES[route] | {field: value})
        assert reply.status == 400
        assert reply.error["param"] == field
        assert reply.error["code"] == "unsupported_parameter"
        assert f"`{field}`" in reply.error["message"]
