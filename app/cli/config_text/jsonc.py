"""JSON with comments and trailing commas, as editors keep their settings in."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from app.cli.config_text import (
    MAX_DEPTH,
    Named,
    NotEditable,
    Path,
    Step,
    Unreadable,
    spelled,
)

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n\ufeff]+)
    |(?P<comment>//[^\n]*|/\*(?:[^*]|\*(?!/))*\*/)
    |(?P<string>"(?:[^"\\\x00-\x1f]|\\[^\x00-\x1f])*")
    |(?P<word>[-+.\w]+)
    |(?P<mark>[{}\[\]:,])""",
    re.VERBOSE,
)


@dataclass
class _Node:
    """A value and where it stands in the text."""

    start: int
    end: int = 0
    value: Any = None
    """Of a scalar."""
    members: dict[str, _Node] | None = None
    """Of an object."""
    repeated: set[str] = field(default_factory=set)
    items: list[_Node] | None = None
    """Of an array."""
    inner_end: int = 0
    """Of a collection: behind its last value, comma or comment."""
    ends_in_comma: bool = False

    @property
    def children(self) -> list[_Node]:
        return list(self.members.values()) if self.members is not None else self.items or []

    def plain(self) -> Any:
        if self.members is not None:
            return {key: one.plain() for key, one in self.members.items()}
        return self.value if self.items is None else [one.plain() for one in self.items]


def read(text: str) -> Any:
    """The document; None when the text holds nothing but spaces and comments."""
    root = _parse(text)
    return None if root is None else root.plain()


def put(text: str, path: Path, value: Any) -> str:
    """Set one place; indentation, line ends and comments follow what is there."""
    root = _parse(text)
    if root is None:
        newline = "" if not text or text.endswith("\n") else "\n"
        empty = "[]" if isinstance(path[0], Named) else "{}"
        return put(f"{text}{newline}{empty}\n", path, value)
    unit = _indent_of(text, root)
    node = root
    for depth, step in enumerate(path):
        found = _child(node, step, path[: depth + 1])
        if found is None:
            key = step if isinstance(step, str) else None
            return _insert(text, node, key, _nested(path[depth:], value), unit)
        if found.value is None and found.members is None and found.items is None:
            return _replace(text, found, _nested(path[depth:], value), unit)
        node = found
    return _replace(text, node, value, unit)


def _child(node: _Node, step: Step, here: Path) -> _Node | None:
    if isinstance(step, str):
        if node.members is None:
            raise NotEditable(f"{spelled(here[:-1])} should be an object in braces")
        if step in node.repeated:
            raise NotEditable(f"{spelled(here)} is there twice")
        return node.members.get(step)
    for one in node.items or []:
        name = (one.members or {}).get("name")
        if name is not None and name.value == step.name:
            return one
    return None


def _nested(path: Path, value: Any) -> Any:
    """`value` in the collections that lead to it; the first step's own key is left out."""
    for step in reversed(path[1:]):
        value = [_named(step, value)] if isinstance(step, Named) else {step: value}
    return _named(path[0], value) if isinstance(path[0], Named) else value


def _named(step: Named, value: dict[str, Any]) -> dict[str, Any]:
    return {"name": step.name, **value}


def _insert(text: str, node: _Node, key: str | None, value: Any, unit: str) -> str:
    newline = "\r\n" if "\r\n" in text else "\n"
    outer = _line_indent(text, node.start)
    first = node.children[0] if node.children else None
    inner = outer + unit
    if first is not None:
        line_start = text.rfind("\n", 0, _entry_start(text, node)) + 1
        before = text[line_start : _entry_start(text, node)]
        if not before.strip():
            inner = before
    entry = "" if key is None else f"{json.dumps(key, ensure_ascii=False)}: "
    entry += _rendered(value, unit, inner, newline)
    tail = text[node.inner_end : node.end - 1]
    comma = "," if node.ends_in_comma else ""
    added = newline + inner + entry + comma
    if "\n" not in tail:
        added += newline + outer
        tail = ""
    text = text[: node.inner_end] + added + tail + text[node.end - 1 :]
    if first is not None and not node.ends_in_comma:
        last = node.children[-1].end
        text = f"{text[:last]},{text[last:]}"
    return text


