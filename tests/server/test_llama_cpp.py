"""llama.cpp's routes: request bodies as llama.vim and llama.vscode send them (our reading of their
sources), answers with what they read."""

from __future__ import annotations

import dataclasses
import itertools
import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.engine.protocol import (
    ContextFile,
    Failed,
    Finished,
    GenerationRequest,
    Infill,
    Timings,
    Token,
    Usage,
)
from app.errors import GryphonError
from app.library.infill import can_infill, infill_models
from app.server import infill
from app.server.infill import EarlyEnd
from app.server.llama_cpp_requests import InfillFields

from ..fakes import FakeEngine
from ..tiny_models import byte_tokenizer
from .conftest import GRIFFIN, SMOL, ScriptedEngine, Server, chat

# llama.vim, autoload/llama.vim: a completion, and the request that has the context read.
VIM: dict[str, Any] = {
    "id_slot": 0,
    "input_prefix": "def f(\n",
    "input_suffix": "\n    return x\n",
    "input_extra": [{"text": "y = 1\n", "time": [1, 2], "filename": "b.py"}],
    "prompt": "    x",
    "n_predict": 128,
    "stop": [],
    "n_indent": 4,
    "top_k": 40,
    "top_p": 0.90,
    "samplers": ["top_k", "top_p", "infill"],
    "stream": False,
    "cache_prompt": True,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 1000,
    "response_fields": [
        "content",
        "timings/prompt_n",
        "timings/prompt_ms",
        "timings/prompt_per_token_ms",
        "timings/prompt_per_second",
        "timings/predicted_n",
        "timings/predicted_ms",
        "timings/predicted_per_token_ms",
        "timings/predicted_per_second",
        "truncated",
        "tokens_cached",
    ],
}
VIM_CONTEXT: dict[str, Any] = {
    "id_slot": 0,
    "input_prefix": "",
    "input_suffix": "",
    "input_extra": [{"text": "y = 1\n", "time": 0.5, "filename": "b.py"}],
    "prompt": "",
    "n_predict": 0,
    "temperature": 0.0,
    "samplers": [],
    "stream": False,
    "cache_prompt": True,
    "t_max_prompt_ms": 1,
    "t_max_predict_ms": 1,
    "response_fields": [""],
}
# llama.vscode, src/llama-server.ts.
VSCODE: dict[str, Any] = {
    "id_slot": 0,
    "input_prefix": "a",
    "input_suffix": "b",
    "input_extra": [],
    "prompt": "",
    "n_predict": 128,
    "n_cmpl": 3,
    "top_k": 40,
    "top_p": 0.99,
    "stream": False,
    "samplers": ["top_k", "top_p", "infill"],
    "cache_prompt": True,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 2500,
}


def test_llama_vim_gets_the_fields_it_names(server: Server, engine: ScriptedEngine) -> None:
    engine.answers = [[" + 1", "\n    y"]]
    reply = server.post("/infill", VIM)
    assert reply.status == 200, reply.body
    assert set(reply.json) == set(VIM["response_fields"])
    assert reply.json["content"] == " + 1\n    y"
    assert reply.json["timings/predicted_n"] == 2 and reply.json["timings/prompt_n"] == 7
    assert reply.json["truncated"] is False and reply.json["tokens_cached"] == 0
    (asked,) = engine.requests
    assert asked.model == SMOL.ref and asked.client
    assert (asked.prompt, asked.suffix) == (VIM["input_prefix"], VIM["input_suffix"])
    assert asked.infill == Infill(files=[ContextFile("b.py", "y = 1\n")], middle="    x")
    assert asked.max_tokens == 128 and asked.stop == []
    chosen = asked.sampling
    assert (chosen.top_k, chosen.top_p, chosen.min_p) == (40, 0.9, 0.2)
    # What it leaves out of the samplers is off, whatever the model recommends.
    assert (chosen.temperature, chosen.typical_p, chosen.xtc_probability) == (1, 1, 0)
    assert (chosen.repetition_penalty, chosen.presence_penalty) == (1, 0)


