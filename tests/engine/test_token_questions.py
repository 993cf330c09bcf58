"""Questions of text and tokens to the real engine process, which loads no weights for them, and
embeddings there: cancelled, in a crash, beside everything else."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from app import paths
from app.engine.client import EngineClient
from app.engine.protocol import (
    Accepted,
    Detokenize,
    Embed,
    Embedded,
    Finished,
    GenerationRequest,
    Message,
    ModelRef,
    Tokenize,
    encode_frame,
    read_event,
)
from app.engine.token_commands import MAX_TEXT_BYTES
from app.errors import GryphonError
from mlxmodels.tokenizer import Tokenizer

from ..tiny_models import OPEN_LLAMA, RECURRENT_GEMMA, write_model

START, END = 256, 257
CHAT = [Message("user", "Hi 🦅")]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    path = write_model(tmp_path_factory.mktemp("tokens") / "griffin", RECURRENT_GEMMA)
    return ModelRef("griffin", str(path))


@pytest.fixture
async def client() -> AsyncIterator[EngineClient]:
    client = EngineClient()
    yield client
    await client.close()


def tokenize(model: ModelRef, text: str | None = None, **fields: object) -> Tokenize:
    return Tokenize(id=f"t {text!r:.40}", model=model, text=text, **fields)  # type: ignore[arg-type]


def ids(model: ModelRef, text: str) -> list[int]:
    return Tokenizer.from_directory(model.path).encode(text, add_special_tokens=False)


def embed(model: ModelRef, id: str = "e", **fields: object) -> Embed:
    return Embed(id=id, model=model, **({"texts": ["Hello"]} | fields))  # type: ignore[arg-type]


async def test_text_and_tokens_become_each_other_without_the_weights(
    client: EngineClient, model: ModelRef
) -> None:
    tokenizer = Tokenizer.from_directory(model.path)
    text = "A 🦅<|im_end|>x"
    plain = await client.tokenize(tokenize(model, text))
    assert plain.tokens == tokenizer.encode(text, add_special_tokens=False)
    assert END in plain.tokens and plain.pieces is None
    pieces = (await client.tokenize(tokenize(model, text, with_pieces=True))).pieces
    assert pieces is not None and b"".join(pieces) == text.encode()
    assert pieces[2] == "🦅".encode()[:1]  # part of a character
    spelled = await client.tokenize(tokenize(model, text, parse_special=False))
    assert END not in spelled.tokens and len(spelled.tokens) == len(text.encode())

    def back(with_special: bool) -> Detokenize:
        return Detokenize(id="d", model=model, tokens=plain.tokens, with_special=with_special)

    assert (await client.detokenize(back(True))).text == text
    assert (await client.detokenize(back(False))).text == "A 🦅x"
    assert (await client.tokenize(tokenize(model, ""))).tokens == []
    status = await client.status()
    assert status is not None and status.model is None and status.requests == []


async def test_a_conversation_has_the_tokens_that_its_prompt_has(
    client: EngineClient, model: ModelRef
) -> None:
    asked = GenerationRequest(id="g", model=model, messages=CHAT, max_tokens=1)
    events = [event async for event in client.stream(asked)]
    (accepted,) = (event for event in events if isinstance(event, Accepted))
    opened = await client.tokenize(tokenize(model, messages=CHAT))
    assert len(opened.tokens) == accepted.prompt_tokens
    closed = await client.tokenize(tokenize(model, messages=CHAT, add_generation_prompt=False))
    assert opened.tokens == [*closed.tokens, START, *ids(model, "assistant\n")]


async def test_questions_that_cannot_be_answered_are_refused_by_name(
    client: EngineClient, model: ModelRef, tmp_path: Path
) -> None:
    async def refused(command: Tokenize | Detokenize | Embed) -> GryphonError:
        with pytest.raises(GryphonError) as caught:
            if isinstance(command, Tokenize):
                await client.tokenize(command)
            elif isinstance(command, Embed):
                await client.embed(command)
            else:
                await client.detokenize(command)
        return caught.value

    assert (await refused(tokenize(model))).code == "invalid_request"
    assert (await refused(tokenize(model, "a", messages=CHAT))).code == "invalid_request"
    assert (await refused(tokenize(model, messages=[]))).code == "invalid_request"
    large = await refused(tokenize(model, "x" * (MAX_TEXT_BYTES + 1)))
    assert large.code == "request_too_large" and str(MAX_TEXT_BYTES) in large.message
    negative = await refused(Detokenize(id="d", model=model, tokens=[1, -1]))
    assert negative.code == "invalid_request" and "-1" in negative.message
    nowhere = ModelRef("nowhere", str(tmp_path / "nowhere"))
    assert (await refused(tokenize(nowhere, "a"))).code == "invalid_model"
    empty = await refused(embed(model, texts=["a", ""]))
    assert empty.code == "invalid_request" and "Input 1 is empty" in empty.message
    many = await refused(embed(model, texts=None, tokens=[[1] * 2**19] * 3))
    assert many.code == "request_too_large" and str(3 * 2**19) in many.message
    for fields in (
        {"texts": []},
        {"texts": None},
        {"tokens": [[1]]},
        {"texts": ["a"] * 2049},
        {"texts": None, "tokens": [[]]},
        {"texts": None, "tokens": [[-1]]},
        {"client": "c" * 201},
        {"keep_alive_s": float("nan")},
    ):
        assert (await refused(embed(model, **fields))).code == "invalid_request", fields


async def test_a_template_that_does_not_end_is_stopped(
    client: EngineClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRYPHON_PROMPT_TIME_LIMIT", "0.5")
    path = write_model(tmp_path / "looping", RECURRENT_GEMMA)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": loop}))
    looping = ModelRef("looping", str(path))
    with pytest.raises(GryphonError) as caught:
        await client.tokenize(tokenize(looping, messages=CHAT))
    assert caught.value.code == "prompt_too_slow"
    assert (await client.tokenize(tokenize(looping, "abc"))).tokens == ids(looping, "abc")


async def test_embeddings_of_texts_are_those_of_their_tokens(
    client: EngineClient, model: ModelRef
) -> None:
    texts = ["Hello", "🦅", "x" * 300]
    of_texts = await client.embed(embed(model, texts=texts))
    assert of_texts.prompt_tokens == [5, 4, 300]
    vectors = np.frombuffer(of_texts.vectors, "<f4").reshape(3, of_texts.dimensions)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    tokens = [ids(model, text) for text in texts]
    of_tokens = await client.embed(embed(model, texts=None, tokens=tokens))
    assert of_tokens.vectors == of_texts.vectors
    status = await client.status()
    assert status is not None and status.counters is not None
    assert status.counters.finished == {"stop": 2}
    assert status.counters.prompt_tokens == 2 * 309


async def until(client: EngineClient, requests: int) -> None:
    """Return when the engine has so many requests that it has accepted."""
    while True:
        status = await client.status()
        under_way = status.requests if status is not None else []
        if sum(one.prompt_tokens > 0 for one in under_way) == requests:
            return
        await asyncio.sleep(0.01)


async def test_who_stops_waiting_for_embeddings_cancels_them(
    client: EngineClient, model: ModelRef
) -> None:
    long = embed(model, "long", texts=None, tokens=[[1] * 20_000] * 50)
    waiting = asyncio.create_task(client.embed(long))
    await until(client, 1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await until(client, 0)
    status = await client.status()
    assert status is not None and status.counters is not None
    assert status.counters.finished == {"cancelled": 1}
    again = asyncio.create_task(client.embed(long))
    await until(client, 1)
    await client.cancel("long")
    with pytest.raises(GryphonError) as caught:
        await again
    assert caught.value.code == "cancelled"
    assert len((await client.embed(embed(model))).prompt_tokens) == 1


async def test_an_engine_that_dies_fails_what_waits_and_the_next_request_works(
    client: EngineClient, model: ModelRef
) -> None:
    long = embed(model, "long", texts=None, tokens=[[1] * 20_000] * 50)
    waiting = asyncio.create_task(client.embed(long))
    await until(client, 1)
    asking = asyncio.create_task(client.tokenize(tokenize(model, "x" * MAX_TEXT_BYTES)))
    status = await client.status()
    assert status is not None
    os.kill(status.pid, signal.SIGKILL)
    for task in (waiting, asking):
        with pytest.raises(GryphonError) as caught:
            await task
        assert caught.value.code == "engine_crashed" and caught.value.retry_after
    assert (await client.tokenize(tokenize(model, "abc"))).tokens == ids(model, "abc")
    assert len((await client.embed(embed(model))).prompt_tokens) == 1


async def test_large_answers_wait_for_a_client_that_reads_late(
    client: EngineClient, tmp_path: Path
) -> None:
    """Together they are more than a client may leave unread of small events."""
    wide = {"hidden_size": 1024, "num_hidden_layers": 1, "intermediate_size": 64}
    model = ModelRef("wide", str(write_model(tmp_path / "wide", OPEN_LLAMA | wide)))
    await client.embed(embed(model))  # the engine runs
    reader, writer = await asyncio.open_unix_connection(paths.engine_socket())
    for i in range(3):
        one = embed(model, f"large {i}", texts=None, tokens=[[id % 256] for id in range(2048)])
        writer.write(encode_frame(one))
    await writer.drain()
    while True:
        status = await client.status()
        assert status is not None and status.counters is not None
        if status.counters.finished.get("stop") == 4:
            break
        await asyncio.sleep(0.01)
    answers: list[Embedded] = []
    ends = 0
    while ends < 3:
        event = await asyncio.wait_for(read_event(reader), 30)
        answers += [event] if isinstance(event, Embedded) else []
        ends += isinstance(event, Finished)
    assert [len(answer.vectors) for answer in answers] == [2048 * 1024 * 4] * 3
    writer.close()