def _entry_start(text: str, node: _Node) -> int:
    """Where the first entry of a collection begins: its key, or its value in an array."""
    for match in _TOKEN.finditer(text, node.start + 1):
        if match.lastgroup not in ("space", "comment"):
            return match.start()
    return node.start


def _replace(text: str, node: _Node, value: Any, unit: str) -> str:
    newline = "\r\n" if "\r\n" in text else "\n"
    rendered = _rendered(value, unit, _line_indent(text, node.start), newline)
    return text[: node.start] + rendered + text[node.end :]


def _rendered(value: Any, unit: str, indent: str, newline: str) -> str:
    lines = json.dumps(value, ensure_ascii=False, indent=unit).split("\n")
    return (newline + indent).join(lines)


def _line_indent(text: str, position: int) -> str:
    line = text[text.rfind("\n", 0, position) + 1 : position].lstrip("\ufeff")
    return line[: len(line) - len(line.lstrip())]


def _indent_of(text: str, root: _Node) -> str:
    """What one level is indented by: as the first entry is, two spaces where nothing tells."""
    if root.children:
        start = _entry_start(text, root)
        before = text[text.rfind("\n", 0, start) + 1 : start]
        if before and not before.strip(" \t"):
            return before
    return "  "


def _parse(text: str) -> _Node | None:
    tokens = _tokens(text)
    parser = _Parser(text, tokens)
    if all(kind == "comment" for kind, _, _ in tokens):
        return None
    root = parser.value(0)
    if parser.peek() is not None:
        raise parser.unexpected()
    return root


def _tokens(text: str) -> list[tuple[str, int, int]]:
    found, position = [], 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise Unreadable(f"line {_line(text, position)} is not JSON")
        position = match.end()
        if match.lastgroup != "space":
            found.append((str(match.lastgroup), match.start(), match.end()))
    return found


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


class _Parser:
    def __init__(self, text: str, tokens: list[tuple[str, int, int]]) -> None:
        self.text = text
        self.tokens = tokens
        self.next = 0
        self.last_end = 0

    def peek(self) -> str | None:
        """The next token that is no comment; comments before it are passed."""
        while self.next < len(self.tokens):
            kind, start, end = self.tokens[self.next]
            if kind != "comment":
                return self.text[start:end]
            self.take()
        return None

    def take(self) -> tuple[str, int, int]:
        token = self.tokens[self.next]
        self.next += 1
        self.last_end = token[2]
        return token

    def unexpected(self) -> Unreadable:
        if self.next >= len(self.tokens):
            return Unreadable("it ends in the middle")
        _, start, end = self.tokens[self.next]
        return Unreadable(
            f"line {_line(self.text, start)} is not JSON at {self.text[start:end][:40]!r}"
        )

    def value(self, depth: int) -> _Node:
        token = self.peek()
        if depth > MAX_DEPTH:
            raise Unreadable(f"it is nested more than {MAX_DEPTH} deep")
        if token is None or token in ("}", "]", ":", ","):
            raise self.unexpected()
        if token in ("{", "["):
            return self.collection(depth, is_object=token == "{")
        node = _Node(self.tokens[self.next][1], self.tokens[self.next][2])
        node.value = self.scalar(token)
        self.take()
        return node

    def scalar(self, token: str) -> Any:
        try:
            return json.loads(token, parse_constant=lambda name: float("x"))
        except ValueError:
            raise self.unexpected() from None

    def collection(self, depth: int, *, is_object: bool) -> _Node:
        _, start, _ = self.take()
        node = _Node(start, members={} if is_object else None, items=None if is_object else [])
        closing = "}" if is_object else "]"
        while True:
            token = self.peek()
            if token == closing:
                node.inner_end = self.last_end
                node.end = self.take()[2]
                return node
            if node.children and not node.ends_in_comma:
                raise self.unexpected()
            if node.members is not None:
                if token is None or token[0] != '"':
                    raise self.unexpected()
                key = self.scalar(token)
                self.take()
                if self.peek() != ":":
                    raise self.unexpected()
                self.take()
                if key in node.members:
                    node.repeated.add(key)
                    del node.members[key]
                node.members[key] = self.value(depth + 1)
            elif node.items is not None:
                node.items.append(self.value(depth + 1))
            node.ends_in_comma = self.peek() == ","
            if node.ends_in_comma:
                self.take()
