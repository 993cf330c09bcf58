"""The official `openai` client, unmodified."""

from __future__ import annotations

import asyncio

import openai
import pytest

from app import __version__
from app.engine.protocol import Failed

from .conftest import GRIFFIN, SMOL, ScriptedEngine, Server

ASK = [{"role": "user", "content": "Hi"}]


def test_models(client: openai.OpenAI) -> None:
    listed = client.models.list().data
    assert [model.id for model in listed] == [GRIFFIN.name, SMOL.name]
    model = client.models.retrieve(GRIFFIN.name)
    assert model.object == "model"
    assert model.created == 1_600_000_000
    assert model.model_extra == {
        "context_length": None,
        "family": "recurrent_gemma",
        "quantization": "bfloat16",
    }


def test_chat(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    answer = client.chat.completions.create(model=SMOL.name, messages=ASK)
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.model == SMOL.name
    assert answer.system_fingerprint == f"gryphon-{__version__}"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == "Hello there."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.total_tokens == 10
    assert engine.started
    assert engine.cancelled == []


def test_chat_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=SMOL.name, messages=ASK, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(one.choices[0].delta.content or "" for one in chunks if one.choices)
    assert text == "Hello there."
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 3
    assert len({one.id for one in chunks}) == 1


def test_completion(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    answer = client.completions.create(model=SMOL.name, prompt="Once", max_tokens=1, logprobs=1)
    assert answer.choices[0].text == "Hello"
    assert answer.choices[0].finish_reason == "length"
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens == ["Hello"]
    assert engine.requests[0].prompt == "Once"


def test_completion_stream(client: openai.OpenAI) -> None:
    stream = client.completions.create(model=SMOL.name, prompt="Once", stream=True)
    assert "".join(one.choices[0].text for one in stream) == "Hello there."


def test_stream_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model=SMOL.name, messages=ASK) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "Hello there."


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=SMOL.name, messages=ASK, logprobs=True, top_logprobs=1
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert [one.token for one in logprobs.content] == ["Hello", " there", "."]
    assert logprobs.content[0].bytes == list(b"Hello")


async def test_async_client(server: Server) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{server.thread.url}/v1", api_key="unused", max_retries=0
    ) as client:

        async def ask() -> str:
            stream = await client.chat.completions.create(
                model=SMOL.name, messages=ASK, stream=True
            )
            return "".join([one.choices[0].delta.content or "" async for one in stream])

        assert await asyncio.gather(*(ask() for _ in range(8))) == ["Hello there."] * 8
        whole = await client.chat.completions.create(model=SMOL.name, messages=ASK)
        assert whole.choices[0].message.content == "Hello there."


def test_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4o", messages=ASK)
    assert caught.value.code == "model_not_found"
    assert SMOL.name in caught.value.message
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")


def test_bad_request(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=SMOL.name, messages=ASK, temperature=5)
    assert caught.value.param == "temperature"
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize("stream", [False, True])
def test_context_overflow(client: openai.OpenAI, engine: ScriptedEngine, stream: bool) -> None:
    engine.answers = [[Failed("", "context_length_exceeded", "9000 tokens, 8192 fit.")]]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=SMOL.name, messages=ASK, stream=stream)
    assert caught.value.code == "context_length_exceeded"


def test_failure_midway_raises_in_the_client(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.answers = [["Hel", Failed("", "engine_crashed", "The engine died; it restarts.")]]
    stream = client.chat.completions.create(model=SMOL.name, messages=ASK, stream=True)
    text = ""
    with pytest.raises(openai.APIError, match="The engine died") as caught:
        for chunk in stream:
            text += chunk.choices[0].delta.content or ""
    assert text == "Hel"
    assert caught.value.code == "engine_crashed"


def test_retry_after_failure(server: Server, engine: ScriptedEngine) -> None:
    """With its usual retries the client gets through a busy moment."""
    engine.answers = [[Failed("", "queue_full", "Busy.", 0.2)], ["ok"]]
    with openai.OpenAI(base_url=f"{server.thread.url}/v1", api_key="x") as client:
        answer = client.chat.completions.create(model=SMOL.name, messages=ASK)
    assert answer.choices[0].message.content == "ok"
