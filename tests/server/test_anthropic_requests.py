"""Anthropic's fields: honoured, accepted or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app.engine.protocol import Message, Sampling, Tokenize, Tool, ToolCallPart
from app.server.anthropic_requests import MessagesFields

from .conftest import GRIFFIN, SMOL, ScriptedEngine, Server, running
from .test_anthropic_frames import PATH, message

BILLING = "x-anthropic-billing-header: cc_version=2.1.177.01c; cc_entrypoint=cli; cch=NONCE;"


def test_fields_that_reach_the_engine(server: Server, engine: ScriptedEngine) -> None:
    asked = {"temperature": 0, "top_p": 0.5, "top_k": 3, "stop_sequences": ["a", "b"]}
    assert server.post(PATH, message(**asked)).status == 200
    (request,) = engine.requests
    assert request.sampling == Sampling(temperature=0, top_p=0.5, top_k=3)
    assert (request.max_tokens, request.stop) == (100, ["a", "b"])
    assert request.model == SMOL.ref and request.client.startswith("127.0.0.1")


def test_what_is_left_out_is_left_to_the_model(server: Server, engine: ScriptedEngine) -> None:
    nulls = dict.fromkeys(
        ["temperature", "top_p", "top_k", "stop_sequences", "system", "tools", "tool_choice"]
        + ["thinking", "output_config", "context_management", "stream", "container"]
    )
    for more in ({}, nulls):
        assert server.post(PATH, message(**more)).status == 200
        request = engine.requests.pop()
        assert request.sampling == Sampling() and request.stop == []
        assert (request.tools, request.tool_choice, request.template_options) == ([], "auto", {})
        assert request.messages == [Message("user", "Hi")]


WITHOUT_EFFECT = {
    "metadata": {"user_id": "ann"},
    "service_tier": "auto",
    "cache_control": {"type": "ephemeral"},
    "betas": ["interleaved-thinking-2025-05-14"],
    "speed": "standard",
    "inference_geo": "us",
    "user_profile_id": "x",
    "workspace_id": "x",
    "diagnostics": {},
}


def test_fields_without_effect(server: Server, engine: ScriptedEngine) -> None:
    assert MessagesFields.without_effect == WITHOUT_EFFECT.keys()
    edits = [{"type": "clear_thinking_20251015", "keep": "all"}]
    asked = message(context_management={"edits": edits}, **WITHOUT_EFFECT)
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "a,b"}
    assert server.post(f"{PATH}?beta=true", asked, headers).status == 200
    assert engine.requests[0].messages == [Message("user", "Hi")]


def block(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": kind, **fields}


def test_messages(server: Server, engine: ScriptedEngine) -> None:
    messages = [
        {"role": "user", "content": [block("text", text="a", cache_control={}),
                                     block("text", text="b")]},
        {
            "role": "assistant",
            "content": [
                block("thinking", thinking="Hm.", signature="x"),
                block("redacted_thinking", data="x"),
                block("text", text="c", citations=None),
                block("tool_use", id="1", name="f", input={"q": "é"}, caller={"type": "direct"}),
                block("tool_use", id="2", name="g", input={}),
            ],
        },
        {
            "role": "user",
            "content": [
                block("tool_result", tool_use_id="1", content="one"),
                block(
                    "tool_result",
                    tool_use_id="2",
                    is_error=True,
                    content=[block("text", text="two"), block("text", text="three")],
                ),
                block("text", text="d"),
            ],
        },
        {"role": "system", "content": "Be quick."},
        {"role": "user", "content": [block("tool_result", tool_use_id="3", is_error=False)]},
    ]  # fmt: skip
    assert server.post(PATH, message() | {"messages": messages}).status == 200
    calls = [ToolCallPart("1", "f", '{"q": "é"}'), ToolCallPart("2", "g", "{}")]
    assert engine.requests[0].messages == [
        Message("user", "a\n\nb"),
        Message("assistant", "c", "Hm.", calls),
        Message("tool", "one", tool_call_id="1"),
        Message("tool", "Error: two\n\nthree", tool_call_id="2"),
        Message("user", "d"),
        Message("system", "Be quick."),
        Message("tool", "", tool_call_id="3"),
    ]


@pytest.mark.parametrize(
    ("system", "text"),
    [
        ("Be brief.", "Be brief."),
        ([block("text", text="a"), block("text", text="b", cache_control={})], "a\n\nb"),
        (f"{BILLING}\nYou help.", "You help."),
        ([block("text", text=BILLING), block("text", text="You help.")], "You help."),
        (f"{BILLING}\n\nYou\nhelp.", "You\nhelp."),
        (BILLING, None),
        ("", None),
        ([], None),
        # Words about the line are words.
        ("Tell of x-anthropic-billing-header: a", "Tell of x-anthropic-billing-header: a"),
    ],
)
def test_system_prompts_without_the_line_that_changes(
    server: Server, engine: ScriptedEngine, system: Any, text: str | None
) -> None:
    for nonce in ("0aaa9", "36ee5"):
        asked = json.loads(json.dumps(message(system=system)).replace("NONCE", nonce))
        assert server.post(PATH, asked).status == 200
        system_turn = [] if text is None else [Message("system", text)]
        assert engine.requests.pop().messages == [*system_turn, Message("user", "Hi")]


SCHEMA = {"type": "object", "properties": {"q": {"type": "string"}}}


@pytest.mark.parametrize(
    ("choice", "engines"),
    [
        (None, "auto"),
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto"),
        ({"type": "any"}, "required"),
        ({"type": "tool", "name": "f"}, "f"),
        ({"type": "none"}, "none"),
    ],
)
def test_tools(server: Server, engine: ScriptedEngine, choice: Any, engines: str) -> None:
    tools = [
        {"name": "f", "description": "F.", "input_schema": SCHEMA, "cache_control": {}},
        {"name": "g", "type": "custom", "strict": True, "input_schema": {"type": "object"}},
    ]
    assert server.post(PATH, message(tools=tools, tool_choice=choice)).status == 200
    (request,) = engine.requests
    assert request.tools == [Tool("f", "F.", SCHEMA), Tool("g", "", {"type": "object"})]
    assert request.tool_choice == engines


def test_a_schema_constrains_the_answer(server: Server, engine: ScriptedEngine) -> None:
    form = {"type": "json_schema", "schema": SCHEMA}
    assert server.post(PATH, message(output_config={"format": form})).status == 200
    constraint = engine.requests[0].constraint
    assert constraint is not None and json.loads(constraint.text) == SCHEMA


def test_thinking(furnished_server: Server) -> None:
    engine = furnished_server.board.current

    def asked(model: str, **more: Any) -> Any:
        reply = furnished_server.post(PATH, message(**more) | {"model": model})
        return engine.requests.pop().template_options if reply.status == 200 else reply.error

    on = {"type": "enabled", "budget_tokens": 2000}
    assert asked("thinker", thinking=on) == {"enable_thinking": True}
    assert asked("thinker", thinking={"type": "adaptive"}) == {"enable_thinking": True}
    assert asked("thinker", thinking={"type": "disabled"}) == {"enable_thinking": False}
    assert asked("thinker") == {}
    assert asked("thinker", output_config={"effort": "high"}) == {}
    # A model that cannot think is let off; one that cannot stop thinking says so.
    assert asked("tiny", thinking=on) == asked("brooder", thinking=on) == {}
    assert "always reasons" in asked("brooder", thinking={"type": "disabled"})["message"]


USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 1.5}, "temperature"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"container": "x"}, "container"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"nonsense": 1}, "nonsense"),
        ({"messages": []}, "messages"),
        ({"messages": [USER, {"role": "assistant", "content": "The answer is ("}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [block("text", text="a"), block("image")]}]},
            "messages[0].content[1]",
        ),
        (
            {"messages": [{"role": "user", "content": [block("text")]}]},
            "messages[0].content[0].text",
        ),
        (
            {"messages": [{"role": "user", "content": [block("thinking", thinking="a")]}]},
            "messages[0].content",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            block("tool_result", tool_use_id="1", content=[block("document")])
                        ],
                    }
                ]
            },
            "messages[0].content[0].content[0]",
        ),
        ({"system": [block("image")]}, "system[0]"),
        ({"tools": [{"type": "web_search_20250305", "name": "w", "max_uses": 8}]}, "tools[0].type"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        (
            {"tools": [{"name": "f", "input_schema": {}, "defer_loading": True}]},
            "tools[0].defer_loading",
        ),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "auto", "name": "f"}}, "tool_choice.name"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type"),
        ({"output_config": {"format": {"type": "json_object"}}}, "output_config.format"),
        (
            {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}},
            "context_management.edits[0].type",
        ),
    ],
)
def test_fields_that_are_refused(
    server: Server, engine: ScriptedEngine, more: dict[str, Any], named: str
) -> None:
    reply = server.post(PATH, message() | more)
    assert reply.status == 400, reply.body
    assert reply.json["type"] == "error" and reply.error["type"] == "invalid_request_error"
    assert f"`{named}`" in reply.error["message"], reply.body
    assert not engine.requests


def test_count_tokens(furnished_server: Server) -> None:
    engine = furnished_server.board.current
    asked = message(system="Be brief.", tools=[{"name": "f", "input_schema": SCHEMA}])
    asked |= {"model": "thinker", "thinking": {"type": "disabled"}}
    del asked["max_tokens"]
    for more in ({}, {"max_tokens": 5}, {"tool_choice": {"type": "none"}}):
        reply = furnished_server.post(f"{PATH}/count_tokens?beta=true", asked | more)
        assert (reply.status, reply.json) == (200, {"input_tokens": len("Be brief.Hi")})
    first, _, without_tools = engine.asked
    assert isinstance(first, Tokenize) and isinstance(without_tools, Tokenize)
    assert first.messages == [Message("system", "Be brief."), Message("user", "Hi")]
    assert first.tools == [Tool("f", "", SCHEMA)] and without_tools.tools == []
    assert first.template_options == {"enable_thinking": False}
    reply = furnished_server.post(f"{PATH}/count_tokens", asked | {"nonsense": 1})
    assert reply.status == 400 and "`nonsense`" in reply.error["message"]


def test_unknown_models(server: Server) -> None:
    reply = server.post(PATH, message() | {"model": "claude-sonnet-4-5"})
    assert reply.status == 404 and reply.error["type"] == "not_found_error"
    assert SMOL.name in reply.error["message"]


def test_models_in_the_shape_that_the_header_asks_for(server: Server) -> None:
    page = server.call("GET", "/v1/models", headers={"anthropic-version": "2023-06-01"}).json
    assert (page["first_id"], page["last_id"], page["has_more"]) == (GRIFFIN.name, SMOL.name, False)
    assert page["data"][1] == {
        "type": "model",
        "id": SMOL.name,
        "display_name": SMOL.name,
        "created_at": "2023-11-14T22:13:20.5Z",
        "max_input_tokens": 8192,
        "lifecycle": "active",
    }
    one = server.call("GET", f"/v1/models/{SMOL.name}", headers={"anthropic-version": "x"}).json
    assert one == page["data"][1]
    assert server.call("GET", "/v1/models").json["object"] == "list"


def test_keys_in_either_header() -> None:
    with running(api_key="secret") as guarded:
        refused = guarded.post(PATH, message())
        assert refused.status == 401 and refused.error["type"] == "authentication_error"
        for headers in ({"x-api-key": "secret"}, {"Authorization": "Bearer secret"}):
            assert guarded.post(PATH, message(), headers).status == 200
            assert guarded.call("GET", "/api/tags", headers=headers).status == 200


def test_fields_are_those_of_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs/rest/anthropic.md").read_text()
    names = {*MessagesFields.model_fields, *WITHOUT_EFFECT, *MessagesFields.only_neutral}
    assert [name for name in names if name not in page] == []
