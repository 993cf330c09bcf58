"""`/v1/responses`: the official client, what Codex and the Agents SDK send, the exact events."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent

from app.engine.constraint import Constraint
from app.engine.protocol import (
    Failed,
    Finished,
    Message,
    Timings,
    Token,
    TokenLogprob,
    Tool,
    ToolCall,
    ToolCallPart,
    Usage,
)

from .conftest import SMOL, ScriptedEngine, Server

PATH = "/v1/responses"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True}
CLOCK = {"type": "function", "name": "clock", "description": "The time.", "parameters": None}


def asking(input: Any = "Hi", **more: Any) -> dict[str, Any]:
    return {"model": SMOL.name, "input": input, **more}


def called(id: str, name: str = "weather", arguments: str = '{"city": "Rome"}') -> ToolCall:
    return ToolCall("", id, name, arguments)


def ended(reason: Any = "stop", text: str = "") -> Finished:
    return Finished("", reason, Usage(7, 5, 3), Timings(0, 0, 0), text)


EVERYTHING: list[Any] = [
    Token("", "", 1, reasoning="H"),
    Token("", "Let", 2, reasoning="m."),
    " me see.",
    called("call_1"),
    called("call_2", "clock", "{}"),
    ended("tool_calls"),
]


def events_of(body: bytes) -> list[dict[str, Any]]:
    """The events of a stream; each is named as its type says and ends with an empty line."""
    events = []
    for block in body.decode().removesuffix("\n\n").split("\n\n"):
        if block == ": keep-alive":
            continue
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def test_create(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    response = client.responses.create(
        model=SMOL.name,
        input="Hi",
        instructions="Be short.",
        max_output_tokens=50,
        temperature=0.5,
        metadata={"a": "b"},
    )
    assert response.id.startswith("resp_")
    assert (response.object, response.status, response.model) == (
        "response",
        "completed",
        SMOL.name,
    )
    assert response.output_text == "Hello there."
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens) == (7, 3)
    assert response.instructions == "Be short."
    assert response.metadata == {"a": "b"}
    assert (response.temperature, response.max_output_tokens) == (0.5, 50)
    request = engine.requests[0]
    assert request.messages == [Message("system", "Be short."), Message("user", "Hi")]
    assert (request.max_tokens, request.sampling.temperature) == (50, 0.5)


def test_response_is_what_the_package_says_it_is(server: Server, engine: ScriptedEngine) -> None:
    engine.answers = [list(EVERYTHING)]
    reply = server.post(PATH, asking(tools=[WEATHER, CLOCK]))
    response = Response.model_validate_json(reply.body, strict=False)
    assert [item.type for item in response.output] == [
        "reasoning",
        "message",
        "function_call",
        "function_call",
    ]
    assert response.usage is not None
    assert response.usage.input_tokens_details.cached_tokens == 3
    assert response.usage.output_tokens_details.reasoning_tokens == 2


def test_stream_is_exact(server: Server, engine: ScriptedEngine) -> None:
    engine.answers = [list(EVERYTHING)]
    events = events_of(server.post(PATH, asking(tools=[WEATHER, CLOCK], stream=True)).body)
    shapes = pydantic.TypeAdapter(ResponseStreamEvent)
    for event in events:
        shapes.validate_python(event)
    reasoning = [
        "response.output_item.added 0",
        "response.content_part.added 0",
        "response.reasoning_text.delta 0",
        "response.reasoning_text.delta 0",
        "response.reasoning_text.done 0",
        "response.content_part.done 0",
        "response.output_item.done 0",
    ]
    message = [
        "response.output_item.added 1",
        "response.content_part.added 1",
        "response.output_text.delta 1",
        "response.output_text.delta 1",
        "response.output_text.done 1",
        "response.content_part.done 1",
        "response.output_item.done 1",
    ]
    calls = [
        f"response.{what} {index}"
        for index in (2, 3)
        for what in (
            "output_item.added",
            "function_call_arguments.delta",
            "function_call_arguments.done",
            "output_item.done",
        )
    ]
    assert [f"{event['type']} {event.get('output_index', '')}".strip() for event in events] == [
        "response.created",
        "response.in_progress",
        *reasoning,
        *message,
        *calls,
        "response.completed",
    ]
    # An item keeps its id from its first event to the response at the end.
    final = events[-1]["response"]
    for index, item in enumerate(final["output"]):
        own = [event for event in events if event.get("output_index") == index]
        ids = {event.get("item_id") or event["item"]["id"] for event in own}
        assert ids == {item["id"]}
        assert own[0]["item"]["status"] == "in_progress"
        assert own[-1]["item"] == item
        assert item["status"] == "completed"
    assert final["output"][0]["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert final["output"][1]["content"] == [
        {"type": "output_text", "annotations": [], "logprobs": [], "text": "Let me see."}
    ]
    assert final["output"][2]["arguments"] == '{"city": "Rome"}'
    assert {event["response"]["id"] for event in events if "response" in event} == {final["id"]}


def test_whole_and_streamed_are_the_same(server: Server, engine: ScriptedEngine) -> None:
    engine.answers = [list(EVERYTHING), list(EVERYTHING)]
    asked = asking(tools=[WEATHER, CLOCK], include=["message.output_text.logprobs"])
    whole = server.post(PATH, asked).json
    streamed = events_of(server.post(PATH, asked | {"stream": True}).body)[-1]["response"]

    def nameless(response: dict[str, Any]) -> dict[str, Any]:
        output = [item | {"id": ""} for item in response["output"]]
        times = {"created_at": 0, "completed_at": 0}
        return response | {"id": "", "output": output} | times

    assert nameless(whole) == nameless(streamed)


def test_stream_through_the_client(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.answers = [list(EVERYTHING)]
    asked: Any = {"model": SMOL.name, "input": "Hi", "tools": [WEATHER, CLOCK]}
    with client.responses.stream(**asked) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()
    assert final.output_text == "Let me see."
    calls = [item for item in final.output if item.type == "function_call"]
    assert [(call.call_id, call.name) for call in calls] == [
        ("call_1", "weather"),
        ("call_2", "clock"),
    ]


async def test_async_client(server: Server) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{server.thread.url}/v1", api_key="x", max_retries=0
    ) as client:

        async def ask() -> str:
            stream = await client.responses.create(model=SMOL.name, input="Hi", stream=True)
            deltas = [one.delta async for one in stream if one.type == "response.output_text.delta"]
            return "".join(deltas)

        assert await asyncio.gather(*(ask() for _ in range(4))) == ["Hello there."] * 4


def test_only_the_first_call_where_calls_may_not_be_parallel(
    server: Server, engine: ScriptedEngine
) -> None:
    engine.answers = [list(EVERYTHING), list(EVERYTHING)]
    for stream in (False, True):
        reply = server.post(
            PATH, asking(tools=[WEATHER, CLOCK], parallel_tool_calls=False, stream=stream)
        )
        response = events_of(reply.body)[-1]["response"] if stream else reply.json
        calls = [item for item in response["output"] if item["type"] == "function_call"]
        assert [call["call_id"] for call in calls] == ["call_1"]
        assert response["parallel_tool_calls"] is False


def test_answer_cut_short_is_incomplete(server: Server, engine: ScriptedEngine) -> None:
    engine.answers = [["a", ended("length", "b")], ["a", ended("length", "b")]]
    whole = server.post(PATH, asking()).json
    *_, done, last = events_of(server.post(PATH, asking(stream=True)).body)
    assert last["type"] == "response.incomplete"
    for response in (whole, last["response"]):
        assert response["status"] == "incomplete"
        assert response["incomplete_details"] == {"reason": "max_output_tokens"}
        assert response["output"][0]["status"] == "incomplete"
        assert response["output"][0]["content"][0]["text"] == "ab"
    assert done["item"] == last["response"]["output"][0]


@pytest.mark.parametrize("stream", [False, True])
def test_answer_of_nothing_is_an_empty_message(
    server: Server, engine: ScriptedEngine, stream: bool
) -> None:
    engine.answers = [[ended()]]
    reply = server.post(PATH, asking(stream=stream))
    response = events_of(reply.body)[-1]["response"] if stream else reply.json
    (item,) = response["output"]
    assert (item["type"], item["content"][0]["text"]) == ("message", "")


@pytest.mark.parametrize(
    ("code", "said"),
    [("engine_crashed", "server_error"), ("invalid_constraint", "invalid_constraint")],
)
def test_failure_midway_is_response_failed(
    server: Server, engine: ScriptedEngine, code: str, said: str
) -> None:
    engine.answers = [["a", Failed("", code, "It failed.")]]
    *_, last = events_of(server.post(PATH, asking(stream=True)).body)
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"] == {"code": said, "message": "It failed."}


@pytest.mark.parametrize("stream", [False, True])
def test_failure_before_the_first_token_has_its_status(
    client: openai.OpenAI, engine: ScriptedEngine, stream: bool
) -> None:
    engine.answers = [[Failed("", "context_length_exceeded", "9000 tokens, 8192 fit.")]]
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=SMOL.name, input="Hi", stream=stream)
    assert caught.value.code == "context_length_exceeded"


def test_logprobs_are_those_of_the_text(server: Server, engine: ScriptedEngine) -> None:
    def token(id: int, text: str, raw: bytes, reasoning: str = "") -> Token:
        own = TokenLogprob(id, raw.decode(errors="replace"), raw, -float(id))
        return Token("", text, id, own, [own], reasoning)

    script = [
        token(9, "", b"<think>"),
        token(1, "", b"Hm", "Hm"),
        token(2, "", b"\xc3"),
        token(3, "é", b"\xa9"),
        token(4, "x", b"x"),
        ended(),
    ]
    engine.answers = [list(script), list(script)]
    asked = asking(top_logprobs=1)
    whole = server.post(PATH, asked).json
    events = events_of(server.post(PATH, asked | {"stream": True}).body)
    assert engine.requests[0].logprobs and engine.requests[0].top_logprobs == 1
    text = whole["output"][1]["content"][0]
    assert [one["logprob"] for one in text["logprobs"]] == [-2.0, -3.0, -4.0]
    assert text["logprobs"][2]["top_logprobs"] == [{"token": "x", "logprob": -4.0, "bytes": [120]}]
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [[one["logprob"] for one in delta["logprobs"]] for delta in deltas] == [
        [-2.0, -3.0],
        [-4.0],
    ]


def test_text_format_reaches_the_engine(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    class City(pydantic.BaseModel):
        name: str

    engine.answers = [['{"name": "Rome"}']]
    parsed = client.responses.parse(model=SMOL.name, input="Hi", text_format=City)
    assert parsed.output_parsed == City(name="Rome")
    constraint = engine.requests[0].constraint
    assert constraint is not None and constraint.kind == "json_schema"
    assert json.loads(constraint.text)["required"] == ["name"]
    client.responses.create(
        model=SMOL.name, input="Hi", text={"format": {"type": "json_object"}, "verbosity": "medium"}
    )
    assert engine.requests[1].constraint == Constraint("json_object")


def test_items_become_messages(server: Server, engine: ScriptedEngine) -> None:
    input = [
        {"role": "developer", "content": "Be short."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [
            {"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [
            {"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}]},
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "a", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "b", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
        {"type": "function_call_output", "call_id": "c2", "output": [
            {"type": "input_text", "text": "2"}]},
        {"type": "function_call", "call_id": "c3", "name": "a", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c3", "output": "3"},
        {"type": "reasoning", "summary": [], "encrypted_content": None},
        {"role": "assistant", "content": "Done."},
        {"role": "user", "content": "Thanks."},
    ]  # fmt: skip
    assert server.post(PATH, asking(input, instructions="First.")).status == 200
    assert engine.requests[0].messages == [
        Message("system", "First."),
        Message("system", "Be short."),
        Message("user", "Hi"),
        Message(
            "assistant",
            "I look.",
            "Hm.",
            [ToolCallPart("c1", "a", "{}"), ToolCallPart("c2", "b", "{}")],
        ),
        Message("tool", "1", tool_call_id="c1"),
        Message("tool", "2", tool_call_id="c2"),
        Message("assistant", "", "", [ToolCallPart("c3", "a", "{}")]),
        Message("tool", "3", tool_call_id="c3"),
        Message("assistant", "Done."),
        Message("user", "Thanks."),
    ]


def test_an_output_is_taken_back_as_it_came(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.answers = [list(EVERYTHING)]
    asked: Any = {"model": SMOL.name, "tools": [WEATHER, CLOCK]}
    first = client.responses.create(input="Hi", **asked)
    # As the Agents SDK does it.
    items: list[Any] = [{"role": "user", "content": "Hi"}]
    items += [item.model_dump(exclude_unset=True) for item in first.output]
    items.append({"type": "function_call_output", "call_id": "call_1", "output": "22 degrees"})
    client.responses.create(input=items, **asked)
    assert engine.requests[1].messages == [
        Message("user", "Hi"),
        Message(
            "assistant",
            "Let me see.",
            "Hm.",
            [
                ToolCallPart("call_1", "weather", '{"city": "Rome"}'),
                ToolCallPart("call_2", "clock", "{}"),
            ],
        ),
        Message("tool", "22 degrees", tool_call_id="call_1"),
    ]


# As Codex 0.169 sends it, with fewer tools and shorter texts.
CODEX = {
    "instructions": "You are Codex.",
    "input": [
        {
            "type": "message",
            "role": "developer",
            "id": "msg_1",
            "content": [{"type": "input_text", "text": "<permissions>"}],
            "internal_chat_message_metadata_passthrough": {"turn_id": "t"},
        },
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "List the files."}],
        },
    ],
    "tools": [
        {
            "type": "function",
            "name": "exec_command",
            "description": "Runs a command.",
            "strict": False,
            "parameters": SCHEMA,
        },
        {
            "type": "namespace",
            "name": "mcp__files__",
            "description": "Files.",
            "tools": [{"type": "function", "name": "read", "description": "One.", "strict": False}],
        },
        {"type": "web_search", "external_web_access": False},
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "0199",
    "client_metadata": {"x-codex-installation-id": "1", "turn_id": "2"},
}


def test_codex(server: Server, engine: ScriptedEngine) -> None:
    engine.answers = [[called("c1", "mcp__files__read", "{}"), ended("tool_calls")]]
    events = events_of(server.post(PATH, CODEX | {"model": SMOL.name}).body)
    request = engine.requests[0]
    assert request.tools == [
        Tool("exec_command", "Runs a command.", SCHEMA),
        Tool("mcp__files__read", "Files.\n\nOne."),
    ]
    done = next(event for event in events if event["type"] == "response.output_item.done")
    assert (done["item"]["namespace"], done["item"]["name"]) == ("mcp__files__", "read")
    assert events[-1]["type"] == "response.completed"
    # What is not offered to the model is not among the response's tools.
    kinds = [tool["type"] for tool in events[-1]["response"]["tools"]]
    assert kinds == ["function", "namespace"]
    # The call comes back under the name that the model knows.
    output = {"type": "function_call_output", "call_id": "c1", "output": "text"}
    again = CODEX | {"model": SMOL.name, "input": [*CODEX["input"], done["item"], output]}  # type: ignore[misc]
    assert server.post(PATH, again).status == 200
    assert engine.requests[1].messages[-2:] == [  # type: ignore[index]
        Message("assistant", "", "", [ToolCallPart("c1", "mcp__files__read", "{}")]),
        Message("tool", "text", tool_call_id="c1"),
    ]


def test_named_tool(server: Server, engine: ScriptedEngine) -> None:
    choice = {"type": "function", "name": "clock"}
    assert server.post(PATH, asking(tools=[WEATHER, CLOCK], tool_choice=choice)).status == 200
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [choice]}
    assert server.post(PATH, asking(tools=[WEATHER, CLOCK], tool_choice=allowed)).status == 200
    named, left = engine.requests
    assert (named.tool_choice, len(named.tools)) == ("clock", 2)
    assert (left.tool_choice, [tool.name for tool in left.tools]) == ("auto", ["clock"])


IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,AA=="}


@pytest.mark.parametrize(
    ("more", "param", "message"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "whole conversation"),
        ({"conversation": "conv_1"}, "conversation", "whole conversation"),
        ({"input": [{"role": "user", "content": [IMAGE]}]}, "input[0].content", "text only"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]", "none is stored"),
        ({"input": [{"type": "computer_call"}]}, "input[0]", '"computer_call"; Gryphon knows'),
        ({"input": [{"role": "bot", "content": ""}]}, "input[0].role", 'got "bot"'),
        ({"input": [{"role": "user", "content": "x", "weight": 1}]}, "input[0].weight", "Unknown"),
        ({"input": [3]}, "input[0]", "object, got 3"),
        ({"input": []}, "input", "at least 1 item"),
        ({"input": None}, "input", "list, got null"),
        (
            {"input": [{"type": "function_call", "call_id": "c", "name": "a", "arguments": "{"}]},
            "input",
            "JSON text of an object",
        ),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools[0]", "functions only"),
        ({"tools": [WEATHER | {"defer_loading": True}]}, "tools[0].defer_loading", "not supported"),
        ({"tools": [WEATHER], "tool_choice": {"type": "web_search"}}, "tool_choice", "web_search"),
        ({"tool_choice": "required"}, "tool_choice", "needs `tools`"),
        (
            {"tools": [WEATHER], "text": {"format": {"type": "json_object"}}},
            "text.format",
            "cannot be combined",
        ),
        (
            {
                "text": {
                    "format": {"type": "json_schema", "name": "x", "schema": {"nullable": True}}
                }
            },
            "text.format",
            "nullable",
        ),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "not supported"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort", "no setting"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode", "not supported"),
        ({"include": ["everything"]}, "include", '"everything"'),
        ({"truncation": "auto"}, "truncation", "not supported"),
        ({"background": True}, "background", "not supported"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
        ({"messages": []}, "messages", "Unknown field"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    server: Server, engine: ScriptedEngine, more: dict[str, Any], param: str, message: str
) -> None:
    reply = server.post(PATH, asking() | more)
    assert (reply.status, reply.error["param"]) == (400, param)
    assert message in reply.error["message"]
    assert engine.requests == []


def test_silence_is_filled_with_comments(impatient_server: Server) -> None:
    engine = impatient_server.board.current
    gate = asyncio.Event()
    engine.answers = [[gate, "late"]]
    with impatient_server.streaming(PATH, asking(stream=True)) as response:
        lines = [response.readline() for _ in range(8)]
        assert lines[0] == b"event: response.created\n"
        assert lines[6:] == [b": keep-alive\n", b"\n"]
        engine.release(gate)
        rest = response.read()
    assert b'"delta":"late"' in rest
    assert b"event: response.completed\n" in rest
