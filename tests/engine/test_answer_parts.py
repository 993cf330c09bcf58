"""Reasoning and tool calls told apart from text: the same however the text is cut, and no character
lost. The formats are those of the models' own templates (`test_chat_prompt.py` renders those)."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

from app.engine.answer import AnswerStream
from app.engine.answer_parts import AnswerFormat, AnswerParts, Reasoning, Text
from app.engine.call_formats import CALL_FORMATS
from app.engine.call_readers import Call
from app.engine.conversation import Tool
from app.engine.pythonic_calls import read_pythonic
from mlxmodels.tokenizer import Tokenizer

from ..tiny_models import byte_tokenizer

WEATHER = Tool(
    "get_weather",
    parameters={
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    },
)
TOOLS = [WEATHER, Tool("now")]
THINK = ("<think>", "</think>")

PARIS = Call("get_weather", '{"city": "Paris", "days": 2}')
NOW = Call("now", "{}")
# One answer with the two calls above, in each convention.
WRITTEN = {
    "hermes": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n'
    '</tool_call>\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    "granite": '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}},'
    ' {"name": "now", "arguments": {}}]',
    "nemotron": '<toolcall> {"name": "get_weather", "arguments": {"city": "Paris", "days": 2}} '
    '</toolcall>\n<toolcall> {"name": "now", "arguments": {}} </toolcall>',
    "nemotron_nano": '<TOOLCALL>[{"name": "get_weather", "arguments": {"city": "Paris", '
    '"days": 2}}, {"name": "now", "arguments": {}}]</TOOLCALL>',
    "command": '<|START_ACTION|>[\n {"tool_call_id": "0", "tool_name": "get_weather", '
    '"parameters": {"city": "Paris", "days": 2}},\n {"tool_call_id": "1", "tool_name": "now", '
    '"parameters": {}}\n]<|END_ACTION|>',
    "mistral": '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}, '
    '"id": "abcdefghi"}, {"name": "now", "arguments": {}}]',
    "deepseek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n"
    '```json\n{"city": "Paris", "days": 2}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>now'
    "<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "llama": '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris", "days": 2}}; '
    '{"name": "now", "parameters": {}}',
    "functions": '<function=get_weather>{"city": "Paris", "days": 2}</function>\n'
    "<function=now>{}</function>",
    "qwen_xml": "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
    "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>\n"
    "<tool_call>\n<function=now>\n</function>\n</tool_call>",
    "glm": "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
    "gemma4": '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:2}<tool_call|>'
    "<|tool_call>call:now{}<tool_call|>",
    "pythonic": "<|python_tag|>[get_weather(city='Paris', days=2), now()]",
    "lfm2": '<|tool_call_start|>[get_weather(city="Paris", days=2), now()]<|tool_call_end|>',
}
OTHER_WAYS = [
    ("mistral", '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris", "days": 2}[TOOL_CALLS]now{}'),
    ("mistral", '[TOOL_CALLS]get_weather[CALL_ID]abc123DEF[ARGS]{"city": "Paris", "days": 2}'
     "[TOOL_CALLS]now[ARGS]{}"),
    ("llama", '{"name": "get_weather", "parameters": {"city": "Paris", "days": 2}}\n'
     '{"type": "function", "name": "now", "parameters": null}'),
    ("pythonic", "[get_weather(city='Paris', days=2), now()]"),
    ("lfm2", '<|tool_call_start|>[{"name": "get_weather", "arguments": {"city": "Paris", '
     '"days": 2}}, {"name": "now", "arguments": {}}]<|tool_call_end|>'),
    ("hermes", '<tool_call>[{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\", '
     '\\"days\\": 2}"}, {"name": "now"}]</tool_call>'),
    ("qwen_xml", "<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>2"
     "</parameter>\n</function>\n<function=now></function>"),
    # The end of the answer may come before the closing marker.
    ("hermes", WRITTEN["hermes"].removesuffix("\n</tool_call>")),
]  # fmt: skip


def joined(parts: list[Any]) -> list[Any]:
    """Neighbours of a kind as one."""
    whole: list[Any] = []
    for part in parts:
        if whole and not isinstance(part, Call) and type(whole[-1]) is type(part):
            whole[-1] = type(part)(whole[-1].text + part.text)
        else:
            whole.append(part)
    return whole


def read(format: AnswerFormat, *pieces: str, special: frozenset[str] = frozenset()) -> list[Any]:
    parts = AnswerParts(format, TOOLS, special)
    return joined([part for piece in pieces for part in parts.add(piece)] + parts.finish())


def calls(name: str) -> AnswerFormat:
    return AnswerFormat(calls=name)


def test_every_format_is_tried_here() -> None:
    assert set(WRITTEN) == set(CALL_FORMATS)


@pytest.mark.parametrize(("name", "written"), [*WRITTEN.items(), *OTHER_WAYS])
def test_calls_come_out_and_nothing_of_them_is_text(name: str, written: str) -> None:
    assert read(calls(name), written) == [PARIS, NOW]
    assert read(calls(name), *written) == [PARIS, NOW]


MARKED = [name for name in WRITTEN if name not in ("llama", "pythonic")]


@pytest.mark.parametrize("name", MARKED)
def test_text_around_calls_is_kept(name: str) -> None:
    written = f"Let me look.\n{WRITTEN[name]}\n\nDone {'{'}.\n"
    expected = [Text("Let me look."), PARIS, NOW, Text("Done {.\n")]
    assert read(calls(name), written) == read(calls(name), *written) == expected


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("get_weather", "launch_missiles"),  # no such tool
        ("Paris", 'Pa"ris'),  # JSON that is none
        ('{"city"', "{city"),
    ],
)
def test_what_is_no_call_is_text_and_the_next_one_is_read(
    name: str, change: str, value: str
) -> None:
    written = WRITTEN[name].replace(change, value)
    got = read(calls(name), *written)
    if value == "{city" and written == WRITTEN[name]:
        return  # not written in JSON
    if value == 'Pa"ris' and name in ("qwen_xml", "glm", "pythonic", "gemma4"):
        return  # a value like any other there
    assert PARIS not in got
    text = "".join(part.text for part in got if isinstance(part, Text))
    if NOW not in got:
        assert _solid(text, name) == _solid(written, name)
    assert value in text


def test_a_call_cut_off_by_the_limit_is_text() -> None:
    cut = '<tool_call>\n{"name": "now", "arg'
    assert read(calls("hermes"), "So:\n", cut) == [Text("So:\n" + cut)]


def test_text_waits_only_while_it_may_be_a_marker() -> None:
    parts = AnswerParts(calls("hermes"), TOOLS)
    assert parts.add("one <tool") == [Text("one")]
    assert parts.add("box> two") == [Text(" <toolbox> two")]
    assert parts.add(" <") == []
    assert parts.finish() == [Text(" <")]


def test_a_call_is_sent_before_the_answer_ends() -> None:
    parts = AnswerParts(calls("hermes"), TOOLS)
    assert parts.add('<tool_call>\n{"name": "now", "arguments": {}') == []
    assert parts.add("}") == [NOW]


def test_a_long_call_is_not_read_again_with_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time costs its length, on the thread that every other answer waits for."""
    pythonic, times = CALL_FORMATS["pythonic"], 0

    def counting(text: str, tools: Any) -> Any:
        nonlocal times
        times += 1
        return read_pythonic(text, tools)

    monkeypatch.setitem(CALL_FORMATS, "pythonic", dataclasses.replace(pythonic, bare=counting))
    parts = AnswerParts(AnswerFormat(calls="pythonic"), TOOLS)
    found: list[Any] = []
    for piece in ["[now(a=[", *["[1],"] * 3000, "])", "]", " then", " more" * 200]:
        found += parts.add(piece)
    found += parts.finish()
    assert times < 200
    assert json.loads(found[0].arguments) == {"a": [[1]] * 3000}
    assert [part.text for part in found[1:]] == ["then" + " more" * 200]


