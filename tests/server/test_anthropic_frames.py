"""Anthropic's messages on the wire, byte by byte."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest

from app.engine.protocol import Failed, Finished, Timings, Token, ToolCall, Usage

from .conftest import SMOL, ScriptedEngine, Server

PATH = "/v1/messages"


def message(text: str = "Hi", **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": SMOL.name, "max_tokens": 100, "messages": messages, **more}


def normalized(body: bytes) -> str:
    return re.sub(rb'"id":"msg_[0-9a-f]{32}"', b'"id":"msg_ID"', body).decode()


def event(kind: str, rest: str = "") -> str:
    return f'event: {kind}\ndata: {{"type":"{kind}"{rest}}}\n\n'


def usage(input_tokens: int, output_tokens: int, cached: int = 0) -> str:
    return (
        f'"usage":{{"input_tokens":{input_tokens},"cache_creation_input_tokens":0,'
        f'"cache_read_input_tokens":{cached},"output_tokens":{output_tokens}}}'
    )


HEAD = f'"id":"msg_ID","type":"message","role":"assistant","model":"{SMOL.name}",'
START = event(
    "message_start",
    f',"message":{{{HEAD}"content":[],"stop_reason":null,"stop_sequence":null,{usage(7, 0)}}}',
) + event("ping")


def start(index: int, block: str) -> str:
    return event("content_block_start", f',"index":{index},"content_block":{{{block}}}')


def delta(index: int, rest: str) -> str:
    return event("content_block_delta", f',"index":{index},"delta":{{{rest}}}')


def stop(index: int) -> str:
    return event("content_block_stop", f',"index":{index}')


def end(reason: str, output_tokens: int, sequence: str = "null") -> str:
    return event(
        "message_delta",
        f',"delta":{{"stop_reason":"{reason}","stop_sequence":{sequence}}},'
        + usage(7, output_tokens),
    ) + event("message_stop")


def ending(reason: Any, **more: Any) -> Finished:
    return Finished("", reason, Usage(7, 2, 0), Timings(0.0, 0.1, 0.1), **more)


def test_stream(server: Server, engine: ScriptedEngine) -> None:
    engine.answers = [["Hé", "llo"]]
    reply = server.post(PATH, message(stream=True))
    assert reply.status == 200
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert normalized(reply.body) == (
        START
        + start(0, '"type":"text","text":""')
        + delta(0, '"type":"text_delta","text":"Hé"')
        + delta(0, '"type":"text_delta","text":"llo"')
        + stop(0)
        + end("end_turn", 2)
    )


def test_whole(server: Server, engine: ScriptedEngine) -> None:
    engine.answers = [["Hé", "llo"]]
    reply = server.post(PATH, message())
    assert reply.headers["content-type"] == "application/json"
    assert normalized(reply.body) == (
        f'{{{HEAD}"content":[{{"type":"text","text":"Héllo"}}],'
        f'"stop_reason":"end_turn","stop_sequence":null,{usage(7, 2)}}}'
    )


PARTS = [
    Token("", "", 0, reasoning="Hm"),
    Token("", "So", 1, reasoning="m."),
    ToolCall("", "call_1", "f", '{"q": "é"}'),
    ToolCall("", "call_2", "g", "{}"),
]
TOOLS = [{"name": name, "input_schema": {"type": "object"}} for name in ("f", "g")]
SIGNATURE = "Z3J5cGhvbg=="


def test_blocks_come_one_after_the_other(server: Server, engine: ScriptedEngine) -> None:
    engine.answers = [[*PARTS, ending("tool_calls", text="!")]]
    assert normalized(server.post(PATH, message(stream=True, tools=TOOLS)).body) == (
        START
        + start(0, '"type":"thinking","thinking":"","signature":""')
        + delta(0, '"type":"thinking_delta","thinking":"Hm"')
        + delta(0, '"type":"thinking_delta","thinking":"m."')
        + delta(0, f'"type":"signature_delta","signature":"{SIGNATURE}"')
        + stop(0)
        + start(1, '"type":"text","text":""')
        + delta(1, '"type":"text_delta","text":"So"')
        + stop(1)
        + start(2, '"type":"tool_use","id":"call_1","name":"f","input":{}')
        + delta(2, '"type":"input_json_delta","partial_json":"{\\"q\\": \\"é\\"}"')
        + stop(2)
        + start(3, '"type":"tool_use","id":"call_2","name":"g","input":{}')
        + delta(3, '"type":"input_json_delta","partial_json":"{}"')
        + stop(3)
        + start(4, '"type":"text","text":""')
        + delta(4, '"type":"text_delta","text":"!"')
        + stop(4)
        + end("tool_use", 2)
    )


def test_whole_with_thoughts_and_calls(server: Server, engine: ScriptedEngine) -> None:
    engine.answers = [[*PARTS, ending("tool_calls")]]
    body = server.post(PATH, message(tools=TOOLS)).json
    assert body["content"] == [
        {"type": "thinking", "thinking": "Hmm.", "signature": SIGNATURE},
        {"type": "text", "text": "So"},
        {"type": "tool_use", "id": "call_1", "name": "f", "input": {"q": "é"}},
        {"type": "tool_use", "id": "call_2", "name": "g", "input": {}},
    ]
    assert body["stop_reason"] == "tool_use"


def test_one_call_at_most_if_so_wished(server: Server, engine: ScriptedEngine) -> None:
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    engine.answers = [[*PARTS, ending("tool_calls")] for _ in range(2)]
    asked = message(tools=TOOLS, tool_choice=choice)
    whole = server.post(PATH, asked).json["content"]
    streamed = server.post(PATH, asked | {"stream": True}).body
    assert [block["id"] for block in whole if block["type"] == "tool_use"] == ["call_1"]
    assert re.findall(rb'"id":"(call_\d)"', streamed) == [b"call_1"]


def test_thoughts_that_are_not_shown(furnished_server: Server) -> None:
    engine = furnished_server.board.current
    engine.answers = [[*PARTS[:2], ending("stop")] for _ in range(2)]
    asked = message(thinking={"type": "adaptive", "display": "omitted"}) | {"model": "thinker"}
    blocks = furnished_server.post(PATH, asked).json["content"]
    assert blocks[0] == {"type": "thinking", "thinking": "", "signature": SIGNATURE}
    streamed = furnished_server.post(PATH, asked | {"stream": True}).body
    assert b'"type":"thinking"' in streamed and b"thinking_delta" not in streamed
    assert b"Hm" not in streamed and b'"text":"So"' in streamed


@pytest.mark.parametrize(
    ("finished", "reason", "sequence"),
    [
        (ending("stop"), "end_turn", None),
        (ending("length"), "max_tokens", None),
        (ending("tool_calls"), "tool_use", None),
        (ending("stop", stop_string="END"), "stop_sequence", "END"),
    ],
)
def test_reasons(
    server: Server, engine: ScriptedEngine, finished: Finished, reason: str, sequence: str | None
) -> None:
    engine.answers = [["a", finished], ["a", finished]]
    whole = server.post(PATH, message(stop_sequences=["END"])).json
    assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, sequence)
    streamed = server.post(PATH, message(stream=True, stop_sequences=["END"])).body.decode()
    quoted = json.dumps(sequence)
    assert f'"stop_reason":"{reason}","stop_sequence":{quoted}}}' in streamed
    assert engine.requests[0].stop == ["END"]


def test_cached_tokens_are_counted_apart(server: Server, engine: ScriptedEngine) -> None:
    end = Finished("", "stop", Usage(7, 2, 5), Timings(0, 0, 0))
    engine.answers = [["a", end], ["a", end]]
    assert usage(2, 2, cached=5) in server.post(PATH, message()).body.decode()
    streamed = server.post(PATH, message(stream=True)).body.decode()
    assert usage(2, 2, cached=5) in streamed.partition("message_delta")[2]


def test_an_answer_without_words_has_no_block(server: Server, engine: ScriptedEngine) -> None:
    engine.answers = [["", ending("stop")], ["", ending("stop")]]
    assert normalized(server.post(PATH, message(stream=True)).body) == START + end("end_turn", 2)
    assert server.post(PATH, message()).json["content"] == []


def test_silence_is_filled_with_pings(impatient_server: Server) -> None:
    engine = impatient_server.board.current
    gate = asyncio.Event()
    engine.answers = [[gate, "b"]]
    with impatient_server.streaming(PATH, message(stream=True)) as response:
        begun = b""
        while begun.count(b"event: ping") < 4:
            begun += response.readline()
        engine.release(gate)
        body = (begun + response.read()).decode()
    kinds = [line[7:] for line in body.split("\n") if line.startswith("event: ")]
    assert [kind for kind in kinds if kind != "ping"] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


def test_a_failure_midway_is_an_error_event(server: Server, engine: ScriptedEngine) -> None:
    engine.answers = [["a", Failed("", "engine_crashed", "It ended.")]]
    body = server.post(PATH, message(stream=True)).body.decode()
    assert body.endswith(
        'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"It ended."}}'
        "\n\n"
    )
    assert "message_stop" not in body


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("queue_full", 503, "overloaded_error"),
        ("invalid_request", 400, "invalid_request_error"),
        ("invalid_numbers", 500, "api_error"),
    ],
)
def test_failures_before_the_answer(
    server: Server, engine: ScriptedEngine, code: str, status: int, kind: str
) -> None:
    engine.answers = [[Failed("", code, "No.")]]
    reply = server.post(PATH, message(stream=True))
    assert reply.status == status
    assert reply.json == {"type": "error", "error": {"type": kind, "message": "No."}}


def test_a_prompt_that_is_too_long_is_named_in_anthropics_words(
    server: Server, engine: ScriptedEngine
) -> None:
    engine.answers = [[Failed("", "context_length_exceeded", "9 tokens, 8 fit.")]]
    reply = server.post(PATH, message())
    assert reply.status == 400
    assert reply.error["message"] == "prompt is too long: 9 tokens, 8 fit."
