"""Every field honoured, accepted, or refused by name; bad bodies answered with one sentence."""

from __future__ import annotations

import json
from typing import Any

import pytest

from app.engine.protocol import Message, Sampling

from .conftest import GRIFFIN, SMOL, ScriptedEngine, Server, chat, completion

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def body_of(path: str, **more: Any) -> dict[str, Any]:
    return chat(**more) if path == CHAT else completion(**more)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_fields_that_reach_the_engine(server: Server, engine: ScriptedEngine, path: str) -> None:
    asked = {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 3,
        "min_p": 0.1,
        "seed": -5,
        "max_tokens": 11,
        "stop": ["a", "b"],
    }
    assert server.post(path, body_of(path, **asked)).status == 200
    request = engine.requests[0]
    assert request.sampling == Sampling(temperature=0, top_p=0.5, top_k=3, min_p=0.1, seed=-5)
    assert request.max_tokens == 11
    assert request.stop == ["a", "b"]
    assert request.model == SMOL.ref


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_defaults_are_those_of_the_house(server: Server, engine: ScriptedEngine, path: str) -> None:
    nulls = dict.fromkeys(["temperature", "top_p", "seed", "stop", "max_tokens", "stream", "n"])
    for more in ({}, nulls):
        assert server.post(path, body_of(path, **more)).status == 200
        request = engine.requests.pop()
        assert request.sampling == Sampling()
        assert (request.max_tokens, request.stop, request.logprobs) == (None, [], False)


def test_messages(server: Server, engine: ScriptedEngine) -> None:
    messages = [
        {"role": "developer", "content": "Be short."},
        {
            "role": "user",
            "name": "ann",
            "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}],
        },
        # An answer of ours, sent back as it came.
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": []},
        {"role": "user", "content": "", "reasoning_content": None},
        {"role": "assistant", "content": "d", "reasoning_content": "Hm."},
    ]
    assert server.post(CHAT, chat() | {"messages": messages}).status == 200
    request = engine.requests[0]
    assert request.messages == [
        Message("system", "Be short."),
        Message("user", "a b"),
        Message("assistant", "c"),
        Message("user", ""),
        Message("assistant", "d", "Hm."),
    ]
    assert request.prompt is None and request.prompt_tokens is None


@pytest.mark.parametrize(
    ("prompt", "text", "tokens"),
    [
        ("Once", "Once", None),
        (["Once"], "Once", None),
        ("", "", None),
        ([1, 2, 3], None, [1, 2, 3]),
        ([[1, 2, 3]], None, [1, 2, 3]),
    ],
)
def test_prompts(
    server: Server, engine: ScriptedEngine, prompt: Any, text: str | None, tokens: list[int] | None
) -> None:
    assert server.post(TEXT, completion(prompt)).status == 200
    request = engine.requests[0]
    assert (request.prompt, request.prompt_tokens, request.messages) == (text, tokens, None)


def test_max_completion_tokens(server: Server, engine: ScriptedEngine) -> None:
    assert server.post(CHAT, chat(max_completion_tokens=5, max_tokens=5)).status == 200
    assert engine.requests[0].max_tokens == 5


