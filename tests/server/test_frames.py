"""Bytes on the wire, exactly."""

from __future__ import annotations

import json
import re

from app import __version__
from app.engine.protocol import Finished, Timings, Token, TokenLogprob, Usage

from .conftest import SMOL, ScriptedEngine, Server, chat, completion


def normalized(body: bytes) -> bytes:
    """`body` with the id and the time, which differ every time, replaced."""
    body = re.sub(rb'"id":"(chatcmpl|cmpl)-[0-9a-f]{32}"', rb'"id":"\1-ID"', body)
    return re.sub(rb'"created":\d{10}', b'"created":0', body)


def head(kind: str, name: str) -> str:
    return (
        f'{{"id":"{kind}-ID","object":"{name}","created":0,"model":"{SMOL.name}",'
        f'"system_fingerprint":"gryphon-{__version__}",'
    )


def test_chat_stream(server: Server, engine: ScriptedEngine) -> None:
    engine.answers = [["Hé", "llo"]]
    reply = server.post("/v1/chat/completions", chat(stream=True))
    start = head("chatcmpl", "chat.completion.chunk")

    def frame(delta: str, finish: str = "null") -> str:
        return (
            f'data: {start}"choices":[{{"index":0,"delta":{delta},"logprobs":null,'
            f'"finish_reason":{finish}}}]}}\n\n'
        )

    assert reply.status == 200
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.headers["x-request-id"] == engine.requests[0].id
    assert normalized(reply.body).decode() == (
        frame('{"role":"assistant","content":""}')
        + frame('{"content":"Hé"}')
        + frame('{"content":"llo"}')
        + frame("{}", '"stop"')
        + "data: [DONE]\n\n"
    )


def test_reasoning_has_a_field_of_its_own(server: Server, engine: ScriptedEngine) -> None:
    thinking = [Token("", "", 0, reasoning="H"), Token("", "Yes", 1, reasoning="m.")]
    engine.answers = [thinking, thinking]
    reply = server.post("/v1/chat/completions", chat(stream=True))
    chunks = [json.loads(line[6:]) for line in reply.body.decode().split("\n\n")[1:-2]]
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"reasoning_content": "H"},
        {"reasoning_content": "m."},
        {"content": "Yes"},
        {},
    ]
    whole = json.loads(server.post("/v1/chat/completions", chat()).body)
    message = whole["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("Yes", "Hm.")


def test_chat_stream_with_usage(server: Server, engine: ScriptedEngine) -> None:
    engine.answers = [["a"]]
    reply = server.post(
        "/v1/chat/completions", chat(stream=True, stream_options={"include_usage": True})
    )
    *chunks, usage = [json.loads(line[6:]) for line in reply.body.decode().split("\n\n")[:-2]]
    assert [chunk["usage"] for chunk in chunks] == [None, None, None]
    assert usage["choices"] == []
    assert usage["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 1,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert reply.body.endswith(b"}}}\n\ndata: [DONE]\n\n")


def test_completion_stream(server: Server, engine: ScriptedEngine) -> None:
    engine.answers = [["a", "b"]]
    reply = server.post("/v1/completions", completion(stream=True))
    start = head("cmpl", "text_completion")

    def frame(text: str, finish: str = "null") -> str:
        return (
            f'data: {start}"choices":[{{"index":0,"text":"{text}","logprobs":null,'
            f'"finish_reason":{finish}}}]}}\n\n'
        )

    assert normalized(reply.body).decode() == (
        frame("a") + frame("b") + frame("", '"stop"') + "data: [DONE]\n\n"
    )


def test_chat_whole(server: Server, engine: ScriptedEngine) -> None:
    engine.answers = [["Hé", "llo"]]
    reply = server.post("/v1/chat/completions", chat())
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["content-length"] == str(len(reply.body))
    assert normalized(reply.body).decode() == (
        head("chatcmpl", "chat.completion")
        + '"choices":[{"message":{"role":"assistant","content":"Héllo","refusal":null},'
        '"logprobs":null,"index":0,"finish_reason":"stop"}],'
        '"usage":{"prompt_tokens":7,"completion_tokens":2,"total_tokens":9,'
        '"prompt_tokens_details":{"cached_tokens":0}}}'
    )


def test_completion_whole(server: Server, engine: ScriptedEngine) -> None:
    reply = server.post("/v1/completions", completion(max_tokens=2))
    assert normalized(reply.body).decode() == (
        head("cmpl", "text_completion")
        + '"choices":[{"text":"Hello there","logprobs":null,"index":0,"finish_reason":"length"}],'
        '"usage":{"prompt_tokens":7,"completion_tokens":2,"total_tokens":9,'
        '"prompt_tokens_details":{"cached_tokens":0}}}'
    )


