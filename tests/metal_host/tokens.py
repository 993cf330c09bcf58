"""Splits Metal source into tokens, with where each one stands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_TOKEN = re.compile(
    r"""
    (?P<comment>//[^\n]*|/\*.*?\*/)
  | (?P<string>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')
  | (?P<directive>^[ \t]*\#(?:\\\n|[^\n])*)
  | (?P<number>\.?[0-9](?:[eEpP][+-]|[\w.])*)
  | (?P<name>[A-Za-z_]\w*)
  | (?P<space>\s+)
  | (?P<symbol>::|->|\+\+|--|<<=|>>=|<=|>=|==|!=|&&|\|\||\[\[|[-+*/%&|^]=|.)
    """,
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Token:
    kind: str
    text: str
    start: int
    line: int

    @property
    def end(self) -> int:
        return self.start + len(self.text)


def tokenize(source: str) -> list[Token]:
    """The tokens of a text, without comments and white space."""
    return [token for token in _every(source) if token.kind not in ("comment", "space")]


def _every(source: str) -> Iterator[Token]:
    line = 1
    for match in _TOKEN.finditer(source):
        assert match.lastgroup is not None
        yield Token(match.lastgroup, match.group(), match.start(), line)
        line += match.group().count("\n")


def matching(tokens: list[Token], at: int) -> int:
    """The index of the bracket that closes the one at this index; len(tokens) if none does."""
    pairs = {"(": ")", "[": "]", "{": "}", "<": ">"}
    opening = tokens[at].text
    closing, depth = pairs[opening], 0
    for i in range(at, len(tokens)):
        text = tokens[i].text
        if opening == "[" and text == "[[":
            depth += 2
        elif text == opening:
            depth += 1
        elif text == closing:
            depth -= 1
            if depth == 0:
                return i
        elif opening == "<" and text in ";{}":
            break  # it was a comparison
    return len(tokens)
