"""The functions that a kernel's header defines, found by tokens."""

from __future__ import annotations

from dataclasses import dataclass

from .tokens import Token, matching

_NOT_CALLS = frozenset(
    ["if", "for", "while", "switch", "return", "sizeof", "alignof", "decltype", "static_assert"]
)
_SPACES = ("device", "constant", "threadgroup", "thread")


@dataclass(frozen=True)
class Argument:
    """A parameter of a function, as far as address spaces go."""

    name: str
    space: str  # "" if it says none
    is_pointer: bool
    is_reference: bool


@dataclass(frozen=True)
class Function:
    name: str
    token: Token
    arguments: tuple[Argument, ...]
    calls: frozenset[str]
    head_start: int
    body_start: int
    body_end: int


def functions(tokens: list[Token]) -> list[Function]:
    found = []
    i = 0
    while i < len(tokens) - 2:
        token = tokens[i]
        if token.kind != "name" or token.text in _NOT_CALLS or tokens[i + 1].text != "(":
            i += 1
            continue
        close = matching(tokens, i + 1)
        after = close + 1
        while after < len(tokens) and tokens[after].text in ("const", *_SPACES):
            after += 1
        if after >= len(tokens) or tokens[after].text != "{":
            i += 1
            continue
        end = matching(tokens, after)
        calls = {
            t.text
            for t, following in zip(tokens[after:end], tokens[after + 1 : end + 1], strict=False)
            if t.kind == "name" and following.text in ("(", "<") and t.text not in _NOT_CALLS
        }
        found.append(
            Function(
                token.text,
                token,
                tuple(argument(part) for part in split(tokens[i + 2 : close])),
                frozenset(calls),
                _head(tokens, i),
                after,
                end,
            )
        )
        i = end
    return found


def split(tokens: list[Token]) -> list[list[Token]]:
    """At the commas that are in no bracket."""
    parts: list[list[Token]] = [[]]
    depth = 0
    for i, token in enumerate(tokens):
        if token.text in ("(", "[", "{"):
            depth += 1
        elif token.text in (")", "]", "}"):
            depth -= 1
        elif (
            token.text == "<"
            and i
            and tokens[i - 1].kind == "name"
            and matching(tokens, i) < len(tokens)
        ):
            depth += 1
        elif token.text == ">" and depth and _closes(tokens, i):
            depth -= 1
        if token.text == "," and depth == 0:
            parts.append([])
        else:
            parts[-1].append(token)
    return [part for part in parts if part]


def argument(tokens: list[Token]) -> Argument:
    words = [t.text for t in tokens]
    if "=" in words:
        words = words[: words.index("=")]
    space = next((word for word in words if word in _SPACES), "")
    is_array = "[" in words
    names = [word for word in words if word.isidentifier()]
    return Argument(names[-1] if names else "", space, "*" in words or is_array, "&" in words)


def _closes(tokens: list[Token], at: int) -> bool:
    return any(
        tokens[i].text == "<" and i and tokens[i - 1].kind == "name" and matching(tokens, i) == at
        for i in range(at)
    )


def _head(tokens: list[Token], at: int) -> int:
    """Where the definition begins that has its name here."""
    i = at
    while i and tokens[i - 1].text not in (";", "}", "{") and tokens[i - 1].kind != "directive":
        i -= 1
    return i
