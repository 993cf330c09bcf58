"""The wire: what goes in comes out, and nonsense is refused by name."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import msgspec
import pytest

from app.engine.protocol import (
    MAX_FRAME_BYTES,
    Accepted,
    Cancel,
    ContextFile,
    Detokenize,
    Detokenized,
    DraftModel,
    Embed,
    Embedded,
    Failed,
    Finished,
    GenerationRequest,
    GetStatus,
    Infill,
    LoadModel,
    Message,
    ModelRef,
    Progress,
    Sampling,
    Timings,
    Token,
    Tokenize,
    Tokenized,
    TokenLogprob,
    Tool,
    ToolCall,
    ToolCallPart,
    Usage,
    check_request,
    encode_frame,
    read_command,
    read_event,
)
from app.errors import GryphonError

MODEL = ModelRef("m", "/m")
REQUEST = GenerationRequest(id="a", model=MODEL, prompt="hi")


def _reader(data: bytes) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    return reader


@pytest.mark.parametrize(
    "command",
    [
        REQUEST,
        GenerationRequest(
            id="b",
            model=MODEL,
            messages=[Message("user", "naïve \x00 🦅")],
            sampling=Sampling(temperature=0, seed=-3, logit_bias={5: -1.5}),
            stop=["\n"],
            logprobs=True,
        ),
        GenerationRequest(
            id="c",
            model=MODEL,
            messages=[
                Message("assistant", "", "Hm.", [ToolCallPart("call_1", "f", '{"a": 1}')]),
                Message("tool", "1", tool_call_id="call_1", name="f"),
            ],
            tools=[Tool("f", "Does.", {"type": "object", "x": [1, None, {"y": 0.5}]})],
            template_options={"enable_thinking": False},
        ),
        GenerationRequest(
            id="g",
            model=MODEL,
            prompt="def f(",
            suffix="):",
            infill=Infill(files=[ContextFile("a.py", "a = 1")], middle="x"),
        ),
        Embed(id="e", model=MODEL, texts=["a", "🦅"], pooling="last", keep_alive_s=math.inf),
        Embed(id="e", model=MODEL, tokens=[[1], [2, 3]], wait_for_model=False),
        Tokenize(id="t", model=MODEL, messages=[Message("user", "a")], add_generation_prompt=False),
        Detokenize(id="d", model=MODEL, tokens=[1, 2], with_special=True),
        Cancel("a"),
        LoadModel("l", MODEL),
        GetStatus("s"),
    ],
    ids=lambda command: type(command).__name__,
)
async def test_commands_survive_the_wire(command: Any) -> None:
    assert await read_command(_reader(encode_frame(command))) == command


@pytest.mark.parametrize(
    "event",
    [
        Accepted("a", 3, 0, None),
        Progress("a", "prefill", 1, 2),
        Token("a", "é", 7, TokenLogprob(7, "�", b"\xc3", -0.5)),
        Token("a", "", 7, reasoning="Hm"),
        ToolCall("a", "call_1", "f", '{"a": 1}'),
        Embedded("e", b"\x00\x00\x80?", 1, [3]),
        Tokenized("t", [1, 2], [b"\xc3", b"\xa9"]),
        Detokenized("d", "é"),
        Finished("a", "stop", Usage(1, 2, 0), Timings(0.1, 0.2, 0.3)),
        Failed("a", "engine_crashed", "It stopped.", 1.0),
    ],
    ids=lambda event: type(event).__name__,
)
async def test_events_survive_the_wire(event: Any) -> None:
    assert await read_event(_reader(encode_frame(event))) == event


async def test_a_frame_that_ends_early_is_the_end_of_the_connection() -> None:
    with pytest.raises(asyncio.IncompleteReadError):
        await read_command(_reader(encode_frame(REQUEST)[:-1]))


async def test_a_frame_that_claims_too_much_is_refused_before_it_is_read() -> None:
    with pytest.raises(ConnectionError, match="larger"):
        await read_command(_reader(b"\xff\xff\xff\xff"))


async def test_bytes_that_are_no_command_are_refused() -> None:
    with pytest.raises(msgspec.MsgspecError):
        await read_command(_reader(b"\x00\x00\x00\x04\xffabc"))


def test_a_number_too_large_for_a_frame_is_the_clients_fault() -> None:
    tool = Tool("f", "", {"type": "object", "maximum": 2**70})
    with pytest.raises(GryphonError, match="64 bits") as caught:
        encode_frame(msgspec.structs.replace(REQUEST, tools=[tool]))
    assert caught.value.code == "invalid_request"


def test_a_request_too_large_for_a_frame_says_so() -> None:
    request = msgspec.structs.replace(REQUEST, prompt="x" * (MAX_FRAME_BYTES + 1))
    with pytest.raises(GryphonError) as caught:
        encode_frame(request)
    assert caught.value.code == "request_too_large"


def test_text_that_is_not_unicode_says_so() -> None:
    with pytest.raises(GryphonError, match="not valid Unicode"):
        encode_frame(msgspec.structs.replace(REQUEST, prompt="\udcff"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": None}, "exactly one"),
        ({"messages": [Message("user", "x")]}, "exactly one"),
        ({"prompt": None, "messages": []}, "messages is empty"),
        ({"prompt": None, "prompt_tokens": []}, "prompt_tokens is empty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": [""]}, "empty string"),
        ({"stop": ["x"] * 17}, "16 strings"),
        ({"stop": ["x" * 1025]}, "stop string may have 1024 characters at most, got 1025"),
        ({"model": ModelRef("m" * 1001, "/m")}, "model's name may have 1000 characters"),
        ({"model": ModelRef("m", "/m\0")}, "without zero bytes"),
        ({"model": ModelRef("m", "/" * 4097)}, "path of 4096 characters at most"),
        ({"model": ModelRef("m", "/m", "/a\0")}, "without zero bytes"),
        ({"speculation": DraftModel(ModelRef("d", "/d\0"))}, "without zero bytes"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"sampling": Sampling(temperature=2.1)}, "temperature must be 0 to 2, got 2.1"),
        ({"sampling": Sampling(temperature=-1)}, "temperature"),
        ({"sampling": Sampling(temperature=math.nan)}, "temperature"),
        ({"sampling": Sampling(top_p=1.5)}, "top_p"),
        ({"sampling": Sampling(min_p=-0.1)}, "min_p"),
        ({"sampling": Sampling(top_k=-1)}, "top_k"),
        ({"sampling": Sampling(top_k=2**31)}, "top_k"),
        ({"sampling": Sampling(seed=2**63)}, "seed"),
        ({"sampling": Sampling(typical_p=1.01)}, "typical_p must be 0 to 1, got 1.01"),
        ({"sampling": Sampling(xtc_probability=-0.5)}, "xtc_probability must be 0 to 1"),
        ({"sampling": Sampling(xtc_threshold=0.6)}, "xtc_threshold must be 0 to 0.5, got 0.6"),
        ({"sampling": Sampling(repetition_penalty=0)}, "repetition_penalty must be 0.1 to 10"),
        ({"sampling": Sampling(repetition_penalty=math.inf)}, "repetition_penalty .* got inf"),
        ({"sampling": Sampling(presence_penalty=-2.1)}, "presence_penalty must be -2 to 2"),
        ({"sampling": Sampling(frequency_penalty=math.nan)}, "frequency_penalty .* got nan"),
        ({"sampling": Sampling(logit_bias={5: 101})}, "token 5 must be -100 to 100, got 101"),
        ({"sampling": Sampling(logit_bias={5: math.nan})}, "token 5 .* got nan"),
        ({"sampling": Sampling(logit_bias={-1: 1})}, "logit_bias .* got -1"),
        ({"sampling": Sampling(logit_bias={2**31: 1})}, "logit_bias .* got 2147483648"),
        ({"sampling": Sampling(logit_bias=dict.fromkeys(range(1025), 1.0))}, "1024 tokens at most"),
        ({"max_tokens": 2**31}, "max_tokens"),
        ({"min_tokens": -1}, "min_tokens must be 0 to"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens must be 0 to 8, which is max_tokens"),
    ],
    ids=str,
)
def test_what_no_model_could_answer_is_refused_by_name(change: dict[str, Any], said: str) -> None:
    with pytest.raises(GryphonError, match=said):
        check_request(msgspec.structs.replace(REQUEST, **change))


def _deep(levels: int) -> dict[str, Any]:
    return {"a": _deep(levels - 1)} if levels > 1 else {}


def _calling(arguments: str, name: str = "f") -> list[Message]:
    return [Message("assistant", "", tool_calls=[ToolCallPart("call_1", name, arguments)])]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tools": [Tool("a b")]}, "A tool's name must be 1 to 64 letters"),
        ({"tools": [Tool("x" * 65)]}, "1 to 64 letters"),
        ({"tools": [Tool("f"), Tool("f")]}, "'f' twice"),
        ({"tools": [Tool(f"f{i}") for i in range(129)]}, "128 tools at most, got 129"),
        ({"tools": [Tool("f", "x" * 2**20)]}, "may take 1048576 bytes"),
        ({"tools": [Tool("f", "", _deep(33))]}, "parameters of 'f' may have 32 levels at most"),
        ({"tools": [Tool("f", "", {"a": math.nan})]}, "parameters of 'f' must be JSON"),
        ({"tools": [Tool("f")], "tool_choice": "g"}, "tool_choice must be auto, none, required"),
        ({"tool_choice": "required"}, "tool_choice 'required' needs tools"),
        ({"tools": [Tool("f", "", {"a": [0] * 100_001})]}, "and 100000 values"),
        ({"messages": _calling('{"a": "' + "x" * 2**22 + '"}')}, "4194304 characters in all"),
        ({"template_options": {"messages": []}}, "may not hold 'messages'"),
        ({"template_options": {"bos_token": "x"}}, "may not hold 'bos_token'"),
        ({"template_options": {"a.b": 1}}, "no variable's name"),
        ({"template_options": {"a": "x" * 2**16}}, "may take 65536 bytes"),
        ({"template_options": {"a": _deep(32)}}, "32 levels at most"),
        ({"template_options": {"a": "é" * 2**15}}, "may take 65536 bytes"),
        ({"template_options": {"a": {1: 2, "b": 3}}}, "template_options must be JSON"),
        ({"messages": _calling('{"a": NaN}')}, "must be the JSON text of an object"),
        ({"messages": [Message("user", "x")] * 10_001}, "10000 at most, got 10001"),
        ({"messages": _calling("{}") * 1025}, "1024 tool calls in all"),
        ({"messages": _calling("[]")}, "JSON text of an object"),
        ({"messages": _calling("{")}, r"messages\[0\] must be the JSON text"),
        ({"messages": _calling('{"a":' * 40 + "1" + "}" * 40)}, "at most 32 levels"),
        ({"messages": _calling("{}", "a/b")}, "A called tool's name"),
        ({"messages": [Message("user", "x", "thought")]}, "only the assistant"),
        ({"messages": [Message("user", "x", tool_call_id="a")]}, "its role must be tool"),
        ({"messages": [Message("tool", "x", name="a b")]}, "The tool's name in messages"),
    ],
    ids=str,
)
def test_tools_that_could_not_be_told_of_are_refused_by_name(
    change: dict[str, Any], said: str
) -> None:
    plain = {"prompt": None, "messages": [Message("user", "x")]}
    with pytest.raises(GryphonError, match=said):
        check_request(msgspec.structs.replace(REQUEST, **(plain | change)))


def test_tools_need_messages() -> None:
    for change in ({"tools": [Tool("f")]}, {"template_options": {"a": 1}}):
        with pytest.raises(GryphonError, match="give messages, not a prompt"):
            check_request(msgspec.structs.replace(REQUEST, **change))


def test_sound_tools_pass() -> None:
    messages = [Message("user", "x"), *_calling('{"a": 1}'), Message("tool", "1")]
    tools = [Tool("get.x-y_1", "", _deep(32))]
    change = {"prompt": None, "messages": messages, "tools": tools}
    for choice in ("auto", "none"):
        check_request(msgspec.structs.replace(REQUEST, tool_choice=choice, **change))
    for choice in ("required", "f"):
        held = change | {"tools": [Tool("f")], "tool_choice": choice}
        check_request(msgspec.structs.replace(REQUEST, **held))


def test_a_request_too_deep_for_the_wire_says_so() -> None:
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"a": deep}
    with pytest.raises(GryphonError, match="nested too deeply"):
        encode_frame(msgspec.structs.replace(REQUEST, template_options=deep))
    while deep:  # or its own end would be too deep
        deep = deep["a"]


def test_a_plain_request_passes() -> None:
    check_request(REQUEST)


def test_the_ends_of_every_range_pass() -> None:
    for sampling in (
        Sampling(typical_p=0, xtc_probability=1, xtc_threshold=0.5, repetition_penalty=10),
        Sampling(presence_penalty=-2, frequency_penalty=2, repetition_penalty=0.1),
        Sampling(logit_bias=dict.fromkeys(range(1024), -100.0)),
    ):
        check_request(msgspec.structs.replace(REQUEST, sampling=sampling))
    check_request(msgspec.structs.replace(REQUEST, min_tokens=8, max_tokens=8))
