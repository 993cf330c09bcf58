"""Ollama's embeddings: what reaches the engine, what comes back, what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from app.errors import GryphonError

from .conftest import SMOL, ScriptedEngine, Server


def embed(**more: Any) -> dict[str, Any]:
    return {"model": SMOL.name, "input": "ab", **more}


@pytest.mark.parametrize(("input", "texts"), [("ab", ["ab"]), (["ab", "c"], ["ab", "c"])])
def test_embed(server: Server, engine: ScriptedEngine, input: Any, texts: list[str]) -> None:
    body = embed(input=input, keep_alive="5m", truncate=True, options={"num_ctx": 100})
    reply = server.post("/api/embed", body | {"model": f"{SMOL.name}:latest"})
    assert reply.status == 200, reply.body
    answer = reply.json
    assert [*answer] == ["model", "embeddings", "total_duration", "prompt_eval_count"]
    assert answer["model"] == f"{SMOL.name}:latest" and answer["total_duration"] > 0
    assert answer["prompt_eval_count"] == sum(map(len, texts))
    assert all(math.isclose(math.hypot(*one), 1, rel_tol=1e-6) for one in answer["embeddings"])
    (asked,) = engine.asked
    assert (asked.texts, asked.keep_alive_s, asked.model) == (texts, 300.0, SMOL.ref)


def test_the_first_numbers_alone_are_made_length_1(server: Server, engine: ScriptedEngine) -> None:
    reply = server.post("/api/embed", embed(input="ab", dimensions=2))
    assert reply.json["embeddings"] == [[0, 1]]
    reply = server.post("/api/embed", embed(input="ab", dimensions=1))
    assert reply.status == 400 and "`dimensions`" in reply.json["error"]
    whole = server.post("/api/embed", embed(input="ab")).json["embeddings"]
    assert server.post("/api/embed", embed(input="ab", dimensions=9)).json["embeddings"] == whole


def test_the_older_route(server: Server, engine: ScriptedEngine) -> None:
    reply = server.post("/api/embeddings", {"model": SMOL.name, "prompt": "a"})
    assert reply.json == {"embedding": [0, 1, 0, 0]}


@pytest.mark.parametrize(
    ("path", "body", "answer"),
    [
        ("/api/embed", {"input": ""}, {"model": SMOL.name, "embeddings": []}),
        ("/api/embed", {"input": []}, {"model": SMOL.name, "embeddings": []}),
        ("/api/embed", {}, {"model": SMOL.name, "embeddings": []}),
        ("/api/embeddings", {}, {"embedding": []}),
    ],
)
def test_nothing_to_embed_loads_the_model(
    server: Server, engine: ScriptedEngine, path: str, body: dict[str, Any], answer: Any
) -> None:
    assert server.post(path, {"model": SMOL.name, **body}).json == answer
    assert engine.loads == [(SMOL.ref, None)] and not engine.asked


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"input": 3}, "input"),
        ({"input": ["a", 3]}, "input[1]"),
        ({"input": ["a"] * 2049}, "input"),
        ({"dimensions": -1}, "dimensions"),
        ({"options": {"num_ctx": 8193}}, "num_ctx"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_fields_that_are_refused(
    server: Server, engine: ScriptedEngine, more: dict[str, Any], named: str
) -> None:
    reply = server.post("/api/embed", embed(**more))
    assert reply.status == 400 and f"`{named}`" in reply.json["error"], reply.body
    assert not engine.asked


def test_failures_come_in_ollamas_shape(server: Server, engine: ScriptedEngine) -> None:
    engine.refuses = GryphonError("context_length_exceeded", "Too long.")
    for path, body in (("/api/embed", embed()), ("/api/embeddings", {"prompt": "a"})):
        reply = server.post(path, {"model": SMOL.name, **body})
        assert (reply.status, reply.json) == (400, {"error": "Too long."})
    assert server.post("/api/embed", embed(model="none")).status == 404