def test_stop_may_be_one_string(server: Server, engine: ScriptedEngine) -> None:
    assert server.post(CHAT, chat(stop="END")).status == 200
    assert engine.requests[0].stop == ["END"]


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_unknown_field_is_named(server: Server, path: str) -> None:
    reply = server.post(path, body_of(path, temprature=0.1))
    assert reply.status == 400
    assert reply.error["message"] == "Unknown field `temprature`."
    assert reply.error["param"] == "temprature"
    assert reply.error["code"] == "unknown_parameter"


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content, **more}]}


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
INVALID = [
    ({"temperature": 2.5}, "temperature", "less than or equal to 2, got 2.5"),
    ({"temperature": -1}, "temperature", "greater than or equal to 0, got -1"),
    ({"temperature": "0.5"}, "temperature", 'valid number, got "0.5"'),
    ({"temperature": True}, "temperature", "valid number, got true"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"top_p": 1.01}, "top_p", "less than or equal to 1"),
    ({"top_k": -2}, "top_k", "greater than or equal to -1"),
    ({"top_k": 1.5}, "top_k", "valid integer, got 1.5"),
    ({"min_p": 2}, "min_p", "less than or equal to 1"),
    ({"seed": "x"}, "seed", "valid integer"),
    ({"seed": 2**70}, "seed", "less than"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": 2**40}, "max_tokens", "less than or equal to"),
    ({"stop": ["a"] * 17}, "stop", "at most 16 items, got a list of 17"),
    ({"stop": [""]}, "stop[0]", "at least 1 character"),
    ({"stop": 3}, "stop", "valid list, got 3"),
    ({"stream": "yes"}, "stream", 'valid boolean, got "yes"'),
    ({"stream_options": 3}, "stream_options", "object, got 3"),
    ({"stream_options": {"usage": True}}, "stream_options.usage", "Unknown field"),
    ({"model": ""}, "model", "at least 1 character"),
    ({"model": None}, "model", "valid string, got null"),
    ({"model": "m" * 300}, "model", "at most 256 characters"),
]
INVALID_CHAT = [
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": "hi"}, "messages", 'valid list, got "hi"'),
    ({"messages": ["hi"]}, "messages[0]", 'object, got "hi"'),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "is required"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "is required in the role user"),
    ({"messages": [{"role": "bot", "content": ""}]}, "messages[0].role", 'tool, got "bot"'),
    ({"messages": [{"role": "function", "content": ""}]}, "messages[0].role", "the role tool"),
    (
        {"messages": [{"role": "user", "content": "", "reasoning_content": "x"}]},
        "messages[0].reasoning_content",
        "for the role assistant alone",
    ),
    (user("x", weight=1), "messages[0].weight", "Unknown field"),
    (user("x", tool_calls=[{}]), "messages[0].tool_calls[0].id", "is required"),
    (user(None), "messages[0].content", "is required in the role user"),
    (user([IMAGE]), "messages[0].content", 'type "image_url"; Gryphon\'s models read text only'),
    (user(["x"]), "messages[0].content", "list of"),
    (user([{"type": "text"}]), "messages[0].content", "without a `text`"),
    (user([{"type": "text", "text": "", "{path}": 1}]), "messages[0].content", '"{path}"'),
    ({"logprobs": 1}, "logprobs", "valid boolean"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
    ({"top_logprobs": 2}, "top_logprobs", "needs `logprobs`"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differ"),
    ({"prompt": "x"}, "prompt", "Unknown field"),
]
INVALID_TEXT = [
    ({"prompt": []}, "prompt", "a text, a list of token ids"),
    ({"prompt": [1, "a"]}, "prompt", "a text, a list of token ids"),
    ({"prompt": [1, -1]}, "prompt", "a text, a list of token ids"),
    ({"prompt": [True]}, "prompt", "a text, a list of token ids"),
    ({"prompt": None}, "prompt", "got null"),
    ({"logprobs": True}, "logprobs", "valid integer"),
    ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
    ({"messages": []}, "messages", "Unknown field"),
]


@pytest.mark.parametrize(
    ("path", "more", "param", "message"),
    [
        *((CHAT, *case) for case in INVALID + INVALID_CHAT),
        *((TEXT, *case) for case in INVALID + INVALID_TEXT),
    ],
)
def test_invalid_value_names_field_expectation_and_value(
    server: Server, path: str, more: dict[str, Any], param: str, message: str
) -> None:
    reply = server.post(path, body_of(path) | more)
    assert reply.status == 400
    assert reply.error["param"] == param
    assert message in reply.error["message"]
    assert reply.error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "missing"), [(CHAT, "model"), (CHAT, "messages"), (TEXT, "model"), (TEXT, "prompt")]
)
def test_required_field(server: Server, path: str, missing: str) -> None:
    body = body_of(path)
    del body[missing]
    reply = server.post(path, body)
    assert reply.status == 400
    assert reply.error["message"] == f"`{missing}` is required."


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "at line 1 column 0: EOF"),
        (b'{\n "model": smol}', "at line 2 column 11"),
        (b'{"model": "a",}', "at line 1 column 15"),
        (b'{"temperature": NaN}', "at line 1"),
        (b'{"model": "\xff"}', "at line 1"),
        (b'{"model": "\\ud800"}', "at line 1"),
        (b"\xef\xbb\xbf{}", "at line 1 column 1"),
        (b"[" * 100_000, "recursion limit exceeded"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "number out of range"),
    ],
)
def test_invalid_json_says_where(server: Server, body: bytes, message: str) -> None:
    reply = server.post(CHAT, body)
    assert reply.status == 400
    assert reply.error["code"] == "invalid_json"
    assert reply.error["message"].startswith("Invalid JSON at line ")
    assert message in reply.error["message"]