def test_an_answer_in_json_is_no_call_and_does_not_wait_for_its_end() -> None:
    parts = AnswerParts(calls("llama"), TOOLS)
    assert parts.add('{"result"') == [Text('{"result"')]
    assert read(calls("pythonic"), "[1, 2, 3]") == [Text("[1, 2, 3]")]
    assert AnswerParts(calls("pythonic"), TOOLS).add("[Note") == []
    assert AnswerParts(calls("pythonic"), TOOLS).add("[Note]") == [Text("[Note]")]


def test_markers_inside_arguments_are_arguments() -> None:
    arguments = {"city": "</tool_call><tool_call>{}[TOOL_CALLS]"}
    for name, opener in [("hermes", "<tool_call>"), ("mistral", "[TOOL_CALLS]")]:
        written = opener + json.dumps([{"name": "get_weather", "arguments": arguments}])
        assert read(calls(name), *written) == [Call("get_weather", json.dumps(arguments))]


def test_gemmas_values_become_json() -> None:
    value = '{a:[<|"|>x{,}"<|"|>,-1.5e3,true],b:{c:null,d:bare word},e:<|"|><|"|>}'
    (call,) = read(calls("gemma4"), f"<|tool_call>call:now{value}<tool_call|>")
    assert json.loads(call.arguments) == {
        "a": ['x{,}"', -1500.0, True], "b": {"c": None, "d": "bare word"}, "e": ""
    }  # fmt: skip


