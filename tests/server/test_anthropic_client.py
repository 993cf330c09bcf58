"""The official anthropic package, unmodified, against the endpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from app.engine.protocol import Failed, Finished, Timings, Token, ToolCall, Usage

from .conftest import SMOL, ScriptedEngine, Server, running

ASK: Any = [{"role": "user", "content": "Hi"}]
TOOL: Any = {
    "name": "look_up",
    "description": "Finds things.",
    "input_schema": {"type": "object", "properties": {"q": {"type": "string"}}},
}
CALLED = [
    Token("", "", 0, reasoning="Hm."),
    "Let me look.",
    ToolCall("", "call_1", "look_up", '{"q": "one"}'),
    Finished("", "tool_calls", Usage(7, 2, 0), Timings(0.0, 0.1, 0.1)),
]


@pytest.fixture
def client(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.thread.url, api_key="unused", max_retries=0) as client:
        yield client


def test_message(client: anthropic.Anthropic, engine: ScriptedEngine) -> None:
    answer = client.messages.create(
        model=SMOL.name, max_tokens=50, system="Be brief.", messages=ASK, metadata={"user_id": "a"}
    )
    assert answer.content[0].type == "text" and answer.content[0].text == "Hello there."
    assert (answer.stop_reason, answer.role, answer.model) == ("end_turn", "assistant", SMOL.name)
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (7, 3)


def test_stream_is_put_together_to_the_same_message(
    client: anthropic.Anthropic, engine: ScriptedEngine
) -> None:
    engine.answers = [list(CALLED), list(CALLED)]
    asked: Any = {"model": SMOL.name, "max_tokens": 50, "messages": ASK, "tools": [TOOL]}
    with client.messages.stream(**asked) as stream:
        streamed = stream.get_final_message()
    whole = client.messages.create(**asked)
    blocks = [block.model_dump(exclude={"parsed_output"}) for block in streamed.content]
    assert blocks == [block.model_dump() for block in whole.content]
    assert streamed.usage == whole.usage
    assert streamed.stop_reason == whole.stop_reason == "tool_use"
    assert [block.type for block in whole.content] == ["thinking", "text", "tool_use"]


def test_raw_stream(client: anthropic.Anthropic, engine: ScriptedEngine) -> None:
    engine.answers = [["Hel", "lo"]]
    kinds = [
        event.type
        for event in client.messages.create(
            model=SMOL.name, max_tokens=50, messages=ASK, stream=True
        )
    ]
    assert kinds == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


async def test_asynchronously(server: Server, engine: ScriptedEngine) -> None:
    async with anthropic.AsyncAnthropic(
        base_url=server.thread.url, auth_token="unused", max_retries=0
    ) as client:
        answer = await client.messages.create(model=SMOL.name, max_tokens=50, messages=ASK)
        assert answer.content[0].type == "text"
        async with client.messages.stream(model=SMOL.name, max_tokens=50, messages=ASK) as stream:
            assert "".join([text async for text in stream.text_stream]) == "Hello there."


def test_tools_there_and_back(client: anthropic.Anthropic, engine: ScriptedEngine) -> None:
    engine.answers = [list(CALLED), ["It is 42."]]
    asked: Any = {"model": SMOL.name, "max_tokens": 50, "tools": [TOOL]}
    answer = client.messages.create(messages=ASK, **asked)
    call = answer.content[-1]
    assert call.type == "tool_use" and call.input == {"q": "one"}
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "42"}
    turns: Any = [
        *ASK,
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [result]},
    ]
    client.messages.create(messages=turns, **asked)
    given = engine.requests[1].messages or []
    assert [message.role for message in given] == ["user", "assistant", "tool"]
    assert (given[1].reasoning, given[1].content) == ("Hm.", "Let me look.")
    assert given[1].tool_calls[0].id == given[2].tool_call_id == "call_1"


def test_beta_fields(client: anthropic.Anthropic, engine: ScriptedEngine) -> None:
    answer = client.beta.messages.create(
        model=SMOL.name,
        max_tokens=50,
        messages=ASK,
        betas=["context-management-2025-06-27"],
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        service_tier="auto",
    )
    assert answer.content[0].type == "text"


def test_count_tokens(client: anthropic.Anthropic, engine: ScriptedEngine) -> None:
    counted = client.messages.count_tokens(model=SMOL.name, messages=ASK, tools=[TOOL])
    assert counted.input_tokens == 2 and len(engine.asked) == 1


def test_models(client: anthropic.Anthropic) -> None:
    assert [model.id for model in client.models.list()][-1] == SMOL.name
    assert client.models.retrieve(SMOL.name).display_name == SMOL.name


def test_errors(client: anthropic.Anthropic, engine: ScriptedEngine) -> None:
    with pytest.raises(anthropic.NotFoundError, match="none"):
        client.messages.create(model="none", max_tokens=50, messages=ASK)
    with pytest.raises(anthropic.BadRequestError, match="messages"):
        client.messages.create(model=SMOL.name, max_tokens=50, messages=[])
    engine.answers = [[Failed("", "queue_full", "Too many.", 3)]]
    with pytest.raises(anthropic.InternalServerError, match="Too many"):
        client.messages.create(model=SMOL.name, max_tokens=50, messages=ASK)
    engine.answers = [["a", Failed("", "engine_crashed", "It ended.")]]
    with pytest.raises(anthropic.APIStatusError, match="It ended"):
        list(client.messages.create(model=SMOL.name, max_tokens=50, messages=ASK, stream=True))


@pytest.mark.parametrize("given", [{"api_key": "secret"}, {"auth_token": "secret"}])
def test_keys(given: dict[str, str]) -> None:
    with running(api_key="secret") as guarded:
        with anthropic.Anthropic(base_url=guarded.thread.url, max_retries=0, **given) as friend:
            assert len(list(friend.models.list())) == 2
        stranger = anthropic.Anthropic(base_url=guarded.thread.url, api_key="x", max_retries=0)
        with stranger, pytest.raises(anthropic.AuthenticationError):
            stranger.models.list()