def test_context_is_read_for_later_without_an_answer(
    server: Server, engine: ScriptedEngine
) -> None:
    assert server.post("/infill", VIM_CONTEXT).json == {}
    engine.answers = [["Hello"]]
    whole = server.post("/infill", VIM_CONTEXT | {"response_fields": None}).json
    assert (whole["content"], whole["tokens_predicted"]) == ("", 0)
    assert whole["tokens_evaluated"] == 7 and whole["stop_type"] == "limit"
    assert [asked.max_tokens for asked in engine.requests] == [1, 1]
    assert engine.requests[0].infill == Infill(files=[ContextFile("b.py", "y = 1\n")])
    assert (engine.requests[0].prompt, engine.requests[0].suffix) == ("", "")


def test_llama_vscode_gets_as_many_completions_as_it_asks_for(
    server: Server, engine: ScriptedEngine
) -> None:
    reply = server.post("/infill", VSCODE | {"seed": 5})
    assert [one["index"] for one in reply.json] == [0, 1, 2]
    assert {one["content"] for one in reply.json} == {"Hello there."}
    assert sorted(asked.sampling.seed or 0 for asked in engine.requests) == [5, 6, 7]
    one = reply.json[0]
    assert one["stop"] is True and one["stop_type"] == "eos" and one["tokens_cached"] == 0
    assert one["generation_settings"]["n_ctx"] == 8192
    assert (one["tokens_predicted"], one["tokens_evaluated"]) == (3, 7)
    timings = one["timings"]
    assert timings["prompt_ms"] == pytest.approx(100) and timings["predicted_n"] == 3
    assert timings["prompt_per_second"] == pytest.approx(70)
    assert timings["predicted_per_second"] == pytest.approx(10)


def frames(body: bytes) -> Iterator[dict[str, Any]]:
    for frame in body.decode().removesuffix("\n\n").split("\n\n"):
        if not frame.startswith(":"):
            assert frame.startswith("data: ")
            yield json.loads(frame.removeprefix("data: "))


def test_a_stream_has_pieces_and_one_end(server: Server, engine: ScriptedEngine) -> None:
    reply = server.post("/infill", {"input_prefix": "a", "stream": True, "stop": ["\n\n"]})
    assert reply.headers["content-type"].startswith("text/event-stream")
    *parts, end = frames(reply.body)
    assert [part["content"] for part in parts] == ["Hello", " there", "."]
    assert [part["stop"] for part in parts] == [False] * 3
    assert [part["tokens"] for part in parts] == [[0], [1], [2]]
    assert end["stop"] is True and end["content"] == "" and end["tokens_predicted"] == 3
    assert "stop_type" not in end  # the model, or the stop string: nobody says
    assert engine.requests[0].infill == Infill() and engine.requests[0].suffix == ""


def test_a_stream_that_fails_midway_says_so_and_has_no_end(
    server: Server, engine: ScriptedEngine
) -> None:
    engine.answers = [["Hi", Failed("", "engine_crashed", "It stopped.")]]
    *parts, last = frames(server.post("/infill", {"stream": True}).body)
    assert [part["content"] for part in parts] == ["Hi"]
    assert last == {"error": {"code": 500, "message": "It stopped.", "type": "server_error"}}