def test_what_is_too_large_for_a_call_is_text() -> None:
    head = '<tool_call>{"name": "now", "arguments": {"x": "'
    written = head + "a" * 300_000 + '"}}</tool_call>'
    pieces = [written[i : i + 5000] for i in range(0, len(written), 5000)]
    assert read(calls("hermes"), written) == read(calls("hermes"), *pieces) == [Text(written)]


@pytest.mark.parametrize(
    ("value", "json_text"),
    [
        ("1e999", None),  # no number of JSON
        ("NaN", None),
        ("[" * 40 + "]" * 40, None),  # too deep
        ("9" * 5000, None),
        ('"\\ud83d"', '"\\ud83d"'),  # half a character survives only as an escape
        ('"line\nend"', '"line\\nend"'),
    ],
)
def test_strange_values_are_text_or_sound_json(value: str, json_text: str | None) -> None:
    written = '<tool_call>{"name": "now", "arguments": {"x": ' + value + "}}</tool_call>"
    got = read(calls("hermes"), written)
    if json_text is None:
        assert got == [Text(written)]
    else:
        assert got == [Call("now", '{"x": ' + json_text + "}")]
        got[0].arguments.encode()


@pytest.mark.parametrize(
    "value", ["__import__('os')", "f()", "1 + 1", "x", "[*y]", "{1: 2}", "'a' 'b'", "lambda: 0"]
)
def test_python_that_is_no_literal_is_text(value: str) -> None:
    written = f"[now(x={value})]"
    assert read(calls("pythonic"), written) == [Text(written)]


def test_python_literals_become_json() -> None:
    written = "[now(a=-1.5e3, b='it\\'s\\n', c=[True, none, {\"k\": (1, 2,)}], d=007 )]"
    (call,) = read(calls("pythonic"), written)
    assert json.loads(call.arguments) == {
        "a": -1500.0, "b": "it's\n", "c": [True, None, {"k": [1, 2]}], "d": 7
    }  # fmt: skip


# Reasoning.

PROMPT_THINKS = AnswerFormat(THINK, begins_reasoning=True)
MODEL_THINKS = AnswerFormat(THINK)


@pytest.mark.parametrize(
    ("format", "written", "expected"),
    [
        (MODEL_THINKS, "<think>\nHm.\n</think>\n\nYes.", [Reasoning("Hm."), Text("Yes.")]),
        (PROMPT_THINKS, "\nHm.\n</think>\n\nYes.\n", [Reasoning("Hm."), Text("Yes.\n")]),
        (PROMPT_THINKS, "<think>\nHm.</think>Yes.", [Reasoning("Hm."), Text("Yes.")]),
        (MODEL_THINKS, "<think>\n\n</think>\n\nYes.", [Text("Yes.")]),
        (MODEL_THINKS, "<think>still th", [Reasoning("still th")]),
        (PROMPT_THINKS, "a </thi", [Reasoning("a </thi")]),
        (MODEL_THINKS, " Write <think> and </think>.", [Text(" Write <think> and </think>.")]),
        (MODEL_THINKS, "  \n", [Text("  \n")]),
        (MODEL_THINKS, "<thin", [Text("<thin")]),
        (
            AnswerFormat(THINK, calls="hermes"),
            "<think>a <tool_call>b</think> Look:\n" + WRITTEN["hermes"],
            [Reasoning("a <tool_call>b"), Text("Look:"), PARIS, NOW],
        ),
        (
            AnswerFormat(THINK, begins_reasoning=True, calls="hermes"),
            "a</think>\n" + WRITTEN["hermes"] + "\n<think>b</think>\nc",
            [Reasoning("a"), PARIS, NOW, Reasoning("b"), Text("c")],
        ),
    ],
)
def test_reasoning_is_told_apart(format: AnswerFormat, written: str, expected: list[Any]) -> None:
    assert read(format, written) == read(format, *written) == expected


def test_special_markers_are_never_text() -> None:
    special = frozenset({"<think>", "</think>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"})
    format = AnswerFormat(THINK, calls="mistral")
    assert read(format, "a</think> b<think>c", special=special) == [Text("a bc")]
    assert read(format, "a [TOOL_CALLS]nothing{}", special=special) == [Text("a nothing{}")]


# Tokens.


