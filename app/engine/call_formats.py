"""The conventions in which models write tool calls, and which of them a template uses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from app.engine.call_readers import (
    Calls,
    Reader,
    Tools,
    json_reader,
    keyed_reader,
    xml_reader,
)
from app.engine.gemma_calls import QUOTE, read_gemma
from app.engine.pythonic_calls import read_pythonic


@dataclass(frozen=True)
class CallFormat:
    """One convention.

    Attributes:
        readers: By the marker that opens a call.
        closers: Markers that may follow a call, and are dropped there.
        dropped: Markers around all calls of an answer, dropped wherever they are.
        inner: Markers inside a call that a tokenizer may hold as special tokens.
        bare: Reader of an answer that is a call from its first character on, without a marker.
        bare_start: That first character.
        written: What is put around a call's JSON, where a template leaves it to the content.
    """

    readers: Mapping[str, Reader]
    closers: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()
    bare: Reader | None = None
    bare_start: str = ""
    written: tuple[str, str] | None = None

    @property
    def markers(self) -> set[str]:
        return {*self.readers, *self.closers, *self.dropped, *self.inner}


def _marked(opener: str, closer: str) -> CallFormat:
    """JSON between two markers."""
    return CallFormat({opener: json_reader()}, closers=(closer,), written=(opener, closer))


_DEEPSEEK = ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>")

_MARKED = {
    "hermes": ("<tool_call>", "</tool_call>"),  # Qwen 2.5 and 3, Hermes, SmolLM3, Granite 4
    "nemotron": ("<toolcall>", "</toolcall>"),  # Nemotron mini
    "nemotron_nano": ("<TOOLCALL>", "</TOOLCALL>"),
    "command": ("<|START_ACTION|>", "<|END_ACTION|>"),
}


_read_json = json_reader()


def _read_list(text: str, tools: Tools) -> Calls | None:
    """Either kind of list: LFM2 is taught both."""
    is_json = re.match(r"\s*(?:\[\s*)?(?:\{|$)", text)
    return _read_json(text, tools) if is_json else read_pythonic(text, tools)


def _formats() -> dict[str, CallFormat]:
    begin, separator, end = _DEEPSEEK
    return {name: _marked(*markers) for name, markers in _MARKED.items()} | {
        "granite": CallFormat(
            {"<|tool_call|>": json_reader()},
            closers=("<|/tool_call|>",),
            written=("<|tool_call|>[", "]"),
        ),
        "mistral": CallFormat(
            {
                "[TOOL_CALLS]": json_reader(
                    r"\s*", r"\s*(?P<name>[\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\])?\s*"
                )
            },
            inner=("[CALL_ID]", "[ARGS]"),
        ),
        "deepseek": CallFormat(
            {
                begin: json_reader(
                    rf"\s*(?:function)?{separator}(?P<name>[\w.-]+)\s*```json\s*",
                    rf"\s*(?P<name>[\w.-]+){separator}\s*",
                )
            },
            closers=("```", end),
            dropped=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
            inner=(separator,),
        ),
        "llama": CallFormat(
            {"<|python_tag|>": json_reader(needs_arguments=True)},
            closers=(";", "<|eom_id|>"),
            bare=json_reader(needs_arguments=True),
            bare_start="{",
        ),
        "functions": CallFormat(
            {"<function=": json_reader(r"(?P<name>[\w.-]+)>\s*")}, closers=("</function>",)
        ),
        "qwen_xml": CallFormat(
            {"<tool_call>": xml_reader("<function="), "<function=": xml_reader("")},
            closers=("</tool_call>",),
            inner=("</function>", "</parameter>"),
        ),
        "gemma4": CallFormat(
            {"<|tool_call>": read_gemma}, closers=("<tool_call|>",), inner=(QUOTE,)
        ),
        "glm": CallFormat(
            {"<tool_call>": keyed_reader()},
            inner=("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "</tool_call>"),
        ),
        "pythonic": CallFormat(
            {"<|python_tag|>": read_pythonic}, bare=read_pythonic, bare_start="["
        ),
        "lfm2": CallFormat(
            {"<|tool_call_start|>": _read_list},
            closers=("<|tool_call_end|>",),
            written=("<|tool_call_start|>[", "]<|tool_call_end|>"),
        ),
    }


CALL_FORMATS = _formats()


def call_format_of(written: str) -> str | None:
    """The convention of a call that a template wrote, or of what a template says of calls; None
    when it is none of ours."""
    if _DEEPSEEK[0] in written:
        return "deepseek"
    if "<arg_key>" in written:
        return "glm"
    if "<function=" in written:
        return "qwen_xml" if "<parameter=" in written else "functions"
    if "[TOOL_CALLS]" in written:
        return "mistral"
    if "<|tool_call_start|>" in written or "<|tool_list_start|>" in written:
        return "lfm2"
    if "<|tool_call|>" in written:
        return "granite"
    if "<|tool_call>" in written:
        return "gemma4"
    for name, (opener, _) in _MARKED.items():
        if opener in written:
            return name
    return None


def bare_call_format_of(written: str, name: str) -> str | None:
    """The same of a call without markers, of the tool `name`."""
    if re.search(rf"\[\s*{re.escape(name)}\(", written):
        return "pythonic"
    if re.search(rf'\{{\s*"name":\s*"{re.escape(name)}",\s*"parameters":', written):
        return "llama"
    return None