@pytest.mark.parametrize(
    ("pieces", "indent", "want"),
    [
        (["x\n", "    y\n", "  ", "z", "w"], 4, "x\n    y\n  "),
        (["x\n    y\nz\n"], 4, "x\n    y\n"),
        (["x\n", "\n", "    y"], 4, "x\n"),
        (["x\n", "\ty"], 1, "x\n\ty"),
        (["  x", "y\n", "y"], 0, "  xy\ny"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_before_a_line_that_is_indented_less(
    server: Server, engine: ScriptedEngine, pieces: list[str], indent: int, want: str, stream: bool
) -> None:
    engine.answers = [list(pieces)]
    reply = server.post("/infill", {"n_indent": indent, "stream": stream})
    answers = [*frames(reply.body)] if stream else [reply.json]
    assert "".join(answer["content"] for answer in answers) == want
    is_early = want != "".join(pieces)
    assert answers[-1]["stop_type"] == ("limit" if is_early else "eos")
    assert len(engine.cancelled) == is_early


async def test_time_ends_an_answer_that_has_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()  # a second passes whenever somebody looks
    clock = types.SimpleNamespace(monotonic=lambda: float(next(ticks)))
    monkeypatch.setattr(infill, "time", clock)
    engine = FakeEngine([["a", "b", "c", "d\n", "e", "f"]])
    request = GenerationRequest(id="g", model=SMOL.ref, prompt="")
    events = [event async for event in EarlyEnd(engine, seconds=1.0).stream(request)]
    assert "".join(event.text for event in events if isinstance(event, Token)) == "abcd\n"
    end = events[-1]
    assert isinstance(end, Finished) and end.reason == "length"
    assert (end.usage.prompt_tokens, end.usage.completion_tokens) == (7, 4)
    assert end.timings.prefill_s > 0 and end.timings.decode_s == 3
    assert engine.cancelled == ["g"]


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"samplers": ["top_k", "magic"]}, "magic"),
        ({"samplers": "kp"}, "samplers"),
        ({"n_predict": -2}, "n_predict"),
        ({"n_cmpl": 9}, "n_cmpl"),
        ({"grammar": "root ::= x"}, "grammar"),
        ({"json_schema": {}}, "json_schema"),
        ({"mirostat": 2}, "mirostat"),
        ({"dry_multiplier": 0.8}, "dry_multiplier"),
        ({"n_probs": 3}, "n_probs"),
        ({"lora": [{"id": 0, "scale": 1}]}, "lora"),
        ({"repeat_penalty": 1.1, "repeat_last_n": 64}, "repeat_last_n"),
        ({"temperature": 3}, "temperature"),
        ({"logit_bias": [["Hello", 1]]}, "logit_bias"),
        ({"logit_bias": [[1, 101]]}, "logit_bias"),
        ({"input_extra": [{"filename": "a"}]}, "input_extra[0].text"),
        ({"input_extra": [{"text": ""}] * 257}, "input_extra"),
        ({"input_prefix": 5}, "input_prefix"),
        ({"image_data": []}, "image_data"),
    ],
)
def test_what_is_refused_is_named(server: Server, more: dict[str, Any], param: str) -> None:
    reply = server.post("/infill", more)
    assert reply.status == 400 and reply.error["code"] == 400
    assert reply.error["type"] == "invalid_request_error" and param in reply.error["message"]


def test_sampling_is_said_in_llama_cpps_names() -> None:
    fields = InfillFields.model_validate(
        {
            "temperature": -1,
            "top_k": -1,
            "typical_p": 0.5,
            "repeat_penalty": 1.2,
            "repeat_last_n": -1,
            "xtc_probability": 0.5,
            "xtc_threshold": 0.6,
            "logit_bias": [[5, -1.5], [6, False], ["7", 2]],
            "seed": 2**32 - 1,
            "stop": "x",
            "min_p": None,
        }
    )
    sampling = fields.sampling
    assert (sampling.temperature, sampling.top_k, sampling.typical_p) == (0, 0, 0.5)
    assert sampling.repetition_penalty == 1.2 and sampling.seed is None
    assert (sampling.xtc_probability, sampling.xtc_threshold) == (0, None)
    assert sampling.logit_bias == {5: -1.5, 6: -100.0, 7: 2.0}
    assert sampling.min_p is None and fields.stop == ["x"]
    assert InfillFields.model_validate({"logit_bias": {"7": 2}}).sampling.logit_bias == {7: 2.0}