def ending(text: str) -> Finished:
    return Finished("", "stop", Usage(7, 2, 5), Timings(0, 0, 0), text)


def test_text_released_at_the_end_is_part_of_the_answer(
    server: Server, engine: ScriptedEngine
) -> None:
    engine.answers = [["a", ending("b")], ["a", ending("b")]]
    whole = server.post("/v1/chat/completions", chat()).json
    assert whole["choices"][0]["message"]["content"] == "ab"
    assert whole["usage"]["prompt_tokens_details"] == {"cached_tokens": 5}
    streamed = server.post("/v1/chat/completions", chat(stream=True)).body
    assert re.findall(rb'"content":"(.*?)"', streamed) == [b"", b"a", b"b"]


def test_token_without_text_sends_no_frame(server: Server, engine: ScriptedEngine) -> None:
    engine.answers = [["a", "", "b"]]
    reply = server.post("/v1/completions", completion(stream=True))
    assert re.findall(rb'"text":"(.*?)"', reply.body) == [b"a", b"b", b""]


def test_separators_of_lines_never_stand_in_a_frame(server: Server, engine: ScriptedEngine) -> None:
    text = "a\u2028b\u2029c\u0085d\r\ne\x0bf"
    engine.answers = [[text]]
    body = server.post("/v1/completions", completion(stream=True)).body.decode()
    lines = body.splitlines()
    assert all(line == "" or line.startswith("data: ") for line in lines)
    assert json.loads(lines[0][6:])["choices"][0]["text"] == text


def test_chat_logprobs(server: Server, engine: ScriptedEngine) -> None:
    best = TokenLogprob(5, "é", "é".encode(), -0.25)
    other = TokenLogprob(6, "e", b"e", float("-inf"))
    engine.answers = [[Token("", "é", 5, best, [best, other])]] * 2
    expected = {
        "content": [
            {
                "token": "é",
                "logprob": -0.25,
                "bytes": [195, 169],
                "top_logprobs": [
                    {"token": "é", "logprob": -0.25, "bytes": [195, 169]},
                    {"token": "e", "logprob": -9999.0, "bytes": [101]},
                ],
            }
        ],
        "refusal": None,
    }
    asked = {"logprobs": True, "top_logprobs": 2}
    whole = server.post("/v1/chat/completions", chat(**asked)).json
    assert whole["choices"][0]["logprobs"] == expected
    streamed = server.post("/v1/chat/completions", chat(stream=True, **asked)).body
    frames = [json.loads(line[6:]) for line in streamed.decode().split("\n\n")[:-2]]
    assert [one["choices"][0]["logprobs"] for one in frames] == [None, expected, None]
    assert engine.requests[0].logprobs and engine.requests[0].top_logprobs == 2


def test_completion_logprobs(server: Server, engine: ScriptedEngine) -> None:
    half = TokenLogprob(1, "\ufffd", b"\xc3", -1.0)
    rest = TokenLogprob(2, "\ufffd", b"\xa9", -2.0)
    last = TokenLogprob(3, "x", b"x", -3.0)
    tokens = [
        Token("", "", 1, half, [half, last]),
        Token("", "é", 2, rest, [rest, last]),
        Token("", "x", 3, last, [last, half]),
    ]
    engine.answers = [list(tokens), list(tokens), list(tokens)]
    expected = {
        "tokens": ["bytes:\\xc3", "bytes:\\xa9", "x"],
        "token_logprobs": [-1.0, -2.0, -3.0],
        "top_logprobs": [
            {"bytes:\\xc3": -1.0, "x": -3.0},
            {"bytes:\\xa9": -2.0, "x": -3.0},
            {"x": -3.0, "bytes:\\xc3": -1.0},
        ],
        "text_offset": [0, 0, 1],
    }
    whole = server.post("/v1/completions", completion(logprobs=2)).json
    assert whole["choices"][0]["logprobs"] == expected
    assert whole["choices"][0]["text"] == "éx"

    only_chosen = server.post("/v1/completions", completion(logprobs=0)).json
    assert only_chosen["choices"][0]["logprobs"] == expected | {"top_logprobs": None}

    streamed = server.post("/v1/completions", completion(logprobs=2, stream=True)).body
    frames = [json.loads(line[6:]) for line in streamed.decode().split("\n\n")[:-2]]
    offsets = [one["choices"][0]["logprobs"] for one in frames]
    assert [one and one["text_offset"] for one in offsets] == [[0], [0], [1], None]
