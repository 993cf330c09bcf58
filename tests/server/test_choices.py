"""Several answers to one request, several prompts, echo; sampling, forms, template options."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest

from app.engine.constraint import Constraint
from app.engine.protocol import Sampling, Token

from .conftest import GRIFFIN, SMOL, FakeModels, ScriptedEngine, Server, chat, completion

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def body_of(path: str, **more: Any) -> dict[str, Any]:
    return chat(**more) if path == CHAT else completion(**more)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_seeds_differ_from_choice_to_choice_and_are_the_same_next_time(
    server: Server, engine: ScriptedEngine, path: str
) -> None:
    for more in ({"n": 3, "seed": 5}, {"n": 3, "seed": 5}, {"seed": 5}, {"n": 3}):
        assert server.post(path, body_of(path, **more)).status == 200
    seeds = [request.sampling.seed for request in engine.requests]
    first, second, alone, unseeded = seeds[:3], seeds[3:6], seeds[6:7], seeds[7:]
    assert len(set(first)) == 3
    assert sorted(first) == sorted(second)
    assert alone == [5] and 5 in first
    assert unseeded == [None, None, None]
    assert len({request.id for request in engine.requests}) == len(engine.requests)


def number_of(id: str) -> int:
    """Of the choice that a request is for."""
    return int(id.split("-")[2]) if id.count("-") > 1 else 0


class Numbering(ScriptedEngine):
    """Answers four requests with their numbers, in two pieces; they end in the order 3, 1, 2, 0.
    The prompt "b" has a token more than "a"."""

    def __init__(self) -> None:
        super().__init__()
        self.over = [asyncio.Event() for _ in range(4)]

    async def stream(self, request):  # type: ignore[no-untyped-def, override]
        number = number_of(request.id)
        self.prompt_tokens = 7 + (request.prompt == "b")
        self.answers = [[f"{number}", Token("", "!", 0)]]
        *pieces, end = [event async for event in super().stream(request)]
        for event in pieces:
            yield event
        if number != 3:
            await self.over[{1: 3, 2: 1, 0: 2}[number]].wait()
        try:
            yield end
        finally:
            self.over[number].set()


def test_choices_are_numbered_prompt_by_prompt(server: Server) -> None:
    for stream in (False, True):
        server.board.current = Numbering()
        reply = server.post(TEXT, completion(["a", "b"], n=2, stream=stream))
        engine = server.board.current
        by_number = {number_of(one.id): one.prompt for one in engine.requests}
        assert by_number == {0: "a", 1: "a", 2: "b", 3: "b"}
        if not stream:
            assert [one["index"] for one in reply.json["choices"]] == [0, 1, 2, 3]
            assert [one["text"] for one in reply.json["choices"]] == ["0!", "1!", "2!", "3!"]
            continue
        frames = [json.loads(line[6:]) for line in reply.body.decode().split("\n\n")[:-2]]
        texts = dict.fromkeys(range(4), "")
        ends = []
        for frame in frames:
            (choice,) = frame["choices"]
            texts[choice["index"]] += choice["text"]
            if choice["finish_reason"]:
                ends.append(choice["index"])
        assert texts == {0: "0!", 1: "1!", 2: "2!", 3: "3!"}
        assert ends == [3, 1, 2, 0]


def test_a_prompt_counts_once_however_many_choices(client: openai.OpenAI, server: Server) -> None:
    asked: dict[str, Any] = {"model": SMOL.name, "prompt": ["a", "b"], "n": 2}
    server.board.current = Numbering()
    whole = client.completions.create(**asked).usage
    server.board.current = Numbering()
    *_, last = client.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    for usage in (whole, last.usage):
        assert usage is not None
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (15, 4, 19)


def test_chat_choices_streamed_through_the_client(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=SMOL.name, messages=[{"role": "user", "content": "Hi"}], n=3
    ) as stream:
        final = stream.get_final_completion()
    assert [one.message.content for one in final.choices] == ["Hello there."] * 3
    assert [one.index for one in final.choices] == [0, 1, 2]


def test_suffix(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    client.completions.create(model=SMOL.name, prompt=["a(", "b("], suffix=")")
    client.completions.create(model=SMOL.name, prompt="a(", suffix="")
    asked = [(request.prompt, request.suffix) for request in engine.requests]
    assert sorted(asked) == [("a(", ""), ("a(", ")"), ("b(", ")")]


@pytest.mark.parametrize("stream", [False, True])
def test_echo(client: openai.OpenAI, stream: bool) -> None:
    asked: dict[str, Any] = {"model": SMOL.name, "prompt": ["One ", "Two "], "echo": True, "n": 2}
    texts = [""] * 4
    if stream:
        for chunk in client.completions.create(**asked, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
    else:
        texts = [one.text for one in client.completions.create(**asked).choices]
    assert texts == ["One Hello there."] * 2 + ["Two Hello there."] * 2


@pytest.mark.parametrize(
    ("path", "more", "param", "message"),
    [
        (CHAT, {"n": 0}, "n", "greater than or equal to 1"),
        (CHAT, {"n": 33}, "n", "less than or equal to 32"),
        (TEXT, {"prompt": ["a"] * 33}, "prompt", "32 prompts at most, got 33"),
        (TEXT, {"prompt": ["a"] * 11, "n": 3}, "n", "33 choices"),
        (TEXT, {"prompt": ["a", [1]]}, "prompt", "list of either"),
        (TEXT, {"best_of": 2}, "best_of", "should be 1, which is `n`"),
        (TEXT, {"best_of": 1, "n": 2}, "best_of", "should be 2"),
        (TEXT, {"echo": True, "logprobs": 1}, "echo", "prompt's own logprobs"),
        (TEXT, {"echo": True, "prompt": [1, 2]}, "echo", "not token ids"),
        (TEXT, {"suffix": "}", "prompt": [1, 2]}, "suffix", "not token ids"),
        (CHAT, {"min_tokens": 5, "max_completion_tokens": 4}, "min_tokens", "should be 4"),
        (CHAT, {"logit_bias": {"a": 1}}, "logit_bias", 'keys, got "a"'),
        (CHAT, {"logit_bias": {"1": 101}}, "logit_bias", "-100 to 100, got 101"),
        (CHAT, {"logit_bias": {"1": True}}, "logit_bias", "got true"),
        (CHAT, {"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "1024"),
        (CHAT, {"logit_bias": [1]}, "logit_bias", "object of biases"),
        (TEXT, {"presence_penalty": 2.5}, "presence_penalty", "less than or equal to 2"),
        (TEXT, {"repeat_penalty": 2, "repetition_penalty": 2}, "repeat_penalty", "another name"),
        (CHAT, {"reasoning_effort": "lots"}, "reasoning_effort", "none, minimal, low"),
        (CHAT, {"reasoning_effort": "high"}, "reasoning_effort", "no setting"),
        (CHAT, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "engine itself"),
        (CHAT, {"response_format": {"type": "xml"}}, "response_format", 'type "xml"'),
        (CHAT, {"response_format": {"type": "json_schema"}}, "response_format", "a schema"),
        (
            CHAT,
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format",
            "have a `schema`",
        ),
        (
            CHAT,
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"nullable": True}},
                }
            },
            "response_format",
            "nullable",
        ),
        (
            CHAT,
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "structured_outputs",
            "both",
        ),
        (TEXT, {"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs", "one of"),
        (TEXT, {"structured_outputs": {"regexp": "a"}}, "structured_outputs", "one of"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    server: Server,
    engine: ScriptedEngine,
    path: str,
    more: dict[str, Any],
    param: str,
    message: str,
) -> None:
    reply = server.post(path, body_of(path) | more)
    assert (reply.status, reply.error["param"]) == (400, param)
    assert message in reply.error["message"]
    assert engine.requests == []


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_many_copies_of_a_long_body_are_refused(
    server: Server, engine: ScriptedEngine, path: str
) -> None:
    long = "x" * 3 * 2**20
    body = {"messages": [{"role": "user", "content": long}]} if path == CHAT else {"prompt": long}
    reply = server.post(path, body_of(path, n=16) | body)
    assert (reply.status, reply.error["param"]) == (400, "n")
    assert server.post(path, body_of(path) | body).status == 200
    assert len(engine.requests) == 1


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_every_sampling_field_reaches_the_engine(
    server: Server, engine: ScriptedEngine, path: str
) -> None:
    asked = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "typical_p": 0.8,
        "xtc_probability": 0.3,
        "xtc_threshold": 0.2,
        "repetition_penalty": 1.5,
        "presence_penalty": -1,
        "frequency_penalty": 0.25,
        "seed": -3,
    }
    bias = {"logit_bias": {"11": -100, "12": 2.5}}
    more = {"min_tokens": 2, "ignore_eos": True, "max_tokens": 9}
    assert server.post(path, body_of(path, **asked, **bias, **more)).status == 200
    request = engine.requests[0]
    assert request.sampling == Sampling(**asked, logit_bias={11: -100.0, 12: 2.5})
    assert (request.min_tokens, request.ignore_eos, request.max_tokens) == (2, True, 9)
    # The names that llama.cpp and vLLM have for the same things.
    assert server.post(path, body_of(path, repeat_penalty=1.5, top_k=-1)).status == 200
    assert engine.requests[1].sampling == Sampling(repetition_penalty=1.5, top_k=0)


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("asked", "constraint"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Constraint("json_object")),
        (
            {"response_format": {"type": "json_object", "schema": SCHEMA}},
            Constraint("json_schema", json.dumps(SCHEMA)),
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": SCHEMA, "strict": False},
                }
            },
            Constraint("json_schema", json.dumps(SCHEMA)),
        ),
        (
            {"structured_outputs": {"json": SCHEMA}},
            Constraint("json_schema", json.dumps(SCHEMA)),
        ),
        ({"structured_outputs": {"regex": "[ab]+", "json": None}}, Constraint("regex", "[ab]+")),
        ({"structured_outputs": {"json_object": True}}, Constraint("json_object")),
        (
            {"structured_outputs": {"choice": ['y"s', "no"]}},
            Constraint("lark", 'start: "y\\"s" | "no"'),
        ),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, Constraint("lark", 'start: "a"')),
    ],
)
def test_forms_reach_the_engine(
    server: Server, engine: ScriptedEngine, asked: dict[str, Any], constraint: Constraint | None
) -> None:
    assert server.post(CHAT, chat(**asked)).status == 200
    assert engine.requests[0].constraint == constraint


TEMPLATES = {
    "switch": "{% if enable_thinking %}<think>{% endif %}",
    "word": "Reasoning: {{ reasoning_effort }}",
    "always": "<think>",
    "never": "{{ messages }}",
}


@pytest.mark.parametrize(
    ("kind", "effort", "options"),
    [
        ("switch", "none", {"enable_thinking": False}),
        ("switch", "low", {"enable_thinking": True}),
        ("switch", "medium", {}),
        ("word", "none", {"reasoning_effort": "none"}),
        ("word", "high", {"reasoning_effort": "high"}),
        ("never", "none", {}),
        ("never", "medium", {}),
        ("never", "high", None),
        ("always", "none", None),
        ("always", "low", None),
    ],
)
def test_reasoning_effort_is_what_the_template_knows_of(
    server: Server,
    engine: ScriptedEngine,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    kind: str,
    effort: str,
    options: dict[str, Any] | None,
) -> None:
    settings = {"chat_template": [{"name": "default", "template": TEMPLATES[kind]}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    models = [type(SMOL)(**{**vars(SMOL), "path": tmp_path}), GRIFFIN]
    monkeypatch.setattr(FakeModels, "installed_models", lambda self: models)
    for path, more in (
        (CHAT, chat(reasoning_effort=effort)),
        ("/v1/responses", {"model": SMOL.name, "input": "Hi", "reasoning": {"effort": effort}}),
    ):
        reply = server.post(path, more)
        if options is None:
            assert (reply.status, reply.error["code"]) == (400, "unsupported_parameter")
        else:
            assert reply.status == 200
            assert engine.requests.pop().template_options == options


def test_template_variables_reach_the_engine(server: Server, engine: ScriptedEngine) -> None:
    asked = chat(chat_template_kwargs={"enable_thinking": False, "style": "terse"})
    assert server.post(CHAT, asked).status == 200
    assert engine.requests[0].template_options == {"enable_thinking": False, "style": "terse"}


def test_the_model_in_memory_has_the_context_that_there_is_room_for(
    server: Server, engine: ScriptedEngine
) -> None:
    engine.context_length = 4096
    lengths = {
        one["id"]: one["context_length"] for one in server.call("GET", "/v1/models").json["data"]
    }
    assert lengths == {SMOL.name: 8192, GRIFFIN.name: None}
    assert server.post(CHAT, chat()).status == 200
    lengths = {
        one["id"]: one["context_length"] for one in server.call("GET", "/v1/models").json["data"]
    }
    assert lengths == {SMOL.name: 4096, GRIFFIN.name: None}
    assert server.call("GET", f"/v1/models/{SMOL.name}").json["context_length"] == 4096


def test_models_answer_while_the_engine_does_not(server: Server, engine: ScriptedEngine) -> None:
    engine.stuck = True
    assert server.call("GET", f"/v1/models/{SMOL.name}").json["context_length"] == 8192
