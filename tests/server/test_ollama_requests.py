"""Ollama's fields: honoured, accepted or refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from app.engine.constraint import Constraint
from app.engine.protocol import Message, Sampling, Tool, ToolCallPart
from app.server.ollama_requests import ChatFields, GenerateFields, Options

from .conftest import SMOL, ScriptedEngine, Server
from .test_ollama_frames import chat, prompt

ROUTES = {"/api/chat": chat, "/api/generate": prompt}
PATHS = pytest.mark.parametrize("path", list(ROUTES))


@PATHS
def test_options_reach_the_engine(server: Server, engine: ScriptedEngine, path: str) -> None:
    options = {
        "temperature": 0,
        "top_k": 3.0,
        "top_p": 0.5,
        "min_p": 0.1,
        "typical_p": 0.9,
        "repeat_penalty": 1.2,
        "repeat_last_n": -1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "seed": 7,
        "stop": ["a", "b"],
        "num_predict": 11,
        "num_ctx": 8192,
    }
    body = ROUTES[path](options=options, keep_alive=-1, format="json", stream=False)
    assert server.post(path, body).status == 200
    (request,) = engine.requests
    assert request.sampling == Sampling(
        temperature=0,
        top_k=3,
        top_p=0.5,
        min_p=0.1,
        typical_p=0.9,
        repetition_penalty=1.2,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        seed=7,
    )
    assert (request.max_tokens, request.stop) == (11, ["a", "b"])
    assert request.keep_alive_s == math.inf
    assert request.constraint == Constraint("json_object")
    assert request.model == SMOL.ref and request.client.startswith("127.0.0.1")


@PATHS
def test_what_is_left_out_is_left_to_the_model(
    server: Server, engine: ScriptedEngine, path: str
) -> None:
    nulls = dict.fromkeys(["options", "keep_alive", "format", "think", "stream", "logprobs"])
    off = {"top_k": None, "seed": -1, "num_predict": -1, "mirostat": 0, "stop": None}
    for more in ({}, nulls, {"options": off, "format": ""}, {"options": {"num_predict": -2}}):
        assert server.post(path, ROUTES[path](**more)).status == 200
        request = engine.requests.pop()
        assert request.sampling == Sampling()
        assert (request.max_tokens, request.stop, request.keep_alive_s) == (None, [], None)
        assert (request.constraint, request.template_options) == (None, {})


def test_penalties_are_off_where_they_look_at_no_token() -> None:
    options = Options(repeat_penalty=1.3, presence_penalty=1, repeat_last_n=0)
    assert options.sampling.repetition_penalty == 1.0
    assert options.sampling.presence_penalty == options.sampling.frequency_penalty == 0.0


WITHOUT_EFFECT = {
    "num_keep": 4,
    "num_batch": 512,
    "num_gpu": 99,
    "main_gpu": 0,
    "num_thread": 8,
    "num_gqa": 1,
    "numa": True,
    "low_vram": True,
    "f16_kv": False,
    "use_mmap": True,
    "use_mlock": True,
    "draft_num_predict": 4,
    "mirostat_tau": 5.0,
    "mirostat_eta": 0.1,
    "repeat_last_n": 64,
}
NEUTRAL: dict[str, tuple[Any, Any]] = {
    # option: (a value that changes nothing, one that would)
    "mirostat": (0, 2),
    "tfs_z": (1.0, 0.5),
    "penalize_newline": (True, False),
    "rope_frequency_base": (0, 10000.0),
    "rope_frequency_scale": (1.0, 0.5),
    "logits_all": (False, True),
    "vocab_only": (False, True),
    "embedding_only": (False, True),
}


def test_every_option_has_its_place() -> None:
    listed = WITHOUT_EFFECT.keys() - {"repeat_last_n"}
    assert Options.without_effect == listed and Options.only_neutral.keys() == NEUTRAL.keys()


@PATHS
def test_options_without_effect(server: Server, engine: ScriptedEngine, path: str) -> None:
    harmless = WITHOUT_EFFECT | {name: pair[0] for name, pair in NEUTRAL.items()}
    assert server.post(path, ROUTES[path](options=harmless)).status == 200
    assert engine.requests[0].sampling == Sampling()


@pytest.mark.parametrize(
    ("options", "named"),
    [({name: pair[1]}, f"options.{name}") for name, pair in NEUTRAL.items()]
    + [
        ({"repeat_penalty": 1.2, "repeat_last_n": 64}, "options.repeat_last_n"),
        ({"num_predict": 0}, "options.num_predict"),
        ({"num_predict": -3}, "options.num_predict"),
        ({"temperature": "warm"}, "options.temperature"),
        ({"temperature": 3}, "options.temperature"),
        ({"top_k": 1.5}, "options.top_k"),
        ({"stop": [""]}, "options.stop[0]"),
        ({"dry_multiplier": 1}, "options.dry_multiplier"),
        ({"num_ctx": 8193}, "num_ctx"),
    ],
)
def test_options_that_are_refused(
    server: Server, engine: ScriptedEngine, options: dict[str, Any], named: str
) -> None:
    for path, body in ROUTES.items():
        reply = server.post(path, body(options=options))
        assert reply.status == 400 and f"`{named}`" in reply.json["error"], reply.body
    assert not engine.requests


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"format": "yaml"}, "format"),
        ({"format": 3}, "format"),
        ({"think": "very"}, "think"),
        ({"keep_alive": "soon"}, "keep_alive"),
        ({"keep_alive": "5"}, "keep_alive"),
        ({"keep_alive": True}, "keep_alive"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"_debug_render_only": True}, "_debug_render_only"),
        ({"nonsense": 1}, "nonsense"),
        ({"options": {"stop": "a"}, "stream": "no"}, "stream"),
    ],
)
def test_fields_that_are_refused(
    server: Server, engine: ScriptedEngine, more: dict[str, Any], named: str
) -> None:
    for path, body in ROUTES.items():
        reply = server.post(path, body(**more))
        assert reply.status == 400 and f"`{named}`" in reply.json["error"], reply.body
    assert not engine.requests


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"images": ["aGk="]}, "images"),
        ({"template": "{{ .Prompt }}"}, "template"),
        ({"suffix": "return x", "system": "Be brief."}, "system"),
        ({"suffix": "return x", "context": [1]}, "context"),
        ({"raw": True, "system": "Be brief."}, "system"),
        ({"raw": True, "context": [1]}, "context"),
        ({"raw": True, "think": True}, "think"),
        ({"context": [1, 2, 3]}, "context"),
        ({"context": [300]}, "context"),
        ({"context": [-1]}, "context[0]"),
        ({"messages": []}, "messages"),
    ],
)
def test_fields_of_generate_that_are_refused(
    server: Server, engine: ScriptedEngine, more: dict[str, Any], named: str
) -> None:
    reply = server.post("/api/generate", prompt(**more))
    assert reply.status == 400 and f"`{named}`" in reply.json["error"], reply.body
    assert not engine.requests


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({"role": "user", "content": "", "images": ["aGk="]}, "messages[0].images"),
        ({"role": "wizard", "content": ""}, "messages[0].role"),
        ({"content": "a"}, "messages[0].role"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}]}, "messages[0].content"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
def test_messages_that_are_refused(
    server: Server, engine: ScriptedEngine, message: dict[str, Any], named: str
) -> None:
    reply = server.post("/api/chat", {"model": SMOL.name, "messages": [message]})
    assert reply.status == 400 and f"`{named}`" in reply.json["error"], reply.body


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (0, 0.0),
        (90, 90.0),
        (1.5, 1.5),
        (-1, math.inf),
        ("5m", 300.0),
        ("1h30m", 5400.0),
        ("1.5h", 5400.0),
        ("300ms", 0.3),
        ("-1m", math.inf),
        ("+10s", 10.0),
        ("0", 0.0),
        (".5s", 0.5),
    ],
)
def test_durations_as_go_writes_them(given: Any, seconds: float) -> None:
    fields = ChatFields.parse(json.dumps({"model": "m", "keep_alive": given}).encode())
    assert fields.keep_alive == pytest.approx(seconds)


def test_messages(server: Server, engine: ScriptedEngine) -> None:
    messages = [
        {"role": "System", "content": "Be short."},
        {"role": "user", "content": "a", "images": [], "name": "ann"},
        {
            "role": "assistant",
            "content": None,
            "thinking": "Hm.",
            "tool_calls": [
                {"function": {"name": "f", "arguments": {"q": "é"}}},
                {"id": "x", "type": "function", "function": {"index": 1, "name": "g"}},
                {"function": {"name": "f", "arguments": {}}},
            ],
        },
        {"role": "tool", "content": "2", "tool_name": "g"},
        {"role": "tool", "content": "3", "tool_call_id": "call_2_2"},
        {"role": "tool", "content": "1"},
        {"role": "user", "content": "b"},
    ]
    assert server.post("/api/chat", chat() | {"messages": messages}).status == 200
    assert engine.requests[0].messages == [
        Message("system", "Be short."),
        Message("user", "a"),
        Message(
            "assistant",
            "",
            "Hm.",
            [
                ToolCallPart("call_2_0", "f", '{"q": "é"}'),
                ToolCallPart("x", "g", "{}"),
                ToolCallPart("call_2_2", "f", "{}"),
            ],
        ),
        Message("tool", "2", tool_call_id="x", name="g"),
        Message("tool", "3", tool_call_id="call_2_2", name="f"),
        Message("tool", "1", tool_call_id="call_2_0", name="f"),
        Message("user", "b"),
    ]


def test_tools(server: Server, engine: ScriptedEngine) -> None:
    schema = {"type": "object", "properties": {"q": {"type": "string"}}}
    tools = [
        {"type": "function", "function": {"name": "f", "description": "F.", "parameters": schema}},
        {"function": {"name": "g", "description": None}},
    ]
    assert server.post("/api/chat", chat(tools=tools)).status == 200
    assert engine.requests[0].tools == [Tool("f", "F.", schema), Tool("g")]
    assert engine.requests[0].tool_choice == "auto"


def test_a_schema_constrains_the_answer(server: Server, engine: ScriptedEngine) -> None:
    schema = {"type": "object", "properties": {"é": {"type": "string"}}}
    assert server.post("/api/chat", chat(format=schema)).status == 200
    constraint = engine.requests[0].constraint
    assert constraint is not None and constraint.kind == "json_schema"
    assert json.loads(constraint.text) == schema


def test_generate_goes_through_the_template_unless_it_is_raw(
    server: Server, engine: ScriptedEngine
) -> None:
    server.post("/api/generate", prompt("Hi", system="Be brief."))
    server.post("/api/generate", prompt("Hi", raw=True))
    with_template, raw = engine.requests
    assert with_template.messages == [Message("system", "Be brief."), Message("user", "Hi")]
    assert (raw.prompt, raw.messages) == ("Hi", None)


def test_a_suffix_makes_a_gap(server: Server, engine: ScriptedEngine) -> None:
    reply = server.post("/api/generate", prompt("def f():", suffix="return x", stream=False))
    (request,) = engine.requests
    assert (request.prompt, request.suffix, request.messages) == ("def f():", "return x", None)
    assert "context" not in reply.json
    assert server.post("/api/generate", prompt("", suffix="return x")).status == 200
    assert engine.requests[1].suffix == "return x" and not engine.loads


def test_a_context_brings_the_conversation_back(server: Server, engine: ScriptedEngine) -> None:
    engine.answers = [["Né", "<b>"], ["c"], ["d"]]
    first = server.post("/api/generate", prompt("a", system="S", stream=False)).json
    lines = server.post("/api/generate", prompt("b", context=first["context"])).body.splitlines()
    streamed = [json.loads(line) for line in lines]
    assert [one for one in streamed if "context" in one] == streamed[-1:]
    context = streamed[-1]["context"]
    server.post("/api/generate", prompt("e", system="T", context=context))
    talk = [Message("user", "a"), Message("assistant", "Né<b>"), Message("user", "b")]
    assert engine.requests[1].messages == [Message("system", "S"), *talk]
    talk += [Message("assistant", "c"), Message("user", "e")]
    assert engine.requests[2].messages == [Message("system", "T"), *talk]


def test_thinking(furnished_server: Server) -> None:
    engine = furnished_server.board.current

    def asked(model: str, think: Any) -> Any:
        reply = furnished_server.post("/api/chat", chat(think=think) | {"model": model})
        return engine.requests.pop().template_options if reply.status == 200 else reply.json

    assert asked("thinker", True) == {"enable_thinking": True}
    assert asked("thinker", False) == {"enable_thinking": False}
    assert asked("thinker", "low") == {"enable_thinking": True}
    assert asked("thinker", None) == {}
    assert asked("brooder", True) == {} and asked("tiny", False) == {}
    assert "always reasons" in asked("brooder", False)["error"]
    assert asked("tiny", True)["error"].startswith('"tiny" does not support thinking')


def test_names_as_ollama_writes_them(server: Server, engine: ScriptedEngine) -> None:
    for name in (SMOL.name, f"{SMOL.name}:latest", SMOL.name.upper(), f"{SMOL.name}:LATEST"):
        reply = server.post("/api/chat", chat(stream=False) | {"model": name})
        assert reply.status == 200 and reply.json["model"] == name
        assert engine.requests.pop().model == SMOL.ref
    reply = server.post("/api/chat", chat() | {"model": f"{SMOL.name}:8b"})
    assert reply.status == 404
    assert reply.json["error"].startswith(f"model '{SMOL.name}:8b' not found")
    assert SMOL.name in reply.json["error"].partition("found")[2]


def test_names_that_are_paths_are_names(server: Server) -> None:
    for name in ("/etc/passwd", "../models", "~/x", "a\0b", "x" * 1000):
        assert server.post("/api/chat", chat() | {"model": name}).status == 404
    for name in ("", None, 3, "x" * 1001):
        assert server.post("/api/chat", chat() | {"model": name}).status == 400


def test_fields_of_both_routes_are_those_of_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs/rest/ollama.md").read_text()
    for fields in (ChatFields, GenerateFields, Options):
        names = {*fields.model_fields, *fields.without_effect, *fields.only_neutral}
        assert [name for name in names if name not in page] == []
