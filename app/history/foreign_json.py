"""JSON that somebody else wrote, read with the place of everything in it at hand: what is wrong is
refused with a sentence that names where it is."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from app.errors import GryphonError
from app.history.text import sound

T = TypeVar("T")

_LATEST = 1e11
"""Seconds since 1970; some thousand years from now."""
_SHOWN_CHARACTERS = 60


class Place:
    """A value and where it is, as in `conversations.json[3].mapping["ab"].parent`."""

    def __init__(self, value: Any, where: str) -> None:
        self.value = value
        self.where = where

    def refuse(self, expected: str) -> NoReturn:
        """Raises:
        GryphonError: "invalid_import": this must be what is expected; nothing was imported.
        """
        raise GryphonError(
            "invalid_import",
            f"{self.where} must be {expected}, got {_name(self.value)}. Nothing was imported.",
        )

    def __getitem__(self, key: str) -> Place:
        """A field of an object; null where it is not there."""
        if not isinstance(self.value, dict):
            self.refuse("an object")
        name = f".{key}" if key.isidentifier() else f'["{key[:_SHOWN_CHARACTERS]}"]'
        return Place(self.value.get(key), self.where + name)

    def __contains__(self, key: str) -> bool:
        return isinstance(self.value, dict) and self.value.get(key) is not None

    def __iter__(self) -> Iterator[Place]:
        """The elements of an array; none of null."""
        if self.value is None:
            return
        if not isinstance(self.value, list):
            self.refuse("an array")
        for index, element in enumerate(self.value):
            yield Place(element, f"{self.where}[{index}]")

    def names(self) -> list[str]:
        """The names of the fields of an object."""
        if not isinstance(self.value, dict):
            self.refuse("an object")
        return list(self.value)

    def text(self, default: str | None = None) -> str:
        """Text; `default` for null."""
        if self.value is None and default is not None:
            return default
        if not isinstance(self.value, str):
            self.refuse("text")
        return sound(self.value)

    def optional_text(self) -> str | None:
        """Text, or None for null."""
        return None if self.value is None else self.text()

    def one_of(self, values: Sequence[str], default: str | None = None) -> str:
        """One of these texts."""
        if self.value is None and default is not None:
            return default
        if self.value not in values or not isinstance(self.value, str):
            self.refuse(" or ".join(filter(None, [", ".join(values[:-1]), values[-1]])))
        return self.value

    def flag(self) -> bool:
        """True or false; null is false."""
        if self.value is None:
            return False
        if not isinstance(self.value, bool):
            self.refuse("true or false")
        return self.value

    def number(self, most: float = math.inf) -> float:
        """A number from 0 on."""
        value = self.value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.refuse("a number")
        if not 0 <= value <= most:
            self.refuse(f"0 to {most:g}")
        return float(value)

    def count(self) -> int:
        """A whole number from 0 on, as large as JSON carries safely."""
        if isinstance(self.value, bool) or not isinstance(self.value, int):
            self.refuse("a whole number")
        if not 0 <= self.value <= 2**53:
            self.refuse(f"0 to {2**53}")
        return self.value

    def moment(self) -> float | None:
        """A time in seconds since 1970, or None for null."""
        return None if self.value is None else self.number(_LATEST)


def parents_first(parents: Mapping[T, T | None], place: Callable[[T], Place]) -> list[T]:
    """The nodes of a forest, each after its parent and otherwise as they came.

    Args:
        parents: Of each node; None for a first one.
        place: Where a node's parent is named, for the refusal.

    Raises:
        GryphonError: "invalid_import": a parent is not there, or nodes are in a circle.
    """
    children: dict[T | None, list[T]] = {}
    for node, parent in parents.items():
        if parent is not None and parent not in parents:
            place(node).refuse("the id of another message")
        children.setdefault(parent, []).append(node)
    rank = {node: number for number, node in enumerate(parents)}
    nodes = list(parents)
    ready = [rank[node] for node in children.get(None, ())]
    ordered = []
    while ready:
        node = nodes[heapq.heappop(ready)]
        ordered.append(node)
        for child in children.get(node, ()):
            heapq.heappush(ready, rank[child])
    if len(ordered) < len(parents):
        reached = set(ordered)
        stray = next(node for node in parents if node not in reached)
        place(stray).refuse("the id of a message above it (these go round in a circle)")
    return ordered


def _name(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "an array"
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