@pytest.mark.parametrize("body", [b"[]", b"3", b"null", b'"x"'])
def test_json_that_is_no_object(server: Server, body: bytes) -> None:
    reply = server.post(CHAT, body)
    assert (reply.status, reply.error["code"]) == (400, "invalid_json")
    assert "JSON object" in reply.error["message"]


def test_long_values_are_not_sent_back_whole(server: Server) -> None:
    for more in ({"temperature": "x" * 100_000}, {"y" * 100_000: 1}, {"n": {"a": ["x"] * 9999}}):
        reply = server.post(CHAT, chat() | more)
        assert reply.status == 400
        assert len(reply.body) < 1000


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    "name", ["gpt-4", "/models/smollm2-135m", "../smollm2-135m", "~/x", "a\r\nb", "\u0000"]
)
def test_model_that_is_not_installed(
    server: Server, engine: ScriptedEngine, path: str, name: str
) -> None:
    reply = server.post(path, body_of(path, model=name))
    assert (reply.status, reply.error["code"]) == (404, "model_not_found")
    assert SMOL.name in reply.error["message"]
    assert engine.requests == []


def test_model_with_a_slash(server: Server, engine: ScriptedEngine) -> None:
    assert server.post(CHAT, chat(model=GRIFFIN.name)).json["model"] == GRIFFIN.name
    assert engine.requests[0].model == GRIFFIN.ref
    for path in (GRIFFIN.name, GRIFFIN.name.replace("/", "%2F")):
        assert server.call("GET", f"/v1/models/{path}").json["id"] == GRIFFIN.name


def test_models(server: Server) -> None:
    listed = server.call("GET", "/v1/models").json
    assert listed["object"] == "list"
    assert listed["data"][1] == {
        "id": SMOL.name,
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "gryphon",
        "context_length": 8192,
        "family": "open-llama",
        "quantization": "mixed 4/8-bit",
    }
    assert server.call("GET", f"/v1/models/{SMOL.name}").json == listed["data"][1]
    assert server.call("GET", "/v1/models/gpt-4").status == 404


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "not_found"),
        ("GET", "/redoc", 404, "not_found"),
        ("GET", "/v1/models/", 404, "model_not_found"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", f"/v1/models/{SMOL.name}", 405, "method_not_allowed"),
    ],
)
def test_routes_that_are_not_there(
    server: Server, method: str, path: str, status: int, code: str
) -> None:
    reply = server.call(method, path)
    assert (reply.status, reply.error["code"]) == (status, code)


def test_openapi_describes_the_bodies(server: Server) -> None:
    reply = server.call("GET", "/openapi.json")
    assert reply.status == 200
    assert b"$ref" not in json.dumps(reply.json["paths"][CHAT]["post"]["requestBody"]).encode()
    content = reply.json["paths"][CHAT]["post"]["requestBody"]["content"]
    assert content["application/json"]["schema"]["required"] == ["model", "messages"]
