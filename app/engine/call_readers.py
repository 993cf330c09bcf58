"""Tool calls read from text: JSON, and values between tags.

A reader is given the text after the marker that opens a call, and the tools. It returns the calls
and where in the text they end; None while the text may still become a call; it raises `NoCall` when
it cannot. What it says of a text it says of every longer one too, so the result does not depend on
how the text was cut into tokens. Nothing here runs what a model wrote.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

from app.engine.conversation import MAX_JSON_DEPTH, Tool, depth_of, parsed_arguments

_MAX_HEADER = 200
_FIRST_KEY = re.compile(r'\{\s*"([^"]*)"')


class NoCall(Exception):
    """The text is no call of a known tool, nor the beginning of one."""


class Call(NamedTuple):
    """One call: a known tool's name, and the JSON text of an object."""

    name: str
    arguments: str


class Calls(NamedTuple):
    """Calls read, and the index behind the last character that belongs to them."""

    calls: list[Call]
    end: int


Tools = Mapping[str, Tool]
Reader = Callable[[str, Tools], Calls | None]


def checked_call(name: Any, arguments: Any, tools: Tools) -> Call:
    """A call of a known tool with an object of arguments.

    Raises:
        NoCall: it is not that.
    """
    if isinstance(arguments, str):
        arguments = parsed_arguments(arguments)
    if not isinstance(name, str) or name not in tools or not isinstance(arguments, dict):
        raise NoCall
    if depth_of(arguments) > MAX_JSON_DEPTH:
        raise NoCall
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise NoCall from error  # 1e999
    # Half a surrogate pair, as a JSON escape can smuggle in, is no text but as an escape.
    sound = not re.search("[\ud800-\udfff]", text)
    return Call(name, text if sound else json.dumps(arguments))


def json_reader(*headers: str, needs_arguments: bool = False) -> Reader:
    """Reads JSON: an object {"name", "arguments"}, or an array of such.

    Args:
        headers: Patterns of what may precede the JSON; with a group "name" the JSON is the
            arguments alone. None: only white space.
        needs_arguments: An object without arguments is no call.
    """
    patterns = [re.compile(header) for header in headers or (r"\s*",)]
    keys = {"name", "arguments", "parameters", "type", "function", "id"}

    def read(text: str, tools: Tools) -> Calls | None:
        start = _json_start(text, blank_header=not headers)
        if start is None:
            return None
        header = next((m for p in patterns if (m := p.fullmatch(text[:start]))), None)
        if header is None:
            raise NoCall
        first = _FIRST_KEY.match(text, start) if needs_arguments else None
        if first is not None and first[1] not in keys:
            raise NoCall  # an answer in JSON, which need not wait until it is whole
        found = _decoded(text, start)
        if found is None:
            return None
        value, end = found
        name = header.groupdict().get("name")
        if name is not None:
            return Calls([checked_call(name, value, tools)], end)
        items = value if isinstance(value, list) else [value]
        if not items:
            raise NoCall
        return Calls([_named_call(item, tools, needs_arguments) for item in items], end)

    return read


def _json_start(text: str, *, blank_header: bool) -> int | None:
    """Where the JSON begins, None where it may still come."""
    blank = len(text) - len(text.lstrip())
    if text[blank : blank + 1] in ("{", "["):
        start = blank
    elif blank_header and blank < len(text):
        raise NoCall
    else:
        start = text.find("{")
    if start > _MAX_HEADER or (start < 0 and len(text) > _MAX_HEADER):
        raise NoCall
    return None if start < 0 else start


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)  # NaN and Infinity are not JSON


# Models write line ends into strings as they are.
_DECODER = json.JSONDecoder(strict=False, parse_constant=_no_constant)


def _decoded(text: str, start: int) -> tuple[Any, int] | None:
    """The JSON value at `start` and where it ends; None while it is incomplete."""
    # Up to a character at which a value can end, or which tells that something else came: so no
    # number, literal or escape is cut in two, and an error is one for good.
    cut = max(text.rfind("}"), text.rfind("]"), text.rfind(">")) + 1
    if cut > start:
        try:
            value, end = _DECODER.raw_decode(text[:cut], start)
        except json.JSONDecodeError as error:
            if error.pos < cut and not error.msg.startswith("Unterminated string"):
                raise NoCall from error
        except (ValueError, RecursionError) as error:
            raise NoCall from error
        else:
            return value, end
    return None


