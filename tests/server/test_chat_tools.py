"""Tools over chat completions: what reaches the engine, and how calls come back."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from app.engine.constraint import Constraint
from app.engine.protocol import (
    Finished,
    Message,
    Timings,
    Token,
    Tool,
    ToolCall,
    ToolCallPart,
    Usage,
)

from .conftest import SMOL, ScriptedEngine, Server, chat

CHAT = "/v1/chat/completions"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def function(name: str = "weather", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": SCHEMA, **more}}


def called(id: str, name: str = "weather", arguments: str = '{"city": "Rome"}') -> ToolCall:
    return ToolCall("", id, name, arguments)


ENDED = Finished("", "tool_calls", Usage(7, 5, 0), Timings(0, 0, 0))
NAMED = {"type": "function", "function": {"name": "clock"}}
ALLOWED = {
    "type": "allowed_tools",
    "allowed_tools": {"mode": "required", "tools": [NAMED]},
}


@pytest.mark.parametrize(
    ("choice", "expected", "names"),
    [
        (None, "auto", ["weather", "clock"]),
        ("auto", "auto", ["weather", "clock"]),
        ("none", "none", ["weather", "clock"]),
        ("required", "required", ["weather", "clock"]),
        (NAMED, "clock", ["weather", "clock"]),
        (ALLOWED, "required", ["clock"]),
    ],
)
def test_tools_and_choice_reach_the_engine(
    server: Server, engine: ScriptedEngine, choice: Any, expected: str, names: list[str]
) -> None:
    tools = [function(description="The weather.", strict=True), function("clock")]
    reply = server.post(CHAT, chat(tools=tools, tool_choice=choice))
    assert reply.status == 200, reply.body
    request = engine.requests[0]
    assert request.tool_choice == expected
    assert [tool.name for tool in request.tools] == names
    if "weather" in names:
        assert request.tools[0] == Tool("weather", "The weather.", SCHEMA)


def test_function_without_parameters_takes_none(server: Server, engine: ScriptedEngine) -> None:
    tool = {"type": "function", "function": {"name": "now"}}
    assert server.post(CHAT, chat(tools=[tool])).status == 200
    assert engine.requests[0].tools == [Tool("now")]


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"tool_choice": "required"}, "tool_choice", "needs `tools`"),
        ({"tool_choice": NAMED, "tools": [function()]}, "tool_choice", '"clock", which is none'),
        ({"tool_choice": ALLOWED, "tools": [function()]}, "tool_choice", '"clock", which is none'),
        ({"tool_choice": "any", "tools": [function()]}, "tool_choice", 'got "any"'),
        ({"tool_choice": {"type": "custom", "custom": {}}}, "tool_choice", 'type "custom"'),
        ({"tools": [function(), function()]}, "tools", "twice"),
        ({"tools": [function("two words")]}, "tools", "two words"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].custom", "function"),
        ({"tools": [{"type": "mcp"}]}, "tools[0].type", "functions only"),
        ({"tools": [function(default=1)]}, "tools[0].function.default", "Unknown field"),
        (
            {
                "tools": [function(parameters={"type": "object", "maxlength": 1})],
                "tool_choice": "required",
            },
            "tools",
            "maxlength",
        ),
        (
            {"tools": [function()], "response_format": {"type": "json_object"}},
            "response_format",
            "cannot be combined",
        ),
    ],
)
def test_tools_that_make_no_sense_are_refused_by_name(
    server: Server, engine: ScriptedEngine, body: dict[str, Any], param: str, message: str
) -> None:
    reply = server.post(CHAT, chat(**body))
    assert (reply.status, reply.error["param"]) == (400, param)
    assert message in reply.error["message"]
    assert engine.requests == []


def test_form_goes_with_tools_that_are_not_offered(server: Server, engine: ScriptedEngine) -> None:
    body = chat(tools=[function()], tool_choice="none", response_format={"type": "json_object"})
    assert server.post(CHAT, body).status == 200
    assert engine.requests[0].constraint == Constraint("json_object")


def test_a_whole_conversation_with_calls_comes_back(server: Server, engine: ScriptedEngine) -> None:
    """What the answers carry is taken back as it was sent."""
    script = [
        [Token("", "", 1, reasoning="Hm."), "Let me see.", called("call_1"), ENDED],
        ["Sunny."],
    ]
    engine.answers = [list(one) for one in script]
    messages: list[Any] = [{"role": "user", "content": "Weather?"}]
    with openai.OpenAI(base_url=f"{server.thread.url}/v1", api_key="x", max_retries=0) as client:
        first = client.chat.completions.create(
            model=SMOL.name, messages=messages, tools=[function()]
        )
        assert first.choices[0].finish_reason == "tool_calls"
        message = first.choices[0].message
        assert message.tool_calls is not None
        messages += [
            message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "22 degrees"},
        ]
        client.chat.completions.create(model=SMOL.name, messages=messages, tools=[function()])
    assert engine.requests[1].messages == [
        Message("user", "Weather?"),
        Message(
            "assistant",
            "Let me see.",
            "Hm.",
            [ToolCallPart("call_1", "weather", '{"city": "Rome"}')],
        ),
        Message("tool", "22 degrees", tool_call_id="call_1"),
    ]


@pytest.mark.parametrize(
    ("parallel", "ids"), [(None, ["a", "b"]), (True, ["a", "b"]), (False, ["a"])]
)
def test_calls_whole_and_streamed_are_the_same(
    client: openai.OpenAI, engine: ScriptedEngine, parallel: bool | None, ids: list[str]
) -> None:
    script = ["Hm ", called("a"), called("b", "clock", "{}"), ENDED]
    engine.answers = [list(script), list(script)]
    asked: dict[str, Any] = {
        "model": SMOL.name,
        "messages": [{"role": "user", "content": "Hi"}],
        "tools": [function(), function("clock")],
    }
    if parallel is not None:
        asked["parallel_tool_calls"] = parallel
    whole = client.chat.completions.create(**asked)
    with client.chat.completions.stream(**asked) as stream:
        streamed = stream.get_final_completion()
    for answer in (whole, streamed):
        (choice,) = answer.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "Hm "
        assert [call.id for call in choice.message.tool_calls or []] == ids
    call = (whole.choices[0].message.tool_calls or [])[0]
    assert call.type == "function"
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Rome"}')


def test_streamed_calls_are_numbered(server: Server, engine: ScriptedEngine) -> None:
    engine.answers = [[called("a"), called("b", "clock", "{}"), ENDED]]
    body = server.post(CHAT, chat(stream=True, tools=[function(), function("clock")])).body
    frames = [json.loads(line[6:]) for line in body.decode().split("\n\n")[:-2]]
    deltas = [one["choices"][0]["delta"] for one in frames]
    assert deltas == [
        {"role": "assistant", "content": ""},
        {
            "tool_calls": [
                {
                    "index": 0,
                    "id": "a",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
                }
            ]
        },
        {
            "tool_calls": [
                {
                    "index": 1,
                    "id": "b",
                    "type": "function",
                    "function": {"name": "clock", "arguments": "{}"},
                }
            ]
        },
        {},
    ]
    assert frames[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_answer_of_calls_alone_has_no_content(server: Server, engine: ScriptedEngine) -> None:
    engine.answers = [[called("a"), ENDED]]
    message = server.post(CHAT, chat(tools=[function()])).json["choices"][0]["message"]
    assert message["content"] is None


CALL = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("message", "param", "said"),
    [
        ({"role": "tool", "content": "x"}, "messages[0].tool_call_id", "required in the role tool"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "messages[0].tool_calls", "alone"),
        (
            {"role": "user", "content": "x", "tool_call_id": "c"},
            "messages[0].tool_call_id",
            "alone",
        ),
        ({"role": "tool", "tool_call_id": "c"}, "messages[0].content", "required"),
        (
            {"role": "assistant", "function_call": {"name": "f", "arguments": ""}},
            "messages[0].function_call",
            "send `tool_calls` instead",
        ),
        (
            {
                "role": "assistant",
                "tool_calls": [CALL | {"function": {"name": "f", "arguments": "{"}}],
            },
            "messages",
            "JSON text of an object",
        ),
        (
            {"role": "tool", "tool_call_id": "c", "content": [{"type": "image_url"}]},
            "messages[0].content",
            "text only",
        ),
    ],
)
def test_messages_that_make_no_sense_are_refused_by_name(
    server: Server, message: dict[str, Any], param: str, said: str
) -> None:
    reply = server.post(CHAT, chat() | {"messages": [message]})
    assert (reply.status, reply.error["param"]) == (400, param)
    assert said in reply.error["message"]
