"""Tool calls written as a Python list of calls, [f(a=1), g(b="x")]: read as text, never run.

Values are literals: strings, numbers, True, False, None (JSON's names for them too), lists, tuples
and dictionaries of these.
"""

from __future__ import annotations

import re
from typing import Any

from app.engine.call_readers import Call, Calls, NoCall, Tools, checked_call
from app.engine.conversation import MAX_JSON_DEPTH

_BEGINNING = re.compile(
    r"\s*(?:\[\s*(?:(?P<name>[A-Za-z_][\w.-]*)\s*(?P<rest>\(.*)?)?)?", re.DOTALL
)
_SPACE = re.compile(r"\s*")
_NAME = re.compile(r"[A-Za-z_][\w.-]*")
_NUMBER = re.compile(r"[+-]?(?:\d[\d_]*)?\.?\d+(?:[eE][+-]?\d+)?")
_STRING = re.compile(r"""(?:"((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)')""", re.DOTALL)
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|\n|.)", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\n": ""}
_CONSTANTS = {"true": True, "false": False, "none": None, "null": None}


class _Ended(Exception):
    """The text ends before the list does."""


def read_pythonic(text: str, tools: Tools) -> Calls | None:
    """Calls of a list; None while it is incomplete.

    Raises:
        NoCall: the text is not that.
    """
    beginning = _BEGINNING.fullmatch(text)
    if beginning is None:
        raise NoCall
    if beginning["rest"] is not None and beginning["name"] not in tools:
        raise NoCall
    # Up to a bracket, so that no number and no name is cut in two.
    cut = text.rfind("]") + 1
    if cut:
        parser = _Parser(text[:cut], tools)
        try:
            calls = parser.calls()
        except _Ended:
            pass
        else:
            return Calls(calls, parser.at)
    return None


class _Parser:
    """Recursive descent over a bounded text, of a bounded depth."""

    def __init__(self, text: str, tools: Tools) -> None:
        self._text = text
        self._tools = tools
        self.at = 0

    def calls(self) -> list[Call]:
        calls: list[Call] = []
        self._expect("[")
        while True:
            calls.append(self._call())
            if self._separator("]"):
                return calls

    def _call(self) -> Call:
        name = self._match(_NAME)
        self._expect("(")
        arguments: dict[str, Any] = {}
        if self._accept(")"):
            return checked_call(name, arguments, self._tools)
        while True:
            key = self._match(_NAME)
            self._expect("=")
            arguments[key] = self._value(1)
            if self._separator(")"):
                return checked_call(name, arguments, self._tools)

    def _value(self, depth: int) -> Any:
        if depth > MAX_JSON_DEPTH:
            raise NoCall
        self._skip()
        character = self._text[self.at]
        if character in "\"'":
            return self._string()
        if self._accept("["):
            return self._items("]", depth)
        if self._accept("("):
            return self._items(")", depth)
        if self._accept("{"):
            return self._pairs(depth)
        if character in "+-.0123456789":
            return self._number(self._match(_NUMBER))
        name = self._match(_NAME).lower()
        if name not in _CONSTANTS:
            raise NoCall
        return _CONSTANTS[name]

    def _items(self, end: str, depth: int) -> list[Any]:
        items: list[Any] = []
        while not self._accept(end):
            items.append(self._value(depth + 1))
            if self._separator(end):
                break
        return items

    def _pairs(self, depth: int) -> dict[str, Any]:
        pairs: dict[str, Any] = {}
        while not self._accept("}"):
            self._skip()
            if self._text[self.at] not in "\"'":
                raise NoCall
            key = self._string()
            self._expect(":")
            pairs[key] = self._value(depth + 1)
            if self._separator("}"):
                break
        return pairs

    def _string(self) -> str:
        found = _STRING.match(self._text, self.at)
        if found is None:
            raise _Ended
        self.at = found.end()
        return _ESCAPE.sub(_unescaped, found[1] if found[1] is not None else found[2])

    @staticmethod
    def _number(text: str) -> int | float:
        plain = text.replace("_", "")
        if re.fullmatch(r"[+-]?\d{1,400}", plain):
            return int(plain)
        value = float(plain)
        if value in (float("inf"), float("-inf")):
            raise NoCall
        return value

    def _separator(self, end: str) -> bool:
        """Go behind a comma, or behind the end, of which it tells."""
        if self._accept(end):
            return True
        self._expect(",")
        return self._accept(end)

    def _accept(self, character: str) -> bool:
        self._skip()
        if self._text[self.at] != character:
            return False
        self.at += 1
        return True

    def _expect(self, character: str) -> None:
        if not self._accept(character):
            raise NoCall

    def _match(self, pattern: re.Pattern[str]) -> str:
        self._skip()
        found = pattern.match(self._text, self.at)
        if found is None:
            raise NoCall
        self.at = found.end()
        return found[0]

    def _skip(self) -> None:
        found = _SPACE.match(self._text, self.at)
        assert found is not None
        self.at = found.end()
        if self.at == len(self._text):
            raise _Ended


def _unescaped(found: re.Match[str]) -> str:
    what = found[1]
    if what[0] in "ux" and len(what) > 1:
        return chr(int(what[1:], 16))
    return _ESCAPED.get(what, what if what in "\\'\"" else found[0])
