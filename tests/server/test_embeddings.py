"""`/v1/embeddings`, by the official client and by hand."""

from __future__ import annotations

import asyncio
import base64
import math
import struct
import time
from typing import Any

import openai
import pytest

from app.errors import GryphonError

from .conftest import SMOL, ScriptedEngine, Server

PATH = "/v1/embeddings"


def body(input: Any = "ab", **more: Any) -> dict[str, Any]:
    return {"model": SMOL.name, "input": input, **more}


def test_the_official_client_reads_the_vectors(
    client: openai.OpenAI, engine: ScriptedEngine
) -> None:
    # It asks for base64 unless told otherwise.
    answer = client.embeddings.create(model=SMOL.name, input=["abc", "a"])
    floats = client.embeddings.create(model=SMOL.name, input=["abc", "a"], encoding_format="float")
    assert answer.object == "list" and answer.model == SMOL.name
    assert [one.index for one in answer.data] == [0, 1]
    for one, other in zip(answer.data, floats.data, strict=True):
        assert one.object == "embedding" and one.embedding == other.embedding
        assert math.isclose(math.hypot(*one.embedding), 1, rel_tol=1e-6)
    # "a" is the byte 97: 1 modulo 4.
    assert answer.data[1].embedding == [0, 1, 0, 0]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == 4
    asked = engine.asked[0]
    assert asked.model == SMOL.ref and asked.client and asked.texts == ["abc", "a"]


@pytest.mark.parametrize(
    ("input", "texts", "tokens"),
    [
        ("ab", ["ab"], None),
        (["ab", "c"], ["ab", "c"], None),
        ([97, 98], None, [[97, 98]]),
        ([[97], [98, 99]], None, [[97], [98, 99]]),
    ],
)
def test_texts_and_token_ids_one_or_several(
    server: Server, engine: ScriptedEngine, input: Any, texts: Any, tokens: Any
) -> None:
    reply = server.post(PATH, body(input, user="me"))
    assert reply.status == 200 and len(reply.json["data"]) == len(texts or tokens)
    (asked,) = engine.asked
    assert (asked.texts, asked.tokens, asked.pooling) == (texts, tokens, "mean")


def test_formats_and_pooling(server: Server, engine: ScriptedEngine) -> None:
    floats = server.post(PATH, body(dimensions=4, encoding_format="float", pooling="last")).json
    packed = server.post(PATH, body(encoding_format="base64")).json
    assert [asked.pooling for asked in engine.asked] == ["last", "mean"]
    vector = floats["data"][0]["embedding"]
    raw = base64.b64decode(packed["data"][0]["embedding"])
    assert list(struct.unpack("<4f", raw)) == vector
    assert packed["usage"] == {"prompt_tokens": 2, "total_tokens": 2}


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": ["a", [1]]}, "input"),
        ({"input": [1, "a"]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": [True]}, "input"),
        ({"input": [2**31]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": {"text": "a"}}, "input"),
        ({"input": None}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"pooling": "max"}, "pooling"),
        ({"dimensions": 3}, "dimensions"),
        ({"dimensions": 0}, "dimensions"),
        ({"truncate": True}, "truncate"),
    ],
)
def test_what_is_refused_is_named(server: Server, more: dict[str, Any], param: str) -> None:
    reply = server.post(PATH, body() | more)
    assert reply.status == 400 and reply.error["param"] == param, reply.body


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("context_length_exceeded", 400),
        ("no_embeddings", 400),
        ("request_too_large", 400),
        ("queue_full", 503),
        ("invalid_numbers", 500),
        ("engine_crashed", 500),
    ],
)
def test_the_engines_errors_have_their_status(
    server: Server, engine: ScriptedEngine, code: str, status: int
) -> None:
    engine.refuses = GryphonError(code, "No.", retry_after=3)
    reply = server.post(PATH, body())
    assert reply.status == status and reply.error["code"] == code
    assert ("retry-after" in reply.headers) == (status == 503)


def test_a_client_that_leaves_cancels(server: Server, engine: ScriptedEngine) -> None:
    engine.hold = asyncio.Event()
    connection = server.connect()
    connection.request("POST", PATH, b'{"model": "smollm2-135m", "input": "a"}',
                       {"Content-Type": "application/json"})  # fmt: skip
    deadline = time.monotonic() + 30
    while not engine.asked and time.monotonic() < deadline:
        time.sleep(0.005)
    connection.close()
    while not engine.cancelled and time.monotonic() < deadline:
        time.sleep(0.005)
    assert engine.cancelled == [engine.asked[0].id]