def test_a_model_that_cannot_says_which_can(
    server: Server, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.answers = [[Failed("", "no_infill", "It cannot.")]]
    monkeypatch.setattr(
        "app.server.generation.infill_models", lambda models: [one.name for one in models]
    )
    reply = server.post("/infill", {"input_prefix": "a", "stream": True})
    assert reply.status == 400
    message = f"It cannot. Installed models that can: {GRIFFIN.name}, {SMOL.name}."
    assert reply.error == {"code": 400, "message": message, "type": "invalid_request_error"}


def test_the_resident_model_answers_where_none_is_named(
    server: Server, engine: ScriptedEngine
) -> None:
    server.post("/infill", {"model": GRIFFIN.name})
    assert engine.requests[-1].model == GRIFFIN.ref  # which makes it resident
    server.post("/infill", {})
    assert engine.requests[-1].model == GRIFFIN.ref
    engine.status_error = GryphonError("engine_unresponsive", "No.")
    server.post("/infill", {"model": ""})
    assert engine.requests[-1].model == SMOL.ref
    missing = server.post("/infill", {"model": "nobody"})
    assert missing.status == 404 and missing.error["type"] == "not_found_error"


def test_props(server: Server, engine: ScriptedEngine) -> None:
    props = server.call("GET", "/props").json
    assert props["default_generation_settings"]["n_ctx"] == 8192
    assert props["model_alias"] == SMOL.name and props["chat_template"] == ""
    assert props["modalities"] == {"vision": False, "audio": False}
    other = server.call("GET", f"/props?model={GRIFFIN.name}&autoload=false").json
    assert other["model_alias"] == GRIFFIN.name
    assert other["default_generation_settings"]["n_ctx"] == 0  # without a limit
    server.post("/v1/chat/completions", chat(model=GRIFFIN.name))
    engine.context_length = 1000  # what there is memory for
    assert server.call("GET", "/props").json["default_generation_settings"]["n_ctx"] == 1000
    assert server.call("GET", "/props?model=nobody").status == 404


def test_tokens_of_a_text_and_back(server: Server, engine: ScriptedEngine) -> None:
    reply = server.post("/tokenize", {"content": "aé"})
    assert reply.json == {"tokens": [97, 0xC3, 0xA9]}
    pieces = server.post("/tokenize", {"content": "aé", "with_pieces": True}).json["tokens"]
    assert pieces == [
        {"id": 97, "piece": "a"},
        {"id": 0xC3, "piece": [0xC3]},
        {"id": 0xA9, "piece": [0xA9]},
    ]
    server.post("/tokenize", {"content": "", "add_special": True, "parse_special": False})
    first, _, last = engine.asked
    assert (first.add_special, first.parse_special) == (False, True)
    assert (last.add_special, last.parse_special) == (True, False)
    back = server.post("/detokenize", {"tokens": [97, 0xC3, 0xA9], "model": GRIFFIN.name})
    assert back.json == {"content": "aé"}
    assert engine.asked[-1].model == GRIFFIN.ref and engine.asked[-1].with_special
    for path, bad in (
        ("/tokenize", {}),
        ("/tokenize", {"content": ["a", 5]}),
        ("/tokenize", {"content": "a", "count": 1}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": "a"}),
    ):
        refused = server.post(path, bad)
        assert refused.status == 400 and refused.error["type"] == "invalid_request_error"
    engine.refuses = GryphonError("prompt_too_slow", "Too slow.")
    assert server.post("/tokenize", {"content": "a"}).status == 400


def test_models_that_fill_gaps_are_known_by_their_files(tmp_path: Path) -> None:
    tokens = ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"]
    models = []
    for name, added in (("coder", tokens), ("half", tokens[:2]), ("none", [])):
        tokenizer = byte_tokenizer()
        tokenizer.add_special_tokens(added)
        (tmp_path / name).mkdir()
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
        models.append(dataclasses.replace(SMOL, name=name, path=tmp_path / name))
    assert infill_models([*models, GRIFFIN]) == ["coder"]
    escaped = json.dumps(json.loads((tmp_path / "coder/tokenizer.json").read_text()))
    (tmp_path / "none" / "tokenizer.json").write_text(escaped)
    assert can_infill(tmp_path / "none")


def test_an_end_of_its_own_passes_through(server: Server, engine: ScriptedEngine) -> None:
    end = Finished("", "stop", Usage(9, 2, 4), Timings(0.0, 0.5, 0.25), text="c\nd")
    engine.answers = [["a", "b", end]]
    whole = server.post("/infill", {"n_indent": 2, "return_tokens": True}).json
    assert whole["content"] == "abc\n" and whole["tokens"] == [0, 1]
    assert whole["tokens_cached"] == whole["timings"]["cache_n"] == 4
    assert whole["timings"]["prompt_n"] == 5 and whole["timings"]["predicted_ms"] == 250