def _stream(
    tmp_path: Path,
    pieces: list[str],
    special: list[str],
    stop: list[str],
    reasoning: tuple[str, str] = THINK,
) -> list[Any]:
    """What each of the pieces releases, one token each, and the end."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([piece for piece in pieces if piece not in special and len(piece) > 1])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ids = [id for piece in pieces for id in tokenizer.encode(piece).ids]
    format = AnswerFormat(reasoning, calls="hermes")
    stream = AnswerStream(Tokenizer.from_directory(tmp_path), stop, format, TOOLS)
    return [*map(stream.add, ids), stream.finish()]


def test_text_behind_a_call_comes_behind_it(tmp_path: Path) -> None:
    written = 'one<tool_call>{"name": "now"}</tool_call>two'
    first, second, last = _stream(tmp_path, [written, "three"], [], [])
    assert (first.text, first.calls) == ("one", [NOW])
    assert (second.text, second.calls, last.text) == ("twothree", [], "")


def test_text_between_calls_that_become_certain_together_stays_between_them(tmp_path: Path) -> None:
    call = '<tool_call>{"name": "now"}</tool_call>'
    released = _stream(tmp_path, [f"one{call}two{call}three", "four", "five"], [], [])
    assert [(r.text, r.calls) for r in released] == [
        ("one", [NOW]),
        ("two", [NOW]),
        ("threefourfive", []),
        ("", []),
    ]


def test_reasoning_ends_at_a_special_token_and_stop_strings_begin_behind_it(tmp_path: Path) -> None:
    pieces = ["<think>", "ok é", "</think>", "Yes"]
    released = _stream(tmp_path, pieces, ["<think>", "</think>"], ["o"])
    assert "".join(r.reasoning for r in released) == "ok é"
    assert "".join(r.text for r in released) == "Yes"


def test_a_marker_may_be_a_special_token_and_more(tmp_path: Path) -> None:
    """As Gemma 4's "<|channel>thought"."""
    channel = ("<|channel>thought", "<channel|>")
    pieces = ["<|channel>", "thought", "\nHm.", "<channel|>", "Yes"]
    released = _stream(tmp_path, pieces, ["<|channel>", "<channel|>"], [], channel)
    assert "".join(r.reasoning for r in released) == "Hm."
    assert "".join(r.text for r in released) == "Yes"


def test_text_held_for_a_stop_string_comes_before_the_call(tmp_path: Path) -> None:
    pieces = ["so EN", '<tool_call>{"name": "now"}', "</tool_call>", "D"]
    released = _stream(tmp_path, pieces, [], ["END"])
    assert not any(r.has_stopped for r in released)
    assert [r.text for r in released if r.calls] == ["EN"]
    assert "".join(r.text for r in released) == "so END"


# Properties.

FORMATS = [
    AnswerFormat(reasoning, begins, name)
    for reasoning, begins in [(None, False), (THINK, False), (THINK, True)]
    for name in ["", *WRITTEN]
]
ALL_MARKERS = sorted({m for f in FORMATS for m in f.markers} | {";"}, key=len, reverse=True)
SNIPPETS = st.sampled_from(
    [*ALL_MARKERS, *WRITTEN.values(), *(written for _, written in OTHER_WAYS)]
    + [" ", "\n", "text", "{", "}", "[", "]", '"', "\\", "<", "é", "🦅", "now", "get_weather("]
)


def _solid(text: str, name: str) -> str:
    """What must survive whatever is found: all but white space and markers."""
    format = AnswerFormat(THINK, calls=name)
    markers = sorted(format.markers | {"<|eom_id|>", ";"}, key=len, reverse=True)
    pattern = r"\s|" + "|".join(map(re.escape, markers))
    while (less := re.sub(pattern, "", text)) != text:  # what is around one may be another
        text = less
    return text


@st.composite
def answers(draw: st.DrawFn) -> str:
    """Valid answers with a few mutations, between snippets of markers and text."""
    text = "".join(draw(st.lists(SNIPPETS, max_size=5)))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(text)))
        drop = draw(st.integers(0, 4))
        text = text[:at] + draw(SNIPPETS | st.text(max_size=3)) + text[at + drop :]
    return text


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(st.sampled_from(FORMATS), answers(), st.data(), st.booleans())
def test_any_split_gives_the_same_and_nothing_is_lost(
    format: AnswerFormat, text: str, data: st.DataObject, specials: bool
) -> None:
    special = format.markers if specials else frozenset()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = read(format, text, special=special)
    assert read(format, *pieces, special=special) == whole
    assert read(format, *text, special=special) == whole
    said = "".join(part.text for part in whole if not isinstance(part, Call))
    if not any(isinstance(part, Call) for part in whole):
        assert _solid(said, format.calls) == _solid(text, format.calls)
    if format.is_plain:
        assert said == text