def _named_call(item: Any, tools: Tools, needs_arguments: bool) -> Call:
    if isinstance(item, dict) and isinstance(item.get("function"), dict):
        item = item["function"]
    if not isinstance(item, dict):
        raise NoCall
    given = [item[key] for key in ("arguments", "parameters") if key in item]
    if needs_arguments and not given:
        raise NoCall
    arguments = given[0] if given and given[0] is not None else {}
    return checked_call(item.get("name", item.get("tool_name")), arguments, tools)


def xml_reader(opening: str) -> Reader:
    """Reads <function=NAME><parameter=KEY>VALUE</parameter>…</function> (Qwen3-Coder).

    A value is text; the tool's schema says which values are JSON.
    """

    def read(text: str, tools: Tools) -> Calls | None:
        tags = _Tags(text)
        if not tags.skip(opening):
            return None
        name = tags.until(">", _MAX_HEADER)
        if name is None:
            return None
        if name not in tools:
            raise NoCall
        arguments: dict[str, Any] = {}
        while (tag := tags.one_of("<parameter=", "</function>")) == "<parameter=":
            key = tags.until(">", _MAX_HEADER)
            value = tags.until("</parameter>") if key is not None else None
            if key is None or value is None:
                return None
            value = value.removeprefix("\n").removesuffix("\n")
            arguments[key] = read_value(value, tools[name], key)
        return Calls([checked_call(name, arguments, tools)], tags.at) if tag else None

    return read


def keyed_reader() -> Reader:
    """Reads NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>…</tool_call> (GLM 4.5)."""

    def read(text: str, tools: Tools) -> Calls | None:
        tags = _Tags(text)
        name = tags.until("<", _MAX_HEADER)
        if name is None:
            return None
        name, tags.at = name.strip(), tags.at - 1
        if name not in tools:
            raise NoCall
        arguments: dict[str, Any] = {}
        while (tag := tags.one_of("<arg_key>", "</tool_call>")) == "<arg_key>":
            key = tags.until("</arg_key>", _MAX_HEADER)
            if key is None or not tags.skip("<arg_value>"):
                return None
            value = tags.until("</arg_value>")
            if value is None:
                return None
            arguments[key] = read_value(value, tools[name], key)
        return Calls([checked_call(name, arguments, tools)], tags.at) if tag else None

    return read


class _Tags:
    """A place in text that consists of tags; None and "" say that the text ends too early."""

    def __init__(self, text: str) -> None:
        self._text = text
        self.at = 0

    def one_of(self, *tags: str) -> str:
        """Go behind white space and whichever of the tags follows."""
        while self._text[self.at : self.at + 1].isspace():
            self.at += 1
        for tag in tags:
            if self._text.startswith(tag, self.at):
                self.at += len(tag)
                return tag
        if any(tag.startswith(self._text[self.at :]) for tag in tags):
            return ""
        raise NoCall

    def skip(self, tag: str) -> bool:
        """Go behind white space and a tag."""
        return not tag or bool(self.one_of(tag))

    def until(self, end: str, most: int | None = None) -> str | None:
        """The text before `end`; go behind that."""
        found = self._text.find(end, self.at)
        size = (found if found >= 0 else len(self._text)) - self.at
        if most is not None and size > most:
            raise NoCall
        if found < 0:
            return None
        text = self._text[self.at : found]
        self.at = found + len(end)
        return text


def read_value(value: str, tool: Tool, key: str) -> Any:
    """A value written as text, as the tool's schema wants it; text where it does not fit."""
    properties = tool.parameters.get("properties")
    schema = properties.get(key) if isinstance(properties, dict) else None
    kind = schema.get("type") if isinstance(schema, dict) else None
    kinds = kind if isinstance(kind, list) else [kind]
    if "string" in kinds and not ("null" in kinds and value.strip() == "null"):
        return value
    try:
        parsed = json.loads(value, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        literal = {"true": True, "false": False, "none": None, "null": None}
        return literal.get(value.strip().lower(), value) if kind is not None else value
    # Without a type, only what cannot be meant as text is taken for more than text.
    return parsed if kind is not None or isinstance(parsed, (dict, list)) else value
