"""Ollama's dialect on the wire, byte by byte."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import msgspec
import pytest

from app.engine.protocol import (
    EngineStatus,
    Failed,
    Finished,
    Timings,
    Token,
    TokenLogprob,
    ToolCall,
    Usage,
)

from .conftest import SMOL, ScriptedEngine, Server

TIME = re.compile(rb'"created_at":"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z"')
TOTAL = re.compile(rb'"total_duration":[1-9]\d*')


def normalized(body: bytes) -> str:
    """`body` with what differs every time replaced, and only where it is well formed."""
    return TOTAL.sub(b'"total_duration":9', TIME.sub(b'"created_at":"NOW"', body)).decode()


def chat(text: str = "Hi", **more: Any) -> dict[str, Any]:
    return {"model": SMOL.name, "messages": [{"role": "user", "content": text}], **more}


def prompt(text: str = "Hi", **more: Any) -> dict[str, Any]:
    return {"model": SMOL.name, "prompt": text, **more}


HEAD = f'{{"model":"{SMOL.name}","created_at":"NOW",'
COUNTS = (
    '"total_duration":9,"load_duration":1,"prompt_eval_count":7,'
    '"prompt_eval_duration":100000000,"eval_count":2,"eval_duration":100000000'
)


def said(message: str) -> str:
    return f'{HEAD}"message":{{"role":"assistant",{message}}},"done":false}}\n'


def test_chat_stream(server: Server, engine: ScriptedEngine) -> None:
    engine.answers = [["Hé", "llo"]]
    reply = server.post("/api/chat", chat())
    assert reply.status == 200
    assert reply.headers["content-type"] == "application/x-ndjson"
    assert normalized(reply.body) == (
        said('"content":"Hé"')
        + said('"content":"llo"')
        + f'{HEAD}"message":{{"role":"assistant","content":""}},'
        + f'"done":true,"done_reason":"stop",{COUNTS}}}\n'
    )


def test_chat_whole(server: Server, engine: ScriptedEngine) -> None:
    engine.answers = [["Hé", "llo"]]
    reply = server.post("/api/chat", chat(stream=False, options={"num_predict": 2}))
    assert reply.headers["content-type"] == "application/json"
    assert normalized(reply.body) == (
        f'{HEAD}"message":{{"role":"assistant","content":"Héllo"}},'
        f'"done":true,"done_reason":"length",{COUNTS}}}'
    )


def test_generate_stream(server: Server, engine: ScriptedEngine) -> None:
    engine.answers = [["a", "b"]]
    reply = server.post("/api/generate", prompt(raw=True))
    assert normalized(reply.body) == (
        f'{HEAD}"response":"a","done":false}}\n'
        f'{HEAD}"response":"b","done":false}}\n'
        f'{HEAD}"response":"","done":true,"done_reason":"stop",{COUNTS}}}\n'
    )


def test_generate_whole(server: Server, engine: ScriptedEngine) -> None:
    engine.answers = [["a", "b"]]
    reply = server.post("/api/generate", prompt(stream=False))
    body = re.sub(r'"context":\[[0-9,]+\]', '"context":[]', normalized(reply.body))
    assert body == (
        f'{HEAD}"response":"ab","done":true,"done_reason":"stop","context":[],{COUNTS}}}'
    )


def test_thoughts_and_calls(server: Server, engine: ScriptedEngine) -> None:
    pieces = [
        Token("", "", 0, reasoning="Hm"),
        Token("", "So", 1, reasoning="m."),
        ToolCall("", "call_1", "f", '{"b": 1, "a": ["<é>"]}'),
        ToolCall("", "call_2", "g", "{}"),
        Finished("", "tool_calls", Usage(7, 2, 0), Timings(0.0, 0.1, 0.1)),
    ]
    engine.answers = [list(pieces), list(pieces)]
    tools = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]
    first = (
        '{"id":"call_1","function":{"index":0,"name":"f",'
        '"arguments":{"b":1,"a":["\\u003cé\\u003e"]}}}'
    )
    second = '{"id":"call_2","function":{"index":1,"name":"g","arguments":{}}}'
    assert normalized(server.post("/api/chat", chat(tools=tools)).body) == (
        said('"content":"","thinking":"Hm"')
        + said('"content":"So","thinking":"m."')
        + said(f'"content":"","tool_calls":[{first}]')
        + said(f'"content":"","tool_calls":[{second}]')
        + f'{HEAD}"message":{{"role":"assistant","content":""}},'
        + f'"done":true,"done_reason":"stop",{COUNTS}}}\n'
    )
    assert normalized(server.post("/api/chat", chat(tools=tools, stream=False)).body) == (
        f'{HEAD}"message":{{"role":"assistant","content":"So","thinking":"Hmm.",'
        f'"tool_calls":[{first},{second}]}},"done":true,"done_reason":"stop",{COUNTS}}}'
    )


def test_logprobs_stand_where_ollama_has_them(server: Server, engine: ScriptedEngine) -> None:
    best = TokenLogprob(5, "é", "é".encode(), -0.25)
    other = TokenLogprob(6, "e", b"e", float("-inf"))
    one = '{"token":"é","logprob":-0.25,"bytes":[195,169]'
    logprobs = f'"logprobs":[{one},"top_logprobs":[{one}}},' + (
        '{"token":"e","logprob":-9999.0,"bytes":[101]}]}]'
    )
    asked = {"logprobs": True, "top_logprobs": 2}
    engine.answers = [[Token("", "é", 5, best, [best, other]), "x"] for _ in range(4)]
    streamed = normalized(server.post("/api/chat", chat(**asked)).body).split("\n")[0]
    assert streamed == f'{HEAD}"message":{{"role":"assistant","content":"é"}},"done":false,' + (
        f"{logprobs}}}"
    )
    assert engine.requests[0].logprobs and engine.requests[0].top_logprobs == 2
    whole = normalized(server.post("/api/chat", chat(stream=False, **asked)).body)
    assert '"done_reason":"stop","logprobs":[' in whole and whole.endswith('"eval_duration":1}')
    generated = normalized(server.post("/api/generate", prompt(raw=True, **asked)).body)
    assert generated.startswith(f'{HEAD}"response":"é","done":false,{logprobs}}}\n')


def test_characters_that_go_escapes_and_line_ends(server: Server, engine: ScriptedEngine) -> None:
    engine.answers = [["a<b>&c\u2028d\u2029e\u0085f\r\ng"]]
    body = server.post("/api/generate", prompt(raw=True)).body.decode()
    assert '"response":"a\\u003cb\\u003e\\u0026c\\u2028d\\u2029e\\u0085f\\r\\ng"' in body
    assert all(json.loads(line) for line in body.splitlines())


def test_text_released_at_the_end_comes_before_the_end(
    server: Server, engine: ScriptedEngine
) -> None:
    end = Finished("", "stop", Usage(7, 2, 5), Timings(0, 0, 0), "b")
    engine.answers = [["a", end], ["a", end]]
    lines = server.post("/api/chat", chat()).body.splitlines()
    assert [json.loads(line)["message"]["content"] for line in lines] == ["a", "b", ""]
    assert server.post("/api/chat", chat(stream=False)).json["message"]["content"] == "ab"


def test_silence_is_filled_with_empty_pieces(impatient_server: Server) -> None:
    """Not with empty lines: clients decode every line."""
    engine = impatient_server.board.current
    gate = asyncio.Event()
    engine.answers = [["a", gate, "b"]]
    with impatient_server.streaming("/api/chat", chat()) as response:
        lines = [response.readline() for _ in range(3)]
        engine.release(gate)
        lines += response.read().splitlines(keepends=True)
    said = [json.loads(line) for line in lines]
    assert all(line.endswith(b"\n") for line in lines)
    assert {one["message"]["content"] for one in said} == {"", "a", "b"}
    assert [one["done"] for one in said] == [False] * (len(said) - 1) + [True]
    assert len({one["created_at"] for one in said}) > 1


def test_a_failure_midway_is_the_last_line(server: Server, engine: ScriptedEngine) -> None:
    engine.answers = [["a", Failed("", "engine_crashed", "It <ended>.")]]
    reply = server.post("/api/chat", chat())
    assert reply.status == 200
    assert reply.body.splitlines()[-1] == b'{"error":"It \\u003cended\\u003e."}'
    engine.answers = [[Failed("", "queue_full", "Too many.", 3)]]
    reply = server.post("/api/generate", prompt())
    assert (reply.status, reply.json) == (503, {"error": "Too many."})
    assert reply.headers["retry-after"] == "3"


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
@pytest.mark.parametrize("stream", [True, False, None])
def test_nothing_to_say_loads_the_model(
    server: Server, engine: ScriptedEngine, path: str, stream: bool | None
) -> None:
    body = {"model": SMOL.name, "keep_alive": "5m"} | ({} if stream is None else {"stream": stream})
    part = '"message":{"role":"assistant","content":""}' if "chat" in path else '"response":""'
    reply = server.post(path, body)
    assert reply.headers["content-type"] == "application/json"
    assert normalized(reply.body) == f'{HEAD}{part},"done":true,"done_reason":"load"}}'
    assert engine.loads == [(SMOL.ref, 300.0)] and not engine.requests


class Resident(ScriptedEngine):
    """An engine that holds the model."""

    async def status(self) -> EngineStatus | None:
        status = await super().status()
        assert status is not None
        return msgspec.structs.replace(status, model=SMOL.ref, state="ready")


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_nothing_to_say_and_no_time_to_stay_unloads_it(server: Server, path: str) -> None:
    engine = server.board.current = Resident()
    body = {"model": SMOL.name, "keep_alive": 0}
    assert server.post(path, body).json["done_reason"] == "unload"
    assert engine.loads == [(SMOL.ref, 0)]
    # One that is not in memory is not brought there to be thrown out.
    engine = server.board.current = ScriptedEngine()
    assert server.post(path, body).json["done_reason"] == "unload"
    assert engine.loads == []


def test_a_model_that_cannot_be_loaded(server: Server) -> None:
    class Broken(ScriptedEngine):
        async def load(self, model: Any, *, keep_alive_s: float | None = None) -> Any:
            yield Failed("load", "does_not_fit", "It does not fit.")

    server.board.current = Broken()
    reply = server.post("/api/generate", {"model": SMOL.name})
    assert (reply.status, reply.json) == (400, {"error": "It does not fit."})
