"""The official ollama package, unmodified, against the endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import ollama
import pytest

from app.engine.protocol import Failed, Message, Token, TokenLogprob, ToolCall, ToolCallPart

from .conftest import SMOL, ScriptedEngine, Server, running

ASK = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def client(server: Server) -> Iterator[ollama.Client]:
    with ollama.Client(server.thread.url) as client:
        yield client


def test_chat(client: ollama.Client, engine: ScriptedEngine) -> None:
    answer = client.chat(SMOL.name, ASK)
    assert answer.message.content == "Hello there." and answer.done_reason == "stop"
    assert (answer.prompt_eval_count, answer.eval_count) == (7, 3)
    assert answer.total_duration and answer.eval_duration == 200_000_000


def test_chat_stream(client: ollama.Client, engine: ScriptedEngine) -> None:
    parts = list(client.chat(SMOL.name, ASK, stream=True))
    assert [part.message.content for part in parts] == ["Hello", " there", ".", ""]
    assert [part.done for part in parts] == [False, False, False, True]


def test_keep_alives_pass_unnoticed(impatient_server: Server) -> None:
    engine = impatient_server.board.current
    gate = asyncio.Event()
    engine.answers = [["a", gate, "b"]]
    with ollama.Client(impatient_server.thread.url) as client:
        text = ""
        for count, part in enumerate(client.chat(SMOL.name, ASK, stream=True)):
            text += part.message.content or ""
            if count == 3:
                engine.release(gate)
    assert text == "ab"


async def test_asynchronously(server: Server, engine: ScriptedEngine) -> None:
    async with ollama.AsyncClient(server.thread.url) as client:
        answer = await client.chat(SMOL.name, ASK)
        assert answer.message.content == "Hello there."
        stream = await client.generate(SMOL.name, "Hi", stream=True)
        assert "".join([part.response or "" async for part in stream]) == "Hello there."
        assert [one.model for one in (await client.list()).models] != []


def look_up(q: str) -> str:
    """Find things.

    Args:
        q: What to look for.
    """
    return f"{q} is 42"


def test_tools_there_and_back(client: ollama.Client, engine: ScriptedEngine) -> None:
    call = ToolCall("", "call_1", "look_up", '{"q": "one"}')
    engine.answers = [[Token("", "", 0, reasoning="Hm."), call], ["It is 42."]]
    messages: list[Any] = [*ASK]
    answer = client.chat(SMOL.name, messages, tools=[look_up])
    (asked,) = answer.message.tool_calls or []
    assert asked.function.name == "look_up" and asked.function.arguments == {"q": "one"}
    assert answer.message.thinking == "Hm."
    result = look_up(**asked.function.arguments)
    messages += [answer.message, {"role": "tool", "content": result, "tool_name": "look_up"}]
    assert client.chat(SMOL.name, messages, tools=[look_up]).message.content == "It is 42."
    (tool,) = engine.requests[0].tools
    assert tool.name == "look_up" and "q" in tool.parameters["properties"]
    given = engine.requests[1].messages or []
    assert [message.role for message in given] == ["user", "assistant", "tool"]
    (part,) = given[1].tool_calls
    assert isinstance(part, ToolCallPart) and part.arguments == '{"q": "one"}'
    assert given[1].reasoning == "Hm."
    assert (given[2].name, given[2].tool_call_id) == ("look_up", part.id)


def test_everything_a_request_may_hold(client: ollama.Client, engine: ScriptedEngine) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    options = ollama.Options(temperature=0, num_predict=5, num_ctx=4096, stop=["x"], num_gpu=1)
    best = TokenLogprob(5, "é", "é".encode(), -0.25)
    engine.answers = [[Token("", "é", 5, best, [best])]]
    answer = client.chat(
        SMOL.name,
        ASK,
        format=schema,
        options=options,
        keep_alive="10m",
        logprobs=True,
        top_logprobs=1,
    )
    assert answer.logprobs is not None and answer.logprobs[0].logprob == -0.25
    request = engine.requests[0]
    assert request.constraint is not None and request.keep_alive_s == 600
    assert (request.max_tokens, request.stop) == (5, ["x"])


def test_generate_with_a_context(client: ollama.Client, engine: ScriptedEngine) -> None:
    engine.answers = [["Hello"], ["Yes"]]
    first = client.generate(SMOL.name, "Hi", system="Be brief.")
    second = client.generate(SMOL.name, "Really?", context=first.context)
    assert (first.response, second.response) == ("Hello", "Yes")
    assert engine.requests[1].messages == [
        Message("system", "Be brief."),
        Message("user", "Hi"),
        Message("assistant", "Hello"),
        Message("user", "Really?"),
    ]


def test_load_and_unload(client: ollama.Client, engine: ScriptedEngine) -> None:
    assert client.generate(SMOL.name, keep_alive=-1).done_reason == "load"
    assert client.generate(SMOL.name, keep_alive=0).done_reason == "unload"
    (part,) = client.chat(SMOL.name, [], stream=True)
    assert part.done_reason == "load"


def test_embeddings(client: ollama.Client, engine: ScriptedEngine) -> None:
    answer = client.embed(SMOL.name, ["abc", "a"])
    # "a" is the byte 97: 1 modulo 4.
    assert [list(one) for one in answer.embeddings][1] == [0, 1, 0, 0]
    assert answer.prompt_eval_count == 4 and answer.model == SMOL.name
    assert list(client.embeddings(SMOL.name, "a").embedding) == [0, 1, 0, 0]


def test_models(furnished_server: Server) -> None:
    with ollama.Client(furnished_server.thread.url) as client:
        listed = client.list().models
        assert [one.model for one in listed] == ["tiny", "thinker", "brooder"]
        assert listed[0].modified_at is not None and listed[0].modified_at < datetime.now(UTC)
        assert client.ps().models == []
        shown = client.show("thinker")
        assert shown.capabilities == ["completion", "tools", "thinking"]
        assert shown.modelinfo and shown.modelinfo["general.architecture"] == "llama"


def test_errors(client: ollama.Client, engine: ScriptedEngine) -> None:
    with pytest.raises(ollama.ResponseError, match="model 'none' not found") as missing:
        client.chat("none", ASK)
    assert missing.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="gryphon pull") as forbidden:
        client.pull("none")
    assert forbidden.value.status_code == 403
    engine.answers = [["a", Failed("", "engine_crashed", "It ended.")]]
    with pytest.raises(ollama.ResponseError, match="It ended"):
        list(client.chat(SMOL.name, ASK, stream=True))


def test_keys() -> None:
    with running(api_key="secret") as guarded:
        stranger = ollama.Client(guarded.thread.url)
        with stranger, pytest.raises(ollama.ResponseError) as refused:
            stranger.list()
        assert refused.value.status_code == 401
        headers = {"Authorization": "Bearer secret"}
        with ollama.Client(guarded.thread.url, headers=headers) as friend:
            assert len(friend.list().models) == 2
